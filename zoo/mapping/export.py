"""Export: a canonical folder -> the release it was made of, a Hugging Face checkpoint, or Meta's or Mistral's own files.

The same rules, read from right to left. Where nothing was converted to another dtype, the release comes back
to the byte: files, headers, index, every tensor (extras too), tokenizer and config; a pickle where the source's own files are
asked for. Otherwise (a dtype was asked for, or the source was a GGUF, a pickle, a vendor's own format) it is a new checkpoint in
Hugging Face names, with new headers; its config says what changed. Or it is one in Meta's or Mistral's names, whose params.json is made of the
Spec.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo._version import __version__
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats import gguf, meta, params_out
from zoo.formats.around import MOST, Hollow
from zoo.formats.base import (
    FLOATS,
    HF_NAMINGS,
    ITEMSIZE,
    MAX_HEADERS,
    Checkpoint,
    TensorRef,
    encoded,
    files_below,
    inside,
    kept_as,
    place_of,
    read_json,
    read_small,
)
from zoo.formats.canonical import JSON, SOURCE, VALUES, Canonical, read
from zoo.formats.pickle import Archive, Budget, read_open
from zoo.formats.safetensors import INDEX, parse_header
from zoo.formats.sharded import full_name
from zoo.formats.wrapped import unwrapped
from zoo.layout import layout
from zoo.mapping.execute import SHARD, Mover, Progress, Sheet
from zoo.mapping.export_config import config_of, misread, renamed
from zoo.mapping.folder import Folder
from zoo.mapping.match import TIED, match
from zoo.mapping.moves import Copy, Loader, Rearrange, in_kernel
from zoo.mapping.names_out import aside_of, family_of, outputs_of, prefix_of, rules_of
from zoo.mapping.plan import DTYPES, Plan
from zoo.mapping.recipe import Output
from zoo.mapping.rules import Fit, respell
from zoo.quant.blocks import is_one
from zoo.quant.schemes import scheme
from zoo.untrusted.bounded import parse_json
from zoo.untrusted.printable import warn

if TYPE_CHECKING:
    from zoo.card import About

log = logging.getLogger(__name__)

FORMATS = ("hf", "source", "gguf", "meta", "mistral")
VENDORS = ("meta", "mistral")
"""Formats of vendors' own, which are namings too."""
MAX_KEPT = MAX_HEADERS
"""Bytes of kept headers, unpacked."""
SMALL, PACKED = 16 << 20, 64
"""Of them so many are read, and as many times the bytes that they are packed to: headers are packed to a twentieth at best."""
MAX_DIRECTORY = 1 << 22
"""Bytes of the list of what is kept: a release has some hundred files."""


HEADED = ("safetensors", "sharded", "mistral", "openai")  # formats whose headers are kept
PICKLES = ("pickle", "meta")  # and those of which all around the tensors is, if that is little


@dataclass
class _Job:
    """What will be written: files and headers, where each tensor lies, small files, and the makings."""

    sheet: Sheet
    outputs: dict[str, Output]
    dtypes: dict[str, str]  # of released tensors
    extras: list[str]
    small: dict[str, bytes]
    carried: list[str]
    exact: bool  # the release's own files
    expands: frozenset[str] = frozenset()  # the schemes of what is written as numbers

    def add_card(self, c: Canonical, dtype: str | None, about: About | None) -> None:
        from zoo import card

        made, self.carried = card.files(c, self.carried, self.exact, dtype, about or card.About())
        self.small.update(made)

    def wrote(self, path: Path) -> bool:
        """Whether the folder holds nothing but what is written here: it may be replaced."""
        names = {*self.sheet.sizes, *self.small, *self.carried, "model.sig"}
        files = files_below(path)
        return bool(files) and files <= names


