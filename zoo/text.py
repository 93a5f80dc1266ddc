"""Text <-> token ids, with the tokenizer and chat template that a canonical folder carries.

Unusual here: the template is a program from the repository. It runs in jinja2's sandbox, with nothing but the
messages in reach.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zoo.errors import ZooError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Text:
    """The tokenizer of the folder `path`. Raises ZooError if it has none that can be read."""

    def __init__(self, path: Path) -> None:
        self.root = path
        self.config = _json(path / "tokenizer_config.json") or {}
        self._tokenizer = _tokenizer(path)

    @property
    def chat_template(self) -> str | None:
        """The jinja2 source of the chat template: chat_template.jinja, or the field of tokenizer_config.json."""
        if (file := self.root / "chat_template.jinja").is_file():
            return file.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return template if isinstance(template, str) else None

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The messages ({"role", "content"}) as the model was trained to see them, ready for its answer."""
        template = self.chat_template
        if template is None:
            raise ZooError(f"{self.root} has no chat template: give the prompt as it is (--raw)")
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
        environment.globals |= {"raise_exception": refuse, "strftime_now": _today}
        try:
            return environment.from_string(template).render(
                messages=list(messages), add_generation_prompt=True, tools=None, **self.special_tokens
            )
        except jinja2.TemplateError as error:
            raise ZooError(
                f"{self.root}: its chat template fails ({error}); give the prompt as it is (--raw)"
            ) from None

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token and the like, as text."""
        found = {**(_json(self.root / "special_tokens_map.json") or {}), **self.config}
        named = {
            k: v["content"] if isinstance(v, dict) else v for k, v in found.items() if k.endswith("_token")
        }
        return {k: v for k, v in named.items() if isinstance(v, str)}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids. `special`: let the tokenizer put its own tokens around (a beginning-of-text token, say)."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def prompt(self, text: str, raw: bool = False) -> list[int]:
        """Token ids of a prompt: a chat of one user message where there is a template, unless `raw`."""
        if raw or self.chat_template is None:
            return self.encode(text)
        chat = self.chat([{"role": "user", "content": text}])
        return self.encode(chat, special=False)  # a template writes the special tokens itself

    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer: those of generation_config.json and config.json, and the tokenizer's own."""
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            eos: Any = (_json(self.root / name) or {}).get("eos_token_id")
            ids += [e for e in (eos if isinstance(eos, list) else [eos]) if isinstance(e, int)]
        own = self._tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return tuple(dict.fromkeys([*ids, *([own] if own is not None else [])]))


def _tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ZooError(
            f"{path} has no tokenizer.json, so text can't be turned into tokens: give token ids (--ids)"
        )
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ZooError(f"{file}: the tokenizers library can't read it ({error})") from None


def _today(form: str) -> str:
    import datetime

    return datetime.date.today().strftime(form)


def _json(path: Path) -> dict[str, Any] | None:
    from zoo.formats.base import read_json

    return read_json(path, "it belongs to the tokenizer") if path.is_file() else None
