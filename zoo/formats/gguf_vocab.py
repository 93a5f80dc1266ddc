"""The fields `tokenizer.*` of a GGUF, from a checkpoint's tokenizer files: the inverse of `gguf_tokenizer.py`.

llama.cpp has its tokenizers in code and knows two kinds of BPE: "gpt2" (byte-level: tokens and merges, and the name of how text
is split before merging) and "llama" (SentencePiece: pieces with scores). A tokenizer.json that does something else is refused
by what that is: a GGUF with another tokenizer is another model.

Source: llama_vocab::impl::load of llama.cpp; TextModel.get_vocab_base and SpecialVocab of its converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoo.errors import ZooError
from zoo.formats import gguf_tokenizer
from zoo.formats.base import TEMPLATES
from zoo.formats.gguf_tokenizer import BYTE, CONTROL, SPACE, USER_DEFINED
from zoo.untrusted.bounded import parse_json

NORMAL, UNKNOWN, UNUSED = 1, 2, 5  # tokenizer.ggml.token_type
_SCORE = {CONTROL: -1000.0, USER_DEFINED: -1000.0, UNUSED: -10000.0}  # as the converter has them
MAX_VOCAB = 1 << 19
"""Rows of an embedding, each of which is a token in the file; the largest vocabularies have 262,144."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def fields(files: Mapping[str, bytes], vocab_size: int, who: str) -> dict[str, Any]:
    """Whole keys and values. `files`: the checkpoint's, by name; `vocab_size`: rows of the embedding.

    Without a tokenizer's files the GGUF says that it has none. Raises ZooError for a tokenizer that llama.cpp has no form of.
    """
    if "tokenizer.json" not in files:
        if there := [n for n in files if n.startswith(("tokenizer.model", "tekken", "vocab.", "merges."))]:
            raise ZooError(
                f"{who}: has {there[0]} but no tokenizer.json, of which a GGUF's tokenizer is made; save one with "
                "transformers' AutoTokenizer"
            )
        return {"tokenizer.ggml.model": "none"}
    if vocab_size > MAX_VOCAB:
        raise ZooError(
            f"{who}: an embedding of {vocab_size} rows (limit {MAX_VOCAB}), each a token of a GGUF: no model has as many"
        )
    whole, config = (_json(files, n, who) for n in ("tokenizer.json", "tokenizer_config.json"))
    where = f"{who}: tokenizer.json"
    try:
        out = _fields(whole, config, vocab_size, where)
        out |= _special(whole, config, files, out["tokens"], who)
        templates = _templates(config, files, who)
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        IndexError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        raise ZooError(
            f"{where} or a file beside it: not as the package tokenizers writes it ({e!r:.200})"
        ) from e
    return {f"tokenizer.ggml.{k}": v for k, v in out.items()} | templates


def unsaid(files: Mapping[str, bytes], who: str) -> Iterator[str]:
    """A sentence on each thing that a tokenizer does, or that a GGUF should have, and no field says."""
    if "tokenizer.json" not in files:
        yield "there is no tokenizer.json: the GGUF has no tokenizer, and llama.cpp takes token ids only"
        return
    whole, config = (_json(files, n, who) for n in ("tokenizer.json", "tokenizer_config.json"))
    if config.get("add_bos_token") is True and not _around(whole)[0]:
        yield (
            "tokenizer_config.json has add_bos_token, but tokenizer.json puts nothing before a text: transformers 5 follows the second, and "
            "so does the GGUF; earlier versions, and llama.cpp's converter, begin a text with the bos token. A chat template says for itself"
        )
    added = whole.get("added_tokens") or ()
    for key, what in (
        ("lstrip", "take the spaces before them along"),
        ("rstrip", "take the spaces behind them along"),
        ("single_word", "are none inside a word"),
    ):
        names = [str(t.get("content")) for t in added if t.get(key) is True]
        if names:
            yield (
                f"{len(names)} added tokens {what} ({key}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}), which llama.cpp does "
                "where it knows the model by its name (Phi-3), and else not: a text that has them so has other ids there"
            )


def _json(files: Mapping[str, bytes], name: str, who: str) -> dict[str, Any]:
    try:
        found = parse_json(files.get(name, b"{}"))
    except ValueError as e:
        raise ZooError(f"{who}: {name}: not JSON ({e})") from None
    if not isinstance(found, dict):
        raise ZooError(f"{who}: {name}: expected an object")
    return found


