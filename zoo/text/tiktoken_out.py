"""Meta's `tokenizer.model` of Llama 3 and 4, a token in base64 and its rank in every line, from a tokenizer.json.

Meta's code has the way text is split, and the special tokens, in itself: they follow the ranks. So the file says all of a tokenizer.json
if that splits text in one of the two ways, its tokens' numbers are their ranks, and its merges are all that the ranks allow, in their
order. Source: llama_models/llama3/tokenizer.py, llama4/tokenizer.py, tokenizer_utils.py.
"""

from __future__ import annotations

import base64

from zoo.errors import ZooError
from zoo.formats.gguf_vocab import split_name
from zoo.text.tokenizer import byte_pairs, byte_spelling
from zoo.untrusted.bounded import parse_json

_SPLITS = ("llama-bpe", "llama3", "llama-v3", "gpt-4o", "llama4")  # llama.cpp's names for Meta's two


def ranks_file(tokenizer_json: bytes) -> bytes:
    """The file. Raises ZooError where it would be another tokenizer, by what differs."""
    try:
        whole = parse_json(tokenizer_json)
        model = whole["model"]
        split = split_name(whole, bool(model.get("ignore_merges")), "tokenizer.json")
        added = {t["id"] for t in whole.get("added_tokens") or ()}
        number = {n: token for token, n in model["vocab"].items() if n not in added}
        merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        byte = {chr(c): b for b, c in byte_spelling().items()}
        tokens = [bytes(byte[c] for c in number[n]) for n in range(len(number))]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ZooError(
            f"tokenizer.json: its tokens are not numbered from 0, in GPT-2's spelling of bytes ({e!r:.100})"
        ) from e
    if split not in _SPLITS:
        raise ZooError(
            f"tokenizer.json: splits text as {split} does; Meta's code as {_SPLITS[0]} or {_SPLITS[-1]}"
        )
    if byte_pairs({t: n for n, t in enumerate(tokens)})[1] != merges:
        raise ZooError("tokenizer.json: its merges are not those that its tokens' numbers, as ranks, allow")
    return b"".join(b"%s %d\n" % (base64.b64encode(t), n) for n, t in enumerate(tokens))
