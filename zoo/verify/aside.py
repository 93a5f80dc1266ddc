"""What a config says about running and that keeps upstream from loading weights which are sound: put aside for it, and said.

No field here moves a logit: a `quantization_config` that was left beside plain weights, a token of padding that the
vocabulary has not, and settings of running (`SETTINGS`): both sides are run in the way that the verifier says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zoo.formats import pickle, safetensors
from zoo.formats.base import FLOATS


def _dtype(x: Any) -> bool:
    """Not what weights may be stored in, fp8 say: no model is made in it."""
    return x in ("float64", "float32", "float16", "bfloat16")


def _numbered(x: Any) -> bool:
    return isinstance(x, Mapping) and all(str(k).isdecimal() for k in x)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _ids(x: Any) -> bool:
    return type(x) is int or (isinstance(x, list) and all(type(i) is int for i in x))


SETTINGS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), lambda x: x in ("eager", "sdpa")),
    **dict.fromkeys(("dtype", "torch_dtype"), _dtype),
    **dict.fromkeys(("return_dict", "use_return_dict"), lambda x: x is True),
    "pad_token_id": lambda x: type(x) is int,
    **dict.fromkeys(("bos_token_id", "eos_token_id"), _ids),
    "use_cache": lambda x: isinstance(x, bool),
    "experts_implementation": lambda x: x == "eager",
    **dict.fromkeys(
        (
            "initializer_range",
            "attention_dropout",
            "hidden_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
        ),
        _number,
    ),
    "num_labels": lambda x: type(x) is int,
    "id2label": _numbered,
}
"""Settings of running, and which of their values upstream is told."""


def put_aside(
    raw: dict[str, Any], root: Path, files: tuple[str, ...] | None
) -> tuple[dict[str, Any], list[str]]:
    """A config without such fields, and a sentence on each. `files`: of weights, in the folder `root`; None: not known."""
    notes: list[str] = []
    out = _part(raw, raw, root, files, notes)
    if isinstance(text := raw.get("text_config"), dict):
        out["text_config"] = _part(text, raw | text, root, files, notes)
    return out, list(dict.fromkeys(notes))


def _part(
    part: dict[str, Any],
    whole: Mapping[str, Any],
    root: Path,
    files: tuple[str, ...] | None,
    notes: list[str],
) -> dict[str, Any]:
    out = dict(part)
    q = out.get("quantization_config")
    if isinstance(q, Mapping) and files is not None and all(_plain(root / f) for f in files):
        del out["quantization_config"]
        notes.append(
            f"upstream was not told the config's quantization_config ({q.get('quant_method')}): the weights are plain"
        )
    elif q is not None and not isinstance(q, Mapping) and q:
        del out["quantization_config"]
        notes.append(
            f"upstream was not told the config's quantization_config ({str(q)[:40]}): it is no object of fields"
        )
    elif q is not None and not q:
        del out["quantization_config"]  # empty, and of another type than upstream looks for
    for key in ("use_cache", "tie_word_embeddings"):
        if key in out and out[key] is None:
            del out[key]  # as good as absent, but not to its class
    for key, fine in SETTINGS.items():
        if out.get(key) is not None and not fine(out[key]):
            value = out.pop(key)
            notes.append(
                f"upstream was not told the config's {key} ({str(value)[:40]}): it moves no logit, and keeps it from running here"
            )
    pad, size = out.get("pad_token_id"), whole.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        out["pad_token_id"] = None
        notes.append(
            f"upstream was not told the config's pad_token_id ({pad}): the vocabulary has {size}, and it moves no logit"
        )
    return out


def _plain(file: Path) -> bool:
    """Whether all tensors of a file of weights are floating-point numbers, as plain weights are."""
    if file.suffix == ".safetensors":
        refs = safetensors.parse_header(
            safetensors.read_header(file), file.name, file.stat().st_size, str(file)
        )
    else:
        refs = pickle.read_pickle(file, file.name)
    return all(t.dtype in FLOATS for t in refs)
