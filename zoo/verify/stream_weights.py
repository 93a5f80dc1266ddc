"""Upstream's model without storage, and the checkpoint's tensors by its names, read when a layer asks for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.formats.base import Checkpoint, TensorRef
from zoo.verify.oracle import (
    CannotLoad,
    DequantisedWhole,
    exact_values,
    its_own_errors,
    kept_in_fp32,
)
from zoo.verify.reading import Range, Window, mapped


def dequantizer(config: Any, path: Path) -> Any:
    """Upstream's own dequantisation of the quantised checkpoint at `path`, or None; the config is then of plain weights.
    Raises DequantisedWhole if it has none that works by layers."""
    if (
        getattr(config.get_text_config(), "quantization_config", None) is None
        and getattr(config, "quantization_config", None) is None
    ):
        return None
    from transformers.quantizers.auto import get_hf_quantizer

    try:
        with its_own_errors(path):
            quantizer, _, _ = get_hf_quantizer(config, None, None, False, {})
    except CannotLoad as e:
        raise DequantisedWhole(str(e)) from e
    asked = getattr(quantizer, "quantization_config", None)
    if not getattr(asked, "dequantize", False):
        raise DequantisedWhole(f"{path}: upstream cannot dequantise this a layer at a time")
    as_plain(config)
    return quantizer


def as_plain(config: Any) -> None:
    """Have upstream's config say nothing of quantised weights."""
    for c in (config, config.get_text_config()):
        c.__dict__.pop("quantization_config", None)


