"""The tokenizer files of a GGUF: tokenizer.json and tokenizer_config.json from its `tokenizer.*` fields.

Two kinds: "gpt2" (byte-level BPE with merges; how text is split before merging is named by
`tokenizer.ggml.pre`) and "llama" (SentencePiece BPE: pieces with scores, from which the merges follow).
What is not known is said in a note, and the conversion goes on without a tokenizer: the weights do not
depend on it.

The splits are facts about the tokenizers, as published in their tokenizer.json; llama.cpp names them in
`llama_vocab::impl::load`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.formats.base import encoded

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # tokenizer.ggml.token_type
SPACE = "\u2581"
LONGEST_PIECE = 256
"""Of SentencePiece, in characters: the time to find a piece's merges grows with its square. It learns 16 by default."""
MAX_CUTS, MAX_MERGES = 1 << 22, 1 << 20
"""Places at which pieces are cut, and the pairs of pieces that this finds. Gemma's 262,144 pieces have less than 2.7 million characters,
and some 0.6 million pairs."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
QWEN35_SPLIT = QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT2 = ({"type": "ByteLevel", "use_regex": True},)
_DIGITS_APART = ({"type": "Digits", "individual_digits": True}, *_GPT2)
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")
# Letters with a case, and what ends a phrase, as DeepSeek LLM's tokenizer.json lists them.
_CASED = (
    r"\s?"
    "[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d"
    "\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_LLM = (r"[\r\n]", _CASED, _PUNCTUATION, r"\s+$", _IDEOGRAPHS, r"\p{N}")
_THOUSANDS = r"\d{1,3}(?=(?:\d{3})*\b)"

# How text is split -> its names as tokenizer.ggml.pre: regexes one after the other, or ready-made steps.
_SPLITS: tuple[tuple[tuple[Any, ...], tuple[str, ...]], ...] = (
    (_GPT2, ("gpt-2", "phi-2", "olmo", "mpt", "gigachat", "mellum", "a.x-4.0", "trillion")),
    (_DIGITS_APART, ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")),
    (
        (_LLAMA3,),
        ("llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "falcon-h1", "midm-2.0", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"),
    ),
    ((QWEN2_SPLIT,), ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "kormo")),
    ((QWEN35_SPLIT,), ("qwen35",)),
    ((_O200K,), ("gpt-4o", "llama4")),
    ((_THOUSANDS, _O200K), ("tiny_aya",)),
    ((_TEKKEN,), ("tekken",)),
    (_DEEPSEEK3, ("deepseek-v3",)),
    (_DEEPSEEK_LLM, ("deepseek-llm",)),
    (_DEEPSEEK_CODER, ("deepseek-coder",)),
)  # fmt: skip
_PRE = {name: split for split, names in _SPLITS for name in names}
# Text is normalised first where the released tokenizer.json does it.
_NFC = ("qwen2", "qwen35", "command-r")
# Merges are skipped for a word that is a token itself (tiktoken's rule).
_IGNORE_MERGES = (
    "llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "falcon-h1", "midm-2.0", "glm4", "tekken", "gpt-4o", "llama4",
)  # fmt: skip
# These vocabularies begin every text with `bos` even where a file does not say so.
_BOS_BY_DEFAULT = (
    "llama-bpe", "llama3", "llama-v3", "pixtral", "falcon3", "falcon-h1", "midm-2.0", "tekken", "deepseek-v3",
)  # fmt: skip


def splits() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """llama.cpp's names for ways to split text, with the steps of each as a tokenizer.json has them."""
    for name in _PRE:
        yield name, _steps(name)


def ignores_merges(pre: str) -> bool:
    """Whether a word that is a token itself stays whole."""
    return pre in _IGNORE_MERGES


