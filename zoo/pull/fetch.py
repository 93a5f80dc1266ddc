"""The ways in which a source's bytes come to its conversion.

Three fetch: whole files into the Hub's cache; `stream`, and always from an object store, one file at a time beside the
destination, each deleted when its last tensor is converted; `layers`, only the byte ranges of those layers, in sparse files. Every way continues where
an interrupted run stopped, and gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.base import Checkpoint
from zoo.formats.safetensors import read_header
from zoo.hub.http import Watch
from zoo.mapping.folder import Folder, clear, in_the_way, is_ours, own
from zoo.mapping.parts import Part, Shared
from zoo.pull.progress import Passed, Steps
from zoo.pull.source import Opened
from zoo.pull.space import check_space, files_of, ranges_of, to_fetch, to_write, written
from zoo.quant.blocks import as_planned
from zoo.untrusted.plain import open_plain, write_plain

if TYPE_CHECKING:
    from zoo.hub import Progress
    from zoo.remote import Remote

MARK = ".zoo-fetched"  # in a folder of fetched files that is zoo's to delete


class Job:
    """One conversion of a remote source into `target`, or a part of it."""

    def __init__(
        self,
        opened: Opened,
        target: Path,
        force: bool,
        progress: Progress,
        workers: int,
        strict: bool,
        part: Part | None = None,
    ) -> None:
        self.opened, self.plan, self.target, self.force = opened, opened.plan, target, force
        self.strict, self.part = strict, part
        self.progress, self.workers = progress, workers
        self.needed, self.nbytes = files_of(self.plan, part), written(self.plan, part)
        mine = "" if part is None else f"-{part.number}-of-{part.of}"
        self.work = target.with_name(f"{target.name}.source{mine}")  # what is fetched beside the destination

    @property
    def remote(self) -> Remote:
        assert self.opened.remote is not None
        return self.opened.remote

    def path(self, file: str) -> str:
        """The path in the repository of a file of the checkpoint."""
        return os.path.join(self.remote.folder, file)

    def from_disk(self) -> None:
        """Convert what a package brought."""
        check_space(self.target, {self.target: to_write(self.plan, self.part)})
        ckpt = self.plan.checkpoint
        self.progress.start(self.nbytes)
        self._convert(ckpt, lambda run: None, path=_reopened(ckpt), identity=_identity(self.opened))

    def by_files(self) -> None:
        """Fetch whole files into the Hub's cache, then convert from there."""
        from zoo import hub
        from zoo.hub import cache

        snapshot, files = self.remote.snapshot, self.remote.files
        if self.part is not None and _by_its_files(self.plan.checkpoint):
            mine = {self.path(f) for f in self.needed}
            weights = set(self.remote.weights)
            files = tuple(f for f in files if f not in weights or f.path in mine)
        fetch, there = to_fetch(self.opened, True, files)
        at = cache.folder(snapshot.repo)
        check_space(self.target, {at: fetch - there, self.target: to_write(self.plan, self.part)})
        self.progress.start(fetch + self.nbytes)
        paths = [f.path for f in files]
        folder = hub.download(snapshot, paths, workers=self.workers, progress=Passed(self.progress))
        ckpt = _moved(self.plan.checkpoint, folder, self.remote, set(paths))
        self._convert(ckpt, lambda run: None, path=_reopened(ckpt), identity=_identity(self.opened))

    def by_ranges(self) -> None:
        """Fetch the byte ranges that the plan reads, into sparse files beside the destination."""
        from zoo import hub

        ranges = ranges_of(self.plan)
        fetch = sum(length for spans in ranges.values() for _, length in spans)
        check_space(self.target, {self.target: fetch + to_write(self.plan)})
        self.progress.start(fetch + self.plan.nbytes)
        self._beside()
        self.progress.phase("downloading")
        for file, spans in ranges.items():
            hub.download_sparse(
                self.remote.snapshot, self.path(file), spans, self.work / file,
                workers=self.workers, progress=Passed(self.progress),
            )  # fmt: skip
        ckpt = replace(self.plan.checkpoint, root=self.work)
        self._convert(ckpt, lambda run: None, path=None, identity=_identity(self.opened))

    def by_streaming(self) -> None:
        """Fetch a file while the one before is converted; delete each when nothing needs it any more."""
        from zoo import hub

        def fetch(file: str, cancel: threading.Event) -> None:
            hub.download_to(
                self.remote.snapshot,
                self.path(file),
                self.work / file,
                progress=Passed(self.progress),
                cancel=cancel,
            )

        self._arriving(fetch, self._beside)

    def from_store(self) -> None:
        """The same, from an object store."""
        assert self.opened.stored is not None
        stored, ckpt = self.opened.stored, self.plan.checkpoint
        advance = Watch(self.progress).advance

        def fetch(file: str, cancel: threading.Event) -> None:
            with open_for_fetching(self.work / file) as fd:
                stored.fetch(stored.path(file), fd, advance=advance, stopped=cancel.is_set)
            if (header := ckpt.headers.get(file)) is not None and read_header(self.work / file) != header:
                raise ZooError(f"{stored}: {file} was written again since the plan was made; run this again")

        def beside() -> None:
            begin_beside(self.work)
            for name in ckpt.carried:
                put_beside(self.work, name, stored.small(stored.path(name)))

        self._arriving(fetch, beside)
        if stored.unhashed:
            self.progress.note(
                f"{stored} tells no hash of {len(stored.unhashed)} of the files that were read: sizes and headers were compared"
            )

    def _arriving(self, fetch: Callable[[str, threading.Event], None], beside: Callable[[], None]) -> None:
        plan = self.plan
        sizes = {f: plan.checkpoint.files[f] for f in self.needed}
        check_space(self.target, {self.target: sum(sorted(sizes.values())[-2:]) + to_write(plan, self.part)})
        self.progress.start(sum(sizes.values()) + self.nbytes)
        beside()

        def feed(run: Any) -> None:
            feed_as_they_arrive(run, self.needed, fetch, self.work, self.progress)

        ckpt = replace(plan.checkpoint, root=self.work)
        self._convert(ckpt, feed, path=None, identity=_identity(self.opened), durable=True)

    def _beside(self) -> None:
        """Have the small files, hashed, beside where the weights will arrive."""
        from zoo import hub

        weights = set(self.remote.weights)
        small = [f for f in self.remote.files if f not in weights]
        cached = hub.download(self.remote.snapshot, [f.path for f in small])
        begin_beside(self.work)
        for file in small:
            inside = os.path.relpath(file.path, self.remote.folder or ".")
            if not inside.startswith(".."):
                put_beside(self.work, inside, (cached / file.path).read_bytes())

    def clean(self) -> None:
        """Remove what was fetched beside the destination, by this run or one before."""
        clean_beside(self.work)

    def _convert(
        self,
        ckpt: Checkpoint,
        feed: Callable[[Any], None],
        *,
        path: str | None,
        identity: str,
        durable: bool = False,
    ) -> None:
        from zoo.mapping.execute import Execution

        self.progress.phase("converting")
        source: dict[str, Any] = {"origin": self.opened.origin} | ({"path": path} if path else {})
        with Execution(
            replace(self.plan, checkpoint=ckpt), self.target, force=self.force, identity=identity, durable=durable,
            strict=self.strict,
            progress=Steps(self.progress), source=source, part=self.part,
        ) as run:  # fmt: skip
            feed(run)
            for file in run.wanted:
                run.feed(file)
            run.finish()
            tell_waiting(run.folder, self.progress)


