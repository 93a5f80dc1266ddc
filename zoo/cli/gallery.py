"""`zoo gallery`: a static site of all releases."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import ReleaseName, common, emit, say


@click.command(short_help="A site of all releases, drawn, compared and counted, that opens from disk")
@click.argument("names", nargs=-1, type=ReleaseName(), metavar="[NAME]...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="The folder of the site.",
)
@common
def command(names: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Write a static site of the releases NAME..., of all if none is named: open DIR/index.html.

    A card and a page for each release, with its drawing; search, filters, comparison, a timeline of choices, and what fits on
    which card. It needs no network and no server.

    \b
    Examples:
      zoo gallery -o site
      zoo gallery gpt-oss-20b qwen3-8b -o two
    """
    from zoo import gallery

    releases = gallery.write(output, names)
    drawn = sum(r.spec is not None for r in releases)
    if as_json:
        emit({"gallery": str(output), "releases": len(releases), "drawn": drawn})
    else:
        say(f"{output / 'index.html'}: {len(releases)} releases, {drawn} of them drawn")
