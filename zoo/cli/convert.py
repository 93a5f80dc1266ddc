"""`zoo convert`: a checkpoint into the canonical layout."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import DTYPE, Source, common, emit, say


@click.command(short_help="A checkpoint into the canonical layout")
@click.argument("src", type=Source())
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--dtype", type=DTYPE, help="Convert weights to this. Default: as released, quantised ones too.")
@click.option("--force", is_flag=True, help="Replace DST if it is a canonical folder.")
@common
def command(src: str, dst: Path, dtype: str | None, force: bool, as_json: bool) -> None:
    """Convert SRC to the canonical folder DST.

    SRC is a checkpoint on disk (safetensors, GGUF, PyTorch, Meta's or Mistral's own files), the name of a release,
    or owner/repo on the Hub. DST appears when it is complete; run again after an interruption to go on.
    """
    from zoo.cli._progress import Bar
    from zoo.pull import convert

    with Bar() as bar:
        path = convert(src, dst, dtype=dtype, force=force, progress=bar)
    if as_json:
        from zoo.cli.inspect import look

        emit(look(path)[0])
        return
    say(f"converted to {path}; `zoo verify {path}` proves it")
