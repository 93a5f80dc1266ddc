"""Export to llama.cpp's GGUF: the family's GGUF rules read from right to left, written through the package gguf.

- Names and rearrangements come from the rules, fields from the Spec (`zoo/formats/gguf_out.py`), the tokenizer from the files
  that the folder carries (`zoo/formats/gguf_vocab.py`).
- Matrices become `type`; vectors, norms, biases and routers stay in fp32, as with llama.cpp's own converter. Weights that are
  carried in MXFP4 stay in it, their codes put into ggml's order.
- The package writes what comes before the data. Weights that are only renamed or put together are copied from file to file, as conversion
  copies them; of others each thread has some rows in memory, the whole tensor where it is made of several. The files are written beside the
  destination and renamed when all are complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
import shlex
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo import families
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats import gguf_out, gguf_vocab
from zoo.formats.base import ITEMSIZE, TEMPLATES, TensorRef, read_small
from zoo.formats.canonical import Canonical, read
from zoo.layout import Slot, layout
from zoo.mapping import changes, decode
from zoo.mapping.execute import Mover, Progress
from zoo.mapping.folder import clear_held, in_the_way, locked
from zoo.mapping.moves import Copy, Rearrange, in_kernel
from zoo.mapping.names_out import family_of
from zoo.mapping.recipe import compile_rule
from zoo.mapping.rules import Box, Change, Fit
from zoo.mapping.ways import write
from zoo.quant import blocks, ggml
from zoo.quant.floats import Array, bits, from_float, to_fp32
from zoo.quant.schemes import Component, scheme
from zoo.system import libc
from zoo.untrusted.plain import by_descriptor
from zoo.untrusted.printable import warn

log = logging.getLogger(__name__)

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4_moe", "tq2_0", "tq1_0")
"""All that the package gguf makes, by the names that llama.cpp has for such files."""
_FILE_TYPE = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "BF16": 32,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4_MOE": 38,
}  # llama_ftype
_PLAIN = ("F32", "F16", "BF16")  # types that safetensors has too, by the same names
_ALWAYS_FP32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")
_ENDS = ("token_embd.weight", "output.weight")
_CHUNK = 1 << 18  # elements converted at a time: they stay in a core's cache
_GROUP = 32  # elements of a block of MXFP4


@dataclass(frozen=True)
class _Piece:
    """Elements of a GGUF tensor: `fit.source`, which are `fit.canonical` of the canonical tensor `name`."""

    name: str
    fit: Fit


@dataclass
class _Tensor:
    """A tensor to write: its type, logical shape, and makings. `scales`: of MXFP4, those of the codes' `pieces`. `carried`: the
    pieces are of its blocks as bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    pieces: list[_Piece]
    scales: list[_Piece]
    carried: bool = False

    @property
    def nbytes(self) -> int:
        block, size = _block(self.type)
        return math.prod(self.shape) // block * size


