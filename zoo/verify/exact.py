"""The levels without arithmetic: plan (every tensor accounted for) and bytes (every element where it belongs).

The bytes level does not run the executor again. It looks up each canonical element in the source through the
plan's boxes with strided views, which is another way to the same place; and it counts that every element of
every source tensor is used exactly once. Where the dtype was changed, the source is rounded here (to nearest,
ties to even) and the bits must agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from zoo import card, families
from zoo.errors import ZooError
from zoo.formats.base import FLOATS, ITEMSIZE, Checkpoint, TensorRef, place_of, read_json
from zoo.formats.canonical import Canonical
from zoo.layout import layout
from zoo.mapping import changes
from zoo.mapping.plan import Plan
from zoo.mapping.recipe import Output
from zoo.mapping.rules import Box
from zoo.model.load import DTYPES as TORCH
from zoo.quant.schemes import scheme
from zoo.spec import Spec
from zoo.verify import certificate
from zoo.verify.certificate import Check, Level
from zoo.verify.reading import Range, Window, mapped_range

Array = NDArray[Any]
Read = Callable[[Path, int, int], Tensor]
"""Bytes of a file, by offset and number."""
CHUNK = 1 << 22  # elements compared at a time
CHUNK_THERE = 1 << 26  # on another device
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def plan_of(folder: Canonical, ckpt: Checkpoint) -> Plan:
    """The plan by which `folder` should have been made of `ckpt`."""
    from zoo.mapping.plan import make_plan

    plan = make_plan(
        ckpt, families.get(folder.spec.family, folder.source.get("package")), converted_to(folder)
    )
    return plan if folder.layers is None else plan.restrict(folder.layers)


def converted_to(folder: Canonical) -> str | None:
    """The dtype that was asked for when `folder` was made; None: as released."""
    asked = folder.source.get("dtype") or folder.json.get("dtype")
    return {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}.get(asked, asked) if asked else None


def plan_level(folder: Canonical, plan: Plan | None, why_no_plan: str | None) -> Level:
    """Every slot of the layout is there in its shape, nothing else is, and every source tensor is accounted for."""
    level = Level("plan")
    slots = layout(folder.spec)
    present = [
        s for s in slots.values() if folder.layers is None or s.layer is None or s.layer in folder.layers
    ]
    missing = [s.name for s in present if s.name not in folder.tensors]
    wrong = [
        s.name for s in present
        if s.name in folder.tensors and s.name.removesuffix(".weight") not in folder.quant
        and folder.tensors[s.name].shape != s.shape
    ]  # fmt: skip
    level.checks += [
        Check(
            "layout tensors missing",
            len(missing),
            0,
            f"the Spec's layout has {len(present)} tensors",
            len(present),
        ),
        Check("tensors of another shape", len(wrong), 0, "shapes of the layout", len(present) - len(missing)),
    ]
    level.figures = {"canonical_tensors": len(folder.tensors), "extras": len(folder.extra_tensors)}
    level.notes += missing[:5] + wrong[:5]
    if plan is None:
        level.notes.append(why_no_plan or "no source to plan from")
        return level
    apart = spec_differences(folder.spec, plan.spec)
    made = {n for n in folder.tensors if n not in plan.outputs}
    made |= {n for n in plan.outputs if n not in folder.tensors and folder.layers is None}
    refs = plan.checkpoint.tensors
    used: dict[str, int] = {}
    whole = {n: ref.size for n, ref in refs.items()}
    for o in plan.outputs.values():
        constant = _is_constant(o.name, plan)
        for k, fit in enumerate(o.fits):
            if constant and o.sources[k] in used:
                continue  # each part that lies in a released tensor has the number of that
            used[o.sources[k]] = used.get(o.sources[k], 0) + _size(fit.source)
            if (way := o.way(k)) is not None:  # the fits are of logical elements, several to a packed code
                whole[o.sources[k]] = int(refs[o.sources[k]].size * _per_code(way))
            for name in o.beside(k).values():
                used[name] = refs[name].size
    partial = [n for n, size in used.items() if size != whole[n]] if folder.layers is None else []
    schemes = [n for n in {**folder.quant, **plan.quant} if folder.quant.get(n) != plan.quant.get(n)]
    lost = [n for n in refs if n not in used and n not in plan.extras] if folder.layers is None else []
    aside = [n for n in plan.extras if n not in folder.extra_tensors and n not in folder.extras]
    all_of = folder.layers is None  # of a part of the layers some sources are not used, as is meant
    codes, fields = {**folder.quant, **plan.quant}, flat(plan.spec.to_dict())
    planned = Check(
        "canonical tensors not as planned",
        len(made),
        0,
        f"the plan has {len(plan.outputs)} tensors",
        len(plan.outputs),
    )
    level.checks.append(planned)
    for name, wrong_ones, of, why in (
        ("source tensors unaccounted for", lost, len(refs) if all_of else 0, f"the source has {len(refs)} tensors"),
        ("source tensors used in part or twice", partial, len(used) if all_of else 0, "each element of a source is used once"),
        ("weights of another quantisation", schemes, len(codes), f"the plan has {len(plan.quant)} quantised ones"),
        ("extras not kept", aside, len(plan.extras), f"{len(plan.extras)} source tensors are kept aside"),
        ("Spec differs from the source's", apart, len(fields), "Spec made from the source's config"),
    ):  # fmt: skip
        level.count(name, len(wrong_ones), of, why)
    level.figures |= {"source_tensors": len(refs), "rules": plan.rules_version}
    level.notes += [f"Spec: {text}" for text in apart[:5]]
    if plan.spec.dtype != folder.spec.dtype:
        level.notes.append(
            f"the source declares {plan.spec.dtype or 'no dtype'}, that of the folder {folder.spec.dtype or 'none'}: not compared"
        )
    level.notes += sorted(made)[:5] + lost[:5] + partial[:5] + aside[:5]
    level.notes += [
        f"{n} is quantised as {folder.quant.get(n)} in zoo.json, as {plan.quant.get(n)} in the plan"
        for n in schemes[:5]
    ]
    return level


def _is_constant(name: str, plan: Plan) -> bool:
    """Whether it is a component that is one thing of each released tensor: a scale of all of it."""
    stem, _, part = name.rpartition(".")
    how = plan.quant.get(stem)
    return how is not None and any(c.name == part and c.unit is None for c in scheme(how).components)


def spec_differences(mine: Spec, source: Spec) -> list[str]:
    """Each field of the architecture that is not the source's. The dtype that a config declares is none of them: it says
    how weights were stored, not what is computed."""
    a, b = flat(mine.to_dict()), flat(source.to_dict())
    return [
        f"{key} is {a.get(key, 'absent')} in the folder, {b.get(key, 'absent')} by the source"
        for key in sorted(a.keys() | b.keys())
        if key != "dtype" and a.get(key, _ABSENT) != b.get(key, _ABSENT)
    ]


_ABSENT = object()


def flat(x: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects and lists by their paths: `layers.3.mixer.window`."""
    if isinstance(x, dict | list) and x:
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: v for key, y in items for k, v in flat(y, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): x}


