"""The process that runs what a repository's tokenizer and template do. Run by zoo.text, never by people.

One request in a line of JSON on stdin, one answer in a line on stdout. A template can loop for ever, a tokenizer's
native library can panic or take all memory: each request has a limit of CPU time, the process one of memory, and whatever
is raised is an answer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from zoo.errors import ZooError
from zoo.untrusted.patience import patience

CPU_SECONDS = 2.0
"""Of a request."""
CPU_MIB, CPU_MOST = 1 / 6, 4.5
"""Of reading a tokenizer: more for each MiB of its file, up to so much. The largest, of 260,000 tokens, takes 2.2: in 44 MB, or without
line breaks, as zoo makes it of a GGUF, in 16."""
CPU_LIBRARY = 8.0
"""Of a chat by mistral-common, which imports much."""
MEMORY = 768 << 20
"""Of addresses; that tokenizer takes 610 MiB."""
RENDERING = 256 << 20
"""More than there was before, to find and render a template."""
ADDED = 256
"""Tokens around a text."""
LONGEST = 300
"""Characters of somebody else's message that are passed on."""


class _Worker:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._loaded: Any = None

    @property
    def loaded(self) -> Any:
        if self._loaded is None:
            from zoo.text import tokenizer

            try:
                self._loaded = tokenizer.load(self.root)
            except (ZooError, KeyboardInterrupt):
                raise
            except (
                BaseException
            ) as error:  # the library raises bare Exception, and panics that are not even that
                raise ZooError(
                    f"{self.root}: its tokenizer can't be read ({_said(error)}); give token ids (--ids)"
                ) from None
        return self._loaded

    def about(self) -> dict[str, Any]:
        return {
            "special": self.loaded.special,
            "files": self.loaded.files,
            "notes": self.loaded.notes,
            "ends": {k: self.loaded.tokenizer.token_to_id(v) for k, v in self.loaded.special.items()},
        }

    def template(self) -> str | None:
        from zoo.text import template

        return template.find(self.root)

    def chat(self, messages: list[dict[str, Any]], source: str) -> str:
        from zoo.text import template

        try:
            return template.render(source, messages, self.loaded.special)
        except ZooError:
            raise
        except BaseException as error:
            raise ZooError(
                f"{self.root}: its chat template fails ({_said(error)}); give the prompt as it is (--raw)"
            ) from None

    def mistral_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        from zoo.text import mistral

        file = mistral.file_of(self.root)
        assert file is not None
        try:
            return mistral.chat(file, messages)
        except ZooError:
            raise
        except BaseException as error:
            raise ZooError(
                f"{file}: mistral-common fails on it ({_said(error)}); give the prompt as it is (--raw)"
            ) from None

    def encode(self, text: str, special: bool) -> list[int]:
        ids = list(self._own("can't split the text", lambda: self.loaded.encode(text, special)))
        if len(ids) > (most := most_tokens(text)) and len(ids) > most_tokens(
            unicodedata.normalize("NFKC", text)
        ):
            raise ZooError(
                f"{self.root}: its tokenizer makes {len(ids)} tokens of {len(text)} characters (limit {most}): refused; give token ids (--ids)"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._own("can't spell the ids", lambda: self.loaded.decode(ids)))

    def _own(self, what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except ZooError:
            raise
        except BaseException as error:
            raise ZooError(f"{self.root}: its tokenizer {what} ({_said(error)})") from None


def most_tokens(text: str) -> int:
    """More than any tokenizer makes of a text, unless a step of it repeats what it was given: a model reads them all. A byte is a token
    at most, and a space that is spelled in bytes three; more stand around it."""
    return ADDED + 3 * len(text.encode("utf-8", "surrogatepass"))


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:LONGEST]}" if text else type(error).__name__


def _limit_memory(do: str) -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        most = MEMORY
        if do in ("chat", "template"):
            with open("/proc/self/statm") as f:
                most = min(most, int(f.read().split()[0]) * resource.getpagesize() + RENDERING)
        resource.setrlimit(resource.RLIMIT_AS, (most, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(do: str, root: Path) -> None:
    """So much CPU time from now on; the process is ended by a signal where it is spent."""
    more = patience()
    seconds = CPU_LIBRARY if do == "mistral_chat" else CPU_SECONDS
    with suppress(AttributeError, OSError, ZooError):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, more * seconds)
        if do == "about":
            from zoo.text import tokenizer

            size = tokenizer.file_of(root).stat().st_size
            signal.setitimer(signal.ITIMER_PROF, more * min(seconds + CPU_MIB * (size >> 20), CPU_MOST))


def serve(root: Path, asked: Iterable[bytes], out: IO[bytes]) -> None:
    """Answer requests about the folder `root`, each within its limits, until there are no more."""
    worker = _Worker(root)
    for line in asked:
        request = json.loads(line)
        do = request.pop("do")
        _limit_memory(do)
        _limit_time(do, root)
        try:
            answer = {"is": getattr(worker, do)(**request)}
        except ZooError as error:
            answer = {"error": str(error)}
        except BaseException as error:
            answer = {"error": f"{root}: the text can't be worked on ({_said(error)})"}
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nothing:  # what libraries print is no answer
        os.dup2(nothing.fileno(), 1)
    serve(Path(sys.argv[1]), sys.stdin.buffer, out)


if __name__ == "__main__":
    main()
