"""A canonical folder with new values: the Spec of another one, and tensors that were trained or merged.

    with Values(like, dst, model, extras, quant, said) as new:   # nothing is there yet
        for tensor in new.tensors:
            new.put(tensor, pieces)                              # its elements, in order, in pieces of any size
        new.finish()                                             # the folder appears under its final name

What a tensor of `like` still holds is copied from file to file (`New.same`), by the mover that conversion has.
The folder says what it is: `source` keeps what export needs (family, names, config), and `values` in it says
whose numbers these are. It carries no certificate: nothing about it is proven.
"""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from zoo._version import __version__
from zoo.errors import ZooError
from zoo.formats.base import ITEMSIZE, TensorRef, encoded, place_of, read_small
from zoo.formats.canonical import JSON, SOURCE, VALUES, Canonical, wrote
from zoo.formats.safetensors import INDEX
from zoo.layout import VERSION
from zoo.mapping.execute import Mover, Progress, Sheet, refuse_overlap, shard_size_of
from zoo.mapping.folder import Folder
from zoo.mapping.match import TIED
from zoo.mapping.moves import Copy
from zoo.untrusted.printable import warn

if TYPE_CHECKING:
    from torch import Tensor

KEPT = ("naming", "prefix", "family", "family_given", "package", "config", "rules", "n_ranks")
"""Of what `source` says of a folder, that which is as true of one with other values."""
CHUNK = 1 << 22  # elements looked at a time
log = logging.getLogger("zoo")


