"""`zoo show`: the architecture of a release, or of several side by side; in words, in JSON, or drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli._common import Source, Whole, common, emit, pairs, say, shortened, terminal_width, window

if TYPE_CHECKING:
    from zoo.draw import Facts
    from zoo.manifest import Manifest
    from zoo.spec import Spec


FACTS = (
    "also called",
    "vendor",
    "released",
    "from",
    "published size",
    "weights",
    "quantisation",
    "formats",
    "licence",
    "paper",
    "code",
    "architecture",
)


@click.command(short_help="How a release is built; several side by side, or as a drawing")
@click.argument("names", nargs=-1, required=True, type=Source(), metavar="NAME...")
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw it: a block diagram as SVG; of several, side by side, what differs underlined.",
)
@click.option(
    "--context",
    type=Whole(1, 2**40),
    metavar="N",
    help="Count the KV cache for N tokens. Default: all.",
)
@click.option("--batch", type=Whole(1, 2**40), metavar="N", help="Of N sequences. Default: 1.")
@click.option(
    "--kv-dtype",
    type=click.Choice(["fp32", "bf16", "fp16", "fp8"]),
    help="What the cache holds. Default: bf16.",
)
@click.option("--family", help="Take it for this family. Default: what its config says.")
@common
def command(
    names: tuple[str, ...],
    svg: Path | None,
    context: int | None,
    batch: int | None,
    kv_dtype: str | None,
    family: str | None,
    as_json: bool,
) -> None:
    """Show what is known of a release and how it is built; several are put side by side, differences marked.

    NAME is a release (`zoo list`), a folder or file on disk, a config.json, or an owner/repo on the Hub: of one that zoo has
    no manifest of, its sets of weights are listed, and what its config.json says.

    \b
    Examples:
      zoo show gpt-oss-20b --context 32768 --batch 8 --kv-dtype fp8
      zoo show llama-3.1-8b olmo-3-7b --svg both.svg
      zoo show path/to/config.json
    """
    shown = [look(name, family) for name in names]
    if context or batch or kv_dtype:
        for s in shown:
            s.load = (context, batch or 1, kv_dtype or "bf16")
    if svg is not None:
        _draw(shown, svg)
        if as_json:
            emit({"svg": str(svg), "drawn": [s.name for s in shown]})
        else:
            say(f"{svg}: {' and '.join(s.name for s in shown)}")
    elif as_json:
        out = [s.to_json() for s in shown]
        emit(out[0] if len(out) == 1 else out)
    elif len(shown) == 1:
        say(pairs([*shown[0].lines().items()]))
        if shown[0].sets:
            from zoo.cli.inspect import sets_table

            say()
            say(sets_table(shown[0].sets))
    else:
        say(side_by_side([s.name for s in shown], [s.lines() for s in shown]))


MAX_DRAWN = 4


def _draw(shown: list[Shown], path: Path) -> None:
    from zoo import draw
    from zoo.errors import ZooError
    from zoo.untrusted.plain import write_plain

    if len(shown) > MAX_DRAWN:
        raise ZooError(f"--svg: {len(shown)} names; side by side there is room for {MAX_DRAWN}")
    for s in shown:
        if s.spec is None:
            why = "; ".join(s.notes) or f"zoo has no copy of its config; `zoo plan {s.name}` reads it"
            raise ZooError(f"{s.name}: nothing to draw: {why}")
    several = [(s.spec, s.drawn()) for s in shown if s.spec is not None]
    text = draw.drawing(*several[0]) if len(several) == 1 else draw.side_by_side(several)
    write_plain(path, text.encode())


@dataclass
class Shown:
    """What NAME stands for. `spec` is None where no config is known or none can be read: `notes` say why."""

    name: str
    manifest: Manifest | None = None
    spec: Spec | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    sets: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    load: tuple[int | None, int, str] | None = (
        None  # tokens, sequences, dtype of the cache: where they were asked for
    )

    def lines(self) -> dict[str, str]:
        m = self.manifest
        facts = _facts(m, self.spec) if m is not None else {"name": self.name, "from": self.source}
        if (quantised := self.quantisation()) is not None:
            facts["quantisation"] = quantised
        if m is not None or self.spec is not None:
            facts |= _architecture(m, self.spec)
        if self.spec is not None and self.load is not None:
            from zoo.describe import serving

            context, batch, dtype = self.load
            facts["serving"] = serving(self.spec, context or self.spec.context_length, batch, dtype)
        return facts | ({"note": "\n".join(self.notes)} if self.notes else {})

    def quantisation(self) -> str | None:
        """What the config says of quantised weights."""
        from zoo.errors import ZooError
        from zoo.quant.told import told

        try:
            return told(self.config)
        except ZooError as error:  # still worth showing
            return f"not read: {error}"

    def to_json(self) -> dict[str, Any]:
        from zoo import describe, manifest, sizes
        from zoo.layout import active_params, total_params

        m = self.manifest
        out = (
            manifest.summary(m) | {"links": m.links}
            if m is not None
            else {"name": self.name, "from": self.source}
        )
        out |= {"sets": self.sets} if self.source.startswith("hf:") else {}
        out |= {"notes": self.notes} if self.notes else {}
        out |= {"quantisation": quantised} if (quantised := self.quantisation()) is not None else {}
        if self.spec is not None:
            out |= {
                "architecture": describe.describe(self.spec),
                "params": {"total": total_params(self.spec), "active": active_params(self.spec)},
                "kv_bytes_per_token": sizes.kv_bytes_per_token(self.spec),
                "numbers": sizes.numbers(self.spec, *(self.load or ())),
                "spec": self.spec.to_dict(),
            }
        return out

    def drawn(self) -> Facts:
        """What stands above its picture."""
        from zoo import draw, families
        from zoo.describe import describe

        assert self.spec is not None
        said = describe(self.spec)
        lines = [said["parameters"], f"context {said['context']}"]
        lines += [f"KV cache {said['KV cache']}"] if "KV cache" in said else []
        family = families.families().get(self.spec.family)
        return draw.Facts(self.name, lines, draw.ahead(self.config, family))


def look(name: str, said: str | None = None) -> Shown:
    """What is known of a release, what lies on disk, or a repository. `said`: the family to take it for. Errors: it is none of them, or
    already another family's."""
    from zoo import manifest
    from zoo.errors import ZooError

    path = Path(name)
    if (
        os.sep in name or name.endswith(".json")
    ) and path.exists():  # ./qwen3-8b is the folder, qwen3-8b the release
        return _on_disk(path, said)
    try:
        m = manifest.find(name)
    except ZooError:
        if path.exists():
            return _on_disk(path, said)
        if name.count("/") == 1:
            return _repository(name, said)
        raise
    if said not in (None, m.family):
        raise ZooError(
            f"{m.name} is a release of the family {m.family}; --family is for what zoo does not know"
        )
    if m.config is None and (shown := _copy(m)) is not None:
        return shown
    config = m.config
    return Shown(m.name, m, _spec(m, config), config or {})


