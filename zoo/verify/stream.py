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
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.formats import safetensors
from zoo.formats.base import Checkpoint, read_json
from zoo.mapping.plan import Plan
from zoo.verify import room
from zoo.verify.carrying import Carrier
from zoo.verify.compare import OnLayer, OnLogits, SpreadMeter
from zoo.verify.inputs import Batch
from zoo.verify.oracle import (
    DTYPES,
    CannotLoad,
    Transformers,
    config_and_class,
    decoder_layers,
    from_pretrained_files,
    its_own_failure,
    placeholder_ids,
    quiet,
    read_otherwise,
    streams_first,
)
from zoo.verify.oracle import OnLayer as OnOneLayer
from zoo.verify.reading import Ahead, Passing, Range, Window
from zoo.verify.sharing import Sharing
from zoo.verify.skeleton import skeleton
from zoo.verify.stage import Clock
from zoo.verify.stream_gguf import GGUFWeights
from zoo.verify.stream_gguf import config_and_class as of_gguf
from zoo.verify.stream_given import GivenWeights
from zoo.verify.stream_weights import Weights, as_plain, dequantizer

HEAD_ROWS = 8192
"""Rows of the head that are in memory at a time."""


class StreamedTransformers(Transformers):
    """As `Transformers`, for folders of safetensors and GGUF files, within the memory of one layer."""

    def __init__(
        self,
        path: Path,
        dtype: str = "fp32",
        note: str | None = None,
        files: Iterable[str] | None = None,
        device: str | torch.device = "cpu",
        window: Window | None = None,
        plan: Plan | None = None,
    ) -> None:
        """`files`: those that the user chose; None: those that `from_pretrained` would take. `window`: what they are read
        through, beside whoever else takes part in a pass. `plan`: by which weights are dequantised that upstream does not
        dequantise by itself."""
        self.path, self.dtype, self.device = path, dtype, torch.device(device)
        self.corrected = []
        self.window = window or Window()
        if path.is_file() and path.suffix == ".gguf":
            self.note = note
            quiet()
            config, cls = of_gguf(path)
            self.model = skeleton(cls, config, DTYPES[dtype], self.device)
            self.weights: Weights = GGUFWeights(self.model, path, DTYPES[dtype], self.device, self.window)
        elif path.is_dir():
            self.note = "; ".join(filter(None, (note, read_otherwise(path)))) or None
            quiet()
            config, cls = config_and_class(path)
            if plan is None:
                quantizer = dequantizer(config, path)
            else:
                as_plain(config)
            self.model = skeleton(cls, config, DTYPES[dtype], self.device)
            how = DTYPES[dtype], self.device, self.window
            if plan is None:
                self.weights = Weights(self.model, _checkpoint(path, files), quantizer, *how)
            else:
                self.weights = GivenWeights(self.model, plan, *how)
        else:
            raise ZooError(
                f"{path}: only a folder of safetensors files, or a GGUF file, can be streamed; verify this one without --stream"
            )
        return_freed_memory()
        self.layers = decoder_layers(self.model)
        self.avoid_ids = placeholder_ids(config)
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
        self._drive(dict(enumerate(batches)), [_Way(contextlib.nullcontext, on_layer, on_logits)])

    def drive_both(
        self,
        batches: Sequence[Batch],
        meter: SpreadMeter,
        on_layer: OnLayer,
        on_logits: OnLogits,
        clock: Clock,
        other: Callable[[], contextlib.AbstractContextManager[tuple[str, str] | None]] | None = None,
    ) -> None:
        """The same both ways, on the weights that are read once; `meter` hears the second (`second_way`, or the `other` given),
        which goes first. Of several ranks each has some of the batches."""
        other = other or self.second_way

        @contextlib.contextmanager
        def second() -> Iterator[None]:
            with clock("oracle, second way"), other():
                yield

        with other() as meter.ways:
            pass
        ways = [_Way(contextlib.nullcontext, on_layer, on_logits)]
        if meter.ways is not None:
            ways.insert(0, _Way(second, meter.keep_layer, meter.keep_logits))
        own = dict(enumerate(batches))
        if (sharing := self.window.sharing) is not None:
            own = {b: batches[b] for b in sharing.mine([x.ids.numel() for x in batches])}
            ways[-1].through = lambda i, states: meter.told(i, states, sharing)
        self._drive(own, ways, lambda: clock("waiting for files"), sharing)

    def _drive(
        self,
        batches: Mapping[int, Batch],
        ways: Sequence[_Way],
        waiting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        sharing: Sharing | None = None,
    ) -> None:
        for way in ways:
            way.workers = {b: _Worker(self, batch) for b, batch in batches.items()}
        ahead = self._ahead(list(batches.values()), sharing)
        try:
            with Passing(self.window, len(self.layers), ahead, waiting) as passing:
                for i in range(len(self.layers)):
                    for way in ways:
                        way.step()  # to just before layer i
                    with passing.layer(i):
                        self._through(i, ways)
                passing.beside()
                for b in batches:
                    for way in ways:
                        way.on_logits(b, way.logits(b))
        finally:
            for way in ways:
                for w in way.workers.values():
                    w.stop()

    def _through(self, i: int, ways: Sequence[_Way]) -> None:
        """Layer `i`, to just after it; both ways have the same weights, unless one widens them."""
        layer, loaded = self.layers[i], None
        for way in ways:
            with way.open():
                if loaded != (wide := (self.weights.dtype, self.weights.widened)):
                    self.weights.load(layer, f"layer {i}")
                    loaded = wide
                for w in way.workers.values():
                    w.step()
        self.weights.unload(layer)
        for way in ways:
            states = {b: w.taken() for b, w in way.workers.items()}
            way.through(i, states)
            for b in list(states):
                way.on_layer(b, i, states.pop(b))

    def ranges(self, layer: int) -> Iterator[Range]:
        """What a pass will read of a layer."""
        return self.weights.ranges(self.layers[layer])

    def computes_with(self, layer: int | None) -> Iterator[Range]:
        """Weights of a layer, or of the head."""
        part = self.model.get_output_embeddings() if layer is None else self.layers[layer]
        return self.weights.used_there(part)

    def leave(self, layer: int | None) -> None:
        """It has gone already."""

    def _ahead(self, batches: Sequence[Batch], sharing: Sharing | None) -> Ahead | None:
        """What copies layers to the device."""
        return None if self.device.type != "cuda" else Carrier(self.device, self._takes(batches), sharing)

    def _takes(self, batches: Sequence[Batch]) -> int:
        """Bytes that a pass takes at most beside the files' own."""
        w = self.weights
        with self.second_way():
            widened = w.widened
        layers = [[w.meta[name] for name in w.names_of(x)] for x in self.layers]
        head = w.meta[f"{w.names[id(self.model.get_output_embeddings())]}.weight"]
        config = self.model.config.get_text_config()
        return room.of_pass(layers, head, batches, config, w.dtype, self.device, w.converts, widened)

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
            rows = self.weights.cast(f"{name}.weight", self.weights.rows_of(f"{name}.weight")(seen.cpu()))
            m.weight = nn.Parameter(rows, requires_grad=False)
            return (compact,)

        return hook

    def _head(self, m: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            rows = self.weights.rows_of(f"{name}.weight")
            starts = range(0, len(self.weights.meta[f"{name}.weight"]), HEAD_ROWS)
            some = (rows(slice(i, i + HEAD_ROWS)) for i in starts)
            parts = (self.weights.cast(f"{name}.weight", part).to(x) for part in some)
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
    workers: Mapping[int, _Worker] = field(default_factory=dict)
    through: Callable[[int, Mapping[int, Tensor]], None] = lambda _i, _states: None
    """Hears all the states after a layer, before each goes to `on_layer`."""

    def step(self) -> None:
        with self.open():
            for w in self.workers.values():
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
        return streams_first(state, self.batch.ids)

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
                own = its_own_failure(self.oracle.model, self.oracle.dtype)
                with torch.inference_mode(), self.oracle.around_pass(), own:
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