def _per_code(scheme_name: str) -> Fraction:
    """Logical elements to an element of the codes."""
    codes = scheme(scheme_name).components[0]
    assert codes.unit is not None
    return Fraction(math.prod(codes.unit), math.prod(codes.trailing) * math.prod(codes.per))


def _size(box: Box) -> int:
    return math.prod(box.shape)


def bytes_level(folder: Canonical, plan: Plan, override: Mapping[str, Tensor] | None = None) -> Level:
    """Every canonical element against its source. `override`: tensors in memory that stand for the folder's
    (a seeded fault); then only these are looked at."""
    return Bytes(folder, plan, override).level()


class Bytes:
    """The bytes level, as far as it has come: beside a pass over the layers (a `reading.Rider`), or all at once."""

    def __init__(
        self,
        folder: Canonical,
        plan: Plan,
        override: Mapping[str, Tensor] | None = None,
        window: Window | None = None,
    ) -> None:
        self.folder, self.plan, self.override = folder, plan, override
        self.window = window
        self.read: Read = mapped_range if window is None else window.range
        self.names = [n for n in plan.outputs if n in folder.tensors and (override is None or n in override)]
        self.sharing = None if window is None else window.sharing
        self.own = frozenset(self.names)  # what this rank looks at beside the pass
        if self.sharing is not None:
            sizes = [folder.tensors[n].nbytes for n in self.names]
            self.own = frozenset(self.names[k] for k in self.sharing.mine(sizes))
        self.seconds = 0.0
        self._found: dict[
            str, int | Tensor
        ] = {}  # how many elements differ; where that was counted on a device, there

    def ranges(self, layer: int) -> Iterator[Range]:
        """What `leave` will read of a layer, of the folder and of the source."""
        for name in self._of(layer):
            yield self._mine(name)
            yield from self._sources(name)

    def computes_with(self, layer: int | None) -> Iterator[Range]:
        """What lies on both sides as it is compared, whichever rank does that: all ask for the same."""
        starts = _prefix(layer)
        for name in self.names:
            if name.startswith(starts) == (layer is not None) and self._bits_alone(name):
                yield self._mine(name)
                yield from self._sources(name)

    def _mine(self, name: str) -> Range:
        ref = self.folder.tensors[name]
        return self.folder.path(ref), ref.offset, ref.nbytes

    def _sources(self, name: str) -> list[Range]:
        output, ckpt = self.plan.outputs[name], self.plan.checkpoint
        refs = [ckpt.tensors[s] for s in (*output.sources, *_parts(output))]
        return [(ckpt.path(r.file), r.offset, r.nbytes) for r in refs]

    def _bits_alone(self, name: str) -> bool:
        """Whether nothing is done to the source's elements but that they are put elsewhere."""
        output, dtype = self.plan.outputs[name], self.folder.tensors[name].dtype
        same = all(self.plan.checkpoint.tensors[s].dtype == dtype for s in output.sources)
        return same and _as_it_lies(self.plan, output) and not any(fit.change for fit in output.fits)

    def leave(self, layer: int | None) -> None:
        self.look(self._of(layer))

    def _of(self, layer: int | None) -> list[str]:
        """What has not been looked at yet, of a layer or beside the layers."""
        starts = _prefix(layer)
        own = [n for n in self.names if n.startswith(starts) == (layer is not None) and n in self.own]
        return [n for n in own if n not in self._found]

    def told(self) -> None:
        """What the others have found, of several ranks, each of which has looked at its own."""
        if self.sharing is not None:
            for found in self.sharing.all({n: int(count) for n, count in self._found.items()}):
                self._found |= found

    def look(self, names: Sequence[str]) -> None:
        """Compare these."""
        began = time.perf_counter()
        there = {n: self._differing_there(n) for n in names}
        self._found |= {n: count for n, count in there.items() if count is not None}
        names = [n for n in names if n not in self._found]
        # What is compared as it lies takes no memory, so several at once; what must be made first is made one by one.
        with ThreadPoolExecutor(min(certificate.READERS, certificate.cores())) as pool:
            lying = {
                n: pool.submit(self._differing, n)
                for n in names
                if _as_it_lies(self.plan, self.plan.outputs[n])
            }
            self._found |= {n: lying[n].result() if n in lying else self._differing(n) for n in names}
        self.seconds += time.perf_counter() - began

    def _differing_there(self, name: str) -> Tensor | None:
        """As `_differing`, where the pass carried both sides to a device; nobody waits for it. None where it did not."""
        if self.window is None or self.override is not None or not self._bits_alone(name):
            return None
        mine, *theirs = (self.window.carried(*at) for at in (self._mine(name), *self._sources(name)))
        if mine is None:
            return None
        bits = _BITS[ITEMSIZE[self.folder.tensors[name].dtype]]
        counts = []
        for fit, source in zip(self.plan.outputs[name].fits, theirs, strict=True):
            if source is None:
                return None
            a, b = box_of(mine.view(bits), fit.canonical), box_of(source.view(bits), fit.source)
            counts += [torch.count_nonzero(x != y) for x, y in in_pieces_there(a, b)]
        return torch.stack(counts).sum()

    def _differing(self, name: str) -> int:
        output, ref = self.plan.outputs[name], self.folder.tensors[name]
        if self.override is not None:
            mine = _in_memory(self.override[name], ref)
        else:
            mine = flat_of(self.read, self.folder.path(ref), ref)
        fits = range(len(output.fits))
        return sum(_fit_differs(self.read, self.plan, output, k, mine, ref.dtype) for k in fits)

    def level(self) -> Level:
        """What has not been looked at is compared, and the outcome of all."""
        self.read = mapped_range  # of what no pass came by
        self.look([n for n in self.names if n not in self._found])
        level = Level("bytes")
        compared = cast = dequantised = 0
        refs, folder, plan = self.plan.checkpoint.tensors, self.folder, self.plan
        for name in self.names:
            output, ref = plan.outputs[name], folder.tensors[name]
            if output.scheme is not None or any(refs[s].dtype not in ITEMSIZE for s in output.sources):
                dequantised += 1
            elif any(refs[s].dtype != ref.dtype for s in output.sources):
                cast += 1
            compared += ref.size
        found = {n: int(self._found[n]) for n in self.names}
        bad = {n: count for n, count in found.items() if count}
        level.checks = [
            Check(
                "elements that differ from the source",
                sum(bad.values()),
                0,
                f"{compared:,} elements compared",
                compared,
            )
        ]
        if self.override is None:
            began = time.perf_counter()
            self._beside(level)
            self.seconds += time.perf_counter() - began
        level.figures = {
            "elements": compared,
            "cast": cast,
            "dequantised": dequantised,
            "differing": dict(list(bad.items())[:20]),
        }
        level.notes += [f"{n}: {c:,} elements differ" for n, c in list(bad.items())[:8]]
        level.notes += _rounded(folder, plan, bad)
        level.seconds = self.seconds
        return level

    def _beside(self, level: Level) -> None:
        """What a folder has beside the model's tensors: extras, and files that are carried."""
        folder, plan = self.folder, self.plan
        kept = [n for n in plan.extras if n in folder.extra_tensors]
        moved = [n for n in kept if not _same_bytes(folder, plan.checkpoint, n)]
        given = set(plan.carried) & set(plan.checkpoint.carried)  # the source's index is kept elsewhere
        given -= card.of_an_export(plan.checkpoint.root, given)
        changed = [
            n for n in sorted(given) if not _same_file(place_of(folder.root, n), plan.checkpoint.path(n))
        ]
        if "config.json" in changed and _alike_but_for_dtype(
            place_of(folder.root, "config.json"), plan.checkpoint.path("config.json")
        ):
            changed.remove("config.json")
            level.notes.append(
                "config.json differs in the dtype that it declares, and in nothing else: not counted"
            )
        changed += [
            n for n, data in plan.checkpoint.synthesised.items() if not _holds(place_of(folder.root, n), data)
        ]
        level.count(
            "extras that differ from the source",
            len(moved),
            len(kept),
            f"{len(plan.extras)} kept byte for byte",
        )
        files = len(given) + len(plan.checkpoint.synthesised)
        level.count(
            "carried files that differ", len(changed), files, f"{len(plan.carried)} files carried verbatim"
        )
        level.notes += moved[:5] + changed[:5]


