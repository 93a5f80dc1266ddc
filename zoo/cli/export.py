"""`zoo export`: a canonical folder back into the release it was made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from zoo.cli._common import DTYPE, common, emit, note, say


class Size(click.ParamType[int]):
    """5GB, 500MB, 2GiB, or a number of bytes."""

    name = "size"
    units = {
        "": 1,
        "B": 1,
        **{f"{u}B": 1000**k for k, u in enumerate("KMGT", 1)},
        **{f"{u}IB": 1024**k for k, u in enumerate("KMGT", 1)},
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value))
        if m is None or m[2].upper() not in self.units or float(m[1]) == 0:
            self.fail(f"{value!r} is no size; expected one like 5GB, 500MB or 2GiB", param, ctx)
        return int(float(m[1]) * self.units[m[2].upper()])


def written_since(canon: Path) -> str | None:
    """A file of weights in CANON that is newer than the description, which a conversion writes last."""
    described = (canon / "zoo.json").stat().st_mtime + 1
    files = sorted(canon.glob("*.safetensors"))
    return next((f.name for f in files if f.stat().st_mtime > described), None)


@click.command(short_help="A canonical folder back into the release")
@click.argument("canon", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--format", type=click.Choice(["hf", "source", "dcp"]), default="hf", show_default=True,
    help="hf: a Hugging Face checkpoint; source: the vendor's own names and files, if it had others; dcp: a folder of "
    "torch.distributed.checkpoint, for trainers.",
)  # fmt: skip
@click.option("--dtype", type=DTYPE, help="Convert weights to this. Default: as they are. For hf.")
@click.option(
    "--max-shard-size", type=Size(), metavar="SIZE", help="Bytes of a file at most: 5GB, 500MB, 2GiB. For hf."
)
@click.option(
    "--names", type=click.Choice(["transformers", "hf", "canonical"]),
    help="For dcp: names as transformers has them in memory (default), the release's, or the canonical ones.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace DST if it is a checkpoint.")
@common
def command(
    canon: Path,
    dst: Path,
    format: str,
    dtype: str | None,
    max_shard_size: int | None,
    names: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the release that the canonical folder CANON was made of to DST: the same tensors and files, and the same
    bytes where CANON is as it was converted.

    After a conversion that changed the dtype, or from a GGUF, it is a new Hugging Face checkpoint; so it is with --dtype or
    --max-shard-size, and where CANON was trained or merged. Its names are the release's.
    """
    from zoo.cli._progress import Bar, Steps
    from zoo.mapping.export import export

    with Bar() as bar:
        bar.phase("exporting")
        path = export(
            canon,
            dst,
            format=format,
            force=force,
            dtype=dtype,
            shard_size=max_shard_size,
            names=names,
            progress=Steps(bar),
        )
    files = sorted(p.name for p in path.iterdir())
    if as_json:
        emit({"path": str(path), "files": files})
        return
    say(f"exported {len(files)} files to {path}")
    if edited := written_since(canon):
        note(
            f"{edited} was written after the conversion: what was exported holds its values, not the release's"
        )
