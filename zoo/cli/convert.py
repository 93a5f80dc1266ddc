"""`zoo convert`: a checkpoint into the canonical layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli._common import DTYPE, Source, common, emit, level, say, what_it_is, which_set


@click.command(short_help="A checkpoint into the canonical layout")
@click.argument("src", type=Source())
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=DTYPE, help="Convert weights to this. Default: as released, quantised ones too."
)
@which_set
@what_it_is
@click.option("--strict", is_flag=True, help="Refuse scales that are zero or not finite, instead of warning.")
@level
@click.option("--force", is_flag=True, help="Replace DST if it is a canonical folder.")
@common
def command(src: str, dst: Path, as_json: bool, **how: Any) -> None:
    """Convert SRC to the canonical folder DST.

    SRC is a checkpoint on disk (safetensors, GGUF, PyTorch, Meta's or Mistral's own files), the name of a release,
    or owner/repo on the Hub. DST appears when it is complete; run again after an interruption to go on.
    """
    from zoo.cli._progress import Bar
    from zoo.pull import convert

    with Bar() as bar:
        path = convert(src, dst, progress=bar, **how)
    if as_json:
        from zoo.cli.inspect import look

        emit(look(path)[0])
        return
    proof = "" if how["verify"] else f"; `zoo verify {path}` proves it"
    say(f"converted to {path}{proof}")