def _rounded(folder: Canonical, plan: Plan, bad: Iterable[str]) -> Iterator[str]:
    """What to do where tensors differ whose dtype in the source is another: one side may be the other, rounded."""
    pairs: dict[tuple[str, str], int] = {}
    for name in bad:
        mine = folder.tensors[name].dtype
        theirs = {plan.checkpoint.tensors[s].dtype for s in plan.outputs[name].sources}
        for dtype in theirs.intersection(FLOATS) - {mine}:
            pairs[mine, dtype] = pairs.get((mine, dtype), 0) + 1
    for (mine, dtype), n in pairs.items():
        narrower, there = ITEMSIZE[dtype] <= ITEMSIZE[mine], plan.checkpoint.root
        what = (
            f"compare with files in {mine} (`zoo export` without --dtype), or convert {there} to a folder of its own and verify that"
            if narrower
            else f"convert {there} again, with its own dtype or with --dtype, which is rounded in the same way"
        )
        yield (
            f"{n} of these are {mine} in the folder, {dtype} in {there}: what was rounded to {dtype if narrower else mine} has "
            f"other values; {what}"
        )


def _prefix(layer: int | None) -> str:
    """What a layer's names begin with; None: those of all layers."""
    return "layers." if layer is None else f"layers.{layer}."


