"""Oracles: whatever says what the logits should be.

An oracle is anything with the methods of `Oracle`. Here is the one that runs transformers in process;
`golden.py` reads a recording; docs/verification.md shows a vendor's own code as a third.

Unusual: hidden states are taken by hooks on the list of decoder layers, which is found by its length and
not by any family's name for it. Right-padded rows need no mask: every model here is causal.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import io
import json
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.formats.base import read_json
from zoo.verify.aside import put_aside
from zoo.verify.gguf_parsed import metadata_once

OnLayer = Callable[[int, Tensor], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
LIMITS = ("sliding_window", "attention_chunk_size", "index_topk", "floor_scale")
"""Fields of upstream's configs that are numbers of positions at which a model starts to behave differently."""
ACTIVATIONS = ("input_activations", "output_activations")  # of a scheme of compressed-tensors


class Oracle(Protocol):
    """The protocol. Only `describe` and `run` are needed to judge layers and logits."""

    def describe(self) -> dict[str, Any]:
        """Who this is: at least `kind`; versions and what it was loaded from."""
        ...

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OnLayer | None = None) -> Tensor:
        """Logits [B, T, V] of right-padded `ids` [B, T]; `on_layer(i, x)` with the state [B, T, D] after layer i."""
        ...

    def second_way(self) -> contextlib.AbstractContextManager[tuple[str, str] | None]:
        """While open, `run` computes the same another way; gives the two ways' names, or None if there is one."""
        ...

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        """The next `n` greedy tokens after `ids` [1, T], with a KV cache: [n]; None if it can't. Raises CannotRun where upstream's own
        code fails at it."""
        ...

    avoid_ids: frozenset[int]


def upstream_available() -> bool:
    """Whether transformers is installed. Raises ZooError, naming it, where a module that transformers needs is not."""
    if importlib.util.find_spec("transformers") is None:
        return False
    try:
        import transformers  # noqa: F401
    except ImportError as e:
        raise ZooError(
            f"transformers is installed, and cannot be imported: {e}; install what is missing, or verify up to `bytes`, which "
            "needs nothing but the source's files"
        ) from e
    return True


# ---------------------------------------------------------------------------------------------------
# transformers