def export(
    canon: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    format: str = "hf",
    *,
    type: str | None = None,
    force: bool = False,
    dtype: str | None = None,
    shard_size: int | None = None,
    card: About | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Path:
    """Write the release that the canonical folder `canon` was made of to the folder `dst`, and return it.

    `format`: "hf", a Hugging Face checkpoint; "source", the files as they came: the vendor's own names if it had other ones, a
    trainer's wrappers in them, pickles, GGUFs whose blocks are all carried; "gguf", a file of llama.cpp's with matrices of `type` (`export_gguf`), of which the first is returned;
    "meta" or "mistral", `params.json` and `consolidated.00.pth` or `consolidated.safetensors`, from any source. `dtype` ("bf16",
    "fp16", "fp32"): convert the model's floating-point tensors to it, as `zoo convert` does. `shard_size`: bytes
    of tensors per file at most, in new files; Meta's are one. New files get a model card (`zoo.card`), and with `card` those
    that are the release's own do too. Raises ZooError if `canon` holds only some layers,
    if its rules have changed since, if a dtype is asked for where weights are quantised, if a vendor's format cannot say what the
    model is, by the name of what it cannot, or as `Folder` does.
    """
    if format not in FORMATS:
        raise ZooError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ZooError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype is not None and format not in ("hf", *VENDORS):
        instead = ", whose matrices get a type (--type)" if format == "gguf" else ""
        raise ZooError(f'a dtype is for formats "hf", "meta" and "mistral", not {format!r}{instead}')
    if shard_size is not None and format not in ("hf", "gguf", "mistral"):
        raise ZooError(f'a size of files is for formats "hf", "gguf" and "mistral", not {format!r}')
    if format == "gguf":
        from zoo.mapping.export_gguf import export_gguf

        return export_gguf(canon, dst, type, force=force, shard_size=shard_size or 0, progress=progress)[0]
    if type is not None:
        raise ZooError(
            f"a type ({type}) is of GGUF; a Hugging Face checkpoint is written in another dtype with --dtype"
        )
    c = read(canon)
    job = _checked(c, format, shard_size, DTYPES[dtype] if dtype else None, card)
    files = {t.file for t in c.tensors.values()} | {t.file for t in c.extra_tensors.values()}
    stamp = [(f, (c.root / f).stat().st_size, (c.root / f).stat().st_mtime_ns) for f in sorted(files)]
    identity = hashlib.sha256(
        repr((str(c.root.resolve()), stamp, job.sheet.sizes, format, dtype, __version__)).encode()
    ).hexdigest()
    if c.root.resolve().is_relative_to(Path(os.path.abspath(dst)).resolve()):
        raise ZooError(f"{dst}: holds the checkpoint {c.root}; choose another destination")
    with Folder(dst, job.sheet.sizes, identity, force=force, ours=job.wrote) as folder:
        mover = Mover(folder, job.sheet.nbytes, progress, threads)
        try:
            for name, header in job.sheet.headers.items():
                folder.head(name, header)
            pieces = {name: archive.pieces for name, archive in job.sheet.archives.items()} | job.sheet.around
            for name, some in pieces.items():
                for at, data in some:
                    folder.head(name, data, at)
            for f in files:
                mover.open(f, c.root / f)
            copies: list[Copy] = []
            through: list[Rearrange] = []
            for o in job.outputs.values():
                for k, fit in enumerate(o.fits):
                    _move(c, job, mover, o, o.sources[k], fit, copies, through)
            for name in job.extras:
                ref = c.extra_tensors[name]
                file, at = job.sheet.place[name]
                copies.append(Copy(ref.file, ref.offset, file, at, ref.nbytes))
            mover.run(copies, through)
        finally:
            mover.close()
        for name, archive in job.sheet.archives.items():
            archive.seal(folder.fd(name))
        for name, data in job.small.items():
            folder.write(name, data)
        for name in job.carried:
            folder.write(name, read_small(c.root, name))
        out = folder.publish()
    if format in ("hf", "source") and (config := out / "config.json").is_file():
        if told := misread(read_json(config, "it was exported")):
            warn(log, "%s: %s", out, told)
    return out


def sizes(
    canon: str | os.PathLike[str], dtype: str | None = None, card: About | None = None
) -> dict[str, int]:
    """The files that `export` would write to a Hugging Face checkpoint, and their bytes. Raises ZooError as it does."""
    c = read(canon)
    job = _checked(c, "hf", None, DTYPES[dtype] if dtype else None, card)
    small = {n: len(data) for n, data in job.small.items()}
    return {**job.sheet.sizes, **small, **{n: place_of(c.root, n).stat().st_size for n in job.carried}}


def _move(
    c: Canonical,
    job: _Job,
    mover: Mover,
    o: Output,
    name: str,
    fit: Fit,
    copies: list[Copy],
    through: list[Rearrange],
) -> None:
    from_ = c.tensors[o.name]
    file, base = job.sheet.place[name]
    dtype, loop = job.dtypes[name], mover.loop(fit, backwards=True)
    size = ITEMSIZE[dtype]
    if from_.dtype == dtype and not fit.change and in_kernel(loop, size):
        src_at, dst_at = from_.offset + fit.canonical.offset * size, base + fit.source.offset * size
        copies += mover.copies(from_.file, src_at, file, dst_at, size, loop)
        return
    from zoo.mapping import decode

    files = decode.Files(mover.source)
    loader: Loader
    stem = o.name.removesuffix(".weight")
    if (how := c.quant.get(stem)) in job.expands and o.name.endswith(".weight"):
        s = scheme(how)
        parts = {part.name: c.tensors[f"{stem}.{part.name}"] for part in s.components}
        loader = decode.expanded(parts, s, layout(c.spec)[o.name], files, dtype, partial(warn, log, "%s"))
    elif fit.change:
        loader = decode.Redone(from_, files, dtype, fit.change)
    else:
        loader = decode.Raw(from_, files) if from_.dtype == dtype else decode.Cast(from_, files, dtype)
    through.append(Rearrange(loader, file, base, size, loop, fit.canonical.offset, fit.source.offset))


# ---------------------------------------------------------------------------------------------------
# What to write


def _checked(
    c: Canonical, format: str, shard_size: int | None, dtype: str | None, card: About | None
) -> _Job:
    """The job, with a card where there is to be one. Raises ZooError for a folder that holds a part of a model, or is not as zoo
    writes it."""
    if c.layers is not None:
        raise ZooError(f"{c.root}: holds layers {list(c.layers)} only; a part of a model cannot be exported")
    try:
        job = _job(c, format, shard_size, dtype)
        if card is not None or not job.exact:
            job.add_card(c, dtype, card)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ZooError(f"{c.root / JSON}: not as zoo writes it ({e!r:.200}); convert again") from e
    return job


def _job(c: Canonical, format: str, shard_size: int | None, dtype: str | None = None) -> _Job:
    source = c.source
    cast = _cast_to(c, dtype)
    family = family_of(c)
    kept = _kept(c)
    headers = _headers(kept)
    naming = format if format in VENDORS else "hf"
    names = _names(headers, c) if format == "hf" else set[str]()
    plain = unwrapped(names)
    # As released, they could not be opened: names that a trainer wrapped are in no class.
    wrapped = source["naming"] == "hf" and bool(plain)
    same_names = (source["naming"] == naming and not wrapped) or format == "source"
    if same_names and source.get("dtype") is None and source["format"] != VALUES and not (cast or shard_size):
        # A pickle is given back where it is asked for; a Hugging Face checkpoint is of safetensors, Meta's file of one rank.
        wanted = format == "source" or (naming == "meta" and source["n_ranks"] == 1)
        if headers or (wanted and any(n.startswith("around/") for n in kept)):
            job = _as_released(c, family, headers, kept)
            if source["naming"] in VENDORS and _config_is_ours(
                c
            ):  # beside the vendor's own files there was none
                job.carried = [n for n in job.carried if n != "config.json"]
            return job
        if source["format"] in HEADED:
            raise ZooError(
                f"{c.root / SOURCE}: missing, or without the headers of the released files; convert again"
            )
    if format in VENDORS:
        return _as_vendors(c, family, format, shard_size, cast)
    if format == "source":
        raise ZooError(
            f'{c.root}: the released files cannot be made again ({_why_not(c)}); export with format "hf"'
        )
    return _as_new(c, family, shard_size or SHARD, set(plain.values()) or names, cast)


def _why_not(c: Canonical) -> str:
    """Why the files that the folder was made of are not given back."""
    source = c.source
    if source["format"] == VALUES:
        return "it holds other values"
    if source.get("dtype"):
        return f"converted to {source['dtype']}"
    kept = (
        " without what is around their tensors: too much, or an earlier zoo"
        if source["format"] in (*PICKLES, "gguf")
        else ""
    )
    return f"they were {source['format']} files{kept}"


def _cast_to(c: Canonical, dtype: str | None) -> dict[str, str]:
    """Canonical tensor -> the dtype that it is converted to, where that is another one. Tensors in fp32 beside narrower
    weights are those that the vendor singled out: they stay."""
    if dtype is None:
        return {}
    if codes := c.codes:
        slot, how = next(iter(codes.items()))
        raise ZooError(
            f"{c.root}: {len(codes)} weights are quantised ({slot}: {how}); export them as they are, or convert the source again with "
            "--dtype"
        )
    numbers = {n: t for n, t in c.tensors.items() if t.dtype in FLOATS}  # no tables of whole ones
    blocks = [n for n, t in c.tensors.items() if n.rpartition(".")[0] in c.quant and t.dtype == "U8"]
    narrow = dtype != "F32" and any(t.dtype != "F32" and len(t.shape) > 1 for t in numbers.values())
    stay = {n for n, t in numbers.items() if t.dtype == dtype or (narrow and t.dtype == "F32")}
    return dict.fromkeys([n for n in (*numbers, *blocks) if n not in stay], dtype)


def _carried(c: Canonical) -> list[str]:
    """The small files that go along, each in the folder."""
    names = c.json.get("carried", [])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ZooError(f"{c.root / JSON}: carried is {names!r:.100}, expected names of files")
    for name in names:
        inside(c.root, name if (c.root / name).exists() else kept_as(name), str(c.root / JSON))
    return names


def _kept(c: Canonical) -> dict[str, bytes]:
    path = c.root / SOURCE
    if not os.path.lexists(path):
        return {}
    inside(c.root, SOURCE, str(c.root))
    try:
        with open(path, "rb") as f, Archive(f, MAX_DIRECTORY) as z:
            if (total := sum(e.file_size for e in z.infolist())) > MAX_KEPT:
                raise ZooError(f"its entries come to {total} bytes (limit {MAX_KEPT})")
            if total > SMALL + PACKED * (size := os.fstat(f.fileno()).st_size):
                raise ZooError(f"its entries come to {total} bytes, packed to {size}, which headers are not")
            return {e.filename: _entry(z, e) for e in z.infolist()}
    except ZooError as e:
        raise ZooError(f"{path}: {e}: not zoo's") from None
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as e:
        raise ZooError(f"{path}: cannot be read ({e}); convert again") from None


def _entry(z: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """An entry, unpacked to no more than it says: `ZipFile.read` unpacks all of it before it is cut to that."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others know no limit
        raise ZooError(f"{entry.filename:.200} is packed in another way than zoo's")
    with z.open(entry) as f:
        return f.read(entry.file_size)


def _as_released(c: Canonical, family: Family, headers: dict[str, bytes], kept: Mapping[str, bytes]) -> _Job:
    """The same files with the same headers, or with the same bytes around their tensors."""
    source, sheet = c.source, Sheet()
    tensors: dict[str, TensorRef] = {}
    for file, raw in headers.items():
        size = source["files"][file]
        for ref in parse_header(raw, file, size, f"{c.root / SOURCE}: {file}"):
            name = full_name(file, ref.name)
            tensors[name] = replace(ref, name=name)
        sheet.sizes[file], sheet.headers[file] = size, struct.pack("<Q", len(raw)) + raw
    if not headers:
        tensors = _around_again(c, kept, sheet)
    sheet.place = {name: (ref.file, ref.offset) for name, ref in tensors.items()}
    if plain := unwrapped(tensors):  # as the plan had them; the kept headers hold the names as they were
        tensors = {plain[n]: replace(ref, name=plain[n]) for n, ref in tensors.items()}
        sheet.place = {plain[n]: at for n, at in sheet.place.items()}
    plan = _plan_again(c, family, tensors)
    for o in plan.outputs.values():
        have = c.tensors.get(o.name)
        if have is None or (have.dtype, have.shape) != (o.dtype, o.shape):
            raise ZooError(
                f"{c.root}: {o.name} is not as it was converted (expected {o.dtype} {list(o.shape)})"
            )
    if missing := [n for n in plan.extras if n not in c.extra_tensors]:
        raise ZooError(f"{c.root}: extra tensor {missing[0]} is missing; convert again")
    small = {INDEX: kept[INDEX]} if INDEX in kept else {}
    carried = [] if source["format"] == "gguf" else _carried(c)  # whose small files are made of the one
    dtypes = {name: ref.dtype for name, ref in tensors.items()}
    for o in plan.outputs.values():
        if plan.block_type(o) is not None:
            dtypes |= dict.fromkeys(o.sources, o.dtype)
        elif lost := [n for n in o.sources if dtypes[n] not in ITEMSIZE]:
            raise ZooError(
                f"{c.root}: the released files cannot be made again (blocks of {lost[0]}, {dtypes[lost[0]]}, were dequantised to "
                f'{o.dtype}); export with format "hf" or "gguf"'
            )
    filled = {
        sheet.place[name] for o in plan.outputs.values() for name in o.sources
    }  # names of the same bytes
    extras = [n for n in plan.extras if sheet.place[n] not in filled]
    return _Job(sheet, plan.outputs, dtypes, extras, small, carried, exact=True)


def _around_again(c: Canonical, kept: Mapping[str, bytes], sheet: Sheet) -> dict[str, TensorRef]:
    """The tensors of the pickles of which `kept` has all that is around them, which goes into `sheet`; as their reader read them."""
    source, found, budget = c.source, dict[str, list[TensorRef]](), Budget()
    if (n := sum(len(raw) for name, raw in kept.items() if name.startswith("around/"))) > MOST:
        raise ZooError(f"{c.root / SOURCE}: {n} bytes around tensors (limit {MOST}): not zoo's")
    for file, size in source["files"].items():
        who = f"{c.root / SOURCE}: {file}"
        hollow = Hollow(kept[f"around/{file}"], size, who)
        if source["format"] == "gguf":
            begin = hollow.pieces[0][1] if hollow.pieces and hollow.pieces[0][0] == 0 else b""
            found[file] = gguf.parse_header(begin, size, file, who)[1]
        else:
            found[file] = read_open(io.BufferedReader(hollow), file, who, budget=budget)
        sheet.sizes[file], sheet.around[file] = size, hollow.pieces
    if source["format"] == "meta":
        found = {file: meta.own(refs) for file, refs in found.items()}
    if source["naming"] == "meta":
        return meta.by_rank(list(found.values()), c.root, list(found))
    return {ref.name: ref for refs in found.values() for ref in refs}


def _plan_again(c: Canonical, family: Family, tensors: dict[str, TensorRef]) -> Plan:
    """The plan by which it was converted; refused if today's rules make another one."""
    source = c.source
    naming, config = source["naming"], source["config"]
    m = match(c.spec, family.rules[naming], tensors, source["n_ranks"], naming, None, config)
    ckpt = Checkpoint(
        c.root, source["format"], (naming,), config, tensors, source["files"], n_ranks=source["n_ranks"]
    )
    plan = Plan(ckpt, family, naming, m.prefix, c.spec, m.outputs, m.extras, None, m.quant)
    if m.n_problems or plan.digest != source["plan"]:
        raise ZooError(
            f"{c.root}: family {family.name}'s rules have changed since it was converted (zoo {c.json['zoo_version']}); "
            "what they give back now would not be the release. Export with that version, or convert again"
        )
    return plan


def _headers(kept: Mapping[str, bytes]) -> dict[str, bytes]:
    return {n.removeprefix("headers/"): raw for n, raw in kept.items() if n.startswith("headers/")}


def released_names(c: Canonical) -> set[str]:
    """The names of the tensors that were released, as far as they are known."""
    names = _names(_headers(_kept(c)), c)
    return set(unwrapped(names).values()) or names


def _names(headers: Mapping[str, bytes], c: Canonical) -> set[str]:
    """Of the released tensors, as the files have them."""
    names = set[str]()
    for file, raw in headers.items():
        header = parse_json(raw)
        if not isinstance(header, dict):
            raise ZooError(f"{c.root / SOURCE}: {file}: header is not a JSON object; convert again")
        names |= {full_name(file, n) for n in header if n != "__metadata__"}
    return names


def _as_new(
    c: Canonical, family: Family, shard_size: int, released: Collection[str], cast: Mapping[str, str]
) -> _Job:
    """A checkpoint in Hugging Face names, those that were `released` where a tensor may have several, from what the canonical
    tensors are now, in other dtypes where `cast` says so."""
    rules = rules_of(family)
    prefix = prefix_of(c, rules)
    outputs: dict[str, Output] = {}
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for o in outputs_of(c, rules, respell(rules, prefix), released):
        o = outputs[o.name] = replace(o, dtype=cast.get(o.name, o.dtype))
        tensors += [(name, o.dtype, fit.shape) for name, fit in zip(o.sources, o.fits)]
    aside = aside_of(c, rules)
    extras = [*aside]  # of other files they have no name here
    if left := [n for n in c.extra_tensors if n not in extras and c.extras.get(n) != TIED]:
        warn(
            log, "%s: %d tensors beside the model are not written (%s, ...), which are of another format than Hugging Face's: %s",
            c.root, len(left), left[0], c.extras.get(left[0], "no part of it"),
        )  # fmt: skip
    if extras and c.source["naming"] == "transformers":
        warn(
            log, "%s: %d tensors beside the model are written as %s, ...: below that, their names are those that transformers has in "
            "memory, which it opens too", c.root, len(extras), aside[extras[0]],
        )  # fmt: skip
    unique = {t[0]: t for t in tensors}  # a source may serve several canonical tensors
    beside = ((aside[n], c.extra_tensors[n].dtype, c.extra_tensors[n].shape) for n in extras)
    listed = [*unique.values(), *beside]
    sheet = Sheet()
    small: dict[str, bytes] = {}
    if index := _lay_out(sheet, listed, "model", shard_size):
        small[INDEX] = index
    sheet.place |= {n: sheet.place[aside[n]] for n in extras}
    carried = [n for n in _carried(c) if n != "config.json" and not n.endswith(".index.json")]
    modules = {} if cast or not c.codes else _modules(c, family, outputs, released)
    small["config.json"] = config_of(c, _carried(c), outputs["embed.weight"].dtype, bool(cast), modules)
    return _Job(
        sheet, outputs, {n: d for n, d, _ in listed}, extras, small, carried, exact=False, expands=_blocks(c)
    )


def _modules(
    c: Canonical, family: Family, outputs: Mapping[str, Output], released: Collection[str]
) -> dict[str, set[str]]:
    """What the source calls modules -> what the export does, where these are not the same names."""
    naming = c.source["naming"]
    if naming == "hf" or naming not in HF_NAMINGS:
        return {}
    theirs = family.rules[naming]
    prefix = tuple((a, b) for a, b in c.source["prefix"])
    return renamed(outputs_of(c, theirs, respell(theirs, prefix), released), outputs.values())


def _lay_out(
    sheet: Sheet, listed: list[tuple[str, str, tuple[int, ...]]], stem: str, shard_size: int
) -> bytes | None:
    """Put the tensors into one file, or into several, whose index is returned."""
    several = Sheet()
    several.add(listed, stem, shard_size)
    if len(several.sizes) == 1:
        sheet.file(f"{stem}.safetensors", listed)
        return None
    sheet.sizes, sheet.headers, sheet.place = several.sizes, several.headers, several.place
    return sheet.index()


def _as_vendors(
    c: Canonical, family: Family, naming: str, shard_size: int | None, cast: Mapping[str, str]
) -> _Job:
    """Meta's or Mistral's own files: their names by the rules of the family that has them, params.json as it came or made of the
    Spec. One file, as the vendors' own code opens, unless a size is asked for."""
    if codes := c.codes:
        slot, how = next(iter(codes.items()))
        raise ZooError(
            f"{c.root}: {len(codes)} weights are quantised ({slot}: {how}), which are not written in {naming}'s names but as they were "
            "released in them; convert the source again with --dtype"
        )
    ours = c.source["naming"] == naming
    form, params = params_out.form(family, naming, c.spec, str(c.root))
    rank0 = len("rank0.") if naming == "meta" else 0  # of one rank, whose file does not say it
    outputs = {
        o.name: replace(o, dtype=cast.get(o.name, o.dtype))
        for o in outputs_of(c, form.rules[naming], lambda name: name[rank0:], called=f"{naming}'s")
    }
    unique = {
        name: (name, o.dtype, fit.shape)
        for o in outputs.values()
        for name, fit in zip(o.sources, o.fits, strict=True)
    }
    extras = [n for n in c.extra_tensors if ours and c.source["n_ranks"] == 1]  # of several, each has a part
    aside = ((n[rank0:], c.extra_tensors[n].dtype, c.extra_tensors[n].shape) for n in extras)
    listed = [*unique.values(), *aside]
    if left := [n for n in c.extra_tensors if n not in extras]:
        warn(
            log, "%s: %d tensors beside the text model are not written (%s, ...): %s",
            c.root, len(left), left[0], c.extras.get(left[0], "no part of it"),
        )  # fmt: skip
    sheet, small = Sheet(), dict[str, bytes]()
    if naming == "meta":
        also = {"output.weight": "tok_embeddings.weight"} if c.spec.tied else {}  # its code asks for both
        sheet.archive("consolidated.00.pth", listed, also)
    elif index := _lay_out(sheet, listed, "consolidated", shard_size or sys.maxsize):
        small["consolidated.safetensors.index.json"] = index
    sheet.place |= {n: sheet.place[n[rank0:]] for n in extras}
    carried = [
        n for n in _carried(c) if n not in ("config.json", "params.json") and not n.endswith(".index.json")
    ]
    small["params.json"] = _params(c, params, ours)
    small |= _vendors_tokenizer(c, naming, carried)
    return _Job(
        sheet, outputs, {n: d for n, d, _ in listed}, extras, small, carried, exact=False, expands=_blocks(c)
    )


def _vendors_tokenizer(c: Canonical, naming: str, carried: Collection[str]) -> dict[str, bytes]:
    """The tokenizer's file that the vendor's code reads, where none is carried and Meta's can be made; else a warning."""
    if any(n.startswith(("tokenizer.model", "tekken")) for n in carried):
        return {}
    why = (
        "none is made of a tokenizer.json"
        if naming == "mistral"
        else "there is no tokenizer.json to make it of"
    )
    if naming == "meta" and "tokenizer.json" in carried:
        from zoo.text.tiktoken_out import ranks_file

        try:
            return {"tokenizer.model": ranks_file(read_small(c.root, "tokenizer.json"))}
        except ZooError as e:
            why = str(e)
    called = "tekken.json or tokenizer.model.v*" if naming == "mistral" else "tokenizer.model"
    warn(log, "%s: no %s is written, which %s's own code reads: %s", c.root, called, naming.title(), why)
    return {}


def _blocks(c: Canonical) -> frozenset[str]:
    """The schemes of what is in ggml's blocks."""
    return frozenset(how for how in c.quant.values() if is_one(scheme(how)))


def _config_is_ours(c: Canonical) -> bool:
    """Whether the config in the folder was made by the reader of a vendor's files."""
    config = place_of(c.root, "config.json")
    return config.exists() and read_json(config, "it was carried") == c.source["config"]


def _params(c: Canonical, made: Mapping[str, Any], ours: bool) -> bytes:
    """params.json: as it came with files of this naming, but for what a conversion changed; else what was `made`."""
    if not ours or "params.json" not in _carried(c):
        return encoded(made, indent=2) + b"\n"
    given = read_small(c.root, "params.json")
    said = parse_json(given)
    stored = [k for k in ("quantization", "quantization_config") if isinstance(said, dict) and k in said]
    if not stored:
        return given
    return encoded({k: v for k, v in said.items() if k not in stored}, indent=2) + b"\n"
