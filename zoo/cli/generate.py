"""`zoo generate`: let a converted model continue a prompt."""

from __future__ import annotations

import math
import time
from pathlib import Path

import click

from zoo.cli._common import DTYPE, common, emit, note, say
from zoo.printable import printable


@click.command(short_help="Let a converted model answer a prompt")
@click.argument("canon", type=click.Path(exists=True, file_okay=False, path_type=Path))
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
    """Let the model in the canonical folder CANON answer PROMPT, through its chat template if it has one."""
    import zoo
    from zoo.text import Text
    from zoo.text.sampling import Sampling, read

    text = None if ids else Text(canon)
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
    import torch

    torch.manual_seed(seed)
    model = zoo.load(canon, device=device, dtype=dtype)
    if (largest := max(tokens)) >= model.spec.vocab_size or min(tokens) < 0:
        raise click.UsageError(f"token id {largest} is outside the vocabulary of {model.spec.vocab_size}")
    began, new, shown = time.perf_counter(), list[int](), ""
    for token in model.stream(
        torch.tensor([tokens], device=device),
        max_new_tokens,
        eos=text.ends() if text else None,
        temperature=drawn.temperature,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
    ):
        new.append(int(token[0]))
        if as_json:
            continue
        so_far = text.decode(new) if text else " ".join(map(str, new))
        if not so_far.endswith("�"):  # half a character
            click.echo(printable(so_far[len(shown) :]), nl=False)
            shown = so_far
    seconds = time.perf_counter() - began
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