def tell_waiting(folder: Folder, progress: Progress) -> None:
    """Of a part that is finished before others: which."""
    if isinstance(folder, Shared) and not folder.published:
        waiting = ", ".join(map(str, folder.waiting))
        progress.note(f"{folder.part} is finished; {folder.dst} appears when these are, too: {waiting}")


def begin_beside(work: Path) -> None:
    """Have a folder for what is fetched beside the destination. Raises ZooError if somebody else's is in its place."""
    if os.path.lexists(work) and not _began(work):
        raise ZooError(in_the_way(work))
    work.mkdir(parents=True, exist_ok=True)
    own(work)
    os.close(open_plain(work / MARK, os.O_WRONLY | os.O_CREAT))


def put_beside(work: Path, name: str, data: bytes) -> None:
    (work / name).parent.mkdir(parents=True, exist_ok=True)
    write_plain(work / name, data)


@contextmanager
def open_for_fetching(path: Path) -> Iterator[int]:
    """The descriptor of a file beside the destination, to be filled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = open_plain(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        yield fd
    finally:
        os.close(fd)


def clean_beside(work: Path) -> None:
    with contextlib.suppress(OSError):
        if _began(work):
            clear(work, MARK)
            work.rmdir()


def _began(work: Path) -> bool:
    """Whether the folder of what is fetched is there, and zoo's."""
    return work.is_dir() and not work.is_symlink() and is_ours(work, MARK)


