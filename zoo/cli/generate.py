"""`zoo generate`: let a converted model continue a prompt."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zoo.cli._common import DTYPE, F, Here, Number, Whole, common, emit, note, say
from zoo.cli._ranks import Ranks, together
from zoo.errors import ZooError
from zoo.untrusted.printable import printable

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.text import Text
    from zoo.text.sampling import Sampling


def drawing(command: F) -> F:
    """`--sample`, `--temperature` and `--seed`."""
    sample = click.option(
        "--sample",
        is_flag=True,
        help="Draw tokens as the release's generation_config.json says. Default: greedy.",
    )
    temperature = click.option(
        "--temperature",
        default=0.0,
        show_default=True,
        type=Number(0),
        help="Draw tokens at this temperature from all; 0: greedy.",
    )
    seed = click.option(
        "--seed",
        default=0,
        show_default=True,
        type=Whole(0, (1 << 63) - 1),
        help="The same seed draws the same tokens.",
    )
    return sample(temperature(seed(command)))


def computing(command: F) -> F:
    """`--device` and `--dtype`."""
    device = click.option("--device", default="cpu", show_default=True, help="As torch spells it.")
    dtype = click.option("--dtype", type=DTYPE, help="What to compute in. Default: as stored.")
    return device(dtype(command))


@click.command(short_help="Let a converted model answer a prompt")
@click.argument("canon", type=Here(exists=True, file_okay=False, path_type=Path))
@click.argument("prompt")
@click.option("-n", "--max-new-tokens", default=128, show_default=True, type=Whole(1))
@drawing
@click.option("--raw", is_flag=True, help="The prompt as it is, not as a message in the chat template.")
@click.option("--ids", is_flag=True, help="PROMPT is token ids, separated by spaces or commas.")
@computing
@common
def command(
    canon: Path, prompt: str, max_new_tokens: int, sample: bool, temperature: float, seed: int, raw: bool, ids: bool,
    device: str, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Let the model in the canonical folder CANON answer PROMPT, through its chat template if it has one. PROMPT `-` is what
    stdin has, without the newline at its end.

    torchrun --nproc-per-node N -m zoo generate ... has N ranks share the model: of GPUs, each has one of its own.

    \b
    Examples:
      zoo generate smollm2-135m 'What is the capital of France?'
      zoo generate smollm2-135m - -n 512 < prompt.txt
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
    prompt = _of_stdin() if prompt == "-" else prompt
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
    if not tokens and text is not None and prompt.strip():
        raise ZooError(
            f"{canon}: its chat template or tokenizer makes no token of the prompt; give token ids (--ids)"
        )
    if not tokens:
        raise click.UsageError("PROMPT is empty")
    return Asked(tokens, text.ends() if text else None, drawn(canon, sample, temperature, seed))


def _of_stdin() -> str:
    """What is piped in, without the newline that `echo` puts at its end."""
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ZooError(f"stdin is not UTF-8 ({error}): the prompt is text") from None


def drawn(canon: Path, sample: bool, temperature: float, seed: int) -> Sampling:
    """How tokens are drawn; where a release's settings say it, they are told on stderr."""
    from zoo.text.sampling import Sampling, read

    if not math.isfinite(temperature):
        raise click.UsageError(f"--temperature is {temperature}")
    if sample and temperature:
        raise click.UsageError("--sample and --temperature are two ways to draw: choose one")
    if not sample:
        return Sampling(temperature, 0)
    found, said = read(canon)
    for line in (f"sampled: {found}, seed {seed}", *said):
        note(line)
    return found


def within(tokens: list[int], vocabulary: int, text: Text | None) -> None:
    """Raises an error where a token is none of the model's: the user's, or that of the tokenizer of `text`."""
    if (largest := max(tokens)) >= vocabulary or min(tokens) < 0:
        why = f"token id {largest} is outside the vocabulary of {vocabulary}"
        raise click.UsageError(why) if text is None else ZooError(f"{text.root}: its tokenizer's {why}")


def follow(
    stream: Iterable[Tensor], new: list[int], text: Text | None, show: bool, ends: tuple[int, ...] = ()
) -> None:
    """Put the tokens of one sequence into `new` as they come. `show`: and their text to stdout, without those in `ends`."""
    shown = ""
    for token in stream:
        new.append(int(token[0]))
        if show and new[-1] not in ends:
            so_far = text.decode(new) if text else " ".join(map(str, new))
            if not so_far.endswith("�"):  # half a character
                click.echo(printable(so_far[len(shown) :]), nl=False)
                shown = so_far


def _generate(
    ranks: Ranks, canon: Path, prompt: str, max_new_tokens: int, sample: bool, temperature: float, seed: int, raw: bool,
    ids: bool, dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    import zoo
    from zoo.text import Text

    text = None if ids or not ranks.first else Text(canon)
    asked = ranks.of_first(lambda: _asked(canon, text, prompt, raw, sample, temperature, seed))
    tokens, how = asked.tokens, asked.drawn
    import torch

    torch.manual_seed(seed)
    model = zoo.load(canon, device=ranks.device, dtype=dtype, mesh=ranks.mesh)
    within(tokens, model.spec.vocab_size, text)
    began, new = time.perf_counter(), list[int]()
    stream = model.stream(
        torch.tensor([tokens], device=ranks.device),
        max_new_tokens,
        eos=asked.ends,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
    )
    follow(stream, new, text, show=ranks.first and not as_json)
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
