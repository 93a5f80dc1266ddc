"""`zoo merge`: a PEFT adapter into a canonical folder."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import Here, common, emit, say


@click.command(short_help="A PEFT adapter (LoRA, DoRA) into a canonical folder")
@click.argument("canon", type=Here(path_type=Path))
@click.argument("adapter", type=Here(path_type=Path))
@click.argument("dst", type=Here(path_type=Path))
@click.option("--force", is_flag=True, help="Replace DST if it is a canonical folder.")
@common
def command(canon: Path, adapter: Path, dst: Path, force: bool, as_json: bool) -> None:
    """Merge the PEFT adapter in the folder ADAPTER into the canonical folder CANON, and write it to DST.

    LoRA, rsLoRA and DoRA, whole modules and biases, fused weights and experts; computed in fp32, rounded once. DST holds no
    release's values, and says so.

    \b
    Examples:
      zoo merge canonical ADAPTER merged
    """
    from zoo.cli._progress import Bar, Steps
    from zoo.mapping.merge import merge

    with Bar() as bar:
        bar.phase("merging")
        path = merge(canon, adapter, dst, force=force, progress=Steps(bar))
    if as_json:
        from zoo.cli.inspect import look

        emit(look(path)[0])
        return
    say(f"merged into {path}; `zoo export {path} OUT` makes a Hugging Face checkpoint of it")
