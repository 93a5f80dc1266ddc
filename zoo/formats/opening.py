"""Opening a checkpoint: which reader a path is for, and what a path that is none is called."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from zoo.errors import ZooError
from zoo.formats import sets, wrapped
from zoo.formats.base import LFS, MAX_NAMES, WEIGHT_SUFFIXES, Checkpoint, read_json, refuse_crowd
from zoo.untrusted.plain import first_text

READERS: dict[str, str] = {
    "canonical": "zoo.formats.canonical",
    "mistral": "zoo.formats.mistral",
    "openai": "zoo.formats.openai",
    "sharded": "zoo.formats.sharded",
    "safetensors": "zoo.formats.safetensors",
    "meta": "zoo.formats.meta",
    "pickle": "zoo.formats.pickle",
    "gguf": "zoo.formats.gguf",
}
"""Readers in the order in which they are asked whether a path is theirs. Each module has
`detect(path: Path) -> bool` and `open(path: Path) -> Checkpoint`."""


def open_checkpoint(path: str | os.PathLike[str], format: str | None = None) -> Checkpoint:
    """Open the checkpoint at `path` (a folder, a single file, or an index of shards) by its headers.

    A folder of the Hub's cache stands for its snapshot (see `snapshot_of`). Of several sets of weights in a folder that is
    read which transformers takes, and a note names the others (`zoo.formats.sets`).
    Raises ZooError if nothing is there, no reader knows it, or its headers are not sound.
    """
    p = Path(path)
    if not p.exists():
        raise ZooError(f"{p}: no such file or folder")
    if (snapshot := snapshot_of(p)) != p:
        found = open_checkpoint(snapshot, format)
        main = _main(snapshot.parent.parent)
        stale = (
            ""
            if main in (None, snapshot.name)
            else f", though refs/main names {main:.60}, which is not there"
        )
        note = f"{p} is a folder of the Hub's cache: its snapshot {snapshot.name} was opened{stale}"
        return replace(found, notes=(note, *found.notes))
    if format is not None and format not in READERS:
        raise ZooError(f"unknown format {format!r}; known: {', '.join(READERS)}")
    if p.is_dir():
        refuse_crowd(p)
    refuse_adapter(p)
    # The vendor's own files beside a Hugging Face checkpoint are the second set, as they are for transformers.
    whole = p.is_dir() and (p / "config.json").is_file() and any((p / n).is_file() for n in sets.ORDER)
    for name in [format] if format else READERS:
        reader = importlib.import_module(READERS[name])
        if format or (reader.detect(p) and not (whole and name in ("mistral", "meta"))):
            open_: Callable[[Path], Checkpoint] = reader.open
            opened = open_(p)
            if (n := sum(map(len, opened.tensors))) > MAX_NAMES:
                raise ZooError(
                    f"{p}: the names of its tensors have {n} characters (limit {MAX_NAMES}): no release's have as many"
                )
            ckpt = wrapped.look_through(opened)
            if empty := [n for n, t in ckpt.tensors.items() if t.size == 0 and n.endswith("weight")]:
                raise ZooError(
                    f"{p}: {empty[0]!r} is empty ({len(empty)} weights of {len(ckpt.tensors)} tensors are): saved from DeepSpeed "
                    "ZeRO-3 or FSDP without gathering; gather it with zero_to_fp32.py, or save it again with "
                    "stage3_gather_16bit_weights_on_model_save"
                )
            ckpt.chosen = p.name if p.is_file() else None
            if p.is_dir() and (p / "adapter_config.json").is_file() and name != "canonical":
                ckpt.notes = (
                    *ckpt.notes,
                    "adapter_config.json: an adapter lies beside the model, and is not merged into it: the model's own weights are "
                    "taken (transformers with peft installed would load the adapter's base and apply it)",
                )
            if waits := [n for n in ckpt.carried if _points(ckpt.path(n))]:
                ckpt.notes = (
                    *ckpt.notes,
                    f"{', '.join(waits)}: git-lfs pointers, not the files themselves, and carried as they are: run `git lfs pull` first",
                )
            if name != "canonical" and (said := sets.note(ckpt, ckpt.chosen)) is not None:
                ckpt.notes = (*ckpt.notes, said)
            return ckpt
    refuse_cache(p)
    if p.is_dir() and (p / ".metadata").is_file():
        raise ZooError(
            f"{p}: a trainer's folder of torch.distributed.checkpoint, which has no config: `zoo convert {p} DST --like CANON`, CANON "
            "being the canonical folder of the model that was trained"
        )
    if p.is_dir() and (deeper := [s for s in sets.here(p) if "/" in s.files[0]]):
        shown = ", ".join(map(str, deeper[:8])) + (f" and {len(deeper) - 8} more" if len(deeper) > 8 else "")
        raise sets.Ambiguous(
            f"{p}: no checkpoint in the folder itself; name one below it with --file: {shown}"
        )
    known = (*OPTIMIZER, "*_states.pt")  # DeepSpeed's
    states = {x for pattern in known for x in p.glob(pattern)} if p.is_dir() else set()
    if p.is_dir() and (theirs := sorted(x.name for x in {*p.glob("*.pt"), *p.glob("*.pth")} - states)):
        raise ZooError(
            f"{p}: {theirs[0]} is called neither as Hugging Face's nor as Meta's files are (torchtune's hf_model_*.pt and "
            "litgpt's *.pth hold a trainer's names): save it with the trainer's own export to Hugging Face, or name a file of "
            "Hugging Face's names with --file"
        )
    if (what := of_another_kind(p)) is not None:
        raise ZooError(f"{p}: no checkpoint that zoo reads: {what}")
    inside = ", ".join(sorted(x.name for x in p.iterdir())[:8]) if p.is_dir() else p.name
    raise ZooError(
        f"{p}: no checkpoint found. Looked for *.safetensors, consolidated.*.pth, pytorch_model*.bin, *.gguf; "
        f"found: {inside or 'an empty folder'}"
    )


def refuse_cache(path: Path) -> None:
    """Raises ZooError, naming them, for the folder that holds the folders of several models (`models--owner--name`)."""
    if path.is_dir() and (models := sorted(str(m) for m in path.glob("models--*"))):
        shown = ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
        raise ZooError(f"{path} is a cache of the Hub, a folder a model: give one of them: {shown}")


def _points(file: Path) -> bool:
    with contextlib.suppress(OSError), file.open("rb") as f:
        return f.read(len(LFS)) == LFS
    return False


UNENDED = ("*.crdownload", "*.part", "*.incomplete", "*.aria2", "*.download")
"""How browsers and downloaders call what has not arrived yet."""
OPTIMIZER = ("optimizer*.pt", "scheduler.pt", "rng_state*.pth", "training_args.bin")
OTHERS = (
    (("*.distcp", "*/*.distcp"), "torch.distributed.checkpoint's shards",
     "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin, beside the model's config.json"),
    (("global_step*/*_states.pt", "*_model_states.pt", "zero_to_fp32.py"), "DeepSpeed's",
     "python zero_to_fp32.py FOLDER OUT, which DeepSpeed put beside it"),
    (("*.ckpt", "*/*.ckpt"), "Lightning's or another trainer's .ckpt",
     "save the model itself with save_pretrained, from the trainer's own loading, or name the file, and with --like the canonical folder of "
     "what was trained"),
    (("*.nemo", "model_weights/common.pt", "weights/common.pt", "*.distckpt"), "NeMo's",
     "export it to Hugging Face with NeMo's exporter (nemo.collections.llm.export_ckpt)"),
    (("mp_rank_*/model_optim_rng.pt", "iter_*/mp_rank_*/model_optim_rng.pt"), "Megatron-LM's",
     "convert it to Hugging Face with the tool that trained it (Megatron-Bridge's export_ckpt)"),
    (("tf_model*.h5", "*.h5", "*.keras"), "TensorFlow's or Keras's",
     "an older transformers (4.x) reads tf_model.h5 with from_pretrained(..., from_tf=True); save_pretrained then writes safetensors"),
    (("flax_model*.msgpack", "*.msgpack"), "Flax's",
     "an older transformers (4.x) reads it with from_pretrained(..., from_flax=True); save_pretrained then writes safetensors"),
    (("*.onnx", "*/*.onnx"), "ONNX's graph", "take the release that it was exported from"),
    (("openvino_*", "*.xml"), "OpenVINO's", "take the release that it was exported from"),
    (("*.npz",), "numpy's (older MLX folders)", "take the release that it was made of"),
    (("*.ggml", "ggml-*.bin", "*.ggmlv3*"), "GGML's, from before GGUF", "llama.cpp's convert_llama_ggml_to_gguf.py makes a GGUF of it"),
    (("*.engine", "*.plan"), "TensorRT's", "take the release that it was built from"),
    (UNENDED, "a download that has not ended", "fetch it again, or to its end"),
    (OPTIMIZER, "a trainer's state, without the model's weights",
     "give the folder that the model itself was saved to"),
    (("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z"), "an archive", "unpack it first"),
)  # fmt: skip
"""Kinds of files that are weights and that no reader here takes: how they are called, whose they are, what to do."""


def of_another_kind(path: Path) -> str | None:
    """What the files of a path are that no reader knows, and what to do, in one sentence; None if that is not known either."""
    for patterns, whose, remedy in OTHERS:
        for pattern in patterns:
            if path.is_dir():
                found = sorted(p.relative_to(path) for p in path.glob(pattern))
            else:
                found = [Path(path.name)] if path.match(pattern) else []
            if found:
                return f"{found[0]} is {whose}; {remedy}"
    return None


def refuse_adapter(path: Path) -> None:
    """Raises ZooError for a folder that holds a LoRA adapter and no model, or a file of one."""
    root = path if path.is_dir() else path.parent
    own = (
        path.name.startswith("adapter_model")
        if path.is_file()
        else not any(
            p.suffix in WEIGHT_SUFFIXES and not p.name.startswith("adapter_") for p in path.iterdir()
        )
    )
    if own and (root / "adapter_config.json").is_file():
        told = read_json(root / "adapter_config.json", "it describes an adapter")
        kind = str(told.get("peft_type", "LORA"))[:20]
        base = str(told.get("base_model_name_or_path") or "a model that it does not name")[:100]
        how = (
            f"merge this into it (`zoo merge CANON {root} DST`)"
            if kind.upper() == "LORA"
            else f"merge this into it first, with peft (merge_and_unload(), where {kind} has it): zoo merges LoRA"
        )
        raise ZooError(f"{path}: an adapter ({kind}) to {base}, not a model: convert that, and {how}")


def snapshot_of(path: Path) -> Path:
    """The snapshot that a folder of the Hub's cache (`models--owner--name`) stands for; any other path is itself.

    It is the one that `refs/main` names, or the only one. Raises ZooError, naming the choices, if there are several.
    """
    at = path.parent if path.name == "snapshots" else path
    cached = at.name.startswith("models--") or (at / "refs").is_dir() or (at / "blobs").is_dir()
    if not (cached and (at / "snapshots").is_dir()):
        return path
    held = sorted(p for p in (at / "snapshots").iterdir() if p.is_dir())
    named = _main(at)
    if (main := next((p for p in held if p.name == named), None)) is not None:
        return main
    if not held:
        raise ZooError(f"{path} is a folder of the Hub's cache without a snapshot: nothing was downloaded")
    if len(held) > 1:
        raise ZooError(
            f"{path} is a folder of the Hub's cache with several snapshots, and its refs/main names none of them. "
            f"Give one: {', '.join(map(str, held))}"
        )
    return held[0]


def _main(cached: Path) -> str | None:
    """What `refs/main` of a folder of the Hub's cache says, if anything."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return first_text(cached / "refs" / "main").strip() or None
    return None
