"""The ways in which a source's bytes come to its conversion.

Three fetch: whole files into the Hub's cache; `stream`, one file at a time beside the destination, each deleted when
its last tensor is converted; `layers`, only the byte ranges of those layers, in sparse files. Every way continues where
an interrupted run stopped, and gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.base import Checkpoint
from zoo.formats.safetensors import read_header
from zoo.mapping.folder import clear, in_the_way, is_ours, own
from zoo.plain import open_plain, write_plain
from zoo.pull.progress import Passed, Steps
from zoo.pull.source import Opened
from zoo.pull.space import check_space, ranges_of, to_fetch, to_write

if TYPE_CHECKING:
    from zoo.hub import Progress
    from zoo.remote import Remote

MARK = ".zoo-fetched"  # in a folder of fetched files that is zoo's to delete


class Job:
    """One conversion of a remote source into `target`."""

    def __init__(
        self, opened: Opened, target: Path, force: bool, progress: Progress, workers: int, strict: bool
    ) -> None:
        self.opened, self.plan, self.target, self.force = opened, opened.plan, target, force
        self.strict = strict
        self.progress, self.workers = progress, workers
        self.work = target.with_name(target.name + ".source")  # what is fetched beside the destination

    @property
    def remote(self) -> Remote:
        assert self.opened.remote is not None
        return self.opened.remote

    def path(self, file: str) -> str:
        """The path in the repository of a file of the checkpoint."""
        return os.path.join(self.remote.folder, file)

    def from_disk(self) -> None:
        """Convert what a package brought."""
        check_space(self.target, {self.target: to_write(self.plan)})
        ckpt = self.plan.checkpoint
        self.progress.start(self.plan.nbytes)
        self._convert(ckpt, lambda run: None, path=_reopened(ckpt), identity=_identity(self.opened))

    def by_files(self) -> None:
        """Fetch whole files into the Hub's cache, then convert from there."""
        from zoo import hub
        from zoo.hub import cache

        snapshot = self.remote.snapshot
        fetch, there = to_fetch(self.opened, cached=True)
        at = cache.folder(snapshot.repo)
        check_space(self.target, {at: fetch - there, self.target: to_write(self.plan)})
        self.progress.start(fetch + self.plan.nbytes)
        paths = [f.path for f in self.remote.files]
        folder = hub.download(snapshot, paths, workers=self.workers, progress=Passed(self.progress))
        ckpt = _moved(self.plan.checkpoint, folder, self.remote)
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

        plan = self.plan
        largest = sorted(plan.checkpoint.files.values())[-2:]
        check_space(self.target, {self.target: sum(largest) + to_write(plan)})
        needed = plan.files_needed()
        self.progress.start(sum(plan.checkpoint.files[f] for f in needed) + plan.nbytes)
        self._beside()
        cancel = threading.Event()

        def fetch(file: str) -> None:
            hub.download_to(
                self.remote.snapshot,
                self.path(file),
                self.work / file,
                progress=Passed(self.progress),
                cancel=cancel,
            )

        def feed(run: Any) -> None:
            wanted: list[str] = run.wanted
            for file in needed:
                if file not in wanted:  # consumed by an earlier run
                    self.progress.advance(plan.checkpoint.files[file])
                    (self.work / file).unlink(missing_ok=True)
            here: set[str] = set()
            ahead: _Background | None = None
            try:
                for n, file in enumerate(wanted):
                    self.progress.phase("converting as it arrives")
                    if ahead is None:
                        fetch(file)
                    else:
                        ahead.wait()
                    here.add(file)
                    following = wanted[n + 1] if n + 1 < len(wanted) else None
                    ahead = _Background(fetch, following) if following and len(here) < 2 else None
                    for name in run.feed(file):
                        (self.work / name).unlink(missing_ok=True)
                        here.discard(name)
            except BaseException:
                cancel.set()
                raise

        ckpt = replace(plan.checkpoint, root=self.work)
        self._convert(ckpt, feed, path=None, identity=_identity(self.opened), durable=True)

    def _beside(self) -> None:
        """Have the small files, hashed, beside where the weights will arrive."""
        from zoo import hub

        small = [f for f in self.remote.files if f not in self.remote.weights]
        cached = hub.download(self.remote.snapshot, [f.path for f in small])
        if os.path.lexists(self.work) and not self._began():
            raise ZooError(in_the_way(self.work))
        self.work.mkdir(parents=True, exist_ok=True)
        own(self.work)
        os.close(open_plain(self.work / MARK, os.O_WRONLY | os.O_CREAT))
        for file in small:
            inside = os.path.relpath(file.path, self.remote.folder or ".")
            if not inside.startswith(".."):
                (self.work / inside).parent.mkdir(parents=True, exist_ok=True)
                write_plain(self.work / inside, (cached / file.path).read_bytes())

    def _began(self) -> bool:
        """Whether the folder of what is fetched is there, and zoo's."""
        return self.work.is_dir() and not self.work.is_symlink() and is_ours(self.work, MARK)

    def clean(self) -> None:
        """Remove what was fetched beside the destination, by this run or one before."""
        with contextlib.suppress(OSError):
            if self._began():
                clear(self.work, MARK)
                self.work.rmdir()

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
            progress=Steps(self.progress), source=source,
        ) as run:  # fmt: skip
            feed(run)
            for file in run.wanted:
                run.feed(file)
            run.finish()


def _identity(opened: Opened) -> str:
    """What tells one source from another, wherever its files lie."""
    return hashlib.sha256(repr((opened.origin or {}).get("files")).encode()).hexdigest()


def _moved(ckpt: Checkpoint, folder: Path, remote: Remote) -> Checkpoint:
    """The checkpoint, now that the repository's files are in `folder`. What was planned from must be what came."""
    entry, folder = remote.entry(folder), folder / remote.folder
    for file, header in ckpt.headers.items():
        if read_header(folder / file) != header:
            raise ZooError(
                f"{remote}: the header of {file} was another when the plan was made; run this again"
            )
    if ckpt.synthesised or not ckpt.headers:  # GGUF and pickles: their headers hold more than names
        path = folder / next(iter(ckpt.files)) if ckpt.format == "gguf" else entry
        again = open_checkpoint(path, ckpt.format)
        if (again.config, again.tensors) != (ckpt.config, ckpt.tensors):
            raise ZooError(f"{remote}: its headers were others when the plan was made; run this again")
        return replace(again, carried=ckpt.carried)
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
