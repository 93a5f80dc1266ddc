"""Parts of names that trainers add and that carry nothing: a compiled or distributed module's wrapper is an attribute
of it, and a checkpoint that was saved without unwrapping has it in every name below. And names that are a trainer's own throughout.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace

from zoo.errors import ZooError
from zoo.formats.base import Checkpoint

ANYWHERE = (
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FSDP
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_forward_module",  # Lightning's strategies
)
OUTERMOST = "module"  # DDP and DeepSpeed's engine; inside a model it may be a name like any other

TRAINERS = (
    (("sa_norm",), r"(^|\.)layers\.\d+\.sa_norm\.scale$", "torchtune's", "its FullModelHFCheckpointer writes those of Hugging Face"),
    (("norm_1",), r"(^|\.)transformer\.h\.\d+\.norm_1\.weight$", "LitGPT's", "`litgpt convert_from_litgpt` gives them those of Hugging Face"),
    (("pp_block",), r"(^|\.)pp_block\.", "nanotron's", "its convert_nanotron_to_hf.py gives them those of Hugging Face"),
    (("linear_qkv", "word_embeddings"), r"(^|\.)(self_attention\.linear_qkv|language_model\.embedding\.word_embeddings)\.", "Megatron's",
     "export it to Hugging Face with the tool that trained it (Megatron-Bridge's export_ckpt)"),
    (("wq",), r"(^|\.)layers\.\d+\.attention\.wq\.weight$", "Meta's, which torchtitan has too",
     "with torchtitan save it for Hugging Face (checkpoint.last_save_in_hf); Meta's own files are read beside their params.json"),
)  # fmt: skip
"""Names of no release and of no class of transformers: words of which one is in them, a part of them, whose they are, and the way to
others."""


def trainers(names: Iterable[str]) -> str | None:
    """Whose names these are, and what to do, where they are known as a trainer's own."""
    together = "\n".join(names)
    for words, part, whose, remedy in TRAINERS:
        # Letters are found a hundred times as fast as a pattern, and of 262,144 names a message is made, too.
        if any(word in together for word in words) and re.search(part, together, re.MULTILINE):
            return f"these names are {whose}: {remedy}"
    return None


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Each name without such parts, where there are any; else nothing. `names`: all that a checkpoint has.

    Raises ZooError where two tensors would have one name: the model was saved wrapped and plain.
    """
    together = "\n".join(names)
    if any(part in together for part in ANYWHERE):
        plain = {name: ".".join(p for p in name.split(".") if p not in ANYWHERE) for name in names}
    else:  # most checkpoints, and some have 100,000 names
        plain = {name: name for name in names}
    if outer := min(map(_outer, plain.values()), default=0):
        plain = {name: short[outer:] for name, short in plain.items()}
    if all(name == short for name, short in plain.items()):
        return {}
    first: dict[str, str] = {}
    for name, short in plain.items():
        if (other := first.setdefault(short, name)) != name:
            raise ZooError(
                f"tensors {other!r} and {name!r} are the same but for a trainer's wrapper: which one is meant? "
                "Save the model again, unwrapped"
            )
    return plain


def _outer(name: str) -> int:
    """How many characters of a name are the outermost wrapper's, which may be wrapped again."""
    at, part = 0, OUTERMOST + "."
    while name.startswith(part, at):
        at += len(part)
    return at


def look_through(ckpt: Checkpoint) -> Checkpoint:
    """The checkpoint under the names that its tensors have without such parts, and a note; as it is if it has none."""
    if "hf" not in ckpt.naming:
        return ckpt
    try:
        plain = unwrapped(ckpt.tensors)
    except ZooError as e:
        raise ZooError(f"{ckpt.root}: {e}") from None
    if not plain:
        return ckpt
    tensors = {plain[n]: replace(t, name=plain[n]) for n, t in ckpt.tensors.items()}
    name = next(n for n, short in plain.items() if n != short)
    note = f"names hold a trainer's wrappers, which are looked through: {name} is {plain[name]}"
    return replace(ckpt, tensors=tensors, notes=(*ckpt.notes, note))