class Transformers:
    """Upstream's own classes on a checkpoint they can read: a Hugging Face folder, or a GGUF file."""

    def __init__(
        self,
        path: Path,
        dtype: str = "fp32",
        note: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.path, self.dtype, self.device = path, dtype, torch.device(device)
        self.corrected: list[str] = []  # points in which the model does as zoo does, not as the library
        self.note = "; ".join(filter(None, (note, read_otherwise(path), _index_note(path)))) or None
        quiet()
        self.model = load(path, DTYPES[dtype], self.device).to(self.device)
        self.layers = decoder_layers(self.model)
        self.avoid_ids = placeholder_ids(self.model.config)

    @property
    def limits(self) -> dict[str, int]:
        """Numbers of positions at which upstream starts to behave differently, by its own config."""
        config = self.model.config.get_text_config()
        values = {key: getattr(config, key, None) for key in LIMITS}
        return {
            f"upstream's {k} {n:g}": int(n)
            for k, n in values.items()
            if isinstance(n, int | float) and n >= 1
        }

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "kind": "transformers",
            "version": transformers.__version__,
            "class": type(self.model).__name__,
            "loaded_from": str(self.path),
            "dtype": self.dtype,
            "attention": self.model.config._attn_implementation,
            "experts": getattr(self.model.config, "_experts_implementation", None),
            "note": self.note,
            "corrected": self.corrected,
        }

    def run(self, ids: Tensor, lengths: Sequence[int], on_layer: OnLayer | None = None) -> Tensor:
        own = its_own_failure(self.model, self.dtype)
        with torch.inference_mode(), hooks(self.layers, on_layer, ids), own:
            logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def second_way(self) -> Iterator[tuple[str, str] | None]:
        """sdpa for eager attention and one grouped product for looped experts, where upstream has them. Without another
        attention: in fp32 a row at a time; in lower precision the same weights in fp32, for there attention's
        own rounding is most of the spread."""
        first, second = [], []
        for kind, switch, attribute, other in (
            ("attention", "set_attn_implementation", "_attn_implementation", "sdpa"),
            ("experts", "set_experts_implementation", "_experts_implementation", self._other_experts()),
        ):
            if other and self._switch(switch, attribute, other):
                first.append(f"eager {kind}")
                second.append(f"{other} {kind}")
        try:
            if self.dtype != "fp32" and "eager attention" not in first:
                with self._in_fp32():
                    yield self.dtype, "fp32 on the same weights"
            elif first:
                yield " and ".join(first), " and ".join(second)
            elif not self._split_rows():
                yield None
            else:
                whole, self.run = self.run, self._row_by_row  # type: ignore[method-assign]
                try:
                    yield "all rows at once", "row by row, one thread"
                finally:
                    self.run = whole  # type: ignore[method-assign]
        finally:
            self._switch("set_attn_implementation", "_attn_implementation", "eager")
            self._switch("set_experts_implementation", "_experts_implementation", "eager")

    @property
    def only_switches(self) -> bool:
        """Whether the second way leaves the weights as they are, so that going back and forth costs nothing."""
        try:
            return self.dtype == "fp32" or self._switch(
                "set_attn_implementation", "_attn_implementation", "sdpa"
            )
        finally:
            self._switch("set_attn_implementation", "_attn_implementation", "eager")

    def _other_experts(self) -> str | None:
        """The kernel to hold against the loop over experts. The grouped one wants rows of 16 bytes; the batched one
        gathers every token's experts, which only small models have the memory for."""
        experts = [p for p in self.layers.parameters() if p.ndim == 3 and p.shape[1] > 1]
        if not experts:
            return None
        size = DTYPES[self.dtype].itemsize
        if all(n * size % 16 == 0 for p in experts for n in p.shape[1:]):
            return "grouped_mm"
        return "batched_mm" if max(p.numel() for p in experts) < 1 << 20 else None

    @contextlib.contextmanager
    def _in_fp32(self) -> Iterator[None]:
        """Every parameter exactly as it is, in fp32, and back."""
        was = {p: p.dtype for p in self.model.parameters()}
        self.model.float()
        try:
            yield
        finally:
            for p, dtype in was.items():
                p.data = p.data.to(dtype)

    def _switch(self, method: str, attribute: str, to: str) -> bool:
        """Ask upstream for another kernel; False where this model has no such choice."""
        config = self.model.config.get_text_config()
        try:
            getattr(self.model, method)(to)
        except (AttributeError, ValueError, ImportError, NotImplementedError):
            return False
        return getattr(config, attribute, None) == to

    def _split_rows(self) -> bool:
        return True

    def _row_by_row(self, ids: Tensor, lengths: Sequence[int], on_layer: OnLayer | None = None) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        states: dict[int, list[Tensor]] = {}
        try:
            rows = []
            for row, n in zip(ids, lengths, strict=True):
                got = Transformers.run(
                    self, row[None, :n], (n,), lambda i, x: states.setdefault(i, []).append(x)
                )
                rows.append(_pad(got, ids.shape[1]))
        finally:
            torch.set_num_threads(threads)
        if on_layer is not None:
            for i, x in states.items():
                on_layer(i, torch.cat([_pad(r, ids.shape[1]) for r in x], -3))
        return torch.cat(rows)

    def greedy(self, ids: Tensor, n: int) -> Tensor | None:
        borders = longrope_borders(self.model.config)
        text = step = ids.to(self.device)
        cache = None
        with torch.inference_mode(), its_own_failure(self.model, f"{self.dtype} with a cache"):
            for _ in range(n):
                out = self.model(input_ids=step, use_cache=True, past_key_values=cache)
                step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                if (
                    text.shape[1] in borders
                ):  # as generate() of the classes that were released so (Phi 3, Phi-3.5-MoE)
                    step, cache = torch.cat([text, step], 1), None
                text = torch.cat([text, step[:, -1:]], 1)
        return text[0, ids.shape[1] :].cpu()


