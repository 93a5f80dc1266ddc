"""`zoo golden`: record an oracle's run, so that others can verify against it without the oracle."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import DTYPE, Here, Whole, common, emit, on, say
from zoo.cli._progress import working


@click.group(short_help="Record upstream's logits, to verify without it")
def command() -> None:
    """Record upstream's logits to a file, or write the inputs that somebody else's code is to be run on.

    `zoo verify CANON --against FILE` then needs no upstream. docs/verification.md describes the file.

    \b
    Examples:
      zoo golden record canonical -o golden.safetensors
      zoo verify canonical --against golden.safetensors
    """


_src = click.argument("src", type=Here(exists=True, path_type=Path))
_out = click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The golden file.")  # fmt: skip
_dtype = click.option(
    "--dtype", type=DTYPE, default="fp32", show_default=True, help="What upstream computes in."
)
_length = click.option("--max-length", default=4096, show_default=True, type=Whole(8), help="Cross the model's windows and other limits up to this many tokens.")  # fmt: skip


@command.command()
@_src
@_out
@_dtype
@_length
@on("Where upstream computes: cpu, cuda, cuda:1, or auto.")
@common
def record(src: Path, output: Path, dtype: str, max_length: int, device: str, as_json: bool) -> None:
    """Run upstream on SRC (a checkpoint, or a canonical folder whose source is still there) and record it."""
    from zoo.verify.recording import record

    with working(as_json) as say_stage:
        about = record(src, output, dtype, max_length, device, say_stage)
    if as_json:
        emit(about)
    else:
        say(f"{output}: {about['tokens']} tokens, {output.stat().st_size:,} bytes, by {about['by']}")
        for note in about["notes"]:
            say(f"note: {note}")


@command.command()
@_src
@_out
@_dtype
@_length
@common
def inputs(src: Path, output: Path, dtype: str, max_length: int, as_json: bool) -> None:
    """Write the standard inputs for SRC (a canonical folder or a checkpoint): token ids and row lengths."""
    from zoo.verify.recording import inputs

    about = inputs(src, output, dtype, max_length)
    if as_json:
        emit(about)
    else:
        say(f"{output}: {about['tokens']} tokens in {about['batches']} batches")