def export_gguf(
    canon: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    type: str | None = None,
    *,
    force: bool = False,
    shard_size: int = 0,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the canonical folder `canon` as the GGUF `dst`, and return its files.

    `type`: one of TYPES, for the matrices; None: as the embedding is stored. `shard_size`: bytes of tensors per file of a
    split set (`x-00001-of-00003.gguf`), 0: one file. `force`: replace files that exist. Raises ZooError where the model is
    none that llama.cpp's format can say, and by the name of what it cannot.
    """
    import gguf

    c, target = read(canon), Path(dst)
    if c.layers is not None:
        raise ZooError(f"{c.root}: holds layers {list(c.layers)} only; a part of a model cannot be exported")
    if target.suffix != ".gguf" or target.is_dir():
        raise ZooError(f"{target}: expected the name of a file that ends in .gguf")
    type = type and type.lower()
    if type is not None and type not in TYPES:
        raise ZooError(_not_made_here(type, c, target))
    own = _own_blocks(c)
    if type is not None and own:
        raise ZooError(
            f"{c.root}: its weights are in GGUF's blocks ({', '.join(sorted(own))}), which are written as they are, without a type; for "
            f"{type} convert the source with --dtype fp32, which is exact, and export that"
        )
    wanted = own.most_common(1)[0][0] if own else (type or _stored(c)).upper()
    family = gguf_out.form_of(family_of(c))
    tensors = list(_tensors(c, family, wanted))
    spec = dataclasses.replace(c.spec, family=family.name)
    described = gguf_out.describe(family, spec, {t.name: t.shape for t in tensors}, str(c.root))
    for text in described.otherwise:
        warn(log, "%s: llama.cpp %s", c.root, text)
    _say_what_is_left(c)
    _say_what_is_kept(tensors, wanted)
    fields = _general(c, tensors, wanted) | described.fields
    fields |= gguf_vocab.fields(small := _small(c), c.spec.vocab_size, str(c.root))
    for text in gguf_vocab.unsaid(small, str(c.root)):
        warn(log, "%s: %s", c.root, text)

    total = sum(t.nbytes for t in tensors) + sum(4 * len(t) for t in described.tables.values())
    writer = gguf.GGUFWriter(None, described.arch, split_max_size=shard_size if shard_size < total else 0)
    for key, value in fields.items():
        _add(writer, key, value)
    for name, table in described.tables.items():
        writer.add_tensor_info(name, (len(table),), np.dtype(np.float32), 4 * len(table))
    for t in tensors:
        writer.add_tensor_info(
            t.name, t.shape, np.dtype(np.float32), t.nbytes, gguf.GGMLQuantizationType[t.type]
        )
    return _write(writer, described, tensors, c, target, force, progress)


def _write(
    writer: Any,
    described: gguf_out.Described,
    tensors: list[_Tensor],
    c: Canonical,
    target: Path,
    force: bool,
    progress: Progress | None,
) -> list[Path]:
    files: list[Path] = writer.format_shard_names(target)
    partial = target.with_name(target.name + ".partial")
    total = sum(t.nbytes for t in tensors)
    _refuse_there(files, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    held = locked(partial, target)
    if not all(n.startswith(target.stem) and n.endswith(".gguf") for n in os.listdir(held)):
        os.close(held)
        raise ZooError(in_the_way(partial))
    try:
        clear_held(held, "")  # what a run that was killed has left
        _refuse_there(files, force)  # another one may have written it meanwhile
        here = by_descriptor(held, partial)
        if shutil.disk_usage(here).free < total:
            raise ZooError(f"{target}: needs {total:,} bytes; its disk has less free")
        writer.write_header_to_file(here / target.name)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        places, sink = _places(writer, target)
        for name, table in described.tables.items():
            file, at = places[name]
            write(sink.fd(file), np.asarray(table, np.float32), at)
        mover = Mover(sink, total, progress)
        try:
            mover.run(*_moves(c, tensors, places, mover))
        finally:
            mover.close()
        writer.close()
        for f in reversed(files):  # the first file of a set, by which it is opened, comes last
            os.replace(f.name, f, src_dir_fd=held)
    except (OSError, ZooError) as e:
        cause = e.__cause__ if isinstance(e, ZooError) else e
        if not isinstance(cause, OSError):
            raise
        raise ZooError(f"{target}: cannot be written: {cause.strerror or cause}") from cause
    except (
        struct.error,
        OverflowError,
        UnicodeError,
    ) as e:  # what a stranger's folder says, and no field can hold
        raise ZooError(f"{target}: a field of it cannot be written ({e!r:.200})") from e
    finally:
        writer.close()
        clear_held(held, "")
        with contextlib.suppress(OSError):
            partial.rmdir()
        os.close(held)  # gives the lock back
    return files


def _refuse_there(files: list[Path], force: bool) -> None:
    if not force and (there := [f for f in files if f.exists()]):
        raise ZooError(f"{there[0]}: exists; --force replaces it")


@dataclass
class _Files:
    """The files in the making, which a Mover fills."""

    dst: Path
    sizes: dict[str, int]
    fds: dict[str, int]

    def fd(self, name: str) -> int:
        return self.fds[name]


def _places(writer: Any, target: Path) -> tuple[dict[str, tuple[str, int]], _Files]:
    """(file, byte) of each tensor, as the headers that are written now say, and the files, with room for all of them. Their
    descriptors are the writer's."""
    places, there = {}, _Files(target, {}, {})
    for file, infos in zip(writer.fout, writer.tensors, strict=True):
        name, at = Path(file.name).name, _padded(writer, file.tell())
        for tensor, info in infos.items():
            places[tensor] = name, at
            at += _padded(writer, info.nbytes)
        there.sizes[name], there.fds[name] = at, file.fileno()
        os.ftruncate(file.fileno(), at)
        libc.reserve(file.fileno(), at)
    return places, there


def _padded(writer: Any, n: int) -> int:
    return int(writer.ggml_pad(n, writer.data_alignment))


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


# ---------------------------------------------------------------------------------------------------
# What to write


def _not_made_here(type: str, c: Canonical, target: Path) -> str:
    """Of a type that is not in TYPES: by way of a file that holds the folder's values. Source of the names: llama_ftype, and the
    quantiser's own for what is mostly meant by three of them."""
    import gguf

    known = {t.name.removeprefix("MOSTLY_").lower() for t in gguf.LlamaFileType} | {"q3_k", "q4_k", "q5_k"}
    if type not in known or not re.match(r"i?q\d|nvfp4", type):
        others = ", ".join(sorted(t for t in known - {*TYPES} if re.match(r"i?q\d|nvfp4", t)))
        return f"unknown type {type!r}; expected one of {', '.join(TYPES)} (of llama.cpp's own quantiser: {others})"
    whole = _stored(c)
    plain = target.with_name(f"{target.stem}-{whole}.gguf")
    root, through, to = (shlex.quote(str(p)) for p in (c.root, plain, target))
    return (
        f"blocks of type {type} are made by llama.cpp's own quantiser: `zoo export {root} {through} --format gguf --type {whole}`, "
        f"then `llama-quantize {through} {to} {type}`; zoo makes {', '.join(TYPES)}"
    )


def _own_blocks(c: Canonical) -> Counter[str]:
    """The types of ggml's blocks that weights are carried in, and how many values are."""
    found = Counter[str]()
    for slot, how in c.quant.items():
        if blocks.is_one(s := scheme(how)):
            for part in s.components:
                kind = blocks.type_of(s, part.name)
                ref, block = c.tensors[f"{slot}.{part.name}"], blocks.TYPES[kind]
                found[kind.upper()] += ref.size // block.nbytes * block.columns
    return found


def _stored(c: Canonical) -> str:
    dtype = c.tensors["embed.weight"].dtype
    if "embed" in c.quant:
        raise ZooError(_no_type(c, "embed.weight", c.quant["embed"]))
    if dtype not in _PLAIN:
        raise ZooError(f"{c.root}: its embedding is {dtype}; give --type, one of {', '.join(TYPES)}")
    return dtype.lower()


def _no_type(c: Canonical, name: str, how: str) -> str:
    return (
        f"{c.root}: {name} is {how}, which GGUF has no type for; `zoo convert --dtype bf16` and export that"
    )


def _say_what_is_left(c: Canonical) -> None:
    if c.extra_tensors:
        first = next(iter(c.extra_tensors))
        warn(
            log, "%s: %d tensors beside the text model are not written (%s, ...): %s",
            c.root, len(c.extra_tensors), first, c.extras.get(first, "no part of it"),
        )  # fmt: skip


def _say_what_is_kept(tensors: list[_Tensor], wanted: str) -> None:
    """Of the matrices that are no blocks of the type: once for each length of their rows. And of a type that no matrix is for."""
    if wanted == "MXFP4_MOE" and not any(t.type == "MXFP4" for t in tensors):
        warn(log, "mxfp4_moe is for stacks of experts, and the model has none: its matrices are Q8_0")
    kept: dict[int, list[str]] = {}
    for t in tensors:
        if t.type == "F16" != wanted and not (wanted.startswith("TQ") and t.name in _ENDS):
            kept.setdefault(t.shape[-1], []).append(t.name)
    block = 256 if wanted.startswith("TQ") else 32
    for length, names in kept.items():
        warn(
            log, "%s%s: rows of %d are no blocks of %d; kept in F16",
            names[0], f" and {len(names) - 1} more" if len(names) > 1 else "", length, block,
        )  # fmt: skip


def _general(c: Canonical, tensors: list[_Tensor], wanted: str) -> dict[str, Any]:
    kinds = {t.type for t in tensors}
    name = c.source.get("repo") or c.source["config"].get("_name_or_path") or c.root.resolve().name
    return {
        "general.type": "model",
        "general.name": str(name).rstrip("/").rpartition("/")[2],
        "general.file_type": _FILE_TYPE["MXFP4_MOE" if "MXFP4" in kinds else wanted],
        "general.quantization_version": 2,
    }


def _small(c: Canonical) -> dict[str, bytes]:
    """The carried files that say how text becomes tokens."""
    wanted = (
        "token", "special_tokens", "generation_config", "chat_template", f"{TEMPLATES}/", "vocab.", "merges.", "tekken",
    )  # fmt: skip
    names = [n for n in c.json.get("carried", []) if n.startswith(wanted)]
    return {n: read_small(c.root, n) for n in names}


def _tensors(c: Canonical, family: Family, wanted: str) -> Iterator[_Tensor]:
    """The tensors of the file, in the order of the layout."""
    if "gguf" not in family.rules or not family.gguf:
        raise ZooError(
            f"{c.root}: zoo knows no GGUF form of family {family.name}; "
            f"it has one of {', '.join(sorted({n for n, f in families.families().items() if f.gguf} | {*gguf_out.AS}))}"
        )
    pieces: dict[str, list[_Piece]] = {}
    scales: dict[str, list[_Piece]] = {}
    kinds: dict[str, str] = {}  # of tensors whose blocks are carried
    for slot in layout(c.spec).values():
        stem = slot.name.removesuffix(".weight")
        how = c.quant.get(stem) if slot.name.endswith(".weight") else None
        if how is not None and blocks.is_one(s := scheme(how)):
            for own in s.components:
                for fit in _fits(c, family, slot, own):
                    name = fit.name.replace("{i}", str(slot.layer))
                    kinds[name] = blocks.type_of(s, own.name)
                    pieces.setdefault(name, []).append(_Piece(f"{stem}.{own.name}", fit))
            continue
        if how not in (None, "mxfp4"):
            raise ZooError(_no_type(c, slot.name, how))
        for part, into in zip(scheme(how).components if how else (None,), (pieces, scales)):
            for fit in _fits(c, family, slot, part):
                name = slot.name if part is None else f"{stem}.{part.name}"
                into.setdefault(fit.name.replace("{i}", str(slot.layer)), []).append(_Piece(name, fit))
    for name, made in pieces.items():
        shape = made[0].fit.shape
        if name in scales:
            yield _Tensor(name, "MXFP4", (*shape[:-2], shape[-2] * _GROUP), made, scales[name])
        elif name in kinds:
            block = blocks.TYPES[kinds[name]]
            logical = (*shape[:-1], shape[-1] // block.nbytes * block.columns)
            yield _Tensor(name, kinds[name].upper(), logical, made, [], carried=True)
        else:  # beside carried blocks, what is no vector is as it is stored
            kind = _type(name, shape, _dtype(c, made) if kinds else wanted)
            yield _Tensor(name, kind, shape, made, [])


def _fits(c: Canonical, family: Family, slot: Slot, part: Component | None) -> tuple[Fit, ...]:
    """By the last rule that applies: where files of several years differ, it is the newest form. Experts are always stacked."""
    layer = None if slot.layer is None else c.spec.layers[slot.layer]
    reason = "no rule of its GGUFs fills it"
    for rule in reversed(family.rules["gguf"].by_key.get(slot.key, ())):
        if rule.one_by_one or (rule.when is not None and not rule.when(layer, c.spec)):
            continue
        try:
            return compile_rule(rule, slot, c.spec, lambda name: name, 1, part).fits
        except ZooError as e:
            reason = str(e)
    raise ZooError(f"{c.root}: {slot.name} has no place in a GGUF of family {family.name}: {reason}")


def _type(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """As llama.cpp's converter and its quantiser choose it: the two ends of the model keep 8 bits where others have 4 or 5, and 16
    where they have three values; of MXFP4 are experts alone."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", *_ALWAYS_FP32)):
        return "F32"
    if wanted in _PLAIN:
        return wanted
    if name in _ENDS:
        made = "F16" if wanted.startswith("TQ") else "Q8_0"
    elif wanted == "MXFP4_MOE":
        made = "MXFP4" if len(shape) > 2 else "Q8_0"
    else:
        made = wanted
    return "F16" if shape[-1] % _block(made)[0] else made


def _block(type: str) -> tuple[int, int]:
    """Elements and bytes of a block."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return int(block), int(size)


# ---------------------------------------------------------------------------------------------------
# The data


def _moves(
    c: Canonical, tensors: list[_Tensor], places: dict[str, tuple[str, int]], mover: Mover
) -> tuple[list[Copy], list[Rearrange | _Made]]:
    """What is copied into the files, and what goes through memory."""
    copies: list[Copy] = []
    through: list[Rearrange | _Made] = []
    for t in tensors:
        dst, base = places[t.name]
        if not t.carried and (t.type != _dtype(c, t.pieces) or any(p.fit.change for p in t.pieces)):
            through.append(_Made(c, t, dst, base))
            continue
        size = 1 if t.carried else ITEMSIZE[t.type]
        for p in t.pieces:
            ref, loop = c.tensors[p.name], mover.loop(p.fit, backwards=True)
            mover.open(ref.file, c.path(ref))
            from_, to = p.fit.canonical.offset, p.fit.source.offset
            if in_kernel(loop, size):
                copies += mover.copies(ref.file, ref.offset + from_ * size, dst, base + to * size, size, loop)
            else:
                loader = decode.Raw(ref, decode.Files(mover.source))
                through.append(Rearrange(loader, dst, base, size, loop, from_, to))
    return copies, through


@dataclass(frozen=True)
class _Made:
    """A tensor whose elements are converted on the way, from byte `at` of `dst`."""

    canon: Canonical
    tensor: _Tensor
    dst: str
    at: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def chunks(self) -> Iterator[_Rows]:
        c, t = self.canon, self.tensor
        rows, dtype = _rows(c, t.pieces, t.shape[-1]), _dtype(c, t.pieces)
        step, change = max(1, _CHUNK * len(rows) // max(1, rows.size)), t.pieces[0].fit.change
        scales = None
        if t.scales:
            scales = _rows(c, t.scales, t.shape[-1] // _GROUP)
            if len(scales) != len(rows):
                rows, scales = rows.reshape(1, -1), scales.reshape(1, -1)
        each = self.nbytes // max(1, len(rows))
        for i in range(0, len(rows), step):
            some = rows[i : i + step]
            if scales is None:
                make = functools.partial(_converted, some, dtype, t, change)
            else:
                make = functools.partial(_mxfp4, some, scales[i : i + step])
            yield _Rows(self.dst, self.at + i * each, len(some) * each, make)

    def run(self, fd: int) -> None:
        for rows in self.chunks():
            rows.run(fd)


@dataclass(frozen=True)
class _Rows:
    """Some of its rows, made when they are written."""

    dst: str
    at: int
    nbytes: int
    make: Callable[[], Array]

    def chunks(self) -> Iterator[_Rows]:
        yield self

    def run(self, fd: int) -> None:
        write(fd, self.make(), self.at)


def _dtype(c: Canonical, pieces: list[_Piece]) -> str:
    dtypes = {c.tensors[p.name].dtype for p in pieces}
    if len(dtypes) > 1:
        raise ZooError(
            f"{c.root}: {pieces[0].fit.name} would be made of {' and '.join(sorted(dtypes))}; convert with --dtype"
        )
    return dtypes.pop()


def _rows(c: Canonical, pieces: list[_Piece], columns: int) -> Array:
    """The tensor in its own dtype's bits, [n, ...] of whole rows of `columns`: where it lies, if it is of one canonical tensor and
    its parts are whole rows there; else put together in memory."""
    shape = pieces[0].fit.shape
    views = [(p, _mapped(c, c.tensors[p.name])) for p in pieces]
    if len(views) == 1:
        ((p, flat),) = views
        view = _box(flat, p.fit.canonical)
        if p.fit.source.flat() == (view.shape, _contiguous(view.shape)) and view.size == math.prod(shape):
            if view.ndim == 1:
                view = view.reshape(-1, columns)
            if math.prod(view.shape[1:]) % columns == 0:
                return view
    out = np.empty(math.prod(shape), bits(_dtype(c, pieces)))
    for p, flat in views:
        _box(out, p.fit.source)[...] = _box(flat, p.fit.canonical)
    return out.reshape(-1, columns)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of an array that lies in one piece."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _mapped(c: Canonical, ref: TensorRef) -> Array:
    raw = np.memmap(c.path(ref), np.uint8, "r", ref.offset, (ref.nbytes,))
    return np.asarray(raw).view(bits(ref.dtype))


def _box(flat: Array, box: Box) -> Array:
    sizes, strides = box.flat()
    return np.lib.stride_tricks.as_strided(
        flat[box.offset :], sizes, tuple(s * flat.itemsize for s in strides)
    )


def _converted(raw: Array, dtype: str, t: _Tensor, change: Change) -> Array:
    """Rows in the bits of one of GGUF's types."""
    raw = np.ascontiguousarray(raw)
    if t.type == "Q8_0" and not change and dtype != "F64":
        return ggml.q8_0(raw, dtype)
    x = to_fp32(raw, dtype).astype(np.float32, copy=False)
    x = changes.stored(x, change)
    if t.type in _PLAIN:
        return from_float(x, t.type, t.name)
    if t.type == "Q8_0":
        return ggml.q8_0(x)
    import gguf

    # As one row: the package takes 16 rows per call of numpy.
    made: Array = gguf.quants.quantize(x.reshape(1, -1), gguf.GGMLQuantizationType[t.type])
    return made


def _mxfp4(codes: Array, scales: Array) -> Array:
    """Blocks of ggml: the exponent, then 16 bytes whose low halves are the first 16 codes and whose high halves the last.
    Released bytes hold two neighbours each, the low half first."""
    pairs = codes.reshape(-1, _GROUP // 2)
    each = np.empty((pairs.shape[0], _GROUP), np.uint8)
    each[:, 0::2], each[:, 1::2] = pairs & 0x0F, pairs >> 4
    out = np.empty((pairs.shape[0], 1 + _GROUP // 2), np.uint8)
    out[:, 0] = scales.reshape(-1)
    out[:, 1:] = each[:, : _GROUP // 2] | each[:, _GROUP // 2 :] << 4
    return out.reshape(-1)