def _on_disk(path: Path, said: str | None) -> Shown:
    """A canonical folder, a checkpoint in any format, or a config.json alone."""
    from zoo import families
    from zoo.errors import ZooError
    from zoo.formats import canonical, open_checkpoint
    from zoo.formats.base import read_json
    from zoo.mapping.plan import found

    wanted = families.get(said) if said else None
    if path.is_file() and path.suffix == ".json" and not path.name.endswith(".index.json"):
        config: Mapping[str, Any] = read_json(path, "a drawing needs a config", given=True)
        name = path.stem.removesuffix(".config")
        name = path.resolve().parent.name if name == "config" else name
        return Shown(name, None, families.spec_of(config, wanted, str(path)), config, str(path))
    if canonical.detect(path):
        folder = canonical.read(path)
        if said not in (None, folder.spec.family):
            raise ZooError(
                f"{path}: was converted as {folder.spec.family}; --family is for what is not converted"
            )
        return Shown(path.resolve().name, None, folder.spec, {}, str(path))
    ckpt = open_checkpoint(path)
    spec = families.spec_of(ckpt.config, wanted or found(ckpt, str(path)), str(path))
    return Shown(
        path.resolve().stem if path.is_file() else path.resolve().name, None, spec, ckpt.config, str(path)
    )


