"""Open LLM checkpoints in one canonical layout: found, pulled, converted and proven.

    path = zoo.pull("smollm2-135m")              # a folder in the canonical layout
    model = zoo.load(path)                       # nn.Module: token_ids [B, T] -> logits [B, T, V]
    print(zoo.verify(path).passed)

These functions are stable; everything else may move. Errors that a user can act on are `zoo.ZooError`.

Unusual here: `import zoo` imports next to nothing; each function imports what it needs when it is called. And
`spec`, `pull`, `verify` are functions although submodules have the same names (see `_Package`).
"""

from __future__ import annotations

import os
import sys
import types
from typing import TYPE_CHECKING, Any

from zoo import shipped as _shipped  # noqa: F401 (zoo.converters and zoo.manifests can be imported from here on)
from zoo._version import __version__
from zoo.errors import ZooError, translated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from zoo.hub import Progress
    from zoo.mapping.plan import Plan
    from zoo.model import Decoder
    from zoo.spec import Spec
    from zoo.verify.certificate import Certificate

    StrPath = str | os.PathLike[str]

__all__ = [
    "ZooError",
    "__version__",
    "convert",
    "export",
    "load",
    "merge",
    "plan",
    "pull",
    "save",
    "spec",
    "state_dict",
    "verify",
]


@translated
def load(
    path: StrPath,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    trainable: bool = False,
    mesh: DeviceMesh | None = None,
) -> Decoder:
    """The model in the canonical folder `path`, in eval mode: `model(token_ids)` maps int64 [B, T] to logits
    [B, T, V]; `model.generate(token_ids, max_new_tokens)` decodes with a KV cache.

    `device` as torch spells it; `dtype` "bf16", "fp16" or "fp32", or torch's own (None: as stored). `trainable`: in training
    mode, its parameters requiring gradients, which plain torch computes; `zoo.save` makes a folder of it again. `mesh`: a
    DeviceMesh of one axis, of ranks that share the model: each calls this, holds its part, and runs the same passes, on the
    mesh's devices (docs/parallel.md). Raises ZooError
    if `path` is no canonical checkpoint, or torch has no such device here, or what is to be trained is quantised or shared, or
    so many ranks cannot share the model.
    """
    import torch

    from zoo.model import load

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    wanted = dtypes.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in dtypes.values():
        raise ZooError(f"unknown dtype {dtype!r}; expected bf16, fp16 or fp32")
    return load(path, device=device, dtype=wanted, trainable=trainable, mesh=mesh)


@translated
def plan(src: StrPath, dtype: str | None = None, *, family: str | None = None) -> Plan:
    """What converting `src` would do: a checkpoint on disk, the name of a release, owner/repo on the Hub, or the URL of an
    object store, of which only headers are read. `family`: what to take it for; by default what its config says. Raises ZooError, listing what does not fit, if the family's rules do not account for
    every tensor; `zoo.hub.HubError` (a ZooError) for what the Hub refuses.
    """
    from zoo.pull import open_source

    return open_source(src, dtype, family=family).plan


@translated
def convert(
    src: StrPath,
    dst: StrPath,
    dtype: str | None = None,
    *,
    family: str | None = None,
    file: str | None = None,
) -> Path:
    """Convert `src` (as in `plan`; fetched first if it is remote) to the canonical folder `dst`; `dst`.

    `dst` must not exist, and does not until it is complete. `dtype` None keeps the released one. `family`: as in `plan`. `file`
    says which weights of the folder or repository `src` (a file in it or below it, or an index of shards), where there are
    several; by default those that transformers takes. Raises ZooError
    as `plan`, and if `dst` exists, can't be written, or the disk is too small.
    """
    from zoo.pull import convert

    return convert(src, dst, dtype=dtype, family=family, file=file)


