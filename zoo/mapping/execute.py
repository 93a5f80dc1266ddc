"""Execute a plan: source files -> a canonical folder, by moving bytes.

    convert(plan, dst)                       everything is here already

    with Execution(plan, dst) as run:        the files arrive one by one, in any order
        for file in run.wanted:              ... those that an earlier, interrupted run has not consumed
            fetch(file)
            for name in run.feed(file):      what is done with the file is done
                delete(name)                 these files are not needed any more
        run.finish()                         the folder appears under its final name

    run.feed_here()                          all that lie in the checkpoint's folder, several at a time

Every move reads one source file (a quantised weight that is dequantised reads those of its scales, too), so a
file is consumed when `feed` returns, unless a later file must be read together with it. A file that was fed
and consumed in an interrupted run is not wanted again. Work within a file is spread over threads.

Renaming, fusing and stacking move whole runs of bytes from file to file: no tensor library is imported and
memory does not grow with the checkpoint. numpy comes in where elements are rearranged, cast or
dequantised; torch never.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import threading
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from zoo import families
from zoo._version import __version__
from zoo.errors import ZooError
from zoo.formats.base import ITEMSIZE, TensorRef, encoded, kept_as, read_json, read_small
from zoo.formats.canonical import JSON, SOURCE, wrote
from zoo.formats.pickle_out import Archive
from zoo.formats.safetensors import INDEX, header_bytes
from zoo.layout import VERSION
from zoo.mapping.folder import Folder
from zoo.mapping.moves import (
    COPY,
    Copy,
    Loader,
    Loop,
    Move,
    Rearrange,
    Through,
    in_kernel,
    loops,
    merged,
    offsets,
    restride,
    run_length,
    woven,
)
from zoo.mapping.parts import Part, Shared, shares
from zoo.mapping.plan import Plan
from zoo.mapping.recipe import Output
from zoo.mapping.rules import Box, Fit
from zoo.mapping.ways import BUFFERED, KERNEL, WAYS, Chooser, Clock, Unfit, copy
from zoo.quant.schemes import scheme
from zoo.untrusted.bounded import parse_json
from zoo.untrusted.plain import open_file
from zoo.untrusted.printable import warn

log = logging.getLogger("zoo")

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all); called from any thread, one call at a time."""

SHARD = 5_000_000_000  # bytes of tensors per file at most, as Hugging Face cuts them
_BATCH = 16_000_000_000  # bytes of source files that are worked on together: what a kill can cost


def shard_size_of(total: int) -> int:
    """Bytes of tensors per file: a small model too has four files, so that several threads can write."""
    return min(SHARD, max(total // 4 + 1, SHARD // 5))


# ---------------------------------------------------------------------------------------------------
# Where the canonical tensors lie


@dataclass
class Sheet:
    """Files to be, safetensors or torch's archives: their sizes, what lies before the first tensor or `around` them (offset, bytes),
    and (file, byte offset) of each tensor."""

    sizes: dict[str, int] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)
    archives: dict[str, Archive] = field(default_factory=dict)
    around: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    place: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, tensors: Iterable[tuple[str, str, tuple[int, ...]]], stem: str, limit: int) -> None:
        """Files `stem-NNNNN-of-NNNNN.safetensors` of about `limit` bytes for (name, dtype, shape) in this order."""
        shards: list[list[tuple[str, str, tuple[int, ...]]]] = []
        left = 0
        for t in tensors:
            n = _nbytes(t[1], t[2])
            if not shards or n > left:
                shards.append([])
                left = limit
            shards[-1].append(t)
            left -= n
        for k, shard in enumerate(shards):
            self.file(f"{stem}-{k + 1:05d}-of-{len(shards):05d}.safetensors", shard)

    def file(self, name: str, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
        # Wide elements first, as safetensors itself writes: every tensor is then aligned to its elements.
        tensors = sorted(tensors, key=lambda t: -ITEMSIZE[t[1]])
        header = header_bytes(tensors, {"format": "pt"})
        at = len(header)
        for tensor, dtype, shape in tensors:
            self.place[tensor] = name, at
            at += _nbytes(dtype, shape)
        self.sizes[name], self.headers[name] = at, header

    def archive(
        self, name: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], also: Mapping[str, str]
    ) -> None:
        """One file as torch.save writes it; see `Archive`."""
        made = self.archives[name] = Archive(name, tensors, also)
        self.place |= {tensor: (name, at) for tensor, at in made.place.items()}
        self.sizes[name] = made.size

    @property
    def nbytes(self) -> int:
        """Of tensors in all files."""
        archived = sum(a.nbytes for a in self.archives.values())
        around = sum(self.sizes[f] - sum(len(data) for _, data in some) for f, some in self.around.items())
        return archived + around + sum(self.sizes[f] - len(raw) for f, raw in self.headers.items())

    def index(self) -> bytes:
        """The index of all files, as Hugging Face writes it."""
        total = self.nbytes
        weight_map = {name: file for name, (file, _) in self.place.items()}
        return (
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
            + b"\n"
        )


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    n = ITEMSIZE[dtype]
    for d in shape:
        n *= d
    return n


