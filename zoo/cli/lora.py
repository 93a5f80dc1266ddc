"""`zoo lora`: what training changed, as a PEFT adapter."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import Whole, common, emit, say, table


@click.command(short_help="What training changed, as a PEFT adapter")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("tuned", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--rank", type=Whole(1), default=32, show_default=True, help="Of each matrix' difference.")
@click.option("--force", is_flag=True, help="Replace DST if it is an adapter.")
@common
def command(base: Path, tuned: Path, dst: Path, rank: int, force: bool, as_json: bool) -> None:
    """Write to DST the PEFT adapter (LoRA) that makes the canonical folder TUNED of BASE, as nearly as its rank allows.

    Each matrix' difference is decomposed (SVD); the share of it that the adapter has is told. Norms, embeddings and biases
    that differ are in it whole. `zoo merge BASE DST OUT` gives TUNED back, as far as the adapter has it.

    \b
    Examples:
      zoo lora canonical tuned adapter --rank 8
    """
    from zoo.cli._progress import Bar, Steps
    from zoo.mapping.lora import extract

    with Bar() as bar:
        bar.phase("extracting")
        done = extract(base, tuned, dst, rank=rank, force=force, progress=Steps(bar))
    if as_json:
        emit(done.to_json())
        return
    if done.kept:
        least = sorted(done.kept.items(), key=lambda x: x[1])[:5]
        say(table(("module, the worst first", "kept"), [(m, f"{x:.4%}") for m, x in least], right=[1]))
    mean = sum(done.kept.values()) / max(len(done.kept), 1)
    of = f", which keep {mean:.2%} of the difference's energy on average" if done.kept else ""
    say(f"{len(done.kept)} matrices of rank {rank}{of}; whole: {', '.join(done.whole[:6]) or 'nothing'}"
        + (f" and {len(done.whole) - 6} more" if len(done.whole) > 6 else ""))  # fmt: skip
    say(f"extracted to {done.path}; `zoo merge {base} {done.path} OUT` merges it")
