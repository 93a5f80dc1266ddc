"""Block diagrams of Specs, as SVG: `zoo show NAME --svg FILE`.

    from zoo.draw import drawing
    text = drawing(spec, Facts("my model"))

words.py says what each part of a Spec is, picture.py puts it into boxes on a canvas (boxes.py), svg.py writes that.
Nothing is drawn that is not in the Spec but a name, lines under it, and multi-token prediction, which no Spec knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.draw import picture, svg
from zoo.draw.boxes import text_width
from zoo.draw.picture import Ahead, Facts
from zoo.spec import Spec

__all__ = ["Ahead", "Facts", "ahead", "drawing", "lines", "side_by_side"]

_AHEAD = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_transformer_layers", "num_mtp_modules")


def drawing(spec: Spec, facts: Facts, about: str | None = None) -> str:
    """One picture. The same Spec and facts give the same text. `about`: the picture in words; by default all of `describe`."""
    canvas, height = picture.draw(spec, facts)
    said = _about(spec) if about is None else about
    return svg.document([(0.0, canvas, ())], picture.WIDTH, height, _title(facts), said)


def lines(spec: Spec, facts: Facts) -> tuple[float, list[tuple[str, float, float, float]]]:
    """The height of the picture, and the lines in it that are compared: text, left end, baseline, width."""
    canvas, height = picture.draw(spec, facts)
    found = []
    for t in canvas.texts:
        if t.compared:
            indent = text_width(t.text[: len(t.text) - len(t.text.lstrip())], t.size)
            found.append((t.text.strip(), t.left + indent, t.y, t.width - indent))
    return height, found


def side_by_side(several: list[tuple[Spec, Facts]]) -> str:
    """Pictures beside each other; a line that not all of them have is underlined and coloured."""
    drawn = [picture.draw(spec, facts) for spec, facts in several]
    said = [{t.text.strip() for t in canvas.texts if t.compared} for canvas, _ in drawn]
    common = set.intersection(*said)
    step = picture.WIDTH + 8
    parts = [(n * step, canvas, said[n] - common) for n, (canvas, _) in enumerate(drawn)]
    title = " and ".join(facts.name for _, facts in several) + ": block diagrams; differences are underlined"
    about = " ".join(f"{facts.name}: {_about(spec)}" for spec, facts in several)
    return svg.document(parts, len(drawn) * step - 8, max(h for _, h in drawn), title, about)


def ahead(config: Mapping[str, Any], family: Any = None) -> Ahead | None:
    """Layers of multi-token prediction: as many as the config names; else as the family's rules keep aside, uncounted."""
    text = config.get("text_config")
    for source in (config, text if isinstance(text, Mapping) else {}):
        for key in _AHEAD:
            if isinstance(n := source.get(key), int):
                return Ahead(int(n)) if n > 0 else None
    from zoo.family.hf import MTP

    rules = family.rules.get("hf") if family is not None else None
    return Ahead(None) if rules is not None and any(e.reason == MTP for e in rules.extras) else None


def _title(facts: Facts) -> str:
    return f"{facts.name}: block diagram".removeprefix(": ")


def _about(spec: Spec) -> str:
    """The picture in sentences, for those who do not see it."""
    from zoo.describe import describe

    counted = (
        "parts",
        "memory",
        "compute",
        "layers",
    )  # numbers that no box has, and letters that nobody wants to hear
    return " ".join(f"{k}: {v}." for k, v in describe(spec).items() if k not in counted)