def sheet_of(plan: Plan, shard_size: int | None = None) -> Sheet:
    """The files of the canonical folder that `plan` makes."""
    sheet = Sheet()
    shard_size = shard_size or shard_size_of(plan.nbytes)
    sheet.add(((o.name, o.dtype, o.shape) for o in plan.outputs.values()), "model", shard_size)
    refs = sorted((plan.checkpoint.tensors[n] for n in plan.extras), key=lambda r: (r.file, r.offset))
    for r in refs:
        if r.dtype not in ITEMSIZE or r.name in plan.outputs:
            raise ZooError(f"{r.name} in {r.file}: an extra of dtype {r.dtype} cannot be kept aside")
    sheet.add(((r.name, r.dtype, r.shape) for r in refs), "extras", shard_size)
    return sheet


# ---------------------------------------------------------------------------------------------------
# Moving


class Sink(Protocol):
    """Where a Mover writes: files of these sizes, by their names; `dst` is what they are called together in errors."""

    @property
    def dst(self) -> Path: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    def fd(self, name: str) -> int: ...


class Mover:
    """Moves between open files; shared by conversion and export."""

    def __init__(
        self, folder: Sink, total: int, progress: Progress | None = None, threads: int | None = None
    ) -> None:
        self.folder, self.total, self.progress = folder, total, progress
        self.threads = threads or min(4, len(os.sched_getaffinity(0)))
        self.n_done = 0
        self._sources: dict[str, int] = {}
        self._paths: dict[str, Path] = {}
        self._lock = threading.Lock()
        # The kernel lets one writer into a file at a time; others would spin. So they wait here.
        self._writing = {name: threading.Lock() for name in folder.sizes}
        # By whether the two sides lie alike within their pages: the kernel may then have the file system share blocks.
        self._choosers = {
            alike: Chooser([KERNEL] if alike else list(WAYS), self.threads) for alike in (True, False)
        }
        if KERNEL not in WAYS:
            self._without(KERNEL)
        self._loops: dict[int, tuple[Fit, tuple[Loop, ...], tuple[Loop, ...]]] = {}

    def open(self, file: str, path: Path) -> None:
        self._paths[file] = path

    def source(self, file: str) -> int:
        """The descriptor of a source file, opened when first asked for."""
        with self._lock:
            if (fd := self._sources.get(file)) is None:
                try:
                    fd = open_file(self._paths[file])
                except OSError as e:
                    raise ZooError(f"{self._paths[file]}: cannot be read: {e.strerror}") from None
                self._sources[file] = fd
            return fd

    def close(self, file: str | None = None) -> None:
        for name in [file] if file else list(self._sources):
            if (fd := self._sources.pop(name, None)) is not None:
                os.close(fd)

    def loop(self, fit: Fit, backwards: bool = False) -> tuple[Loop, ...]:
        """The loops of a fit, from source to canonical or `backwards`."""
        if id(fit) not in self._loops:
            self._loops[id(fit)] = (fit, loops(fit.source, fit.canonical), loops(fit.canonical, fit.source))
        _, there, back = self._loops[id(fit)]
        return back if backwards else there

    def copies(
        self, src: str, src_at: int, dst: str, dst_at: int, itemsize: int, loop: tuple[Loop, ...]
    ) -> list[Copy]:
        """A move whose runs are long, as one copy per run; offsets in bytes."""
        n = run_length(loop)
        outer = loop[:-1] if n > 1 else loop
        return [
            Copy(src, src_at + a * itemsize, dst, dst_at + b * itemsize, n * itemsize)
            for a, b in offsets(outer)
        ]

    def run(self, copies: list[Copy], rearrangements: Iterable[Through]) -> None:
        """Do all of them, over the threads; the first error stops everything and is raised."""
        pieces = merged(copies)
        for alike in (True, False):
            self._copy_all(_Queues(c for c in pieces if c.alike is alike), alike)
        self._over_threads(_Queues(rearrangements), self.threads, lambda: self._rearrange)

    def _copy_all(self, queues: _Queues, alike: bool) -> None:
        while queues.left:
            chooser = self._choosers[alike]
            choice, most = chooser.next()
            chooser.took(
                choice, *self._over_threads(queues, choice.threads, partial(self._copier, choice.way), most)
            )

    def _copier(self, way: str) -> Callable[[Any], None]:
        """For one thread, as long as no source is closed."""
        step = WAYS[way]()

        def work(c: Copy) -> None:
            nonlocal step
            places = self.source(c.src), c.src_at, self.folder.fd(c.dst), c.dst_at, c.nbytes, c.src
            try:
                copy(step, *places, self._writing[c.dst])
            except Unfit:
                with self._lock:
                    self._without(way)
                step = WAYS[BUFFERED]()
                copy(step, *places, self._writing[c.dst])

        return work

    def _without(self, way: str) -> None:
        """It does not work between these files."""
        self._choosers[False].drop(way)
        if way == KERNEL:
            self._choosers[True] = self._choosers[False]

    def _over_threads(
        self,
        queues: _Queues,
        threads: int,
        worker: Callable[[], Callable[[Any], None]],
        most: float = math.inf,
    ) -> tuple[int, float]:
        """Take moves of `most` bytes and do them, by a worker in each thread; bytes done, and seconds (see `ways.Clock`)."""
        lock, stop, errors = threading.Lock(), threading.Event(), list[BaseException]()
        begun = done = 0
        seconds = 0.0

        def work() -> None:
            nonlocal begun, done, seconds
            try:
                clock, do = Clock(), worker()
                while not stop.is_set():
                    with lock:
                        moves = queues.take() if begun < most else []
                        begun += sum(m.nbytes for m in moves)
                        if not moves:
                            seconds = max(seconds, clock.seconds)
                            return
                    for move in moves:
                        do(move)
                        with lock:
                            done += move.nbytes
                            self.report(move.nbytes)
                    with lock:
                        queues.done(moves[0].dst)
            except BaseException as e:
                stop.set()
                errors.append(e)

        helpers = [threading.Thread(target=work, daemon=True) for _ in range(threads - 1)]
        for h in helpers:
            h.start()
        try:
            work()
            for h in helpers:
                h.join()
        except BaseException as e:  # Ctrl-C while joining
            stop.set()
            errors.append(e)
            for h in helpers:
                h.join()
        if errors:
            first = errors[0]
            if isinstance(first, OSError):
                raise ZooError(
                    f"{self.folder.dst}: {first.strerror}; what is written so far is kept, run again to go on"
                ) from first
            raise first
        return done, seconds

    def report(self, n: int) -> None:
        """`n` more bytes are written."""
        self.n_done += n
        if self.progress is not None:
            self.progress(self.n_done, self.total)

    def _rearrange(self, r: Through) -> None:
        r.run(self.folder.fd(r.dst))