def _fields(
    whole: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int, where: str
) -> dict[str, Any]:
    model = whole["model"]
    if model.get("type", "BPE") != "BPE":
        raise ZooError(
            f"{where}: a model of type {model['type']}; GGUF is written for BPE (byte-level or SentencePiece)"
        )
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(whole, config, vocab_size, sentencepiece, where)
    if sentencepiece:
        # What a user defines is looked for in the text as it is, before its spaces are spelled otherwise.
        said = [t.replace(SPACE, " ") if kind == USER_DEFINED else t for t, kind in zip(tokens, types)]
        return {
            "model": "llama", "pre": "default", "tokens": said, "scores": _scores(tokens, types, merges), "token_type": types,
            "add_space_prefix": _adds_space(whole, where),
        }  # fmt: skip
    _refuse_normaliser(whole.get("normalizer"), where)
    # Inside a merge a space would end the first piece: llama.cpp's converter spells it as the byte-level alphabet does.
    spelled = [" ".join(piece.replace(" ", "\u0120") for piece in m) for m in merges]
    pre = split_name(whole, bool(model.get("ignore_merges")), where)
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": spelled}


def _tokens(
    whole: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int, byte_fallback: bool, where: str
) -> tuple[list[str], list[int]]:
    """Tokens by number, and their types. Rows of the embedding without a token are unused ones. Added tokens are those of
    tokenizer.json, and what tokenizer_config.json lists besides."""
    model = whole["model"]
    by_number = {n: token for token, n in model["vocab"].items()}
    types = {n: UNUSED if token == f"[PAD{n}]" else NORMAL for n, token in by_number.items()}
    if byte_fallback:
        types |= {n: BYTE for n, token in by_number.items() if _BYTE.fullmatch(token)}
        if (unknown := model.get("unk_token")) in model["vocab"]:
            types[model["vocab"][unknown]] = UNKNOWN
    listed = config.get("added_tokens_decoder") or {}
    besides = [{**t, "id": int(n)} for n, t in listed.items() if int(n) not in by_number]
    for added in (*besides, *(whole.get("added_tokens") or ())):
        by_number[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if odd := next(
        ((n, t) for n, t in by_number.items() if type(n) is not int or n < 0 or not isinstance(t, str)), None
    ):
        raise ValueError(f"a token {odd[1]!r:.40} of number {odd[0]!r:.40}")
    if max(by_number, default=0) >= vocab_size:
        n = max(by_number)
        raise ZooError(
            f"{where}: token {by_number[n]!r} has the number {n}; the embedding has {vocab_size} rows"
        )
    tokens = [by_number.get(n, f"[PAD{n}]") for n in range(vocab_size)]
    return tokens, [types.get(n, UNUSED) for n in range(vocab_size)]


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece merges the pair whose result has the highest score. Pieces are numbered in the order in which they were
    learned, and have -0, -1, ... as scores; where the merges are in another order, it is theirs that counts."""
    number = {t: n for n, t in enumerate(tokens)}
    made = [number["".join(pair)] for pair in merges]
    if made == sorted(made):
        order = [n for n, kind in enumerate(types) if kind == NORMAL]
    else:
        order = list(dict.fromkeys(made))
    out = [_SCORE.get(kind, 0.0) for kind in types]
    for rank, n in enumerate(order):
        out[n] = -float(rank)
    return out


# ---------------------------------------------------------------------------------------------------
# How text is split, and what is put before and after it


def _steps(step: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """A step, or those of a sequence."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [s for part in step[inside] for s in _steps(part, inside)]
    return [step]


_ESCAPED = {r"\r": "\r", r"\n": "\n", r"\t": "\t"}


def _meant(regex: str) -> str:
    """A regex in one spelling: ends of lines stand in it as themselves (so in DeepSeek V3's) or escaped."""
    return re.sub(r"\\.", lambda m: _ESCAPED.get(m[0], m[0]), regex)


def _signature(steps: Sequence[Mapping[str, Any]], where: str) -> tuple[Any, ...]:
    """What splits text: regexes, and whether GPT-2's own follows."""
    out: list[Any] = []
    for step in steps:
        kind = step["type"]
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            out.append(_meant(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern["String"]))
        elif kind == "Digits":
            out.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            out += ["gpt-2"] if step.get("use_regex", True) else []
        else:
            raise ZooError(f"{where}: splits text by {str(dict(step))[:120]}, which llama.cpp has no form of")
    return tuple(out)


def split_name(whole: Mapping[str, Any], ignore_merges: bool, where: str) -> str:
    """llama.cpp's name for how this tokenizer splits text."""
    found = _signature(_steps(whole.get("pre_tokenizer"), "pretokenizers"), where)
    named = [name for name, steps in gguf_tokenizer.splits() if _signature(steps, where) == found]
    exact = [n for n in named if gguf_tokenizer.ignores_merges(n) == ignore_merges]
    if not named:
        raise ZooError(
            f"{where}: splits text by {str(found)[:300]}: llama.cpp's name for that (tokenizer.ggml.pre) is not known to zoo"
        )
    if not exact:
        raise ZooError(
            f"{where}: ignore_merges is {ignore_merges}; where llama.cpp splits text this way ({named[0]}) it is {not ignore_merges}"
        )
    return exact[0]


def _refuse_normaliser(step: Mapping[str, Any] | None, where: str) -> None:
    for s in _steps(step, "normalizers"):
        if s["type"] != "NFC":  # text is almost always in this form; llama.cpp takes it as it comes
            raise ZooError(
                f"{where}: normalises text by {str(dict(s))[:120]}, which llama.cpp has no form of"
            )


def _adds_space(whole: Mapping[str, Any], where: str) -> bool:
    """Whether a text begins with a space that is not there. Raises ZooError for what SentencePiece's BPE does not do."""
    adds = False
    for s in _steps(whole.get("normalizer"), "normalizers"):
        if s == {"type": "Prepend", "prepend": SPACE}:
            adds = True
        elif not (s["type"] == "Replace" and s["pattern"] == {"String": " "} and s["content"] == SPACE):
            raise ZooError(
                f"{where}: normalises text by {str(dict(s))[:120]}, which llama.cpp has no form of"
            )
    for s in _steps(whole.get("pre_tokenizer"), "pretokenizers"):
        if s["type"] == "Metaspace" and s.get("replacement", SPACE) == SPACE:
            scheme = s.get("prepend_scheme", "always" if s.get("add_prefix_space", True) else "never")
            adds = adds or scheme != "never"
        elif not (s["type"] == "Split" and s["pattern"] == {"String": " "}):  # no space is left to split by
            raise ZooError(f"{where}: splits text by {str(dict(s))[:120]}, which llama.cpp has no form of")
    return adds


def _around(whole: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Numbers of the tokens that are put before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for step in _steps(whole.get("post_processor"), "processors"):
        if step["type"] != "TemplateProcessing":
            continue
        side = before
        for part in step["single"]:
            if "Sequence" in part:
                side = after
            else:
                side += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return before, after


def _special(
    whole: Mapping[str, Any],
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    tokens: list[str],
    who: str,
) -> dict[str, Any]:
    """Numbers of the tokens with a role, and whether they are put around a text."""
    number = {token: n for n, token in reversed(list(enumerate(tokens)))}
    mapped, generation = (_json(files, n, who) for n in ("special_tokens_map.json", "generation_config.json"))
    out: dict[str, Any] = {}
    for role, key in _SPECIAL.items():
        token = config.get(key) or mapped.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token in number:
            out[f"{role}_token_id"] = number[token]
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if "eos_token_id" not in out and ends:
        out["eos_token_id"] = ends[0]
    if "bos_token_id" not in out and type(generation.get("bos_token_id")) is int:
        out["bos_token_id"] = generation["bos_token_id"]
    if odd := [n for n in ends if type(n) is not int or not 0 <= n < 1 << 32]:
        raise ValueError(f"a text ends at {odd[0]!r:.40}, which is no token's number")
    others = [n for n in ends if n != out.get("eos_token_id")]
    for role, n in zip(("eot", "eom"), others):  # llama.cpp stops at each of these
        out[f"{role}_token_id"] = n
    if len(others) > 2:
        raise ZooError(
            f"{who}: generation_config.json ends a text at {len(others) + 1} tokens; a GGUF has fields for three"
        )
    before, after = _around(whole)
    for side, role, found in (("before", "bos", before), ("after", "eos", after)):
        if found and found != [out.get(f"{role}_token_id")]:
            raise ZooError(
                f"{who}: tokenizer.json puts {[tokens[n] for n in found]} {side} a text; a GGUF can say the {role} token only"
            )
    return out | {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _templates(config: Mapping[str, Any], files: Mapping[str, bytes], who: str) -> dict[str, Any]:
    """The chat template, and further ones by name: those of the first place that has any (`zoo.text.PLACES`)."""
    named: dict[str, Any] = {}
    for file, data in files.items():
        if file == "chat_template.jinja" or file.startswith(f"{TEMPLATES}/"):
            name = file.rpartition("/")[2].removesuffix(".jinja")
            named["default" if "/" not in file else name] = data.decode("utf-8", "replace")
    for held in (_json(files, "chat_template.json", who), config):
        if not named and (found := held.get("chat_template")):
            named = {"default": found} if isinstance(found, str) else dict(_named(found))
    out: dict[str, Any] = {}
    for name, template in named.items():
        if not isinstance(template, str):
            raise ZooError(f"{who}: chat template {name!r} is no text")
        out["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    if others := [n for n in named if n != "default"]:
        out["tokenizer.chat_templates"] = others
    return out


def _named(templates: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(templates, dict):
        yield from templates.items()
    else:
        yield from ((t["name"], t["template"]) for t in templates)