def files(metadata: Mapping[str, Any], where: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The tokenizer's files by name, and notes on what could not be made."""
    fields = {
        k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")
    }
    tokens = fields.get("tokens")
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        number = fields.get(f"{name}_token_id")
        if number is not None and (type(number) is not int or number < 0):
            raise ZooError(f"{where}: {name}_token_id is {str(number)[:40]!r}; expected a token's number")
        if number is not None and isinstance(tokens, list) and number >= len(tokens):
            raise ZooError(f"{where}: {name}_token_id is {number}, the vocabulary has {len(tokens)} tokens")
    if tokens is None:
        return {}, ("the file has no tokenizer; none is written",)
    try:
        if (doubt := _doubt(fields)) is None:
            model = _byte_level(fields) if fields["model"] == "gpt2" else _sentencepiece(fields)
            config = _config(fields, metadata.get("tokenizer.chat_template"))
            return {"tokenizer.json": _json(model), "tokenizer_config.json": _json(config, indent=2)}, ()
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as e:
        doubt = f"the tokenizer's fields make none ({type(e).__name__}: {e})"
    return {}, (f"{doubt}; no tokenizer.json is written",)


def _doubt(fields: Mapping[str, Any]) -> str | None:
    """Why no tokenizer.json can be made that does what the released one did, or None."""
    tokens, kind, pre = fields["tokens"], fields.get("model"), fields.get("pre", "default")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        return "the tokenizer's tokens are not a list of texts"
    if kind not in ("gpt2", "llama"):
        return f"tokenizer of kind {kind!r} is not known"
    if kind == "gpt2" and pre == "default":
        return "the file does not say how text is split before merging (tokenizer.ggml.pre)"
    if kind == "gpt2" and pre not in _PRE:
        return f"tokenizer of split {pre!r} is not known"
    if fields.get("token_type") and len(fields["token_type"]) != len(tokens):
        return f"the tokenizer has {len(tokens)} tokens and {len(fields['token_type'])} types of tokens"
    if fields.get("scores") and len(fields["scores"]) != len(tokens):
        return f"the tokenizer has {len(tokens)} tokens and {len(fields['scores'])} scores"
    spelled = _spelled(tokens) if kind == "llama" else tokens
    index = {token: n for n, token in enumerate(spelled)}
    if len(index) < len(tokens):
        n = next(n for n, token in enumerate(spelled) if index[token] != n)
        return f"the tokenizer's tokens {n} and {index[spelled[n]]} are both {tokens[n]!r}"
    if kind == "llama":
        longest = max(map(len, tokens), default=0)
        if longest <= LONGEST_PIECE and (cuts := sum(map(len, tokens))) > MAX_CUTS:
            return f"the tokenizer's tokens have {cuts} characters"
        return f"the tokenizer has a token of {longest} characters" if longest > LONGEST_PIECE else None
    if not fields.get("merges") and max(map(len, tokens), default=0) > 1:
        return "the tokenizer has tokens of several characters, and no merges that make them"
    for merge in fields["merges"]:
        left, right = merge.split(" ", 1)
        if not (left in index and right in index and left + right in index):
            return f"the tokenizer merges {merge!r}, which are not all tokens"
    return None


def _json(data: Mapping[str, Any], indent: int | None = None) -> bytes:
    return encoded(data, indent=indent) + b"\n"


def _config(fields: Mapping[str, Any], chat_template: str | None) -> dict[str, Any]:
    tokens = fields["tokens"]
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    out: dict[str, Any] = {
        key: tokens[fields[f"{name}_token_id"]] for key, name in named.items() if f"{name}_token_id" in fields
    }
    out |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(chat_template, str):
        out["chat_template"] = chat_template
    return out


def _adds_bos(fields: Mapping[str, Any]) -> bool:
    default = fields["model"] == "llama" or fields.get("pre") in _BOS_BY_DEFAULT
    return bool(fields.get("add_bos_token", default)) and "bos_token_id" in fields


def _frame(fields: Mapping[str, Any], model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    tokens, kinds = fields["tokens"], fields.get("token_type") or []
    added = [
        {
            "id": n, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == CONTROL,
        }
        for n, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    before = (
        [{"SpecialToken": {"id": tokens[fields["bos_token_id"]], "type_id": 0}}] if _adds_bos(fields) else []
    )
    bos = {t["SpecialToken"]["id"]: fields["bos_token_id"] for t in before}
    template = {
        "type": "TemplateProcessing",
        "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*before, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [n], "tokens": [t]} for t, n in bos.items()},
    }
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": None, "post_processor": template if before else None, "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **model,
        },
    } | steps  # fmt: skip


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _steps(pre: str) -> list[dict[str, Any]]:
    split = _PRE[pre]
    if not isinstance(split[0], str):
        return [{**_BYTES, **s} if s["type"] == "ByteLevel" else dict(s) for s in split]
    return [
        *({"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in split),
        dict(_BYTES),
    ]


def _byte_level(fields: Mapping[str, Any]) -> dict[str, Any]:
    pre = fields["pre"]
    return _frame(
        fields,
        {
            "vocab": {token: n for n, token in enumerate(fields["tokens"])},
            "merges": [m.split(" ", 1) for m in fields.get("merges", ())],
            "ignore_merges": pre in _IGNORE_MERGES,
        },
        normalizer={"type": "NFC"} if pre in _NFC else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": _steps(pre)},
        decoder={**_BYTES, "use_regex": True},
    )


def _spelled(tokens: list[str]) -> list[str]:
    """Runs of spaces are stored as spaces by some writers; inside the model a space is always U+2581."""
    return [t.replace(" ", SPACE) if t and not t.strip(" ") else t for t in tokens]


def _sentencepiece(fields: Mapping[str, Any]) -> dict[str, Any]:
    spelled = _spelled(fields["tokens"])
    vocab = {token: n for n, token in enumerate(spelled)}
    normal: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decode: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if fields.get("add_space_prefix", True):
        normal.insert(0, {"type": "Prepend", "prepend": SPACE})
        decode.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = fields.get("unknown_token_id")
    return _frame(
        {**fields, "tokens": spelled},
        {
            "vocab": vocab,
            "merges": _merges(spelled, fields),
            "unk_token": spelled[unknown] if unknown is not None else None,
            "fuse_unk": True,
            "byte_fallback": True,
        },
        normalizer={"type": "Sequence", "normalizers": normal},
        decoder={"type": "Sequence", "decoders": decode},
    )


def _merges(tokens: list[str], fields: Mapping[str, Any]) -> list[list[str]]:
    """Pairs of pieces that make a piece, best first: by the scores, as SentencePiece and llama.cpp merge, then in the order of the
    vocabulary, in which pieces were learned. The two differ: Llama 2's runs of spaces come first and are merged last. Some writers
    give all pieces one score. Added tokens are found in the text before anything is merged, and no merge makes one."""
    kinds = fields.get("token_type") or [1] * len(tokens)
    scores = fields.get("scores") or [0.0] * len(tokens)
    index = {t: n for n, t in enumerate(tokens) if kinds[n] not in (CONTROL, USER_DEFINED, BYTE)}
    pairs = []
    for token, n in index.items():
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in index and (right := token[cut:]) in index:
                pairs.append((-scores[n], n, index[left], index[right], left, right))
        if len(pairs) > MAX_MERGES:
            raise ValueError(f"more than {MAX_MERGES} pairs of tokens make a token")
    pairs.sort(key=lambda p: p[:4])
    return [[left, right] for *_, left, right in pairs]