class _Queues:
    """Moves by destination. The kernel lets one writer into a file at a time, so a thread is given moves of a file that
    no other is writing, where there is one; of those the one with most left to do, so that the last are short."""

    def __init__(self, moves: Iterable[Move]) -> None:
        work: dict[str, list[Move]] = {}
        for move in moves:
            work.setdefault(move.dst, []).append(move)
        self.moves = {dst: _pieces(moves) for dst, moves in work.items()}
        self.left = {dst: sum(m.nbytes for m in moves) for dst, moves in work.items()}
        self.writers = dict.fromkeys(work, 0)

    def take(self) -> list[Move]:
        """Neighbours of one file, of about `COPY` bytes; none if nothing is left."""
        while self.left:
            dst = min(self.left, key=lambda d: (self.writers[d], -self.left[d]))
            found: list[Move] = []
            while sum(m.nbytes for m in found) < COPY and (move := next(self.moves[dst], None)) is not None:
                found.append(move)
            self.left[dst] -= sum(m.nbytes for m in found)
            if not found or self.left[dst] <= 0:
                del self.left[dst]
            if found:
                self.writers[dst] += 1
                return found
        return []

    def done(self, dst: str) -> None:
        self.writers[dst] -= 1


def _pieces(moves: Iterable[Move]) -> Iterator[Move]:
    for m in moves:
        yield from (m,) if isinstance(m, Copy) else m.chunks()