def longrope_borders(config: Any) -> set[int]:
    """The lengths of a text beyond which LongRoPE's angles are others, for all its positions, by upstream's own config."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [p for p in (rope, *rope.values()) if isinstance(p, dict) and p.get("rope_type") == "longrope"]
    said = [p.get("original_max_position_embeddings") for p in kinds]
    return {n for x in said if (n := x or getattr(text, "original_max_position_embeddings", None))}


def _pad(x: Tensor, length: int) -> Tensor:
    """Zeros to the right on the axis of positions (the last but one)."""
    return nn.functional.pad(x, (0, 0, 0, length - x.shape[-2]))


def quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def from_pretrained_files(root: Path) -> tuple[str, ...] | None:
    """The files of weights that `from_pretrained(root)` reads, by an implementation of its own that shares nothing with
    zoo's readers: a proof must not read what zoo chose. None if it would find none. (transformers 5.23: what
    `transformers_weights` in the config names, else the first of four names.)"""
    entry = _entry(root)
    if entry is None or not entry.endswith(".json"):
        return None if entry is None else (entry,)
    named = read_json(root / entry, "it lists the shards")["weight_map"].values()
    return tuple(sorted({str(name).removeprefix("./") for name in named}))


def _entry(root: Path) -> str | None:
    """The file that `from_pretrained` opens first: the weights, or the index of their shards."""
    config = read_json(root / "config.json", "upstream reads it")
    if (said := config.get("transformers_weights")) is not None:
        return str(said)
    stems = ("model.safetensors", "pytorch_model.bin")
    return next((n for s in stems for n in (s, f"{s}.index.json") if (root / n).is_file()), None)


def _mended_index(root: Path) -> tuple[str, dict[str, Any]] | None:
    """The index of shards with the object `metadata` that transformers 5.23 stops without, and its name; None where there is
    no such index, or it has one."""
    entry = _entry(root)
    if entry is None or not entry.endswith(".json"):
        return None
    index = read_json(root / entry, "it lists the shards")
    return None if isinstance(index.get("metadata"), dict) else (entry, {**index, "metadata": {}})


def _index_note(path: Path) -> str | None:
    mended = _mended_index(path) if path.is_dir() else None
    return (
        f"upstream was given {mended[0]} with an object 'metadata': it has none, and transformers stops without"
        if mended
        else None
    )


@contextlib.contextmanager
def _opened_as(path: Path) -> Iterator[Path]:
    """The folder that upstream opens: `path`, or links to what is in it beside a mended index."""
    if (mended := _mended_index(path)) is None:
        yield path
        return
    entry, index = mended
    with tempfile.TemporaryDirectory(prefix="zoo-verify-") as links:
        for file in path.resolve().iterdir():
            if (
                file.suffix == ".json" and file.is_file()
            ):  # what zoo reads is read as a stranger's: a link out is refused
                shutil.copyfile(file, Path(links) / file.name)
            else:
                (Path(links) / file.name).symlink_to(file)
        (Path(links) / entry).write_text(json.dumps(index), encoding="utf-8")
        yield Path(links)


def load(path: Path, dtype: torch.dtype, device: torch.device = CPU) -> Any:
    """Upstream's model of the checkpoint at `path`, eager attention and experts, in eval mode: on the CPU, or where `device` is
    another and upstream dequantises faster there, on that."""
    import transformers

    switches: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if path.suffix == ".gguf":
        cls = transformers.AutoModelForCausalLM
        # It reads some architectures only, and of those not every shape.
        with its_own_errors(path), metadata_once():
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
                    return cls.from_pretrained(path.parent, gguf_file=path.name, **switches).eval()
            except ImportError as e:
                raise ZooError(f"{path}: transformers needs another package to read GGUF: {e}") from e
    config, cls = config_and_class(path)
    given = {
        "config": config,
        "generation_config": transformers.GenerationConfig(),  # else it reads config.json for one, what was put aside too
        "output_loading_info": True,
    }
    if cls._can_set_experts_implementation():
        switches["experts_implementation"] = "eager"
    there = device != CPU and (quantisation_of(config) or {}).get("quant_method") == "mxfp4"
    if there:  # a table look-up for each of its codes
        switches["device_map"] = {"": device}
    with its_own_errors(path), exact_values(), _opened_as(path) as at:
        try:
            model, said = cls.from_pretrained(at, **given, **switches)
        except ValueError as e:  # a class without the switch
            if "attn_implementation" not in str(e) and "attention" not in str(e).lower():
                raise
            switches.pop("attn_implementation")
            switches.pop("experts_implementation", None)
            model, said = cls.from_pretrained(at, **given, **switches)
        if missing := sorted(said["missing_keys"]):  # it would go on with random numbers
            raise LookupError(f"no tensor for {', '.join(missing[:3])} ({len(missing)} in all)")
        held = model.state_dict()
        for scale in sorted(
            said["unexpected_keys"]
        ):  # Mistral Small 4's experts in 5.23: their codes would be the values
            if (weight := re.sub("_scale(_inv)?$", "", scale)) != scale and weight in held:
                raise LookupError(f"{weight} is loaded without its scales ({scale})")
    if quantisation_of(config):
        _cast_plain(model, config, dtype)
    if there:
        _as_computed_here(model)
    return model.eval()


def _as_computed_here(model: Any) -> None:
    """The buffers that no checkpoint holds (rotary frequencies) as the CPU computes them, as in models that are loaded there."""
    from zoo.verify.skeleton import skeleton

    kept = set(model.state_dict())
    for name, b in skeleton(type(model), model.config, model.dtype).named_buffers():
        if name not in kept:
            owner, _, leaf = name.rpartition(".")
            held = model.get_submodule(owner)._buffers
            held[leaf] = b.to(held[leaf].device)


def _cast_plain(model: Any, config: Any, dtype: torch.dtype) -> None:
    """The unquantised tensors in the dtypes that an unquantised checkpoint's would have. Upstream leaves those of a
    quantised one as in the file, bf16 beside the dequantised fp32 (seen in transformers 5.23)."""
    plain = copy.deepcopy(config)
    for c in (plain, plain.get_text_config()):
        c.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        like = type(model)._from_config(plain, dtype=dtype)
    kept = kept_in_fp32(like, dtype)
    held = dict(model.state_dict(keep_vars=True))
    for name in like.state_dict():
        if (t := held.get(name)) is not None and t.is_floating_point():
            t.data = t.data.to(torch.float32 if name in kept else dtype)


def kept_in_fp32(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Names of the tensors that upstream's class, made in `dtype`, has in fp32 all the same."""
    plan = [re.compile(rf"(^|\.){re.escape(k)}(\.|$)") for k in model._get_dtype_plan(dtype)]
    tensors = model.state_dict(keep_vars=True).items()
    return frozenset(n for n, t in tensors if t.dtype == torch.float32 or any(p.search(n) for p in plan))


