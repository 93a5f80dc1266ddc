"""A checkpoint that a trainer wrote of a model that is known (`zoo convert SRC DST --like CANON`): safetensors or PyTorch's pickles, with
a config beside them or without, and their tensors as views of the mapped files.

Read as any other, but that nothing has to say what the model is: accelerate and FSDP write weights alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import pickle, safetensors, sets, wrapped
from zoo.formats.base import HF_NAMINGS, Checkpoint, TensorRef, add_tensors, inside
from zoo.formats.opening import of_another_kind, open_checkpoint
from zoo.model.load import DTYPES

FORMATS = ("safetensors", "pickle")


class Mapped:
    """The tensors of files of a folder, where they lie."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._maps: dict[str, Tensor] = {}

    def tensor(self, ref: TensorRef) -> Tensor:
        """Raises ZooError for a dtype that torch cannot hold."""
        if (dtype := DTYPES.get(ref.dtype)) is None:
            raise ZooError(
                f"{self.root / ref.file}: {ref.name!r:.200} has dtype {ref.dtype}, which torch cannot hold"
            )
        if ref.file not in self._maps:
            file = inside(self.root, ref.file, str(self.root))
            self._maps[ref.file] = torch.from_file(str(file), False, file.stat().st_size, dtype=torch.uint8)
        flat = self._maps[ref.file][ref.offset : ref.offset + ref.nbytes]
        flat = (flat.clone() if ref.offset % dtype.itemsize else flat).view(dtype)
        return flat.view(ref.shape) if ref.strides is None else flat.as_strided(ref.shape, ref.strides)


def open_trained(path: Path) -> Checkpoint:
    """Open a folder, a file, or an index of shards, by headers. Its config is {} if there is none.

    Raises ZooError if nothing is there, or files that are neither safetensors nor pickles.
    """
    root = path if path.is_dir() else path.parent
    lightning = path.is_file() and path.suffix == ".ckpt"  # a pickle, whose model is asked for by its name
    if not path.exists() or ((root / "config.json").is_file() and not lightning):
        found = open_checkpoint(path)
        if found.format not in FORMATS:
            raise ZooError(
                f"{path}: {found.format} files, which no trainer writes: convert them without --like; of what was trained are taken "
                "torch.distributed.checkpoint folders, safetensors and PyTorch's files"
            )
        return found
    entry = path.name if path.is_file() else sets.taken(root)
    if entry is None or Path(entry.removesuffix(".index.json")).suffix not in (
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
    ):
        if path.is_dir() and (what := of_another_kind(path)) is not None:
            raise ZooError(f"{path}: {what}; a single file of PyTorch's can be named itself")
        raise ZooError(
            f"{path}: not what a trainer writes: a folder of torch.distributed.checkpoint (it has no .metadata), safetensors or PyTorch's "
            "files under the names that transformers opens; of others name the file itself"
        )
    names = sets.members(root, entry)
    if entry.endswith(".safetensors") or sets.is_index(entry, ".safetensors"):
        return wrapped.look_through(safetensors.open_files(root, names, {}, entry))
    tensors: dict[str, TensorRef] = {}
    sizes: dict[str, int] = {}
    notes: list[str] = []
    budget = pickle.Budget()
    for name in names:
        file = inside(root, name, entry)
        sizes[name] = file.stat().st_size
        add_tensors(tensors, pickle.read_pickle(file, name, notes, budget), file)
    return wrapped.look_through(
        Checkpoint(root, "pickle", HF_NAMINGS, {}, tensors, sizes, notes=tuple(notes))
    )
