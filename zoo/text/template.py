"""The chat template of a release: where it is kept, and the environment it is written for, which is transformers'.

Unusual here: a template is a program from the repository. It runs in jinja2's sandbox, with nothing but the messages in
reach, and only in a process that may be lost (zoo.text.worker).

Facts: transformers 5.23, `utils/chat_template_utils.py`, `tokenization_utils_base.py`, `processing_utils.py`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zoo.errors import ZooError
from zoo.formats.base import read_json
from zoo.text import PLACES

MAX_TEMPLATE = 4 << 20
"""Bytes of a template; the longest released ones have some 100 kB."""
MAX_ADDED, TIMES = 1 << 14, 8
"""Characters that a template may write beside the messages, and how often each of these: a prompt costs the model more than it
costs the template."""


def find(root: Path) -> str | None:
    """The template for a plain chat, or None if no place has one. Raises ZooError where several have names and none is
    the default, or what is there is no template."""
    files = {"default": root / "chat_template.jinja"} if (root / "chat_template.jinja").is_file() else {}
    files |= {f.name.removesuffix(".jinja"): f for f in sorted((root / PLACES[1]).glob("*.jinja"))}
    if files:
        return str(_one(root, {name: _read(file) for name, file in files.items()}))
    for name in PLACES[2:]:
        file = root / name
        held = read_json(file, "it may hold the chat template") if file.is_file() else {}
        if (found := held.get("chat_template")) in (None, [], {}):
            continue
        if isinstance(found, list):
            if not all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in found):
                raise ZooError(f"{file}: chat_template lists an entry without a name or a template")
            found = {t["name"]: t["template"] for t in found}
        template: Any = _one(root, found) if isinstance(found, dict) else found
        if not isinstance(template, str):
            raise ZooError(f"{file}: chat_template is of type {type(template).__name__}, expected text")
        if len(template) > MAX_TEMPLATE:
            raise ZooError(f"{file}: a chat template of {len(template)} characters: refused")
        return str(template)
    return None


def render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str]) -> str:
    """The messages as the template spells them, ready for the model's answer. Raises whatever the template does, and ZooError where
    it makes far more of them than they are."""
    said = _environment().from_string(template).render(
        messages=[dict(m) for m in messages], tools=None, documents=None, add_generation_prompt=True, **special
    )  # fmt: skip
    # Each message has marks of its own around it.
    if len(said) > (
        most := MAX_ADDED + sum(256 + TIMES * len(str(m.get("content") or "")) for m in messages)
    ):
        raise ZooError(
            f"its chat template makes {len(said)} characters of the messages (limit {most}): refused; give the prompt as it is (--raw)"
        )
    return said


def _one(root: Path, named: Mapping[str, Any]) -> Any:
    if "default" in named:
        return named["default"]
    raise ZooError(
        f"{root} has chat templates named {', '.join(map(str, sorted(named, key=str)))} and none that is the default: "
        "give the prompt as it is (--raw)"
    )


def _read(file: Path) -> str:
    if (size := file.stat().st_size) > MAX_TEMPLATE:
        raise ZooError(f"{file}: a chat template of {size} bytes: refused")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ZooError(f"{file}: a chat template that is not UTF-8 ({error})") from None


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks what the model says, for training. It writes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    @staticmethod
    def _inside(caller: Any) -> str:
        return str(caller())


class _Dict:
    """`dict` without the ways out that a class has."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _Dict()}
    return environment


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own escapes what HTML would misread."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