def _repository(name: str, said: str | None) -> Shown:
    """What a repository holds that is no release of zoo's."""
    from zoo import families, hub, remote
    from zoo.errors import ZooError
    from zoo.formats.base import read_json

    wanted = families.get(said) if said else None
    snapshot = hub.resolve(name)
    sets = [s.to_json() for s in remote.sets_of(snapshot)]
    shown = Shown(name, source=f"hf:{name}, commit {snapshot.commit}", sets=sets)
    if not any(f.path == "config.json" for f in snapshot.files):
        shown.notes.append("there is no config.json: a GGUF says itself what it is")
        return shown
    try:
        at = hub.download(snapshot, ["config.json"]) / "config.json"
        shown.config = read_json(at, "a checkpoint needs its config")
        shown.spec = families.spec_of(shown.config, wanted, f"{name}: config.json")
    except ZooError as error:  # still worth showing
        shown.notes.append(str(error))
    return shown


def _copy(m: Manifest) -> Shown | None:
    """A quantised copy as the release that it is certain to be a copy of, whose config is public."""
    from zoo.gallery.copies import base

    original = base(m)
    if original is None or (config := original.config) is None:
        return None
    # Not the config itself: what it says of quantised weights is that release's.
    note = f"drawn and counted as {original.name}, of which it is a quantised copy: its own config has no public copy"
    return Shown(m.name, m, _spec(original, config), notes=[note])


def _spec(m: Manifest, config: dict[str, Any] | None) -> Spec | None:
    """From the release's config, which zoo has a copy of for most."""
    from zoo import families

    return (
        None if config is None else families.spec_of(config, families.get(m.family), f"{m.name}: config.json")
    )


def _facts(m: Manifest, spec: Spec | None) -> dict[str, str]:
    from zoo.describe import published

    facts = {
        "name": m.name,
        "also called": ", ".join(m.aliases),
        "vendor": m.vendor or "",
        "released": m.released or "",
        "from": "\n".join(str(s) for s in m.sources),
        "published size": published(m, spec),
        "weights": m.quantization or m.dtype or "",
        "formats": ", ".join(m.formats),
        "licence": (m.licence or "") + (", gated: accept it on the Hub first" if m.gated else ""),
        "paper": m.links.get("paper", ""),
        "code": m.links.get("code", ""),
    }
    return {k: v for k, v in facts.items() if v}


def _architecture(m: Manifest | None, spec: Spec | None) -> dict[str, str]:
    from zoo.describe import describe

    if spec is None:
        assert m is not None
        return {
            "family": m.family,
            "architecture": f"zoo has no copy of its config; `zoo plan {m.name}` reads it",
        }
    from zoo import families

    disputed = "\n".join(map(str, families.disagreements(spec)))
    return describe(spec) | ({"disputed": disputed} if disputed else {})


def side_by_side(names: list[str], columns: list[dict[str, str]]) -> str:
    """A column per release, as many beside each other as the window has room for; rows in which they differ begin with *."""
    from zoo.describe import QUESTIONS

    room = window()
    keys = [key for key in (*FACTS, *QUESTIONS, "serving") if any(key in column for column in columns)]
    left = max(map(len, keys)) + 4
    differ = {key for key in keys if len({c.get(key, "-") for c in columns}) > 1}
    beside = len(columns)
    if room is not None:
        beside = min(beside, max(1, (room - left + 2) // 26))
    blocks = [slice(n, n + beside) for n in range(0, len(columns), beside)]
    each = max(24, (min(200, terminal_width()) - left) // beside - 2)
    if room is not None:
        each = max(12, min(each, (room - left + 2) // beside - 2))
    return "\n\n".join(_block(names[b], columns[b], keys, differ, left, each) for b in blocks)


def _block(
    names: list[str], columns: list[dict[str, str]], keys: list[str], differ: set[str], left: int, each: int
) -> str:
    import textwrap

    heads = names if window() is None else [shortened(n, each) for n in names]
    lines = [" " * left + "  ".join(n.ljust(each) for n in heads).rstrip()]
    for key in keys:
        values = [c.get(key, "-") for c in columns]
        mark = "*" if key in differ else " "
        cells = [
            [x for v in value.split("\n") for x in textwrap.wrap(v, each, break_on_hyphens=False) or [""]]
            for value in values
        ]
        for n in range(max(map(len, cells))):
            row = "  ".join((c[n] if n < len(c) else "").ljust(each) for c in cells)
            lines.append((f"{mark} {key}" if n == 0 else "").ljust(left) + row.rstrip())
    return "\n".join(line.rstrip() for line in lines)