def quantisation_of(config: Any) -> dict[str, Any] | None:
    """What upstream's config says of quantised weights, in the wrapper's part or the text model's."""
    for c in (config, config.get_text_config()):
        if (found := getattr(c, "quantization_config", None)) is not None:
            return found if isinstance(found, dict) else dict(found.to_dict())
    return None


def _weights_only(config: Any) -> None:
    """Quantised weights dequantised while loading, wherever this is run (with a GPU upstream would have fp8 kernels). Of
    compressed-tensors only the weights: upstream would round activations too, as the engine does that a release is for,
    and ours is compared for what its weights stand for."""
    for c in (config, config.get_text_config()):
        q = getattr(c, "quantization_config", None)
        if isinstance(q, dict) and q.get("quant_method") in ("fp8", "mxfp4", "compressed-tensors"):
            c.quantization_config = q | {"dequantize": True}
            if groups := q.get("config_groups"):
                none = dict.fromkeys(ACTIVATIONS)
                c.quantization_config["config_groups"] = {
                    name: g | none if isinstance(g, dict) else g for name, g in groups.items()
                }


def read_otherwise(path: Path) -> str | None:
    """For the certificate: in what upstream is given a release other than it is written; None if in nothing."""
    if not (path / "config.json").is_file():
        return None
    raw, aside = _told(path)
    return "; ".join([*aside, *_dequantised(raw)]) or None


def _dequantised(raw: dict[str, Any]) -> list[str]:
    """How quantised weights are read, where that is not as a release has them."""
    found = [c.get("quantization_config") for c in (raw, raw.get("text_config")) if isinstance(c, dict)]
    for q in found:
        if isinstance(q, dict) and q.get("quant_method") == "compressed-tensors":
            groups = (q.get("config_groups") or {}).values()
            rounds = any(isinstance(g, dict) and g.get(kind) for g in groups for kind in ACTIVATIONS)
            how = f", and not to round activations as the release has it ({', '.join(ACTIVATIONS)})"
            said = "upstream was told to dequantise weights while loading, by scales widened to fp32"
            return [said + (how if rounds else "")]
    return []


@contextlib.contextmanager
def its_own_errors(path: Path) -> Iterator[None]:
    """What goes wrong inside upstream's loading is no bug of ours, and no verdict."""
    try:
        yield
    except (ZooError, MemoryError):
        raise
    except Exception as e:
        raise CannotLoad(f"{path}: upstream cannot load this: {_first_line(e)}") from e


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


