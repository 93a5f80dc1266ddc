"""Upstream's reading of a GGUF file, some tensors at a time: its own names, its own dequantisation, its own undoing of what
llama.cpp's converter does to values; only that it is asked for a layer, where `from_pretrained` reads all.

By the reader that transformers has for most architectures; what it reads otherwise (Qwen3.5, LFM2) is not read here. Experts, which
that reader puts together of several tensors of the file (gate and up), are put together of those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.verify.gguf_parsed import metadata_once
from zoo.verify.oracle import CannotLoad, its_own_errors
from zoo.verify.reading import Range, Window
from zoo.verify.stream_weights import Weights


def config_and_class(path: Path) -> tuple[Any, Any]:
    """Upstream's config object and class for a GGUF file. Raises CannotLoad if it has none, or reads it otherwise."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    with its_own_errors(path), metadata_once():
        if _architecture(path) in _read_otherwise():
            raise CannotLoad(f"{path}: not streamed: upstream reads this architecture's files in another way")
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return config, getattr(transformers, CAUSAL[config.model_type])


def _architecture(path: Path) -> str:
    from transformers.integrations.gguf.reader import read_gguf_metadata

    return str(read_gguf_metadata(str(path))[0]["general.architecture"])


def _read_otherwise() -> frozenset[str]:
    from transformers.integrations.gguf import GGUF_ARCHS

    return frozenset(GGUF_ARCHS)


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: where its bytes are, and how gguf-py would give them."""

    range: Range
    kind: Any  # GGMLQuantizationType
    dtype: Any
    shape: tuple[int, ...]
    size: int  # numbers


class GGUFWeights(Weights):
    """As `Weights`, of a GGUF file."""

    def __init__(
        self, model: Any, path: Path, dtype: torch.dtype, device: str | torch.device, window: Window
    ) -> None:
        import gguf
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._begin(model, path, dtype, device, window)
        self.dequantize: Callable[..., Any] = gguf.dequantize
        with its_own_errors(path), metadata_once():
            self.stored = {
                t.name: Stored(
                    (path, int(t.data_offset), int(t.n_bytes)),
                    t.tensor_type,
                    t.data.dtype,
                    t.data.shape,
                    int(t.n_elements),
                )
                for t in gguf.GGUFReader(path).tensors
            }
            process = TENSOR_PROCESSORS.get(_architecture(path), TensorProcessor)
            self.processor = process(config=model.config.to_dict())
            self.theirs: dict[str, str] = get_gguf_hf_weights_map(
                model, self.processor
            )  # GGUF's name -> upstream's
        self.sources_of: dict[
            str, list[str]
        ] = {}  # upstream's name -> the file's, several of stacked experts
        for stem, name in self.theirs.items():
            if (source := stem if stem in self.stored else f"{stem}.weight") in self.stored:
                self.sources_of.setdefault(name, []).append(source)
        for name, like in self.meta.items():
            if (n := sum(self.stored[source].size for source in self._sources(name))) != like.numel():
                found = f"{n:,} numbers" if n else "nothing"
                raise CannotLoad(
                    f"{path}: upstream knows {found} of it for {name}, whose shape is {list(like.shape)}"
                )

    @property
    def converts(self) -> bool:
        return True

    def mapped_one(self, name: str) -> Tensor | None:
        return None

    def rows_of(self, name: str) -> Callable[[Any], Tensor]:
        (source,) = self._found(name)
        return lambda at: self._made(name, [source], at)

    def ranges(self, module: nn.Module) -> Iterator[Range]:
        for name in self.names_of(module):
            yield from (self.stored[source].range for source in self._sources(name))

    def used_there(self, module: nn.Module) -> Iterator[Range]:
        """Nothing: numpy dequantises."""
        return iter(())

    def _convert(self, name: str) -> dict[str, Tensor]:
        return {name: self._made(name, self._found(name))}

    def _sources(self, name: str) -> list[str]:
        return self.sources_of.get(name) or self.sources_of.get(self.tied.get(name, "")) or []

    def _found(self, name: str) -> list[str]:
        if not (found := self._sources(name)):
            raise ZooError(f"{self.root}: no tensor for upstream's {name}; verify without --stream")
        return found

    def _made(self, name: str, sources: list[str], at: Any = None) -> Tensor:
        """What upstream makes of tensors of the file, or of some rows of one."""
        together: dict[str, Tensor] = {}  # what it makes of several it puts here
        for source in sources:
            stored = self.stored[source]
            raw = self.window.range(*stored.range).numpy().view(stored.dtype).reshape(stored.shape)
            if at is not None:
                raw = raw[at.numpy() if isinstance(at, Tensor) else at]
            with its_own_errors(self.root):
                values = self.processor.process(
                    weights=self.dequantize(raw, stored.kind), name=source,
                    tensor_key_mapping=self.theirs, parsed_parameters={"tensors": together},
                )  # fmt: skip
        return together[name] if together else torch.from_numpy(np.copy(values.weights))
