"""Upstream with one decoder layer in memory: its own classes and its own forward pass, weights on demand.

The model is built without storage. Hooks give each decoder layer its weights when it is about to run and take
them away after it; embeddings get the rows that are asked for; the head runs over its vocabulary in pieces.
Names and fusions of the checkpoint (experts stacked in memory, one by one on disk) go through transformers'
own conversion, one layer's tensors at a time.

Unusual: all batches go through a layer, both ways that upstream is run, before the next is read. Upstream's forward
cannot be run a layer at a time from outside, so each batch has a thread of its own, for either way, that stops before and
after every layer; one runs at a time, and a conductor says which.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.formats import safetensors
from zoo.formats.base import Checkpoint, TensorRef, read_json
from zoo.verify.compare import Clock, OnLayer, OnLogits, SpreadMeter
from zoo.verify.inputs import Batch
from zoo.verify.oracle import (
    DTYPES,
    CannotLoad,
    Transformers,
    config_and_class,
    decoder_layers,
    exact_values,
    from_pretrained_files,
    its_own_errors,
    kept_in_fp32,
    placeholder_ids,
    quiet,
    read_otherwise,
)
from zoo.verify.oracle import OnLayer as OnOneLayer
from zoo.verify.reading import Passing, Range, Window, mapped

HEAD_ROWS = 8192
"""Rows of the head that are in memory at a time."""


class StreamedTransformers(Transformers):
    """As `Transformers`, for safetensors folders, within the memory of one layer."""

    def __init__(
        self,
        path: Path,
        dtype: str = "fp32",
        note: str | None = None,
        files: Iterable[str] | None = None,
        device: str | torch.device = "cpu",
        window: Window | None = None,
    ) -> None:
        """`files`: those that the user chose; None: those that `from_pretrained` would take. `window`: what they are read
        through, beside whoever else takes part in a pass."""
        if not path.is_dir():
            raise ZooError(
                f"{path}: only a folder of safetensors files can be streamed; verify this one without --stream"
            )
        self.path, self.dtype, self.device = path, dtype, torch.device(device)
        self.corrected = []
        self.note = "; ".join(filter(None, (note, read_otherwise(path)))) or None
        quiet()
        return_freed_memory()
        config, cls = config_and_class(path)
        with its_own_errors(path):
            quantizer = dequantizer(config)
        self.model = skeleton(cls, config, DTYPES[dtype], self.device)
        self.layers = decoder_layers(self.model)
        self.avoid_ids = placeholder_ids(config)
        self.window = window or Window()
        self.weights = Weights(
            self.model, _checkpoint(path, files), DTYPES[dtype], quantizer, self.device, self.window
        )
        self.window.riders.append(self)
        self._workers: dict[int, _Worker] = {}
        self.around_pass: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.around_step: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self._hook()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"streamed": True}

    def _split_rows(self) -> bool:
        return False

    @contextlib.contextmanager
    def _in_fp32(self) -> Iterator[None]:
        self.weights.widened = True
        try:
            yield
        finally:
            self.weights.widened = False

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OnOneLayer | None = None) -> Tensor:
        raise AssertionError("a streamed oracle is driven over all batches at once")

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        return None  # it would read every weight once per token

    def drive(self, batches: Sequence[Batch], on_layer: OnLayer, on_logits: OnLogits) -> None:
        """All batches through one layer, then the next."""
        self._drive(batches, [_Way(contextlib.nullcontext, on_layer, on_logits)])

    def drive_both(
        self,
        batches: Sequence[Batch],
        meter: SpreadMeter,
        on_layer: OnLayer,
        on_logits: OnLogits,
        clock: Clock,
    ) -> None:
        """The same both ways, on the weights that are read once; `meter` hears the second, which goes first."""

        @contextlib.contextmanager
        def second() -> Iterator[None]:
            with clock("oracle, second way"), self.second_way():
                yield

        with self.second_way() as meter.ways:
            pass
        ways = [_Way(contextlib.nullcontext, on_layer, on_logits)]
        if meter.ways is not None:
            ways.insert(0, _Way(second, meter.keep_layer, meter.keep_logits))
        self._drive(batches, ways)

    def _drive(self, batches: Sequence[Batch], ways: Sequence[_Way]) -> None:
        for way in ways:
            way.workers = [_Worker(self, batch) for batch in batches]
        try:
            with Passing(self.window, len(self.layers)) as passing:
                for i in range(len(self.layers)):
                    for way in ways:
                        way.step()  # to just before layer i
                    with passing.layer(i):
                        self._through(i, ways)
                for b in range(len(batches)):
                    for way in ways:
                        way.on_logits(b, way.logits(b))
        finally:
            for way in ways:
                for w in way.workers:
                    w.stop()

    def _through(self, i: int, ways: Sequence[_Way]) -> None:
        """Layer `i`, to just after it; both ways have the same weights, unless one widens them."""
        layer, widened = self.layers[i], None
        for way in ways:
            with way.open():
                if widened != self.weights.widened:
                    self.weights.load(layer, f"layer {i}")
                    widened = self.weights.widened
                for w in way.workers:
                    w.step()
        self.weights.unload(layer)
        for way in ways:
            for b, w in enumerate(way.workers):
                way.on_layer(b, i, w.taken())

    def ranges(self, layer: int) -> Iterator[Range]:
        """What a pass will read of a layer."""
        return self.weights.ranges(self.layers[layer])

    def leave(self, layer: int | None) -> None:
        """It has gone already."""

    def _hook(self) -> None:
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda _m, _args: self._worker().pause())
            layer.register_forward_hook(
                lambda _m, _args, out: self._worker().pause(out[0] if isinstance(out, tuple) else out)
            )
        inside = {id(m) for layer in self.layers for m in layer.modules()}
        head = self.model.get_output_embeddings()
        for name, m in self.model.named_modules():
            own = [*m.named_parameters(recurse=False), *self.weights.buffers_of(m)]
            if id(m) in inside or not own:
                continue
            if isinstance(m, nn.Embedding) and _looks_up_ids(m):
                m.padding_idx = None
                self._rest(m, name)
                m.register_forward_pre_hook(self._gather(name))
                m.register_forward_hook(lambda m, _args, _out, name=name: self._rest(m, name))
            elif m is head:
                m.forward = self._head(m, name)
            else:
                m.register_forward_pre_hook(lambda m, _args: self.weights.load(m, recurse=False))
                m.register_forward_hook(lambda m, _args, _out: self.weights.unload(m, recurse=False))

    def _rest(self, m: nn.Embedding, name: str) -> None:
        """Between its passes an embedding is its file, mapped: Gemma 4's wrapper looks up one row by itself. Where making
        the table would take memory it has no rows, but on the device: some classes look where it is."""
        table = self.weights.mapped_one(f"{name}.weight")
        if table is None:
            m.weight = nn.Parameter(torch.empty(0, m.embedding_dim, device=self.device), requires_grad=False)
        elif self.device.type == "cpu":
            m.weight = nn.Parameter(table, requires_grad=False)
        else:
            m.weight = _Elsewhere(table, requires_grad=False)
            m.weight.at = self.device

    def _gather(self, name: str) -> Callable[..., tuple[Tensor]]:
        """Only the embedding's rows for these ids; the ids are renumbered to fit."""

        def hook(m: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen, compact = args[0].unique(return_inverse=True)
            table = self.weights.one(f"{name}.weight")
            rows = self.weights.cast(f"{name}.weight", table[seen.to(table.device)])
            m.weight = nn.Parameter(rows, requires_grad=False)
            return (compact,)

        return hook

    def _head(self, m: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            table = self.weights.one(f"{name}.weight")
            parts = (self.weights.cast(f"{name}.weight", part).to(x) for part in table.split(HEAD_ROWS))
            pieces = [nn.functional.linear(x, part) for part in parts]
            logits = torch.cat(pieces, -1)
            if getattr(m, "bias", None) is not None:
                logits += self.weights.one(f"{name}.bias").to(x)
            return logits

        return forward

    def _worker(self) -> _Worker:
        return self._workers[threading.get_ident()]


def _checkpoint(path: Path, files: Iterable[str] | None) -> Checkpoint:
    """These files, or those that `from_pretrained` would read, whichever zoo's own readers take."""
    files = from_pretrained_files(path) if files is None else sorted(files)
    if files is None or not all(f.endswith(".safetensors") for f in files):
        raise CannotLoad(
            f"{path}: upstream finds no safetensors files there under its names; verify without --stream"
        )
    return safetensors.open_files(path, files, read_json(path / "config.json", "upstream needs it"))


def return_freed_memory() -> None:
    """Tell glibc to give a freed layer back at once. It would learn from the first large tensor that is freed to
    keep such memory, in heaps that fragment: many times a layer in the end."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD; setting it also stops it from adapting


class _Elsewhere(nn.Parameter):
    """A table in its file, for a model on a GPU: it says that it is there, and gives rows there."""

    at: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.at

    def __getitem__(self, rows: Any) -> Tensor:
        here = rows.cpu() if isinstance(rows, Tensor) else rows
        return self.data[here].to(self.at)


def _looks_up_ids(m: nn.Embedding) -> bool:
    """Whether it is called with ids: OPT's positions are called with a mask, and get the whole of their small table."""
    return next(iter(inspect.signature(m.forward).parameters)) in ("input", "input_ids")


@dataclass
class _Way:
    """One way to run upstream: what is set meanwhile, who hears of it, and each batch's pass."""

    open: Callable[[], contextlib.AbstractContextManager[Any]]
    on_layer: OnLayer
    on_logits: OnLogits
    workers: Sequence[_Worker] = ()

    def step(self) -> None:
        with self.open():
            for w in self.workers:
                w.step()

    def logits(self, b: int) -> Tensor:
        """Batch `b` to the end."""
        with self.open():
            self.workers[b].step()
        logits, self.workers[b].logits = self.workers[b].logits, None
        assert logits is not None
        return logits


class _Worker:
    """One batch's forward pass in a thread that runs only between `step` and the next `pause`."""

    def __init__(self, oracle: StreamedTransformers, batch: Batch) -> None:
        self.oracle, self.batch = oracle, batch
        self.state: Tensor | None = None
        self.logits: Tensor | None = None
        self.error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Run to the next pause, or to the end. Raises what the pass raised."""
        with self.oracle.around_step():
            self._go.release()
            self._back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, state: Tensor | None = None) -> None:
        """Called by the pass itself, before a layer and (with its output) after it."""
        self.state = state if state is None else state.clone()
        self._back.release()
        self._go.acquire()
        if self._stopping:
            raise _Stopped

    def taken(self) -> Tensor:
        """The state after the layer that it has just been through."""
        state, self.state = self.state, None
        assert state is not None
        return state

    def stop(self) -> None:
        self._stopping = True
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(0.05)

    def _run(self) -> None:
        self._go.acquire()
        workers = self.oracle._workers
        workers[threading.get_ident()] = self
        try:
            if not self._stopping:
                with torch.inference_mode(), self.oracle.around_pass():
                    ids = self.batch.ids.to(self.oracle.device)
                    self.logits = self.oracle.model(input_ids=ids, use_cache=False).logits
        except _Stopped:
            pass
        except BaseException as e:
            self.error = e
        finally:
            workers.pop(threading.get_ident(), None)
            self._back.release()


class _Stopped(Exception):
    """The comparison ended early."""


# ---------------------------------------------------------------------------------------------------
# Weights on demand


def dequantizer(config: Any) -> Any:
    """Upstream's own dequantisation of a quantised checkpoint, or None; the config is then of plain weights."""
    if (
        getattr(config.get_text_config(), "quantization_config", None) is None
        and getattr(config, "quantization_config", None) is None
    ):
        return None
    from transformers.quantizers.auto import get_hf_quantizer

    quantizer, _, _ = get_hf_quantizer(config, None, None, False, {})
    asked = getattr(quantizer, "quantization_config", None)
    if not getattr(asked, "dequantize", False):
        raise ZooError(
            "upstream cannot dequantise this checkpoint a layer at a time; verify without --stream"
        )
    for c in (config, config.get_text_config()):
        c.__dict__.pop("quantization_config", None)
    return quantizer


def skeleton(cls: Any, config: Any, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """Upstream's model without storage, but with the buffers that no checkpoint holds (rotary frequencies), on `device`."""
    switches: dict[str, Any] = {"attn_implementation": "eager"}
    if cls._can_set_experts_implementation():
        switches["experts_implementation"] = "eager"
    with torch.device("meta"):
        try:
            model = cls._from_config(config, dtype=dtype, **switches)
        except (TypeError, ValueError):
            model = cls._from_config(config, dtype=dtype)
    kept = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        if name not in kept:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for t in model.state_dict(keep_vars=True).values():
        t._is_hf_initialized = True
    for m in model.modules():
        m._is_hf_initialized = False
    model.initialize_weights()
    for m in model.modules():
        for leaf, b in m._buffers.items():
            if b is not None and not b.is_meta:
                m._buffers[leaf] = b.to(device)
    return model.eval()


class Weights:
    """The checkpoint's tensors by upstream's names, read when asked for."""

    def __init__(
        self,
        model: Any,
        ckpt: Checkpoint,
        dtype: torch.dtype,
        quantizer: Any = None,
        device: str | torch.device = "cpu",
        window: Window | None = None,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.model, self.ckpt, self.dtype, self.device = model, ckpt, dtype, torch.device(device)
        self.window = window
        self.widened = False  # to fp32, after they were rounded to `dtype`
        self.names = {id(m): n for n, m in model.named_modules()}
        self.meta: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.fp32 = kept_in_fp32(model, dtype)
        self.quantizer = quantizer
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
        for name in self._of(module, self.names[id(module)], True):
            key = self.targets_of.get(name, name)
            for source, _ in self.sources.get(key) or self.sources.get(self.tied.get(key, "")) or []:
                ref = self.ckpt.tensors[source]
                yield self.ckpt.path(ref.file), ref.offset, ref.nbytes

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
                f"{self.ckpt.root}: no tensor for upstream's {missing[0]} ({what or prefix}); verify without --stream"
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
            raise ZooError(f"{self.ckpt.root}: no tensor for upstream's {name}; verify without --stream")
        refs = [self.ckpt.tensors[source] for source, _ in found]
        pattern = found[0][1]
        if pattern is None:
            return {name: self._mapped(refs[0])}
        mapping = deepcopy(self.converter[pattern])
        for ref, (source, p) in zip(refs, found, strict=True):
            mapping.add_tensor(key, source, p, self._mapped(ref))
        del refs
        with its_own_errors(self.ckpt.root), exact_values():
            made = mapping.convert(
                key, model=self.model, config=self.model.config, hf_quantizer=self.quantizer
            )
        return {n: (t[0] if isinstance(t, list) else t) for n, t in made.items()}

    def _set(self, name: str, t: Tensor) -> None:
        like = self.meta[name]
        if tuple(t.shape) != tuple(like.shape):
            raise ZooError(
                f"{self.ckpt.root}: {name} has shape {list(t.shape)}, upstream's class needs {list(like.shape)}"
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
