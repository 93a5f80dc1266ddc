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
    from zoo.verify.oracle import Oracle

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
    """The model in a canonical folder, in eval mode.

    `model(token_ids)` maps int64 [B, T] to logits [B, T, V]; `model.generate(token_ids, max_new_tokens)` decodes with a KV
    cache. Weights are mapped from the files.

    Args:
        path: A canonical folder.
        device: As torch spells it.
        dtype: "bf16", "fp16" or "fp32", or torch's own; None: as stored.
        trainable: In training mode, its parameters requiring gradients, which plain torch computes. `zoo.save` makes a folder
            of it again.
        mesh: A DeviceMesh of one axis, of ranks that share the model. Each calls this, holds its part, and runs the same
            passes, on the mesh's devices (docs/parallel.md).

    Returns:
        An nn.Module whose parameters are named as in the canonical layout, and whose `spec` is its Spec.

    Raises:
        ZooError: `path` is no canonical checkpoint; torch has no such device here; what is to be trained is quantised or
            shared; so many ranks cannot share the model.
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
    """What converting `src` would do, from headers alone.

    Args:
        src: A checkpoint on disk, the name of a release, owner/repo on the Hub, or the URL of an object store.
        dtype: "bf16", "fp16", "fp32"; None: as released.
        family: What to take it for; None: what its config says.

    Returns:
        `summary()` for people, `to_json()` for programs; `outputs` (a canonical tensor each), `extras`, and `nbytes` to write.

    Raises:
        ZooError: The family's rules do not account for every tensor; the text lists what does not fit.
        zoo.hub.HubError: A ZooError: what the Hub refuses.
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
    """Convert a checkpoint to the canonical folder `dst`, which appears when it is complete.

    Args:
        src: As in `plan`. What is remote is fetched first.
        dst: A folder that does not exist.
        dtype: "bf16", "fp16", "fp32"; None: as released, quantised weights too.
        family: As in `plan`.
        file: Which weights of a folder or repository, where there are several: a file in it or below it, or an index of
            shards. None: those that transformers takes.

    Returns:
        `dst`.

    Raises:
        ZooError: As `plan`; `dst` exists or can't be written; the disk is too small.
    """
    from zoo.pull import convert

    return convert(src, dst, dtype=dtype, family=family, file=file)


@translated
def export(
    canon: StrPath, dst: StrPath, format: str = "hf", type: str | None = None, *, dtype: str | None = None
) -> Path:
    """Give back the release that a canonical folder was converted from: the same tensors and files, and the same bytes where
    the folder is as it was converted.

    Args:
        canon: A canonical folder.
        dst: A folder, or of "gguf" a file, that does not exist.
        format: "hf"; "gguf", a file for llama.cpp; "meta" or "mistral", the vendors' own files; "dcp", a folder of
            torch.distributed.checkpoint.
        type: Of a GGUF's matrices: "bf16", "q8_0", ...; None: as stored.
        dtype: Convert weights to it: a new checkpoint then, under the release's names.

    Returns:
        `dst`.

    Raises:
        ZooError: `dst` exists; the format cannot say what the model is; the conversion changed the dtype, which can't be undone.
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
    """Merge a PEFT adapter into a canonical folder: LoRA, rsLoRA and DoRA, computed in fp32 and rounded once.

    Args:
        canon: The canonical folder that the adapter is for.
        adapter: A folder with `adapter_config.json` and its weights.
        to: The canonical folder to write, which does not exist.

    Returns:
        `to`.

    Raises:
        ZooError: Another kind of adapter, one for another model, or one that changes quantised weights.
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
    """Write values that were trained as a canonical folder, which appears when it is complete and says that its values are no
    release's.

    Of DTensors (FSDP2, tensor parallel) every rank calls this; they are gathered one at a time, and rank 0 writes.

    Args:
        values: A model; tensors by name: canonical names, Hugging Face's, or those that transformers has in memory, in a
            trainer's wrappers or not; or the path of what a trainer wrote: a torch.distributed.checkpoint folder, safetensors,
            PyTorch's files.
        like: The canonical folder that was trained, whose Spec, tokenizer and templates go along.
        to: The folder to write, which does not exist.
        dtype: What to convert values to; None: as they are.

    Returns:
        `to`.

    Raises:
        ZooError: What is missing, over, or of another shape or dtype, by pattern.
    """
    from zoo.mapping.save import save

    return save(values, like, to, dtype=dtype)


@translated
def state_dict(canon: StrPath, names: str = "hf") -> dict[str, torch.Tensor]:
    """The tensors of a canonical folder, views of mapped files where they can be.

    Args:
        canon: A canonical folder.
        names: "hf": those of the release's files; "transformers": those that its class has in memory
            (`model.load_state_dict`); "canonical": zoo's own.

    Returns:
        Name -> tensor, in the shapes of these names.

    Raises:
        ZooError: `canon` is no canonical checkpoint, or cannot be named so.
    """
    from zoo.mapping.state import state_dict

    return state_dict(canon, names)


@translated
def verify(canon: StrPath, against: StrPath | Oracle | None = None, **how: Any) -> Certificate:
    """Compare a canonical folder with upstream's implementation.

    Args:
        canon: A canonical folder; or a GGUF that was written of the folder `against`.
        against: A checkpoint, a golden file, or an oracle; None: what the folder was converted from, where that still exists.
        how: The options of `zoo.verify.run.verify`: `level`, `dtype`, `stream`, `device`, `self_test`, ...

    Returns:
        The certificate, with `passed` and `to_json()`; it is kept as `parity.json` in the folder.

    Raises:
        ZooError: The folder is not sound, there is nothing to compare it with, or what was asked for can't be done here.
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
    """Fetch, check, convert and verify a release. Interrupted at any point, the same call continues.

    Args:
        name: A name or alias of `zoo list`, owner/repo on the Hub, or the URL of an object store.
        to: The canonical folder; None: the name, in the current folder.
        dtype: "bf16", "fp16", "fp32"; None: as released.
        revision: A branch, tag or commit; None: the manifest's, or main.
        file: Which of a repository's sets of weights, as in `convert`.
        family: As in `plan`.
        layers: Convert only these layers, and the ends; None: all.
        stream: Convert as files arrive, and keep no copy of the source.
        verify: The level of parity to reach before the folder appears; None: no verification.
        progress: Told of bytes, phases and notes; see below.

    Returns:
        The canonical folder.

    Raises:
        zoo.hub.HubError: A ZooError: what the Hub refuses.
        ZooError: The rest, as `convert`.
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
    """The architecture of a checkpoint, a canonical folder, a release by name, or owner/repo on the Hub.

    Raises:
        ZooError: No family claims it, or it says what zoo cannot compute.
    """
    from zoo.pull import spec_of

    return spec_of(src)


class _Package(types.ModuleType):
    """Importing the submodule `zoo.spec` must not replace the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
