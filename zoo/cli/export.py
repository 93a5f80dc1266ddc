"""`zoo export`: a canonical folder back into the release it was made of."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import common, emit, note, say


def written_since(canon: Path) -> str | None:
    """A file of weights in CANON that is newer than the description, which a conversion writes last."""
    described = (canon / "zoo.json").stat().st_mtime + 1
    files = sorted(canon.glob("*.safetensors"))
    return next((f.name for f in files if f.stat().st_mtime > described), None)


@click.command(short_help="A canonical folder back into the release")
@click.argument("canon", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--format", type=click.Choice(["hf", "source"]), default="hf", show_default=True,
    help="hf: a Hugging Face checkpoint; source: the vendor's own names and files, if it had others.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace DST if it is a checkpoint.")
@common
def command(canon: Path, dst: Path, format: str, force: bool, as_json: bool) -> None:
    """Write the release that the canonical folder CANON was made of to DST: the same tensors and files, and the same
    bytes where CANON is as it was converted.

    After a conversion that changed the dtype, or from a GGUF, it is a new Hugging Face checkpoint.
    """
    from zoo.cli._progress import Bar, Steps
    from zoo.mapping.export import export

    with Bar() as bar:
        bar.phase("exporting")
        path = export(canon, dst, format=format, force=force, progress=Steps(bar))
    files = sorted(p.name for p in path.iterdir())
    if as_json:
        emit({"path": str(path), "files": files})
        return
    say(f"exported {len(files)} files to {path}")
    if edited := written_since(canon):
        note(
            f"{edited} was written after the conversion: what was exported holds its values, not the release's"
        )
