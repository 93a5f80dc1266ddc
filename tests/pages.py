"""The documentation's pages, run: their blocks in order, in a folder of a small model, against a Hub on loopback.

A block of `sh` or `python` without a title is run. One with a title says by it what it needs (`sh title="With llama.cpp"`): it is
only parsed. A block of `text` after another is what that prints: lines in order, `...` for any others or the rest of one, any number
where a number stands.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import verified
from click.testing import CliRunner

import zoo
from zoo.cli import cli

ROOT = Path(zoo.__file__).parents[1]
DOCS = ROOT / "docs"
SHELL = ("sh", "bash")


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    code: str

    @property
    def runs(self) -> bool:
        return self.language in (*SHELL, "python") and not self.title


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'^ *```(\w*)(?: title="([^"]*)")?[^\n]*\n(.*?)^ *```$', text, re.S | re.M)
    return [Block(*one) for one in found]


def lines(code: str) -> list[str]:
    """The shell's lines, those that end in a backslash joined, without comments."""
    whole = code.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in whole) if line]


def command(line: str) -> list[str] | None:
    """The arguments of the line's `zoo`, or of torchrun's and srun's `-m zoo`; None where it runs none."""
    said = re.search(
        r"(?:^|[|(] *|^\S+=\S+ +|^srun (?:-\S+ (?:\d+ )?)*)(?:zoo|torchrun .*-m zoo) (.*)$", line
    )
    return (shlex.split(said[1].partition("|")[0].partition(" > ")[0]) or None) if said else None


def parse(args: list[str]) -> None:
    """Raises click.UsageError unless there are such a command, options, values of theirs, and as many arguments."""
    group: click.Group = cli
    while True:
        found = group.get_command(click.Context(group), args[0])
        if found is None:
            raise click.UsageError(f"no such command: zoo {args[0]}")
        args = args[1:]
        if not isinstance(found, click.Group):
            break
        group = found
    context = click.Context(found)
    given, rest, _ = found.make_parser(context).parse_args(list(args))
    if rest:
        raise click.UsageError(f"zoo {found.name}: too many arguments: {rest}")
    for parameter in found.params:
        value = given.get(parameter.name or "")
        if parameter.required and not (value and isinstance(value, str | tuple)):
            raise click.UsageError(f"zoo {found.name}: {parameter.name} is missing")
        if isinstance(parameter.type, click.Choice | click.types.IntParamType) and isinstance(value, str):
            parameter.type.convert(value, parameter, context)


def shown(expected: str) -> re.Pattern[str]:
    """What a `text` block stands for."""
    out = ""
    for line in expected.splitlines():
        if line.strip() == "...":
            out += r"(?:.*\n)*?"
            continue
        words = []
        for word in line.split():
            pieces = re.split(r"(\.\.\.|(?<![A-Za-z_\d-])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)", word)
            words.append(
                "".join(
                    (r".*" if piece == "..." else r"[-+\d,.e]+") if n % 2 else re.escape(piece)
                    for n, piece in enumerate(pieces)
                )
            )
        out += r"\s*" + r"\s+".join(words) + r"\s*\n" if words else r"\s*"
    return re.compile(out)


def said(printed: str, expected: str) -> str:
    """What is wrong with `printed`; nothing where it is as the page says."""
    text = "".join(f"{line.rstrip()}\n" for line in printed.splitlines() if line.strip())
    wanted = "".join(f"{line}\n" for line in expected.splitlines() if line.strip())
    return "" if shown(wanted).fullmatch(text) else f"--- the page\n{wanted}--- printed\n{text}"


def run(page: Path, names: dict[str, Any], first: int | None = None) -> None:
    """The page from its first block to its last (or so many of them), in the working folder; `names`: what its Python knows."""
    printed, ran = "", 0
    for block in blocks(page)[:first]:
        if block.language == "text" and printed:
            assert not (wrong := said(printed, block.code)), wrong
            printed = ""
        if not block.runs:
            continue
        printed, ran = "", ran + 1
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.code, str(page), "exec"), names)
            printed = out.getvalue()
            continue
        for line in lines(block.code):
            args = command(line)
            if line.startswith("pip install "):
                continue  # of what the tests have
            assert args is not None, f"{line}: not of zoo; what it needs belongs in a title"
            done = CliRunner().invoke(cli, args)
            assert done.exit_code == 0, (line, done.output, done.exception)
            printed += done.stdout
    assert ran, f"{page}: nothing on it was run"


# ------------------------------------------------------------------ what they find there


@functools.cache
def release() -> Path:
    """A small Llama as SmolLM2 is one, with a tokenizer of bytes and a chat template: what the pages' `smollm2-135m` is here."""
    import json

    import tiny
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from zoo.testing import BASE, Variant, build, rope

    config = BASE | {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 3,
        "vocab_size": 288, "rope_parameters": rope(977.0), "tie_word_embeddings": True,
    }  # fmt: skip
    dst = verified.ROOT / "smollm2"
    build.make(tiny.CASES["llama"], Variant("pages", "LlamaForCausalLM", config, "a page's"), dst)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "etaoin" for b in "srhld"]
    tokens = ["<bos>", "<eos>", *letters, *(a + b for a, b in merges)]
    speaks = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    speaks.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    speaks.decoder = decoders.ByteLevel()
    speaks.add_special_tokens(["<bos>", "<eos>"])
    speaks.save(str(dst / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }  # fmt: skip
    (dst / "tokenizer_config.json").write_text(json.dumps(about))
    (dst / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A small model\n")
    return dst
