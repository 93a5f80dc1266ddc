"""`zoo list`: the releases zoo knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zoo.cli._common import Whole, common, emit, fold, note, say, table, window

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zoo.manifest import Manifest


@click.command(short_help="The releases zoo knows, filtered by words, year, vendor")
@click.argument("words", nargs=-1)
@click.option("--year", type=Whole(1900, 2099), help="Only those released in this year.")
@click.option("--vendor", help="Only those of this vendor, or of this owner on the Hub: meta, qwen, mistral.")
@click.option(
    "--has",
    multiple=True,
    metavar="CHOICE",
    help="Only those that made this structural choice: MLA, 'sliding window', NoPE. Several: all of them.",
)
@click.option(
    "--scheme",
    metavar="NAME",
    help="Only those whose weights are so quantised: nvfp4, fp8, awq, gptq4-group128; the beginning of a name is enough.",
)
@click.option(
    "--sort",
    type=click.Choice(["name", "released", "params"]),
    default="name",
    show_default=True,
    help="released: newest first; params: largest first; unknown ones last.",
)
@common
def command(
    words: tuple[str, ...],
    year: int | None,
    vendor: str | None,
    has: tuple[str, ...],
    scheme: str | None,
    sort: str,
    as_json: bool,
) -> None:
    """List the releases zoo knows; those with all WORDS in them, if any are given.

    Words are looked for in name, family, vendor, repository, licence, format and quantisation, years and months in the
    release's date: `zoo list qwen fp8`, `zoo list 2026`, `zoo list 2026-02 moe`.

    \b
    Examples:
      zoo list qwen fp8
      zoo list --vendor meta --year 2025 --sort released
      zoo list --has MLA --has 'shared expert'
    """
    from zoo import manifest

    dates = [w for w in words if manifest.is_date(w)] + ([str(year)] if year else [])
    found = manifest.search(words)
    if year is not None:
        found = tuple(m for m in found if (m.released or "").startswith(str(year)))
    others = manifest.search([w for w in words if w not in dates]) if dates else ()
    undated = [m for m in others if m.released is None and m not in found]
    if vendor is not None:
        found, undated = manifest.of_vendor(found, vendor), [*manifest.of_vendor(undated, vendor)]
    if scheme is not None:
        found, undated = manifest.of_scheme(found, scheme), [*manifest.of_scheme(undated, scheme)]
    for choice in has:
        found = _with(found, choice)
        undated = [*_with(undated, choice)]
    if undated:
        note(f"not listed: {len(undated)} whose date has no public source, and may be {' '.join(dates)}")
    found = _sorted(found, sort)
    if as_json:
        emit([manifest.summary(m) for m in found])
        return
    if not found:
        asked = [
            *words,
            *(f"--has {choice}" for choice in has),
            *([f"--year {year}"] if year else []),
            *([f"--vendor {vendor}"] if vendor else []),
            *([f"--scheme {scheme}"] if scheme else []),
        ]
        note(
            f"no release has all of: {' '.join(asked)}. `zoo list` without words shows all {len(manifest.stems())}."
        )
        return
    say(_table(found))


def _with(found: Iterable[Manifest], choice: str) -> tuple[Manifest, ...]:
    """Those whose Spec makes a choice, by its name in any case. Errors: no choice is called that."""
    from zoo import families
    from zoo.errors import ZooError
    from zoo.gallery.choices import CHOICES
    from zoo.gallery.copies import base

    tests = {name.lower(): test for of in CHOICES.values() for name, test in of.items()}
    if choice.lower() not in tests:
        known = "; ".join(name for of in CHOICES.values() for name in of)
        raise ZooError(f"--has: no choice is called {choice!r}; there are: {known}")
    made, unknown = [], 0
    for m in found:
        # A quantised copy is built like its original.
        drawn = m if m.config is not None else base(m)
        config = None if drawn is None else drawn.config
        if drawn is None or config is None:
            unknown += 1
        elif tests[choice.lower()](
            families.spec_of(config, families.get(m.family), f"{drawn.name}: config.json")
        ):
            made.append(m)
    if unknown:
        note(f"not listed: {unknown} whose config has no public copy, and may have {choice}")
    return tuple(made)


def _sorted(found: Iterable[Manifest], by: str) -> tuple[Manifest, ...]:
    """Within equals, by name."""
    if by == "released":
        return tuple(sorted(found, key=lambda m: m.released or "", reverse=True))
    if by == "params":
        return tuple(sorted(found, key=lambda m: m.params_total or 0, reverse=True))
    return tuple(found)


def _table(found: Iterable[Manifest]) -> str:
    from zoo import manifest
    from zoo.untrusted.printable import count

    rows = [
        (
            m.name,
            m.family,
            m.released or "",
            count(m.params_total) if m.params_total else "",
            count(m.params_active) if m.params_active else "",
            " ".join(_format(m, f) for f in m.formats),
            m.quantization or m.dtype or "",
            m.licence or "",
            {True: "gated", False: "", None: "?"}[m.gated],
            manifest.proof(m) or "",
        )
        for m in found
    ]
    head = (
        "NAME",
        "FAMILY",
        "RELEASED",
        "PARAMS",
        "ACTIVE",
        "FORMATS",
        "WEIGHTS",
        "LICENCE",
        "GATED",
        "PROVEN",
    )
    short = {1: 12, 5: 16, 6: 9, 7: 12}
    shown = table(head, rows, right=(3, 4), short=short, drop=(5, 7, 8, 1, 4, 6, 9, 2, 3))
    if window() is None:
        return shown
    held = shown.split("\n", 1)[0].split()
    told = [text for name, text in LEGEND.items() if name in held]
    return "\n".join([shown, "", *(part for text in told for part in fold(text))])


LEGEND = {
    "WEIGHTS": "WEIGHTS: how they are quantised, or their dtype",
    "GATED": "GATED: the Hub asks to accept a licence first; ?: not known",
    "PROVEN": "PROVEN: weights: its own, compared with upstream; rules: its family's conversion and model, on small random "
    "checkpoints",
}


def _format(m: Manifest, format: str) -> str:
    """A format; in brackets what the release's weights are rounded to in it."""
    rounded = [s.quantization for s in m.sources if s.format == format and s.quantization]
    return f"{format} ({rounded[0]})" if rounded else format
