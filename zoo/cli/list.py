"""`zoo list`: the releases zoo knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zoo.cli._common import common, emit, note, say, table

if TYPE_CHECKING:
    from zoo.manifest import Manifest


@click.command(short_help="The releases zoo knows, filtered by words")
@click.argument("words", nargs=-1)
@common
def command(words: tuple[str, ...], as_json: bool) -> None:
    """List the releases zoo knows; those with all WORDS in them, if any are given.

    Words are looked for in name, family, repository, licence, format and quantisation: `zoo list qwen fp8`.
    """
    from zoo import manifest
    from zoo.describe import count

    found = manifest.search(words)
    if as_json:
        emit([manifest.summary(m) for m in found])
        return
    if not found:
        note(
            f"no release has all of: {' '.join(words)}. `zoo list` without words shows all {len(manifest.stems())}."
        )
        return
    rows = []
    for m in found:
        rows.append(
            (
                m.name,
                m.family,
                count(m.params_total) if m.params_total else "",
                count(m.params_active) if m.params_active else "",
                " ".join(_format(m, f) for f in m.formats),
                m.quantization or m.dtype or "",
                m.licence or "",
                {True: "gated", False: "", None: "?"}[m.gated],
                manifest.proof(m) or "",
            )
        )
    head = ("NAME", "FAMILY", "PARAMS", "ACTIVE", "FORMATS", "WEIGHTS", "LICENCE", "GATED", "PROVEN")
    say(table(head, rows, right=(2, 3)))


def _format(m: Manifest, format: str) -> str:
    """A format; in brackets what the release's weights are rounded to in it."""
    rounded = [s.quantization for s in m.sources if s.format == format and s.quantization]
    return f"{format} ({rounded[0]})" if rounded else format