@contextlib.contextmanager
def exact_values() -> Iterator[None]:
    """Meanwhile upstream's own dequantisation gives the value that codes and scales stand for, rounded once, also where
    transformers 5.23 does not:
    - of fp8 it takes the block to be the shape over the grid of scales; where the last block is not whole (DeepSeek V3's
      576 rows in blocks of 128) that is refused, or wrong. Codes are padded to whole blocks, and the padding cut off.
    - of compressed-tensors it multiplies in the scales' dtype, mostly bf16, and rounds NVFP4's values to bf16. The scales are
      widened to fp32, and NVFP4's codes unpacked to that."""
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    one, convert = Fp8Dequantize._dequantize_one, CompressedTensorsDequantize.convert

    def padded(self: Any, codes: Tensor, scales: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        if not block or scales.ndim < 2:
            return one(self, codes, scales, *args, **kwargs)
        shape, grid = list(codes.shape[-2:]), list(scales.shape[-2:])
        full = [n * b for n, b in zip(grid, block, strict=True)]
        if full == shape or grid != [-(-n // b) for n, b in zip(shape, block, strict=True)]:
            return one(self, codes, scales, *args, **kwargs)
        (rows, columns), (R, C) = shape, full
        bits = nn.functional.pad(codes.view(torch.uint8), (0, C - columns, 0, R - rows))
        made = one(self, bits.view(codes.dtype), scales, *args, **kwargs)
        return made[..., :rows, :columns].contiguous()

    def widened(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        wide = {
            k: v if "weight_scale" not in k else [t.float() for t in v] if isinstance(v, list) else v.float()
            for k, v in input_dict.items()
        }
        return convert(self, wide, *args, **kwargs)

    Fp8Dequantize._dequantize_one, CompressedTensorsDequantize.convert = padded, widened
    try:
        with _fp4_in_fp32():
            yield
    finally:
        Fp8Dequantize._dequantize_one, CompressedTensorsDequantize.convert = one, convert


@contextlib.contextmanager
def _fp4_in_fp32() -> Iterator[None]:
    """Meanwhile compressed-tensors, where it is there and has NVFP4, computes its values in fp32."""
    try:
        nvfp4: Any = importlib.import_module("compressed_tensors.compressors.nvfp4.base")
        unpack = nvfp4.unpack_fp4_from_uint8
    except (ImportError, AttributeError):
        yield
        return
    nvfp4.unpack_fp4_from_uint8 = functools.partial(unpack, dtype=torch.float32)
    try:
        yield
    finally:
        nvfp4.unpack_fp4_from_uint8 = unpack


def _told(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The config that upstream is given of a folder, and what it was not told of it."""
    raw = _plain(read_json(path / "config.json", "upstream reads it"))
    return put_aside(raw, path, from_pretrained_files(path))


def config_and_class(path: Path) -> tuple[Any, Any]:
    """Upstream's config object and class for a folder: by `architectures`; the text model's where the
    wrapper's class cannot be built here (a vision tower that needs packages nobody installed)."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    raw, _ = _told(path)
    # A decoder's class without its head gives no logits: the model_type decides, as AutoModelForCausalLM has it.
    named = raw.get("architectures") or ()
    candidates = [(n, raw) for n in named if n.endswith("LMHeadModel") or not n.endswith("Model")]
    candidates += [(CAUSAL.get(raw.get("model_type")), raw)]
    if isinstance(text := raw.get("text_config"), dict):
        inherited = {k: raw[k] for k in ("tie_word_embeddings",) if k in raw and k not in text}
        candidates += [(CAUSAL.get(text.get("model_type")), inherited | text)]
    errors = []
    for name, data in candidates:
        cls = getattr(transformers, name or "", None)
        if cls is None:
            errors.append(f"transformers {transformers.__version__} has no class {name}")
            continue
        keys = {k: v for k, v in data.items() if k != "auto_map"}
        keys["model_type"] = cls.config_class.model_type
        with its_own_errors(path):
            config = cls.config_class.from_dict(_typed(keys, cls.config_class))
            _weights_only(config)
            try:
                with torch.device("meta"):
                    cls._from_config(config)
            except ImportError as e:
                errors.append(f"{name}: {e}")
                continue
        return config, cls
    raise NoUpstream(f"{path}: upstream cannot run this: " + "; ".join(dict.fromkeys(errors)))


def _typed(keys: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """Numbers of the types that upstream's class asks for, which takes no whole number for a float (JSON has one kind of
    number: 1 is 1.0), nor 0 for false."""
    out = dict(keys)
    for f in dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ():
        asked = {t.strip() for t in str(getattr(f.type, "__name__", f.type)).split("|")}
        value = out.get(f.name)
        if type(value) is int and "int" not in asked:
            if "float" in asked:
                out[f.name] = float(value)
            elif "bool" in asked and value in (0, 1):
                out[f.name] = bool(value)
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if isinstance(out.get(name), dict):
            out[name] = _typed(out[name], part)
    return out


class NoUpstream(ZooError):
    """There is no upstream implementation to compare with."""


class CannotLoad(NoUpstream):
    """There is one, and it does not load these files."""


class CannotRun(NoUpstream):
    """There is one, and its own code fails on this model."""


@contextlib.contextmanager
def its_own_failure(model: nn.Module, dtype: str) -> Iterator[None]:
    """What fails in upstream's code while it computes (DeepSeek V4 in fp16, transformers 5.23) is no bug of ours, and no verdict.
    What fails in ours, which is called by its hooks, is. Memory that is short stays what it is, and so does what a GPU says later than
    it happened, of whose kernels nobody knows."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, ZooError):
        raise
    except Exception as e:
        if "can't allocate memory" in str(e):  # torch's own, of a CPU: a RuntimeError
            raise
        frames = [
            frame.f_globals.get("__name__", "").partition(".")[0]
            for frame, _ in traceback.walk_tb(e.__traceback__)
        ]
        if next((name for name in reversed(frames) if name in ("zoo", "transformers")), "zoo") == "zoo":
            raise
        raise CannotRun(
            f"upstream's {type(model).__name__} fails in {dtype}: {_first_line(e)}; verify in another --dtype"
        ) from e


class DequantisedWhole(CannotLoad):
    """Its dequantisation of these files needs the whole model, or a package that is not here."""


def _plain(value: Any) -> Any:
    """JSON's stand-ins for infinity resolved."""
    if isinstance(value, dict):
        return float(value["__float__"]) if "__float__" in value else {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the longest-running ModuleList as long as the text config's depth.

    A vision tower has its own; the text model's is the one whose modules hold most parameters.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    n = config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if not lists:
        raise ZooError(
            f"{type(model).__name__}: no list of {n} decoder layers found, so hidden states cannot be taken"
        )
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


@contextlib.contextmanager
def hooks(layers: nn.ModuleList, on_layer: OnLayer | None, ids: Tensor) -> Iterator[None]:
    """Call `on_layer(i, state)` with what each layer makes of `ids` [B, T]."""
    if on_layer is None:
        yield
        return

    def hook(i: int) -> Callable[..., None]:
        def call(_module: nn.Module, _args: Any, out: Any) -> None:
            assert on_layer is not None
            on_layer(i, streams_first(out[0] if isinstance(out, tuple) else out, ids))

        return call

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def placeholder_ids(config: Any) -> frozenset[int]:
    """Ids that stand for an image, a video or a sound in a wrapper's input. Gemma 3n's are the last of its vocabulary, from where its
    towers' own begin (`vocab_offset`): the text model has rows for them too, which the wrapper does not look up."""
    found: set[int] = set()
    said = config.to_dict()
    begins = [
        part["vocab_offset"] for part in said.values() if isinstance(part, dict) and part.get("vocab_offset")
    ]
    if begins:
        found.update(range(min(begins), config.get_text_config().vocab_size))
    for key, value in said.items():
        if isinstance(value, int) and any(
            w in key for w in ("image", "video", "audio", "vision", "boi", "eoi", "boa")
        ):
            if key.endswith(("token_id", "token_index")):
                found.add(value)
    return frozenset(found)


def streams_first(state: Tensor, ids: Tensor) -> Tensor:
    """Of several streams, [B, T, S, D] as some classes have them, [S, B, T, D]; any other state of `ids` [B, T] as it is."""
    if state.ndim == 4 and state.shape[:2] == ids.shape and state.shape[1:3] != ids.shape:
        return state.permute(2, 0, 1, 3)
    return state
