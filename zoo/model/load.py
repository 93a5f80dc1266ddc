"""A canonical folder -> a decoder, its weights mapped from the files.

Unusual: on the CPU nothing is read at load time. Each file is mapped once and tensors are views of the
map, so a layer or expert that is never used costs no memory, and two processes share one copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.formats.base import TensorRef
from zoo.kernels.affine import in_order
from zoo.layout import layout
from zoo.model.across import Across
from zoo.model.decoder import Decoder
from zoo.model.linear import Table, Weights
from zoo.model.moe import Router
from zoo.model.parallel import share_out
from zoo.model.upload import Upload
from zoo.quant.schemes import scheme
from zoo.split import Cut, component_cut, pieces, split

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U32": torch.uint32, "BOOL": torch.bool,
}  # fmt: skip

UNTRAINED = (".selection_bias", ".scalar", ".act.beta", ".act.near")
"""Ends of names of what upstream holds as buffers: given, not learnt by gradients. Through a bias that only chooses experts
none leads."""


class Source:
    """The tensors of an opened canonical folder, as views of its mapped files."""

    def __init__(
        self,
        folder: canonical.Canonical,
        upload: Upload | None = None,
        cuts: Mapping[str, Cut] | None = None,
    ) -> None:
        """`upload`: how tensors reach a GPU, if not by way of the mapped files. `cuts`: what this rank has of tensors that it
        has a part of."""
        self.folder, self.upload, self.cuts = folder, upload, cuts or {}
        self._maps: dict[str, Tensor] = {}

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor's bytes in place (private: writing to it does not reach the file)."""
        return self.part(ref, None)

    def part(self, ref: TensorRef, cut: Cut | None) -> Tensor:
        """What `cut` leaves of the tensor: in place where that is one range of bytes, else a copy."""
        if ref.dtype not in DTYPES:
            raise ZooError(
                f"{self.folder.path(ref)}: {ref.name} has dtype {ref.dtype}, which torch cannot hold"
            )
        dtype = DTYPES[ref.dtype]
        if ref.file not in self._maps:
            path = self.folder.path(ref)
            self._maps[ref.file] = torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8)
        whole = self._maps[ref.file]
        parts = [
            whole[p.offset : p.offset + p.nbytes]
            if p.rows == 1
            else whole.as_strided((p.rows, p.nbytes), (p.stride, 1), p.offset).reshape(-1)
            for p in pieces(ref, cut)
        ]
        raw = parts[0] if len(parts) == 1 else torch.cat(parts)
        if (
            raw.storage_offset() % dtype.itemsize
        ):  # torch addresses whole elements; copy what does not start at one
            raw = raw.clone()
        return raw.view(dtype).view(ref.shape if cut is None else cut.shape(ref.shape))

    def on(
        self,
        device: str | torch.device,
        ref: TensorRef,
        dtype: torch.dtype | None = None,
        cut: Cut | None = None,
    ) -> Tensor:
        """The tensor, or what `cut` leaves of it, on a device, cast to `dtype` if given. With `upload`, filled by the end of
        that."""
        if self.upload is None or ref.dtype not in DTYPES:
            whole = self.tensor(ref) if cut is None else self.part(ref, cut)
            return whole.to(device=device, dtype=dtype)
        path, stored = self.folder.path(ref), DTYPES[ref.dtype]
        if cut is None:
            return self.upload(path, ref.offset, tuple(ref.shape), stored, dtype)
        return self.upload.cut(path, pieces(ref, cut), cut.shape(ref.shape), stored, dtype)

    def fill(
        self,
        module: nn.Module,
        prefix: str = "",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Give `module` (the decoder's submodule called `prefix`) its tensors.

        Floating-point parameters are cast to `dtype` if given; quantised weights stay as stored.
        Raises ZooError if the folder lacks one.
        """
        dot = f"{prefix}." if prefix else ""
        refuse_quantised(self.folder.quant, module, prefix, self.folder.root)
        for name, m in module.named_modules():
            slot = f"{dot}{name}".rstrip(".")
            if isinstance(m, Weights) and slot in self.folder.quant:
                m.quantise(self.folder.quant[slot], self._components(slot, device))
                if isinstance(m, Table):
                    m.asked = dtype
        for name, p in list(module.named_parameters()):
            ref = self.folder.tensors.get(dot + name)
            if ref is None:
                raise ZooError(f"{self.folder.root}: tensor {dot + name!r} is missing")
            cut = self.cuts.get(dot + name)
            shape = tuple(ref.shape) if cut is None else cut.shape(ref.shape)
            if shape != tuple(p.shape):
                raise ZooError(
                    f"{self.folder.path(ref)}: {ref.name} has shape {list(shape)}, the model needs {list(p.shape)}"
                )
            floating = ref.dtype not in DTYPES or DTYPES[ref.dtype].is_floating_point
            owner, _, leaf = name.rpartition(".")
            of = module.get_submodule(owner)
            cast = dtype if floating and leaf not in kept_by(of) else None
            parameter = nn.Parameter(self.on(device, ref, cast, cut), requires_grad=False)
            if isinstance(of, Router) and leaf == "table":
                self._refuse_other_experts(ref, parameter, sum(of.parts))
            setattr(of, leaf, parameter)

    def sizes(self, model: Decoder, parts: set[str], dtype: torch.dtype | None) -> list[int]:
        """Bytes of each tensor that `fill` will make of the decoder's submodules `parts`, of a folder without codes."""
        refs, found = self.folder.tensors, []
        for name, p in model.named_parameters() if not self.folder.quant else ():
            of = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
            if of in parts and name in refs and (stored := DTYPES.get(refs[name].dtype)) is not None:
                cast = dtype if stored.is_floating_point and dtype is not None else stored
                found.append(p.numel() * cast.itemsize)
        return found

    def _refuse_other_experts(self, ref: TensorRef, table: Tensor, n: int) -> None:
        """Raise ZooError if a table says experts that are not among the `n` there are: a GPU would read beyond them."""
        values = self.tensor(ref) if self.upload is not None else table  # an upload may not have come yet
        least, most = int(values.min()), int(values.max())
        if least < 0 or most >= n:
            raise ZooError(
                f"{self.folder.path(ref)}: {ref.name} names experts {least} to {most}; expected 0 to {n - 1}: convert the "
                "release again, or download it anew"
            )

    def _components(self, slot: str, device: str | torch.device) -> dict[str, Tensor]:
        how, found = self.folder.quant[slot], dict[str, Tensor]()
        of_weight = self.cuts.get(f"{slot}.weight")
        for c in scheme(how).components:
            ref, cut = self.folder.tensors.get(f"{slot}.{c.name}"), None
            if ref is not None and of_weight is not None:
                whole = layout(self.folder.spec)[f"{slot}.weight"].shape
                cut = component_cut(of_weight, whole, c, ref, how)
                if c.axes == "i" and of_weight.axis == len(whole) - 1:
                    cut = self._unordered(ref, how, whole[-1])
            if ref is not None and (cut is None or cut.ranges):
                found[c.name] = self.on(device, ref, cut=cut)
        return found

    def _unordered(self, ref: TensorRef, how: str, columns: int) -> Cut:
        """Nothing, of the groups that a weight's columns are in: where columns are cut, these are one after the other. Raises
        ZooError where they are not."""
        if not in_order(self.tensor(ref), columns, scheme(how).group or columns):
            raise ZooError(
                f"{self.folder.path(ref)}: {ref.name} puts the columns of a weight ({how}) into groups in an order of its own, so "
                "that ranks cannot each have some; convert the source again with --dtype bf16"
            )
        return Cut(0, (), ())


def kept_by(module: nn.Module) -> tuple[str, ...]:
    """Parameters of the module itself that keep their dtype whatever is asked for, as upstream keeps them: the module says `KEPT`."""
    return getattr(module, "KEPT", ())


def kept(model: nn.Module) -> frozenset[str]:
    """The names of all that keep their dtype."""
    return frozenset(f"{name}.{leaf}".lstrip(".") for name, m in model.named_modules() for leaf in kept_by(m))


def refuse_quantised(
    quant: Mapping[str, str], module: nn.Module, prefix: str = "", where: object = "the model"
) -> None:
    """Raise ZooError if something in `module` (the submodule called `prefix`) is quantised that is no linear map, nor a table of tokens
    whose rows are looked up one by one: it would be run as if its codes were the values."""
    maps = {f"{prefix}.{name}".strip("."): m for name, m in module.named_modules() if isinstance(m, Weights)}
    for slot, how in quant.items():
        m = maps.get(slot)
        fits = m is not None and (not isinstance(m, Table) or (slot != "positions" and scheme(how).by_rows))
        if f"{slot}.".startswith(f"{prefix}." if prefix else "") and not fits:
            raise ZooError(
                f"{where}: {slot} is quantised ({how}), and only linear maps and tables of tokens can be run quantised; "
                "convert the source again with --dtype bf16"
            )


def usable(name: str | torch.device) -> torch.device:
    """The device called `name`. Raises ZooError if torch has no such device here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # the second from a torch built without CUDA
        raise ZooError(f"torch can't use the device {str(name)!r} here: {str(e).splitlines()[0]}") from e
    return device


def _of_rank(mesh: DeviceMesh, device: str | torch.device) -> torch.device:
    """Where this rank of a mesh computes. Raises ZooError if a device was asked for that is not of the mesh's kind."""
    kind, asked = mesh.device_type, torch.device(device).type
    if asked not in ("cpu", kind):
        raise ZooError(f"the mesh is of {kind}, and the device asked for is {str(device)!r}")
    return usable(f"{kind}:{torch.cuda.current_device()}" if kind == "cuda" else kind)


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    layers: Iterable[int] | None = None,
    trainable: bool = False,
    mesh: DeviceMesh | None = None,
) -> Decoder:
    """The decoder of the canonical folder at `path`, ready to run.

    `mesh`: ranks that share the model, along its one axis. Each calls this, reads its part, and runs the same passes; the
    logits are the same on all. The device is then of the mesh's kind: of GPUs the one that torch has as its current.
    `dtype`: what to compute in; None: as stored. `layers`: fill only these (and the ends); the others stay
    without storage, so the model cannot be run as a whole. Default: the layers that the folder has.
    `trainable`: gradients reach its parameters, each of which has memory of its own (all but `UNTRAINED`).
    Raises ZooError if the folder is not sound, torch has no such device here, or so many ranks cannot share the model; of a
    trainable model, if weights are quantised, or ranks are to share it.
    """
    folder = canonical.read(path)
    device = usable(device) if mesh is None else _of_rank(mesh, device)
    if trainable and mesh is not None and mesh.size() > 1:
        raise ZooError(
            f"{folder.root}: a model that {mesh.size()} ranks share can't be trained: what they add up has no gradient; load "
            "it whole, or leave `trainable` out"
        )
    if trainable and folder.quant:
        slot, how = next(iter(folder.quant.items()))
        raise ZooError(
            f"{folder.root}: {len(folder.quant)} weights are quantised ({slot}: {how}), and codes can't be trained; convert the "
            "source again with --dtype bf16"
        )
    with Upload(device) if torch.device(device).type == "cuda" else nullcontext() as upload:
        model, across, cuts = Decoder(folder.spec), None, None
        if mesh is not None and mesh.size() > 1:
            across = Across(mesh)
            shares = split(folder.spec, across.size, across.rank)
            share_out(model, shares, across)
            cuts = shares.cuts
        source = Source(folder, upload, cuts)
        wanted = folder.layers if layers is None else layers
        ends = {n: m for n, m in model.named_children() if n != "layers"}
        if wanted is not None:
            wanted = tuple(wanted)
            model.held = wanted if len(set(wanted)) < model.spec.n_layers else None
        if upload is not None:
            held = {f"layers.{i}" for i in range(model.spec.n_layers) if wanted is None or i in wanted}
            upload.reserve(source.sizes(model, held | set(ends), dtype))
        for name, module in ends.items():
            source.fill(module, name, device, dtype)
        for i in range(model.spec.n_layers) if wanted is None else wanted:
            source.fill(model.layers[i], f"layers.{i}", device, dtype)
        if upload is not None:
            upload.start()
        if across is not None:
            across.meet()  # while files are read
    if trainable:
        train(model)
    return model


def train(model: Decoder) -> None:
    """Let gradients reach the parameters that `load` filled."""
    model.trainable = True
    for name, p in list(model.named_parameters()):
        if p.is_meta:
            continue
        owner, _, leaf = name.rpartition(".")
        learns = p.is_floating_point() and not name.endswith(UNTRAINED)
        own = p.detach().clone() if p.device.type == "cpu" else p.detach()  # not a view of a file's pages
        setattr(model.get_submodule(owner), leaf, nn.Parameter(own, requires_grad=learns))
    model.train()
