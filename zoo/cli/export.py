"""`zoo export`: a canonical folder back into the release it was made of."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from zoo.cli._common import DTYPE, Here, common, emit, note, say


def written_since(canon: Path) -> str | None:
    """A file of weights in CANON that is newer than the description, which a conversion writes last."""
    described = (canon / "zoo.json").stat().st_mtime + 1
    files = sorted(canon.glob("*.safetensors"))
    return next((f.name for f in files if f.stat().st_mtime > described), None)


class Size(click.ParamType[int]):
    """A number of bytes, with or without a unit: of the powers of 1000 (GB), or of 1024 (GiB)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        m = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([KMGT]?)(I?)B?", str(value).upper())
        n = 0
        if m is not None and not (m[3] and not m[2]):
            n = int(Fraction(m[1]) * (1024 if m[3] else 1000) ** " KMGT".index(m[2] or " "))
        if not n:
            self.fail(
                f"{value!r:.60} is no size; expected a number with a unit, as in 500MB or 2.5GB", param, ctx
            )
        return n


@click.command(short_help="A canonical folder back into the release")
@click.argument("canon", type=Here(exists=True, file_okay=False, path_type=Path))
@click.argument("dst", type=Here(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["hf", "source", "gguf", "meta", "mistral", "dcp"]),
    default="hf",
    show_default=True,
    help="hf: a Hugging Face checkpoint; source: the vendor's own names and files, if it had others; gguf: a file for llama.cpp; "
    "meta, mistral: params.json and consolidated.00.pth or .safetensors, as the vendors' own code reads; "
    "dcp: a folder of torch.distributed.checkpoint, for trainers.",
)
@click.option(
    "--type",
    "type_",
    metavar="TYPE",
    help="Of a GGUF's matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, mxfp4_moe, tq2_0, tq1_0. Default: as the embedding is stored; blocks of a GGUF as they are.",
)
@click.option("--dtype", type=DTYPE, help="Convert an hf checkpoint's weights to this. Default: as they are.")
@click.option(
    "--max-shard-size",
    "shard_size",
    type=Size(),
    metavar="SIZE",
    help="Bytes of tensors in a file, 5GB for example; the files are new then. Default: as released, else 5 GB; a GGUF is one file.",
)
@click.option(
    "--names", type=click.Choice(["transformers", "hf", "canonical"]),
    help="Of dcp: names as transformers has them in memory (default), the release's, or the canonical ones.",
)  # fmt: skip
@click.option(
    "--card", is_flag=True,
    help="Write a model card (README.md) into an hf folder that is the release to the byte, too; new files have one anyway.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace DST if it is a checkpoint.")
@common
def command(
    canon: Path,
    dst: Path,
    format: str,
    type_: str | None,
    dtype: str | None,
    shard_size: int | None,
    names: str | None,
    card: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the release that the canonical folder CANON was made of to DST: the same tensors and files, and the same
    bytes where CANON is as it was converted.

    After a conversion that changed the dtype, or from a GGUF, it is a new Hugging Face checkpoint; so it is with --dtype or
    --max-shard-size, and where CANON was trained or merged. Its names are the release's.

    With --format gguf DST is a file, x.gguf, or the first of a set of files.

    \b
    Examples:
      zoo export canonical release
      zoo export canonical model.gguf --format gguf --type q8_0
      zoo export tuned tuned-hf --dtype bf16 --max-shard-size 2GB
    """
    from zoo.card import About
    from zoo.cli._progress import Bar, Steps
    from zoo.formats.gguf import files_of_set
    from zoo.mapping.export import export

    if names and format != "dcp":
        raise click.UsageError("--names are chosen for --format dcp")
    if format == "dcp" and (type_ or dtype or shard_size):
        raise click.UsageError(
            "--format dcp writes tensors as they are: no --type, --dtype or --max-shard-size"
        )
    if card and format not in ("hf", "source"):
        raise click.UsageError("--card is of a folder that the Hub shows: --format hf or source")
    with Bar() as bar:
        bar.phase("exporting")
        if format == "dcp":
            from zoo.mapping.state import export_dcp  # it imports torch, which the others do without

            path = export_dcp(canon, dst, names or "transformers", force=force)
        else:
            path = export(
                canon, dst, format=format, type=type_, force=force, dtype=dtype, shard_size=shard_size,
                card=About() if card else None, progress=Steps(bar),
            )  # fmt: skip
    files = sorted(p.name for p in path.iterdir()) if path.is_dir() else files_of_set(path.name)
    if as_json:
        emit({"path": str(path), "files": files})
        return
    say(f"exported {len(files)} file{'s' * (len(files) > 1)} to {path}")
    if edited := written_since(canon):
        note(
            f"{edited} was written after the conversion: what was exported holds its values, not the release's"
        )
