"""`zoo generate`: let a converted model continue a prompt."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zoo.cli._common import DTYPE, Here, common, emit, note, say
from zoo.cli._ranks import Ranks, together
from zoo.printable import printable

if TYPE_CHECKING:
    from zoo.text import Text
    from zoo.text.sampling import Sampling


@click.command(short_help="Let a converted model answer a prompt")
@click.argument("canon", type=Here(exists=True, file_okay=False, path_type=Path))
@click.argument("prompt")
@click.option("-n", "--max-new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option(
    "--sample",
    is_flag=True,
    help="Draw tokens as the release's generation_config.json says. Default: greedy.",
)
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="Draw tokens at this temperature from all; 0: greedy.")  # fmt: skip
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, (1 << 63) - 1),
    help="The same seed draws the same tokens.",
)
@click.option("--raw", is_flag=True, help="The prompt as it is, not as a message in the chat template.")
@click.option("--ids", is_flag=True, help="PROMPT is token ids, separated by spaces or commas.")
@click.option("--device", default="cpu", show_default=True, help="As torch spells it.")
@click.option("--dtype", type=DTYPE, help="What to compute in. Default: as stored.")
@common
def command(
    canon: Path, prompt: str, max_new_tokens: int, sample: bool, temperature: float, seed: int, raw: bool, ids: bool,
    device: str, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Let the model in the canonical folder CANON answer PROMPT, through its chat template if it has one.

    torchrun --nproc-per-node N -m zoo generate ... has N ranks share the model: of GPUs, each has one of its own.
    """
    with together(device) as ranks:
        _generate(ranks, canon, prompt, max_new_tokens, sample, temperature, seed, raw, ids, dtype, as_json)


@dataclass(frozen=True)
class Asked:
    """What the model is given: token ids, those that end an answer, and how tokens are drawn."""

    tokens: list[int]
    ends: int | tuple[int, ...] | None
    drawn: Sampling


def _asked(
    canon: Path, text: Text | None, prompt: str, raw: bool, sample: bool, temperature: float, seed: int
) -> Asked:
    """PROMPT in token ids. Says on stderr what is special about it."""
    from zoo.text.sampling import Sampling, read

    if text is None:
        try:
            tokens = [int(i) for i in prompt.replace(",", " ").split()]
        except ValueError:
            raise click.UsageError("--ids needs whole numbers as PROMPT") from None
    else:
        if not raw and text.no_chat is not None:
            note(f"{text.no_chat}: the prompt is given to the model as it is")
        tokens = text.prompt(prompt, raw)
        for line in text.notes:
            note(line)
    if not tokens:
        raise click.UsageError("PROMPT is empty")
    if not math.isfinite(temperature):
        raise click.UsageError(f"--temperature is {temperature}")
    if sample and temperature:
        raise click.UsageError("--sample and --temperature are two ways to draw: choose one")
    drawn = Sampling(temperature, 0)
    if sample:
        drawn, said = read(canon)
        for line in (f"sampled: {drawn}, seed {seed}", *said):
            note(line)
    return Asked(tokens, text.ends() if text else None, drawn)


def _generate(
    ranks: Ranks, canon: Path, prompt: str, max_new_tokens: int, sample: bool, temperature: float, seed: int, raw: bool,
    ids: bool, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    import zoo
    from zoo.text import Text

    text = None if ids or not ranks.first else Text(canon)
    asked = ranks.of_first(lambda: _asked(canon, text, prompt, raw, sample, temperature, seed))
    tokens, drawn = asked.tokens, asked.drawn
    import torch

    torch.manual_seed(seed)
    model = zoo.load(canon, device=ranks.device, dtype=dtype, mesh=ranks.mesh)
    if (largest := max(tokens)) >= model.spec.vocab_size or min(tokens) < 0:
        raise click.UsageError(f"token id {largest} is outside the vocabulary of {model.spec.vocab_size}")
    began, new, shown = time.perf_counter(), list[int](), ""
    for token in model.stream(
        torch.tensor([tokens], device=ranks.device),
        max_new_tokens,
        eos=asked.ends,
        temperature=drawn.temperature,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
    ):
        new.append(int(token[0]))
        if as_json or not ranks.first:
            continue
        so_far = text.decode(new) if text else " ".join(map(str, new))
        if not so_far.endswith("�"):  # half a character
            click.echo(printable(so_far[len(shown) :]), nl=False)
            shown = so_far
    seconds = time.perf_counter() - began
    if not ranks.first:
        return
    if as_json:
        emit(
            {
                "prompt_tokens": tokens,
                "tokens": new,
                "text": text.decode(new) if text else None,
                "seconds": round(seconds, 3),
            }
        )
        return
    say()
    note(
        f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} a second, after a prompt of {len(tokens)}"
    )
