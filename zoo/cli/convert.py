"""`zoo convert`: a checkpoint into the canonical layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli._common import (
    DTYPE,
    Anywhere,
    Source,
    common,
    emit,
    in_parts,
    level,
    part_of_these,
    say,
    what_it_is,
    which_set,
)
from zoo.url import is_url, without_secrets

if TYPE_CHECKING:
    from zoo.mapping.parts import Part


@click.command(short_help="A checkpoint into the canonical layout")
@click.argument("src", type=Source())
@click.argument("dst", type=Anywhere(new=True))
@click.option(
    "--dtype", type=DTYPE, help="Convert weights to this. Default: as released, quantised ones too."
)
@which_set
@what_it_is
@click.option("--strict", is_flag=True, help="Refuse scales that are zero or not finite, instead of warning.")
@level
@click.option("--force", is_flag=True, help="Replace DST if it is a canonical folder.")
@in_parts
@click.option(
    "--like",
    type=click.Path(path_type=Path),
    metavar="CANON",
    help="SRC is what a trainer wrote (torch.distributed.checkpoint, safetensors, PyTorch): its values, in the Spec of this canonical folder.",
)
@common
def command(
    src: str, dst: Path | str, as_json: bool, part: Part | None, like: Path | None, **how: Any
) -> None:
    """Convert SRC to the canonical folder DST.

    SRC is a checkpoint on disk (safetensors, GGUF, PyTorch, Meta's or Mistral's own files), the name of a release,
    or owner/repo on the Hub. DST appears when it is complete; run again after an interruption to go on.

    SRC and DST may be URLs of a store that fsspec knows (s3://bucket/model, gs://, memory://): headers are read by ranges to
    make the plan, files one by one after that; into a store, zoo.json is written last. Credentials are read from where the
    store's own client reads them.

    Several processes share the work where torchrun or srun started them (RANK of WORLD_SIZE), or each is given its
    --part. DST must be on a file system that they share; the last to finish lets it appear.

    \b
    Examples:
      zoo convert CHECKPOINT canonical
      zoo convert model-fp8 plain --dtype bf16
      zoo convert dcp back --like canonical
    """
    from zoo.cli._progress import Bar
    from zoo.pull import convert

    if not isinstance(dst, Path):
        _sent(src, dst, as_json, part, like, **how)
        return
    if like is not None:
        _saved(src, dst, like, as_json, part, **how)
        return
    part = part_of_these(part)
    with Bar() as bar:
        path = convert(src, dst, progress=bar, part=part, **how)
    if part is not None and not path.exists():  # the last one tells of it
        if as_json:
            emit({"part": f"{part.number}/{part.of}", "appears_later": str(path)})
        return
    if as_json:
        from zoo.cli.inspect import look

        emit(look(path)[0])
        return
    against = " --against SOURCE" if is_url(src) else ""  # nothing that was fetched is kept
    proof = "" if how["verify"] else f"; `zoo verify {path}{against}` proves it"
    say(f"converted to {path}{proof}")


def _sent(src: str, url: str, as_json: bool, part: Part | None, like: Path | None, **how: Any) -> None:
    """Into a store."""
    from zoo.cli._progress import Bar
    from zoo.mapping.parts import of_process
    from zoo.pull.sent import convert_to_store

    if part is None and (found := of_process(os.environ)):
        part = found[0]
    if part is not None or like is not None:
        raise click.UsageError(
            f"{'several processes share' if like is None else '--like is for'} a folder on disk: {without_secrets(url)} is one process's"
        )
    with Bar() as bar:
        at = convert_to_store(src, url, progress=bar, **how)
    if as_json:
        from zoo.cli.inspect import look

        emit(look(url)[0])
        return
    say(f"converted to {at}; `zoo pull {at} --to FOLDER` brings it here")


def _saved(src: str, dst: Path, like: Path, as_json: bool, part: Part | None, **how: Any) -> None:
    """A trainer's checkpoint."""
    from zoo.cli._progress import Bar, Steps
    from zoo.mapping.save import save

    meaningless = ("file", "format", "family", "strict", "verify")
    if (given := [name for name in meaningless if how.get(name)]) or part is not None:
        raise click.UsageError(
            f"--{(given or ['part'])[0]} says nothing of a trainer's checkpoint: leave it out with --like"
        )
    with Bar() as bar:
        bar.phase("converting")
        path = save(src, like, dst, dtype=how["dtype"], force=how["force"], progress=Steps(bar))
    if as_json:
        from zoo.cli.inspect import look

        emit(look(path)[0])
        return
    say(f"converted to {path}; its values are no release's, and compared with nothing")