# ---------------------------------------------------------------------------------------------------
# Converting


class Execution:
    """A conversion under way; see the module's docstring. A context manager.

    `identity`: what says that a source is the same as in an interrupted run, where that is not the files'
    times and sizes (a commit, for a remote one). `strict`: scales that are zero or not finite stop it,
    otherwise they are warnings (in `warnings`, logged, and written to zoo.json). `durable`: each consumed file
    is synced to disk, so that its source may be deleted at once. `part`: do this part of it, other processes the
    others (see `zoo.mapping.parts`); the folder appears when the last has finished.
    Raises ZooError as `Folder` does, and if a source file is not what its header said.
    """

    def __init__(
        self,
        plan: Plan,
        dst: str | os.PathLike[str],
        *,
        force: bool = False,
        shard_size: int | None = None,
        strict: bool = False,
        durable: bool = False,
        identity: str | None = None,
        progress: Progress | None = None,
        threads: int | None = None,
        source: Mapping[str, Any] | None = None,
        part: Part | None = None,
    ) -> None:
        self.plan, self.strict = plan, strict
        self.sheet = sheet_of(plan, shard_size)
        self.warnings: list[str] = []
        self._warning = threading.Lock()
        self._extra_source = dict(source or {})
        self._local = identity is None
        identity = identity or _identity(plan)
        refuse_overlap(plan.checkpoint.root, Path(dst))
        self._mine: frozenset[str] | None = None
        if part is None:
            job = repr((plan.digest, plan.rules_version, __version__, self.sheet.sizes, identity))
            self.folder = Folder(
                dst, self.sheet.sizes, _sha256(job), force=force, ours=wrote, durable=durable
            )
        else:
            self._mine = frozenset(shares(self.sheet.sizes, part.of)[part.number - 1])
            says = {
                "the plan": plan.digest,
                "the source": str(plan.checkpoint.root.resolve()) if self._local else "a remote one",
                "the source's files (sizes, times)": _sha256(identity)[:16],
                "the size of its shards": _sha256(repr(self.sheet.sizes))[:16],
                "zoo": f"{__version__}, rules {plan.rules_version}",
            }
            self.folder = Shared(
                dst, self.sheet.sizes, self._mine, says, part,
                made=self._made, force=force, ours=wrote, durable=durable,
            )  # fmt: skip
        self.nbytes = sum(n - len(self.sheet.headers[name]) for name, n in self.folder.sizes.items())
        self.mover = Mover(self.folder, plan.nbytes if part is None else self.nbytes, progress, threads)
        self._outputs = list(plan.outputs.values())
        self._extras: dict[str, list[str]] = {}
        for name in plan.extras:
            if self._is_mine(name):
                self._extras.setdefault(plan.checkpoint.tensors[name].file, []).append(name)
        self._units, self._joint = self._by_file()

    def __enter__(self) -> Self:
        self.folder.__enter__()
        self.warnings += self.folder.said
        if not self.folder.published:
            for name in self.folder.sizes:
                self.folder.head(name, self.sheet.headers[name])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.mover.close()
        self.folder.__exit__(kind, e, tb)

    @property
    def wanted(self) -> list[str]:
        """Source files still to be fed, in their natural order."""
        if self.folder.published:  # by the other parts
            return []
        files = {*self._units, *self._extras, *(f for files, _, _ in self._joint for f in files)}
        return [f for f in self.plan.checkpoint.files if f in files and f not in self.folder.done]

    def feed(self, file: str, path: Path | None = None) -> list[str]:
        """Do all that can be done now that `file` is complete (at `path`, default: in the checkpoint's folder).
        Returns the fed files that nothing needs any more. Returns at once for a file consumed before."""
        if file not in self.folder.done:
            self._consume({file: path or self.plan.checkpoint.path(file)})
        return self._free()

    def feed_here(self) -> None:
        """Feed every file that is still wanted; all lie in the checkpoint's folder."""
        ckpt = self.plan.checkpoint
        batch: dict[str, Path] = {}
        for file in self.wanted:
            batch[file] = ckpt.path(file)
            if sum(ckpt.files[f] for f in batch) >= _BATCH:
                self._consume(batch)
                self._free()
                batch = {}
        self._consume(batch)

    def _consume(self, files: Mapping[str, Path]) -> None:
        for file, path in files.items():
            _check_file(path, self.plan.checkpoint.files[file])
            self.mover.open(file, path)
        there = self.folder.done | files.keys()
        units = [u for file in files for u in self._unpack(self._units.get(file, ()))]
        units += [(o, k) for needed, o, k in self._joint if needed & files.keys() and needed <= there]
        self._run(files, units)
        for file in files:
            self.folder.mark(file, [w for w in self.warnings if w not in self.folder.said])

    def _free(self) -> list[str]:
        """Consumed files that nothing waits for."""
        ckpt = self.plan.checkpoint
        waiting = {f for files, _, _ in self._joint for f in files if not files <= self.folder.done}
        free = [f for f in ckpt.files if f in self.folder.done and f not in waiting]
        for f in free:
            self.mover.close(f)
        return free

    def finish(self) -> Path:
        """Write what describes the checkpoint, and let the folder appear; of several parts the last to finish does so
        (`folder.published`, else `folder.waiting`). Raises ZooError if files are wanting."""
        if wanted := self.wanted:
            raise ZooError(
                f"{self.folder.dst}: not complete, {len(wanted)} source file(s) were not fed: {wanted[0]}, ..."
            )
        with self.folder.last() as last:
            if last:
                self._write_beside()
                self.folder.publish()
        return self.folder.dst

    def _write_beside(self) -> None:
        ckpt = self.plan.checkpoint
        for name in self.plan.carried:
            data = ckpt.synthesised.get(name)
            self.folder.write(kept_as(name), read_small(ckpt.root, name) if data is None else data)
        self.folder.write(INDEX, self.sheet.index())
        if kept := _source_zip(self.plan):
            self.folder.write(SOURCE, kept)
        self.warnings = sorted({*self.warnings, *self.folder.said})
        self.folder.write(JSON, encoded(self._describe(), indent=1) + b"\n")

    def _made(self, dst: Path) -> bool:
        """Whether the folder is what this conversion makes, made since its source was last changed."""
        try:
            at = (dst / JSON).stat().st_mtime_ns
            there = read_json(dst / JSON, "")
            if any((dst / name).stat().st_size != size for name, size in self.sheet.sizes.items()):
                return False
        except (OSError, ZooError):
            return False
        here = parse_json(encoded(self._describe()))
        if not self._local:  # each machine may have fetched it to a place of its own
            for said in (there, here):
                said["source"] = {**(said.get("source") or {}), "path": None}
        ckpt = self.plan.checkpoint
        newer = self._local and any(ckpt.path(f).stat().st_mtime_ns > at for f in ckpt.files)
        return {**there, "warnings": None} == {**here, "warnings": None} and not newer

    def _is_mine(self, tensor: str) -> bool:
        return self._mine is None or self.sheet.place[tensor][0] in self._mine

    # --- what a source file is needed for -------------------------------------------------------------------

    def _by_file(self) -> tuple[dict[str, array[int]], list[tuple[frozenset[str], Output, int]]]:
        """(output, fit) by the file that they need, packed: there may be a hundred thousand; and those that
        need several files."""
        tensors = self.plan.checkpoint.tensors
        units: dict[str, array[int]] = {}
        joint: list[tuple[frozenset[str], Output, int]] = []
        for n, o in enumerate(self._outputs):
            if not self._is_mine(o.name):
                continue
            for k, (source, fit) in enumerate(zip(o.sources, o.fits)):
                file = tensors[source].file
                if o.scheme is not None or fit.copy:
                    names = self.plan.sources_of(o, k) + ([o.sources[_original(o, k)]] if fit.copy else [])
                    files = frozenset(tensors[s].file for s in names)
                    if len(files) > 1:
                        joint.append((files, o, k))
                        continue
                units.setdefault(file, array("q")).append(n << 32 | k)
        return units, joint

    def _unpack(self, packed: Iterable[int]) -> Iterator[tuple[Output, int]]:
        for u in packed:
            yield self._outputs[u >> 32], u & 0xFFFFFFFF

    def _run(self, files: Iterable[str], units: list[tuple[Output, int]]) -> None:
        copies: list[Copy] = []
        through: list[Rearrange] = []
        replicas: list[tuple[Output, int]] = []
        for o, k in units:
            if o.fits[k].copy:
                replicas.append((o, k))
                continue
            if o.scheme is not None or o.name.endswith("scale"):
                self._check_scales(o, k)
            elif (kind := self.plan.block_type(o)) is not None:
                self._check_blocks(self.plan.checkpoint.tensors[o.sources[k]], kind)
            self._move(o, k, copies, through)
        for name in (n for file in files for n in self._extras.get(file, ())):
            ref = self.plan.checkpoint.tensors[name]
            dst, at = self.sheet.place[name]
            if ref.strides is None:
                copies.append(Copy(ref.file, ref.offset, dst, at, ref.nbytes))
            else:
                whole = Box.whole(ref.shape)
                box = restride(whole, ref.shape, ref.strides)
                through.append(
                    Rearrange(self._raw(ref), dst, at, ITEMSIZE[ref.dtype], loops(box, whole), 0, 0)
                )
        self.mover.run(copies, woven(through))
        for o, k in replicas:
            self._compare(o, k)

    def _move(self, o: Output, k: int, copies: list[Copy], through: list[Rearrange]) -> None:
        ref, fit = self.plan.checkpoint.tensors[o.sources[k]], o.fits[k]
        if not ref.size:
            return
        dst, base = self.sheet.place[o.name]
        size = ITEMSIZE[o.dtype]
        src_box = fit.source
        if ref.strides is None:
            loop = self.mover.loop(fit)
        else:
            src_box = restride(src_box, fit.shape, ref.strides)
            loop = loops(src_box, fit.canonical)
        plain = o.way(k) is None and ref.dtype == o.dtype and not fit.change
        if plain and in_kernel(loop, size):
            src_at, dst_at = ref.offset + src_box.offset * size, base + fit.canonical.offset * size
            copies += self.mover.copies(ref.file, src_at, dst, dst_at, size, loop)
        else:
            loader = self._raw(ref) if plain else self._decoder(o, k, ref)
            through.append(Rearrange(loader, dst, base, size, loop, src_box.offset, fit.canonical.offset))

    def _raw(self, ref: TensorRef) -> Loader:
        from zoo.mapping import decode

        return decode.Raw(ref, decode.Files(self.mover.source))

    def _decoder(self, o: Output, k: int, ref: TensorRef) -> Loader:
        from zoo.mapping import decode

        files = decode.Files(self.mover.source)
        if (way := o.way(k)) is not None:
            others = {c: self.plan.checkpoint.tensors[name] for c, name in o.beside(k).items()}
            if (how := scheme(way)).module:
                return decode.Formula(ref, others, how, o.fits[k].shape, files, o.dtype)
            return decode.Quantised(ref, others, way, o.fits[k].shape, files, o.dtype)
        change = o.fits[k].change
        dtype = "F32" if change else o.dtype
        blocks = ref.dtype not in ITEMSIZE
        whole = decode.Blocks(ref, files, dtype, self._warn) if blocks else decode.Cast(ref, files, dtype)
        return decode.Undone(ref, whole, o.dtype, change) if change else whole

    def _compare(self, o: Output, k: int) -> None:
        """A replica must be the bytes of the original."""
        tensors = self.plan.checkpoint.tensors
        a, b = tensors[o.sources[_original(o, k)]], tensors[o.sources[k]]
        x, y = self._raw(a), self._raw(b)
        step = COPY // ITEMSIZE[a.dtype]
        same = (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides)
        if not same or any(
            x.read(at, min(step, a.size - at)).tobytes() != y.read(at, min(step, a.size - at)).tobytes()
            for at in range(0, a.size, step)
        ):
            raise ZooError(
                f"{b.name} in {b.file}: differs from {a.name} in {a.file}, of which it should be a copy"
            )

    def _check_scales(self, o: Output, k: int) -> None:
        from zoo.mapping import decode

        names = (
            [o.sources[k]] if o.scheme is None else [name for c, name in o.beside(k).items() if c == "scale"]
        )
        for name in names:
            ref = self.plan.checkpoint.tensors[name]
            if bad := decode.bad_scales(ref, decode.Files(self.mover.source)):
                self._warn(f"{name} in {ref.file}: its scales are {bad}")

    def _check_blocks(self, ref: TensorRef, kind: str) -> None:
        """Of blocks that are carried as they are, the scales inside: a pass over them, some rows at a time."""
        import numpy as np

        from zoo.mapping import decode
        from zoo.quant import blocks

        files, row = decode.Files(self.mover.source), ref.shape[-1]
        step = max(1, COPY // row) * row
        for at in range(0, ref.nbytes, step):
            raw = files(ref.file, ref.offset + at, min(step, ref.nbytes - at))
            if not blocks.finite(np.asarray(raw), kind):
                self._warn(decode.NOT_FINITE.format(ref.name, ref.file))
                return

    def _warn(self, text: str) -> None:
        if self.strict:
            raise ZooError(f"{text}; refused because of --strict")
        with self._warning:  # threads find the same of one tensor
            if text not in self.warnings:
                self.warnings.append(text)
                warn(log, "%s", text)

    # --- what describes it ----------------------------------------------------------------------------------

    def _describe(self) -> dict[str, Any]:
        plan, ckpt = self.plan, self.plan.checkpoint
        out: dict[str, Any] = {
            "layout_version": VERSION,
            "zoo_version": __version__,
            "spec": plan.spec.to_dict(),
            "quant": plan.quant,
            "source": {
                "path": str(ckpt.root.resolve()),
                "format": ckpt.format,
                "naming": plan.naming,
                "prefix": [list(p) for p in plan.prefix],
                "family": plan.family.name,
                **({"family_given": True} if plan.family_given else {}),
                **_brought_by(plan.family.name),
                "rules": plan.rules_version,
                "plan": plan.digest,
                "dtype": plan.dtype,
                "n_ranks": ckpt.n_ranks,
                "files": ckpt.files,
                "config": ckpt.config,
                **self._extra_source,
            },
            "carried": list(plan.carried),
            "extras": plan.extras,
        }
        if plan.layers is not None:
            out["layers"] = list(plan.layers)
        if notes := [*ckpt.notes, *plan.notes]:
            out["notes"] = notes
        if self.warnings:
            out["warnings"] = self.warnings
        return out


def _brought_by(family: str) -> dict[str, Any]:
    """The package that a family came with, unless it is one of zoo's own: what to install where it is missing."""
    package = families.package_of(family)
    return {} if package is None else {"package": {"name": package.name, "version": package.version}}


def convert(
    plan: Plan,
    dst: str | os.PathLike[str],
    *,
    force: bool = False,
    shard_size: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    source: Mapping[str, Any] | None = None,
    part: Part | None = None,
) -> Path:
    """Convert a checkpoint whose files are all here to the canonical folder `dst`, and return it.

    `dst` must not exist (`force` replaces a canonical folder), and does not until it is complete. `shard_size`: bytes
    of tensors per file, None: see `shard_size_of`. `source`: provenance to add. Raises ZooError as `Execution` does.
    """
    with Execution(
        plan,
        dst,
        force=force,
        shard_size=shard_size,
        strict=strict,
        progress=progress,
        threads=threads,
        source=source,
        part=part,
    ) as run:
        run.feed_here()
        return run.finish()


def _original(o: Output, k: int) -> int:
    """Which fit gives the elements that the k-th is a copy of."""
    at = o.fits[k].canonical
    return next(j for j, f in enumerate(o.fits) if not f.copy and f.canonical == at)


def _check_file(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as e:
        raise ZooError(f"{path}: cannot be read: {e.strerror}") from None
    if found != size:
        raise ZooError(
            f"{path}: has {found:,} bytes, its header was read at {size:,}: it changed or is truncated"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(plan: Plan) -> str:
    """Sizes and times of the source's files."""
    parts = []
    for name, size in plan.checkpoint.files.items():
        path = plan.checkpoint.path(name)
        parts.append((name, size, path.stat().st_mtime_ns if path.exists() else 0))
    return repr((str(plan.checkpoint.root.resolve()), parts))


def refuse_overlap(root: Path, dst: Path) -> None:
    """Neither may lie within the other: replacing the destination would remove the source."""
    a, b = root.resolve(), Path(os.path.abspath(dst)).resolve()
    if a == b or a.is_relative_to(b):
        raise ZooError(f"{dst}: holds the source {root}; choose another destination")


def _source_zip(plan: Plan) -> bytes | None:
    """What export needs to give the files back to the byte, and what could not lie beside the canonical files
    under its own name: raw headers of the weight files, or all that lies around their tensors, and their index."""
    ckpt = plan.checkpoint
    kept: dict[str, bytes] = {f"headers/{name}": raw for name, raw in ckpt.headers.items()}
    if ckpt.format != "gguf" or plan.dtype is None:  # of a GGUF that is dequantised nothing can be given back
        kept |= {f"around/{name}": raw for name, raw in ckpt.around.items()}
    if INDEX in ckpt.carried:
        kept[INDEX] = read_small(ckpt.root, INDEX)
    if not kept:
        return None
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for name, data in kept.items():
            z.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