def _alike_but_for_dtype(a: Path, b: Path) -> bool:
    """Whether two configs say the same but for a declared dtype, which is no part of the model: an export of what came
    from a GGUF declares one, and the GGUF does not."""

    def plain(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {k: plain(v) for k, v in config.items() if k not in ("dtype", "torch_dtype")}

    try:
        return bool(
            plain(read_json(a, "the config of the folder")) == plain(read_json(b, "the source's config"))
        )
    except ZooError:
        return False


def _parts(output: Output) -> list[str]:
    """The source tensors beside the codes of a quantised one."""
    return [n for k in range(len(output.sources)) for n in output.beside(k).values()]


def _as_it_lies(plan: Plan, output: Output) -> bool:
    """Whether the source's elements can be looked at in their files."""
    refs = [plan.checkpoint.tensors[s] for s in output.sources]
    return output.scheme is None and all(r.dtype in ITEMSIZE and r.strides is None for r in refs)


def _in_memory(t: Tensor, ref: TensorRef) -> Array:
    """A tensor that stands for a canonical one: its elements as unsigned integers of their size, flat."""
    t = t.detach().cpu().to(TORCH[ref.dtype]).contiguous()
    if not t.numel():
        return np.empty(0)
    return t.flatten().view(torch.uint8).numpy().view(_UNSIGNED[ITEMSIZE[ref.dtype]])


def flat_of(read: Read, path: Path, ref: TensorRef) -> Array:
    """The same of one in a file."""
    dtype = _UNSIGNED[ITEMSIZE[ref.dtype]]
    if ref.size == 0:
        return np.empty(0, dtype)
    raw = read(path, ref.offset, ref.nbytes).numpy()
    if ref.offset % np.dtype(dtype).itemsize:
        return np.array(raw).view(dtype)
    return raw.view(dtype)


def view_of(flat: Array, box: Box) -> Array:
    sizes, strides = box.flat()
    step = flat.itemsize
    return as_strided(flat[box.offset :], sizes, tuple(s * step for s in strides), writeable=False)


def box_of(flat: Tensor, box: Box) -> Tensor:
    sizes, strides = box.flat()
    return flat.as_strided(sizes, strides, box.offset)


def in_pieces_there(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in pieces along their longest axis."""
    if a.ndim == 0:
        return iter(((a, b),))
    axis = max(range(a.ndim), key=lambda i: a.shape[i])
    step = max(1, CHUNK_THERE * a.shape[axis] // max(1, a.numel()))
    return zip(a.split(step, axis), b.split(step, axis), strict=True)


def _fit_differs(read: Read, plan: Plan, output: Output, k: int, mine: Array, dtype: str) -> int:
    """How many elements of the k-th fit differ between canonical and source."""
    fit = output.fits[k]
    dst = view_of(mine, fit.canonical)
    src, bits = _source(read, plan, output, k, dtype)
    if fit.change:
        src, bits = changes.weights(_floats(src, dtype) if bits else src, fit.change), False
    wrong = 0
    for a, b in in_pieces(dst, view_of(src, fit.source)):
        if bits:
            wrong += int(np.count_nonzero(a != b))
        else:
            wrong += int(np.count_nonzero(a != rounded(b, dtype).view(a.dtype)))
    return wrong


def _source(read: Read, plan: Plan, output: Output, k: int, dtype: str) -> tuple[Array, bool]:
    """The source's elements, flat; and whether they are bits of the canonical dtype already."""
    ckpt, name = plan.checkpoint, output.sources[k]
    ref = ckpt.tensors[name]
    path = ckpt.path(ref.file)
    if (way := output.way(k)) is not None:
        values = dequantised(read, plan, output, k)
        turned = scheme(way).turned
        return (values.transpose(-1, -2) if turned else values).numpy().reshape(-1), False
    if ref.dtype not in ITEMSIZE:  # a block type of GGUF
        from zoo.quant import ggml

        raw = read(path, ref.offset, ref.nbytes).numpy()
        return np.asarray(ggml.dequantise(raw, ref.dtype, ref.shape), np.float32).reshape(-1), False
    if ref.strides is not None:
        flat = flat_of(
            read,
            path,
            TensorRef(
                name, ref.dtype, (ref.nbytes // ITEMSIZE[ref.dtype],), ref.file, ref.offset, ref.nbytes
            ),
        )
        step = flat.itemsize
        view = as_strided(flat, ref.shape, tuple(s * step for s in ref.strides), writeable=False)
        flat = np.ascontiguousarray(view).reshape(-1)
    else:
        flat = flat_of(read, path, ref)
    if ref.dtype == dtype:
        return flat, True
    if ref.dtype not in FLOATS or dtype not in FLOATS:
        raise ZooError(f"{path}: {name} is {ref.dtype} and became {dtype}: not a change of float precision")
    return _floats(flat, ref.dtype), False


def dequantised(read: Read, plan: Plan, output: Output, k: int) -> Tensor:
    """The weight [..., out, in] that the k-th source of a quantised output stands for, in fp32."""
    from zoo.quant import as_canonical, dequantise

    ckpt = plan.checkpoint
    components = {}
    for part, name in {"weight": output.sources[k], **output.beside(k)}.items():
        ref = ckpt.tensors[name]
        raw = read(ckpt.path(ref.file), ref.offset, ref.nbytes).clone()  # aligned
        components[part] = raw.view(TORCH[ref.dtype]).view(ref.shape)
    way = output.way(k)
    assert way is not None
    s = scheme(way)
    rows = output.fits[k].shape[-1 if s.turned else -2]
    return dequantise(way, as_canonical(s, components), (rows,), torch.float32)


def _floats(flat: Array, dtype: str) -> Array:
    """Bits of a float dtype as numpy floats, exactly."""
    if dtype == "BF16":
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def rounded(x: Array, dtype: str) -> Array:
    """Floats to a float dtype, to nearest with ties to even, as unsigned integers."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        if x.dtype == np.float64:
            return (
                torch.from_numpy(np.ascontiguousarray(x))
                .to(torch.bfloat16)
                .view(torch.int16)
                .numpy()
                .view(np.uint16)
            )
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(nan, (bits >> 16) | 0x40, up).astype(np.uint16)
    to = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x).astype(to).view(_UNSIGNED[np.dtype(to).itemsize])


def in_pieces(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Both arrays in pieces along their first axis, so that no temporary is large."""
    if a.ndim == 0 or a.size <= CHUNK:
        yield a, b
    elif len(a) == 1:
        yield from in_pieces(a[0], b[0])
    else:
        step = max(1, CHUNK * len(a) // a.size)
        for i in range(0, len(a), step):
            yield from in_pieces(a[i : i + step], b[i : i + step])


def _same_bytes(folder: Canonical, ckpt: Checkpoint, name: str) -> bool:
    mine, theirs = folder.extra_tensors[name], ckpt.tensors[name]
    if mine.nbytes != theirs.nbytes or mine.shape != theirs.shape:
        return False
    a = (
        np.memmap(folder.path(mine), np.uint8, "r", mine.offset, (mine.nbytes,))
        if mine.nbytes
        else np.empty(0)
    )
    b = (
        np.memmap(ckpt.path(theirs.file), np.uint8, "r", theirs.offset, (theirs.nbytes,))
        if mine.nbytes
        else np.empty(0)
    )
    return all(np.array_equal(a[i : i + CHUNK], b[i : i + CHUNK]) for i in range(0, len(a), CHUNK))


def _same_file(a: Path, b: Path) -> bool:
    return a.is_file() and a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
