"""Text <-> token ids, with the tokenizer and chat template that a folder carries: the ids of transformers'
`AutoTokenizer`, for every kind of tokenizer file (zoo.text.tokenizer), and its templates (zoo.text.template).

Unusual here: both run what a repository says, so they run in a process of their own, with limits of memory and time.
That process ends with the `Text` it belongs to.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from zoo.errors import ZooError
from zoo.formats.base import TEMPLATES, carried_files, place_of, read_json
from zoo.text import mistral, tokenizer
from zoo.untrusted.patience import PATIENCE, patience

SECONDS = 30
"""A request may take so long by the clock; by its own CPU time less (zoo.text.worker)."""
LONGEST_ANSWER = 64 << 20
"""Bytes."""
MAX_ID = 1 << 31
MAX_ENDS = 100
"""Tokens that end an answer."""
PLACES = (
    "chat_template.jinja",
    f"{TEMPLATES}/",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
)
"""Where a chat template may be kept, in the order in which they are looked at."""


class Text:
    """The tokenizer of the folder `path`. Raises ZooError if it has none that can be read."""

    def __init__(self, path: Path) -> None:
        self.root = Path(path)
        self._process: subprocess.Popen[bytes] | None = None
        carried_files(self.root)  # refuses those that are links to what lies elsewhere
        tokenizer.file_of(self.root)
        self._about: dict[str, Any] = self._ask("about")
        self.files: tuple[str, ...] = tuple(self._about["files"])
        """Names of the files that the tokenizer was made from."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token and the like, as text."""
        return dict(self._about["special"])

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja2 source of the chat template, or None if no place has one."""
        return cast("str | None", self._ask("template"))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The messages ({"role", "content"}) as the model was trained to see them, ready for its answer."""
        if self.chat_template is None:
            raise ZooError(f"{self.root} has no chat template: give the prompt as it is (--raw)")
        return str(self._ask("chat", messages=[dict(m) for m in messages], source=self.chat_template))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids. `special`: let the tokenizer put its own tokens around (a beginning-of-text token, say)."""
        return list(self._ask("encode", text=text, special=special))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens. It may hold control characters: see zoo.untrusted.printable."""
        return str(self._ask("decode", ids=list(ids)))

    @cached_property
    def no_chat(self) -> str | None:
        """Why there is no chat format; None if there is one: a template, or Mistral's own by its library."""
        if self.chat_template is not None:
            return None
        file = mistral.file_of(self.root)
        if file is not None and mistral.installed():
            return None
        hint = "" if file is None else f"; {mistral.MISSING.format(file.name)}"
        return f"no chat template ({', '.join(PLACES)}){hint}"

    def prompt(self, text: str, raw: bool = False) -> list[int]:
        """Token ids of a prompt: a chat of one user message where there is a chat format, unless `raw`."""
        if raw or self.no_chat is not None:
            return self.encode(text)
        return self.conversation([{"role": "user", "content": text}])

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of the messages ({"role", "content"}), ready for the model's answer. Raises ZooError where there is no
        chat format, or it does not allow them."""
        if self.no_chat is not None:
            raise ZooError(f"{self.root}: {self.no_chat}")
        if self.chat_template is None:
            return list(self._ask("mistral_chat", messages=[dict(m) for m in messages]))
        return self.encode(self.chat(messages), special=False)  # a template writes the special tokens itself

    @cached_property
    def _stops(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        ids: list[int] = []
        notes: list[str] = []
        for name, inner in STOPS:
            held: Any = _json(place_of(self.root, name))
            held = held.get(inner) if inner else held
            eos = held.get("eos_token_id") if isinstance(held, dict) else None
            for e in eos if isinstance(eos, list) else [] if eos is None else [eos]:
                if type(e) is int and 0 <= e < MAX_ID:
                    ids.append(e)
                else:
                    notes.append(f"{name}: eos_token_id {str(e)[:40]!r} is no token's number; ignored")
                if len(ids) + len(notes) > MAX_ENDS:
                    raise ZooError(f"{self.root / name}: eos_token_id lists over {MAX_ENDS} tokens: refused")
        own = self._about["ends"].get("eos_token")
        return tuple(dict.fromkeys([*ids, *([own] if own is not None else [])])), tuple(notes)

    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer: those of generation_config.json, config.json and its text_config, and the
        tokenizer's own; each once, in this order."""
        return self._stops[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found in the files and not followed."""
        return (*self._about["notes"], *self._stops[1])

    # ---- the process

    def close(self) -> None:
        """End the process; a later call starts another."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(__file__).resolve().parents[2])
        quiet = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2", "RUST_BACKTRACE": "0"}
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zoo.text.worker", str(self.root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, **quiet, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        weakref.finalize(self, _end, process)
        return process

    def _ask(self, do: str, **what: Any) -> Any:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
            process.stdin.flush()
            line = _line(process.stdout.fileno())
        except BrokenPipeError:
            line = b""
        except BaseException:  # stopped meanwhile: what comes would answer another question
            self.close()
            raise
        if line.endswith(b"\n"):
            answer = json.loads(line)
            if "error" in answer:
                raise ZooError(answer["error"])
            return answer["is"]
        self.close()
        thing = "chat template" if do in ("chat", "template", "mistral_chat") else "tokenizer"
        why = (
            _LATE.decode()
            if line is _LATE
            else _LONG.decode()
            if line is _LONG
            else _ended(process.returncode)
        )
        raise ZooError(
            f"{self.root}: its {thing} {why}; give "
            + ("the prompt as it is (--raw)" if do in ("chat", "mistral_chat") else "token ids (--ids)")
        )


STOPS = (("generation_config.json", ""), ("config.json", ""), ("config.json", "text_config"))
"""Where eos_token_id is kept: a file, and an object in it."""
_LATE = b"did not answer in time"
_LONG = b"gives an answer without end"


def _line(stream: int) -> bytes:
    """One line from the process; less where it has ended, `_LATE` or `_LONG` where it is to be ended."""
    parts: list[bytes] = []
    size, until = 0, time.monotonic() + SECONDS * patience()
    while True:
        ready, _, _ = select.select([stream], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return _LATE
        part = os.read(stream, 1 << 20)
        parts.append(part)
        size += len(part)
        if not part or part.endswith(b"\n"):
            return b"".join(parts)
        if size > LONGEST_ANSWER:
            return _LONG


def _ended(code: int) -> str:
    if code == -getattr(signal, "SIGPROF", 0):
        return f"takes too long: it was stopped (on a slow machine {PATIENCE}=4 gives it four times as long)"
    return f"ended the process that it ran in ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        if process.poll() is None and process.stdin is not None and process.stdout is not None:
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    with suppress(OSError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            if stream is not None:
                stream.close()


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "it may say where an answer ends") if path.is_file() else {}