@dataclass(frozen=True)
class New:
    """A tensor of the new folder. `same`: it is this one of the old folder, byte for byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    same: TensorRef | None = None


def unchanged(ref: TensorRef) -> New:
    return New(ref.name, ref.dtype, ref.shape, ref)


def extras_of(like: Canonical) -> dict[str, str]:
    """The tensors kept aside that stay true when the model's change, with the reasons. (A copy of the embedding
    does not; it is one of what was released.)"""
    return {name: why for name, why in like.extras.items() if why != TIED and name in like.extra_tensors}


class Values:
    """The folder `dst` in the making; a context manager. `said`: what `source.values` is to say, short texts.

    Raises ZooError as `Folder` does, and for a part of a model.
    """

    def __init__(
        self,
        like: Canonical,
        dst: str | os.PathLike[str],
        tensors: Iterable[New],
        extras: Mapping[str, tuple[New, str]],
        quant: Mapping[str, str],
        said: Mapping[str, str],
        *,
        notes: Iterable[str] = (),
        force: bool = False,
        shard_size: int | None = None,
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> None:
        refuse_part(like)
        refuse_overlap(like.root, Path(dst))
        self.like, self.quant, self.said, self.notes = like, dict(quant), dict(said), list(notes)
        self.extras = {name: why for name, (_, why) in extras.items()}
        self.not_finite: dict[str, int] = {}  # elements by tensor
        model, aside = list(tensors), [new for new, _ in extras.values()]
        self.tensors = [*model, *aside]
        listed = [(n.name, n.dtype, n.shape) for n in self.tensors]
        total = sum(math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in listed)
        self.sheet = Sheet()
        limit = shard_size or shard_size_of(total)
        self.sheet.add(listed[: len(model)], "model", limit)
        self.sheet.add(listed[len(model) :], "extras", limit)
        # A job of its own: what is written comes out of memory, and another run can't know that it is the same.
        self.folder = Folder(dst, self.sheet.sizes, uuid.uuid4().hex, force=force, ours=wrote)
        self.mover = Mover(self.folder, total, progress, threads)
        self._dtype = _converted(like, model)

    def __enter__(self) -> Self:
        self.folder.__enter__()
        try:
            for name, header in self.sheet.headers.items():
                self.folder.head(name, header)
            self._copy_unchanged()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.mover.close()
        if not self.folder.published and self.folder._lock is not None:
            self.folder.discard()
        self.folder.__exit__(kind, e, tb)

    def _copy_unchanged(self) -> None:
        copies = []
        for new in self.tensors:
            if (ref := new.same) is not None:
                self.mover.open(ref.file, self.like.path(ref))
                file, at = self.sheet.place[new.name]
                copies.append(Copy(ref.file, ref.offset, file, at, ref.nbytes))
        self.mover.run(copies, ())

    def put(self, new: New, pieces: Iterable[Tensor]) -> None:
        """The elements of a tensor, in row-major order. Raises ZooError if the disk does not take them."""
        file, at = self.sheet.place[new.name]
        for piece in pieces:
            if n := not_finite(piece):
                self.not_finite[new.name] = self.not_finite.get(new.name, 0) + n
            data = _bytes_of(piece)
            try:
                done = 0
                while done < len(data):
                    done += os.pwrite(self.folder.fd(file), data[done : done + (64 << 20)], at + done)
            except OSError as e:
                raise ZooError(f"{self.folder.dst}: {e.strerror}; nothing is left of it") from e
            at += len(data)
            self.mover.report(len(data))

    def finish(self) -> Path:
        """Write what describes the folder, and let it appear. Values that are no numbers are noted: whoever looks for where they
        come from saves them, too."""
        root = self.like.root
        if self.not_finite:
            first, n = next(iter(self.not_finite.items()))
            said = f"NaN or infinite: {sum(self.not_finite.values()):,} elements in {len(self.not_finite)} tensors, the first {first} ({n:,})"
            self.notes.append(said)
            warn(log, "%s: %s", self.folder.dst, said)
        carried = [n for n in self.like.json.get("carried", []) if place_of(root, n).is_file()]
        for name in carried:
            place = place_of(root, name)
            self.folder.write(place.relative_to(root).as_posix(), read_small(root, name))
        if (root / SOURCE).is_file():  # which of several names export is to take
            self.folder.write(SOURCE, read_small(root, SOURCE))
        self.folder.write(INDEX, self.sheet.index())
        self.folder.write(JSON, encoded(self._describe(carried), indent=1) + b"\n")
        return self.folder.publish()

    def _describe(self, carried: list[str]) -> dict[str, Any]:
        source = self.like.source
        out: dict[str, Any] = {
            "layout_version": VERSION,
            "zoo_version": __version__,
            "spec": self.like.spec.to_dict(),
            "quant": self.quant,
            "source": {
                **{k: source[k] for k in KEPT if k in source},
                "format": VALUES,
                "dtype": self._dtype,
                "files": {},
                "values": {"from": str(self.like.root.resolve()), **release_of(source), **self.said},
            },
            "carried": carried,
            "extras": self.extras,
        }
        if notes := [*(self.like.json.get("notes") or []), *self.notes]:
            out["notes"] = notes
        return out


def refuse_part(like: Canonical) -> None:
    """Raises ZooError for a folder of some layers only."""
    if like.layers is not None and len(set(like.layers)) < like.spec.n_layers:
        raise ZooError(
            f"{like.root}: holds {len(set(like.layers))} of {like.spec.n_layers} layers; a whole model is needed"
        )


def release_of(source: Mapping[str, Any]) -> dict[str, str]:
    """Which release the values began as: a repository and its revision, or the path that was converted."""
    if isinstance(values := source.get("values"), dict):
        return {k: values[k] for k in ("release",) if k in values}
    origin = source.get("origin")
    if isinstance(origin, dict) and isinstance(repo := origin.get("repo"), str):
        revision = origin.get("revision")
        return {"release": f"{repo}@{revision}" if isinstance(revision, str) else repo}
    return {"release": path} if isinstance(path := source.get("path"), str) else {}


def _converted(like: Canonical, model: list[New]) -> str | None:
    """What the folder's dtype is said to have been converted to: None, if all tensors have that of the old folder."""
    had = {name: ref.dtype for name, ref in like.tensors.items()}
    if all(had.get(new.name) == new.dtype for new in model) and len(had) == len(model):
        return like.source.get("dtype")
    return next(new.dtype for new in model if new.name == "embed.weight")


def not_finite(t: Tensor) -> int:
    """How many elements are NaN or infinite."""
    import torch

    if not t.is_floating_point():
        return 0
    found = 0
    for part in t.detach().reshape(-1).split(CHUNK):
        part = part.float() if part.element_size() == 1 else part
        if part.numel() and not bool(torch.stack(part.aminmax()).isfinite().all()):
            found += part.numel() - int(part.isfinite().sum())
    return found


def _bytes_of(t: Tensor) -> memoryview:
    import torch

    flat = t.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