def feed_as_they_arrive(
    run: Any,
    needed: Iterable[str],
    fetch: Callable[[str, threading.Event], None],
    work: Path,
    progress: Progress,
) -> None:
    """Have the files that `run` wants fetched to `work`, one while the one before is converted; each is deleted when
    nothing needs it any more. `fetch(file, cancel)` stops early when `cancel` is set."""
    cancel = threading.Event()
    sizes = run.plan.checkpoint.files
    wanted: list[str] = run.wanted
    for file in needed:
        if file not in wanted:  # consumed by an earlier run
            progress.advance(sizes[file])
            (work / file).unlink(missing_ok=True)
    here: set[str] = set()
    ahead: _Background | None = None
    try:
        for n, file in enumerate(wanted):
            progress.phase("converting as it arrives")
            if ahead is None:
                fetch(file, cancel)
            else:
                ahead.wait()
            here.add(file)
            following = wanted[n + 1] if n + 1 < len(wanted) else None
            ahead = (
                _Background(lambda f: fetch(f, cancel), following) if following and len(here) < 2 else None
            )
            for name in run.feed(file):
                (work / name).unlink(missing_ok=True)
                here.discard(name)
    except BaseException:
        cancel.set()
        raise


def _identity(opened: Opened) -> str:
    """What tells one source from another, wherever its files lie."""
    return hashlib.sha256(repr((opened.origin or {}).get("files")).encode()).hexdigest()


def _by_its_files(ckpt: Checkpoint) -> bool:
    """Whether some of the files do without the others: not of GGUF and pickles, whose headers hold more than names."""
    return bool(ckpt.headers) and not ckpt.synthesised


def _moved(ckpt: Checkpoint, folder: Path, remote: Remote, came: set[str]) -> Checkpoint:
    """The checkpoint, now that the repository's files, those that `came`, are in `folder`. What was planned from must be
    what came."""
    entry, folder = remote.entry(folder), folder / remote.folder
    for file, header in ckpt.headers.items():
        if os.path.join(remote.folder, file) in came and read_header(folder / file) != header:
            raise ZooError(
                f"{remote}: the header of {file} was another when the plan was made; run this again"
            )
    if not _by_its_files(ckpt):
        path = folder / next(iter(ckpt.files)) if ckpt.format == "gguf" else entry
        again = open_checkpoint(path, ckpt.format)
        tensors = as_planned(again.tensors, ckpt.tensors)
        if (again.config, tensors) != (ckpt.config, ckpt.tensors):
            raise ZooError(f"{remote}: its headers were others when the plan was made; run this again")
        return replace(again, carried=ckpt.carried, tensors=tensors)
    return replace(ckpt, root=folder)


def _reopened(ckpt: Checkpoint) -> str | None:
    """What `zoo verify` has to open to find this checkpoint again; None: its folder."""
    if ckpt.format == "gguf":
        return str(ckpt.path(next(iter(ckpt.files))))
    return str(ckpt.root / ckpt.chosen) if ckpt.chosen is not None else None


class _Background:
    """A call in a thread; `wait` ends it, with its error."""

    def __init__(self, call: Callable[[str], None], file: str) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                call(file)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(0.2)  # so that Ctrl-C gets through
        if self._error is not None:
            raise self._error
