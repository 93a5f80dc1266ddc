"""`zoo chat`: a conversation with a converted model."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zoo.cli._common import Here, Whole, common, emit, note, say
from zoo.cli._state import State
from zoo.cli.generate import computing, drawing, drawn, follow, within
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.model.cache import Cache
    from zoo.model.decoder import Decoder
    from zoo.text import Text
    from zoo.text.sampling import Sampling


@click.command(short_help="Talk with a converted model")
@click.argument("canon", type=Here(exists=True, file_okay=False, path_type=Path))
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option(
    "-n",
    "--max-new-tokens",
    default=1024,
    show_default=True,
    type=Whole(1),
    help="The longest answer.",
)
@drawing
@computing
@common
def command(
    canon: Path, system: str | None, max_new_tokens: int, sample: bool, temperature: float, seed: int, device: str,
    dtype: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Talk with the model in the canonical folder CANON, through its chat template. Each line of stdin is a question; its
    answer is written as it comes.

    /exit or the end of stdin (Ctrl-D) ends the conversation. Ctrl-C stops an answer, and what was said of it stays said;
    where a question is awaited it ends zoo. --json prints the messages at the end, and nothing before.

    \b
    Examples:
      zoo chat smollm2-135m --system 'Answer in one sentence.'
    """
    import zoo
    from zoo.mapping.parts import of_process
    from zoo.text import Text

    if of_process(os.environ) is not None:
        raise ZooError("zoo chat is one process; several share a model in `zoo generate`")
    text = Text(canon)
    if text.no_chat is not None:
        raise ZooError(
            f"{canon}: {text.no_chat}, so it can't be talked with; `zoo generate {canon} PROMPT` continues a text"
        )
    for line in text.notes:
        note(line)
    how = drawn(canon, sample, temperature, seed)
    import torch

    torch.manual_seed(seed)
    talk = Conversation(zoo.load(canon, device=device, dtype=dtype), text, how, system)
    if sys.stdin is not None and sys.stdin.isatty():
        note("/exit or Ctrl-D ends, Ctrl-C stops an answer")
    while (question := _line()) not in (None, "/exit"):
        if question:
            talk.answer(question, max_new_tokens, show=not as_json)
    if as_json:
        emit({"messages": talk.messages})


def _line() -> str | None:
    """The next question; None at the end."""
    if sys.stdin is None:
        return None
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (what is typed can be edited and recalled)
    try:
        return input("> " if typed else "").strip()
    except EOFError:
        if typed:
            say()
        return None
    except UnicodeDecodeError as error:
        raise ZooError(f"stdin is not {error.encoding} ({error.reason}): questions are text") from None


ROOM = 4096
"""Tokens that a cache has room for at first."""


class Conversation:
    """What was said, and a cache that has read it: for an answer, only what is new is read.

    Unusual: the text is spelled anew for each answer, as the template wants it, which may leave out what was thought or
    strip spaces. The cache keeps what both spellings begin with.
    """

    def __init__(self, model: Decoder, text: Text, how: Sampling, system: str | None = None) -> None:
        self.model, self.text, self.how = model, text, how
        self.messages: list[dict[str, str]] = []
        self.cache: Cache | None = None
        self.read: list[int] = []
        """The tokens in the cache."""
        if system is not None:
            self.messages.append({"role": "system", "content": system})
            asked = {"role": "user", "content": "?"}
            if text.conversation([*self.messages, asked]) == text.conversation([asked]):
                note("the chat template leaves --system out")

    def answer(self, question: str, longest: int, show: bool = True) -> str:
        """What the model says to `question`, in `longest` tokens or fewer; `show`: written to stdout as it comes. Ctrl-C
        ends it early."""
        asked = {"role": "user", "content": question}
        tokens = self.text.conversation([*self.messages, asked])
        within(tokens, self.model.spec.vocab_size, self.text)
        import torch

        how, ends, new = self.how, self.text.ends(), list[int]()
        cache = self._cache(tokens, longest)
        stream = self.model.stream(
            torch.tensor([tokens], device=self.model.device),
            longest,
            eos=ends,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            cache=cache,
        )
        stopped = False
        try:
            follow(stream, new, self.text, show, ends)
            self.read = [*tokens, *new][: cache.length]
        except KeyboardInterrupt:
            if State.stopped != signal.SIGINT:
                raise
            self.cache, stopped = None, True  # a pass was cut short: what it left is not known
        if show:
            say()
        if stopped:
            note("stopped")
        elif len(new) == longest and new[-1] not in ends:
            note(f"cut after {longest} tokens; -n allows more")
        said = self.text.decode([t for t in new if t not in ends])
        if new:  # else nothing was said, and the question is taken back
            self.messages += [asked, {"role": "assistant", "content": said}]
        return said

    def _cache(self, tokens: list[int], longest: int) -> Cache:
        """The cache with what it has read of `tokens`, at least the last of which is to be read."""
        needed = len(tokens) + longest
        if self.cache is None or self.cache.max_len < needed:
            room = ROOM if self.cache is None else 2 * self.cache.max_len
            self.cache, self.read = self.model.cache(1, max(room, needed)), []
        same = next((i for i, (a, b) in enumerate(zip(tokens, self.read, strict=False)) if a != b), None)
        self.cache.keep(min(len(tokens) - 1, len(self.read)) if same is None else same)
        return self.cache