@translated
def export(
    canon: StrPath, dst: StrPath, format: str = "hf", type: str | None = None, *, dtype: str | None = None
) -> Path:
    """Give back the release that the canonical folder `canon` was converted from, in `dst`: the same tensors and
    files, and the same bytes where `canon` is as it was converted. `dtype`: convert weights to it (a new checkpoint then, under the
    release's names). Or write the GGUF `dst` (`format="gguf"`), its matrices in `type` ("bf16", "q8_0", ...; None: as stored), Meta's or
    Mistral's own files ("meta", "mistral"), or a folder of torch.distributed.checkpoint ("dcp"). Raises ZooError if `dst` exists or the conversion changed the dtype, which can't be undone.
    """
    if format == "dcp":
        if type is not None or dtype is not None:
            raise ZooError('a type is for format "gguf", a dtype for "hf"; "dcp" holds tensors as they are')
        from zoo.mapping.state import export_dcp

        return export_dcp(canon, dst)
    from zoo.mapping.export import export

    return export(canon, dst, format=format, type=type, dtype=dtype)


@translated
def merge(canon: StrPath, adapter: StrPath, to: StrPath) -> Path:
    """Write the canonical folder `to`: `canon` with the PEFT adapter in the folder `adapter` merged into it; `to`.

    LoRA, rsLoRA and DoRA, computed in fp32 and rounded once. Raises ZooError for another kind of adapter, one for another model, or
    one that changes quantised weights.
    """
    from zoo.mapping.merge import merge

    return merge(canon, adapter, to)


@translated
def save(
    values: nn.Module | Mapping[str, torch.Tensor] | StrPath,
    like: StrPath,
    to: StrPath,
    *,
    dtype: str | None = None,
) -> Path:
    """Write values that were trained to the canonical folder `to`, with the Spec of the canonical folder `like`; `to`.

    `values`: a model, the path of a torch.distributed.checkpoint folder, or tensors by name: canonical names, Hugging Face's, or those that transformers has in memory, in a
    trainer's wrappers or not. `dtype`: what to convert them to, None: as they are. Of DTensors (FSDP2, tensor parallel) every
    rank calls this; they are gathered one at a time, and rank 0 writes. The folder appears when it is complete, and
    says that its values are no release's. Raises ZooError, listing by pattern what is missing, over, or of another shape or dtype.
    """
    from zoo.mapping.save import save

    return save(values, like, to, dtype=dtype)


@translated
def state_dict(canon: StrPath, names: str = "hf") -> dict[str, torch.Tensor]:
    """The tensors of the canonical folder `canon`, by the names of the release's files; with `names` "transformers", by those that its
    class has in memory (`model.load_state_dict`); "canonical", by their own. Views of mapped files where they can be.
    """
    from zoo.mapping.state import state_dict

    return state_dict(canon, names)


@translated
def verify(canon: StrPath, against: StrPath | None = None, **how: Any) -> Certificate:
    """Compare the canonical folder `canon` with upstream's implementation of `against` (default: what it was
    converted from, where that still exists). `how`: see `zoo.verify.verify`. The certificate has `.passed` and
    `.to_json()`, and is kept as `parity.json` in the folder.
    """
    from zoo.verify import verify

    return verify(canon, against=against, **how)


@translated
def pull(
    name: str,
    to: StrPath | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    file: str | None = None,
    family: str | None = None,
    layers: Sequence[int] | None = None,
    stream: bool = False,
    verify: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch, check, convert and verify a release: a name or alias from `zoo list`, or owner/repo on the Hub.
    Returns the canonical folder (default `to`: the name, in the current folder).

    Interrupted at any point, the same call continues. `family`: as in `plan`. `file` says which of a repository's sets of
    weights (as in `convert`); `layers` converts only those (and the ends); `stream` keeps no copy of the source; `verify` is
    the level of parity asked for, None for none. Raises `zoo.hub.HubError` (a
    ZooError) for what the Hub refuses, ZooError for the rest.
    """
    from zoo.pull import pull

    return pull(
        name,
        to,
        dtype=dtype,
        revision=revision,
        file=file,
        family=family,
        layers=layers,
        stream=stream,
        verify=verify,
        progress=progress,
    )


@translated
def spec(src: StrPath) -> Spec:
    """The architecture of a checkpoint, a canonical folder, a release by name, or owner/repo on the Hub."""
    from zoo.pull import spec_of

    return spec_of(src)


class _Package(types.ModuleType):
    """Importing the submodule `zoo.spec` must not replace the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