class Weights:
    """The checkpoint's tensors by upstream's names, read when asked for."""

    def __init__(
        self,
        model: Any,
        ckpt: Checkpoint,
        quantizer: Any,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        window: Window | None = None,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._begin(model, ckpt.root, dtype, device, window or Window())
        self.ckpt, self.quantizer = ckpt, quantizer
        transforms = get_model_conversion_mapping(model, None, quantizer)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.converter = {p: c for c in converters for p in c.source_patterns}
        self.sources: dict[
            str, list[tuple[str, str | None]]
        ] = {}  # target -> (source, pattern of its converter)
        for name in sorted(ckpt.tensors, key=_natural):
            for chain in ((renamings, converters), ([], [])):
                target, pattern = rename_source_key(name, *chain, model.base_model_prefix, self.meta)
                if target in self.meta:
                    self.sources.setdefault(target, []).append((name, pattern))
                    break
        self.targets_of: dict[
            str, str
        ] = {}  # a further target of a converter -> the first, which it is keyed by
        self._more_targets()

    def _begin(
        self, model: Any, root: Path, dtype: torch.dtype, device: str | torch.device, window: Window
    ) -> None:
        """What does not depend on the format of the files. `root`: what errors name."""
        self.model, self.root, self.dtype, self.device = model, root, dtype, torch.device(device)
        self.window = window
        self.widened = False  # to fp32, after they were rounded to `dtype`
        self.names = {id(m): n for n, m in model.named_modules()}
        self.meta: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.fp32 = kept_in_fp32(model, dtype)

    def _more_targets(self) -> None:
        """A converter with several targets is keyed by its first; find the others by their endings."""
        for first, found in list(self.sources.items()):
            pattern = found[0][1]
            if pattern is None:
                continue
            targets = self.converter[pattern].target_patterns
            for other in targets[1:]:
                name = first.replace(targets[0], other)
                if name in self.meta and name not in self.sources:
                    self.targets_of[name] = first

    def buffers_of(self, m: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The module's own buffers that a checkpoint holds."""
        prefix = self.names[id(m)]
        for leaf, b in m.named_buffers(recurse=False):
            if f"{prefix}.{leaf}".lstrip(".") in self.meta:
                yield leaf, b

    def one(self, name: str) -> Tensor:
        """A tensor as stored, mapped: for embeddings and heads."""
        table = self.mapped_one(name)
        return self._convert(name)[name] if table is None else table

    def rows_of(self, name: str) -> Callable[[Any], Tensor]:
        """Some rows of a table as stored, by numbers (on the CPU) or a slice."""
        table = self.one(name)
        return lambda at: table[at]

    def mapped_one(self, name: str) -> Tensor | None:
        """The same, if no memory is needed for it: it is stored as upstream has it."""
        found = self.sources.get(name) or self.sources.get(self.tied.get(name, ""))
        if found is None or len(found) != 1 or found[0][1] is not None:
            return None
        return self._mapped(self.ckpt.tensors[found[0][0]])

    def _mapped(self, ref: TensorRef) -> Tensor:
        return mapped(self.ckpt.path(ref.file), ref, self.window)

    def ranges(self, module: nn.Module) -> Iterator[Range]:
        """What `load` will read."""
        for ref in self._refs(module):
            yield self.ckpt.path(ref.file), ref.offset, ref.nbytes

    def used_there(self, module: nn.Module) -> Iterator[Range]:
        """What of that is used on the device, and not on the CPU first."""
        return self.ranges(module)

    @property
    def converts(self) -> bool:
        """Whether upstream's tensors are made of the checkpoint's, and not just these renamed."""
        return any(found[0][1] is not None for found in self.sources.values())

    def names_of(self, module: nn.Module) -> Iterator[str]:
        """Those of the module's weights."""
        return self._of(module, self.names[id(module)], True)

    def _refs(self, module: nn.Module) -> Iterator[TensorRef]:
        """The checkpoint's tensors that the module's are made of."""
        for name in self.names_of(module):
            key = self.targets_of.get(name, name)
            for source, _ in self.sources.get(key) or self.sources.get(self.tied.get(key, "")) or []:
                yield self.ckpt.tensors[source]

    def cast(self, name: str, t: Tensor) -> Tensor:
        """A tensor as stored, or part of it, on the device in the dtype that upstream would have it in."""
        if not t.is_floating_point():
            return t.to(self.device)
        if name in self.fp32:
            return t.to(self.device, torch.float32)
        made = t.to(self.device, self.dtype)
        return made.float() if self.widened else made

    def load(self, module: nn.Module, what: str = "", recurse: bool = True) -> None:
        """Give `module` its weights, in the dtype that upstream would have them."""
        prefix = self.names[id(module)]
        wanted = list(self._of(module, prefix, recurse))
        done: set[str] = set()
        for name in wanted:
            if name in done:
                continue
            made = self._convert(name)
            for target, t in made.items():
                if target in self.meta:
                    self._set(target, t)
                    done.add(target)
        if missing := [n for n in wanted if n not in done]:
            raise ZooError(
                f"{self.root}: no tensor for upstream's {missing[0]} ({what or prefix}); verify without --stream"
            )

    def unload(self, module: nn.Module, recurse: bool = True) -> None:
        prefix = self.names[id(module)]
        for name in self._of(module, prefix, recurse):
            self._put(name, self.meta[name])

    def _of(self, module: nn.Module, prefix: str, recurse: bool) -> Iterator[str]:
        for kind in (module.named_parameters, module.named_buffers):
            for leaf, _ in kind(recurse=recurse, remove_duplicate=False):
                if (name := f"{prefix}.{leaf}".lstrip(".")) in self.meta:
                    yield name

    def _convert(self, name: str) -> dict[str, Tensor]:
        """The tensors that are made together with `name`, by their names."""
        key = self.targets_of.get(name, name)
        found = self.sources.get(key) or self.sources.get(self.tied.get(key, ""))
        if not found:
            raise ZooError(f"{self.root}: no tensor for upstream's {name}; verify without --stream")
        refs = [self.ckpt.tensors[source] for source, _ in found]
        pattern = found[0][1]
        if pattern is None:
            return {name: self._mapped(refs[0])}
        mapping = deepcopy(self.converter[pattern])
        for ref, (source, p) in zip(refs, found, strict=True):
            mapping.add_tensor(key, source, p, self._mapped(ref))
        del refs
        with its_own_errors(self.root), exact_values():
            made = mapping.convert(
                key, model=self.model, config=self.model.config, hf_quantizer=self.quantizer
            )
        return {n: (t[0] if isinstance(t, list) else t) for n, t in made.items()}

    def _set(self, name: str, t: Tensor) -> None:
        like = self.meta[name]
        if tuple(t.shape) != tuple(like.shape):
            raise ZooError(
                f"{self.root}: {name} has shape {list(t.shape)}, upstream's class needs {list(like.shape)}"
            )
        new = self.cast(name, t)
        if isinstance(like, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        self._put(name, new)

    def _put(self, name: str, t: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        m = self.model.get_submodule(owner)
        if leaf in m._parameters:
            m._parameters[leaf] = t if isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False)
        else:
            m._buffers[leaf] = t


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which expert 10 comes after expert 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]
