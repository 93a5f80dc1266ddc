"""`zoo pull`, `zoo plan` and `zoo convert`, from a name or a path to a canonical folder.

    resolve -> plan from headers -> space -> fetch, hashed -> convert -> verify -> the folder appears

Unusual: nothing of a release's weights is fetched before its plan is made: one that the rules don't cover fails in
seconds.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.mapping.folder import check_destination, put, recover
from zoo.pull.brought import bring
from zoo.pull.fetch import Job, tell_waiting
from zoo.pull.progress import Quiet, Steps
from zoo.pull.source import (
    Opened,
    StrPath,
    cache_folder,
    default_folder,
    is_local,
    named,
    not_here,
    of_hub,
    open_source,
    opening,
)
from zoo.pull.space import existing, to_fetch, to_write
from zoo.pull.stored import canonical_at
from zoo.url import is_url, without_secrets

if TYPE_CHECKING:
    from zoo.hub import Progress
    from zoo.mapping.parts import Part
    from zoo.mapping.plan import Plan


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
    device: str = "cpu",
    force: bool = False,
    part: Part | None = None,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint on disk, or a remote one, to the canonical folder `dst`. See `zoo.convert`.

    `format`, `family`: what the files are, where that is not to be found out. `strict`: refuse quantised weights
    whose scales are zero or not finite, instead of warning. `verify`: the level up to which `dst` must agree with
    `src` before it appears, and `device`: where that is computed. `file`: which file of weights, or index of shards, in the
    folder or repository `src` or below it. `part`: of a conversion on disk, only this part; `dst` appears with the last.
    """
    refuse_store(dst)
    how: dict[str, Any] = {"dtype": dtype, "format": format, "family": family}
    if part is not None and verify is not None:
        raise ZooError(f"{part}: what is made in parts is verified when all are finished: leave out --verify")
    if not is_local(src):
        with not_here(src):
            return pull(
                os.fspath(src),
                dst,
                strict=strict,
                verify=verify,
                device=device,
                force=force,
                progress=progress,
                file=file,
                part=part,
                **how,
            )
    if file is not None:
        src = named(src, file)
    from zoo.mapping.execute import Execution, refuse_overlap

    path, dst = Path(src), Path(os.path.abspath(dst))
    if verify is not None:
        _can_verify(verify, device)
        recover(dst)
        _check(dst, force)
    plan = open_source(path, **how).plan
    refuse_overlap(plan.checkpoint.root, dst)
    progress = progress or Quiet()
    _note(plan, progress)
    # A single file is what `zoo verify` opens again, not the folder that it happens to lie in.
    source = {"path": str(path.resolve())} if path.is_file() else {}
    target = dst if verify is None else _unverified(dst)
    with Execution(
        plan, target, force=force or target != dst, strict=strict, source=source, progress=Steps(progress), part=part
    ) as run:  # fmt: skip
        progress.start(run.mover.total)
        progress.phase("converting")
        if part is not None:
            mine, every = len(run.folder.sizes), len(run.sheet.sizes)
            progress.note(f"{part}: {mine} of {every} files, {run.nbytes:,} bytes of weights")
        run.feed_here()
        run.finish()
        tell_waiting(run.folder, progress)
    if verify is not None:
        _verify(target, dst, verify, device, force, progress)
    return dst


def refuse_store(dst: StrPath | None) -> None:
    """A URL taken for a path would make a folder called `s3:`."""
    if is_url(dst):
        raise ZooError(
            f"{without_secrets(dst)} is in a store: `zoo convert` writes there (zoo.pull.sent.convert_to_store in Python)"
        )


def _note(plan: Plan, progress: Progress) -> None:
    """Say what a user may not expect: other sets of weights, fields that zoo does not know, names that were looked through."""
    for said in (*plan.checkpoint.notes, *plan.notes):
        progress.note(said)


def pull(
    name: str,
    to: StrPath | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    format: str | None = None,
    family: str | None = None,
    file: str | None = None,
    layers: Collection[int] | None = None,
    stream: bool = False,
    strict: bool = False,
    verify: str | None = None,
    device: str = "cpu",
    force: bool = False,
    workers: int = 4,
    part: Part | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch, check, convert and verify a release. See `zoo.pull`; `workers` files arrive at once. `part`: only this part of
    it, of which other processes do the others: the files that its own output files are made of are fetched; `to` appears with
    the last."""
    if part is not None and (verify is not None or layers is not None):
        raise ZooError(
            f"{part}: a whole release is pulled in parts, and verified when all are finished: leave out "
            f"{'--layers' if verify is None else '--verify'}"
        )
    if stream and layers is not None:
        raise ZooError("stream and layers are two ways to fetch: choose one")
    progress = progress or Quiet()
    refuse_store(to)
    name, revision = of_hub(name, revision)
    if is_url(name) and (found := canonical_at(name)) is not None:
        if any(v is not None for v in (dtype, revision, format, family, file, layers, verify)) or stream:
            raise ZooError(f"{found} is a canonical folder: it is fetched as it is, without other options")
        if part is not None:
            raise ZooError(f"{found} is a canonical folder, which one process fetches: --part 1/1")
        to = Path(os.path.abspath(to if to is not None else default_folder(found.store.url)))
        with alone(str(to), progress):
            return bring(found, to, force, progress)
    if is_url(name) and (layers is not None or verify is not None):
        raise ZooError(
            f"{without_secrets(name)} is in a store: it is converted whole, and nothing of it is kept that could be verified against: leave out "
            f"{'--verify' if layers is None else '--layers'}"
        )
    if verify is not None:
        _can_verify(verify, device, layers)
    dst = Path(os.path.abspath(to if to is not None else default_folder(name)))
    if (here := cache_folder(name)) is not None:
        if stream or layers is not None or revision is not None:
            raise ZooError(
                f"{name} is a folder on this disk: nothing is fetched, so not in part, streamed or by revision"
            )
        return convert(
            here,
            dst,
            dtype=dtype,
            format=format,
            family=family,
            file=file,
            strict=strict,
            verify=verify,
            device=device,
            force=force,
            part=part,
            progress=progress,
        )
    with (
        alone(str(dst) if part is None else f"{dst}, {part}", progress),
        opening(name, dtype, revision, format, layers, progress, family, file) as opened,
    ):
        opened.hash(progress)
        if part is None:  # parts do so in turn
            recover(dst)
        if _is_done(dst, opened) and not force:
            progress.note(f"{dst} is there already, from the same source")
            return dst
        if part is None or not _is_done(dst, opened):
            _check(dst, force)
        target = dst if verify is None else _unverified(dst)
        _note(opened.plan, progress)
        job = Job(opened, target, force, progress, workers, strict, part)
        if verify is not None and _is_done(target, opened):
            progress.note(f"{target} is converted already")
        elif opened.stored is not None:
            job.from_store()
        elif opened.remote is None:
            job.from_disk()
        elif layers is not None:
            job.by_ranges()
        elif stream:
            job.by_streaming()
        else:
            job.by_files()
        if verify is not None:
            _verify(target, dst, verify, device, force, progress)
        job.clean()
        return dst


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
    file: str | None = None,
    layers: Collection[int] | None = None,
    stream: bool = False,
    progress: Progress | None = None,
) -> Preview:
    """What `pull` with the same arguments would fetch, write and need; nothing but headers is fetched."""
    name, revision = of_hub(name, revision)
    dst = Path(os.path.abspath(to if to is not None else default_folder(name)))
    with opening(name, dtype, revision, format, layers, progress or Quiet(), family, file) as opened:
        fetch = there = 0
        if opened.stored is not None:
            fetch = sum(f.size for f in opened.stored.files.values())
        if opened.remote is not None:
            fetch, there = to_fetch(opened, cached=layers is None and not stream)
        return Preview(opened, fetch, there, to_write(opened.plan), shutil.disk_usage(existing(dst)).free)


# ---- verification and what is there already


def _unverified(dst: Path) -> Path:
    """Where a conversion waits for its verification."""
    return dst.with_name(dst.name + ".unverified")


def _can_verify(level: str, device: str, layers: Collection[int] | None = None) -> None:
    """Raises ZooError, before anything is fetched, if `level` can't be judged here, or not on `device`."""
    from zoo.verify import check_upstream
    from zoo.verify.certificate import NUMERIC
    from zoo.verify.device import chosen

    check_upstream(level)
    chosen(device)
    if layers is not None and level in NUMERIC:
        raise ZooError(f"some layers of a model have no {level} to compare: verify them up to `bytes`")


def _verify(target: Path, dst: Path, level: str, device: str, force: bool, progress: Progress) -> None:
    """Verify the folder `target`, in the precision that it was rounded to, and let it appear as `dst` if it passes."""
    from zoo.verify import verify
    from zoo.verify.exact import converted_to

    progress.phase(f"verifying ({level})")
    dtype = converted_to(canonical.read(target)) or "fp32"
    certificate = verify(
        target, level=level, dtype=dtype, device=device, write=False, progress=progress.phase
    )
    if not certificate.passed:
        certificate.write(target)
        raise ZooError(
            f"{target} does not agree with its source: see `zoo verify {shlex.quote(str(target))} --dtype {dtype}` and the "
            f"certificate in it. It was not made {dst}."
        )
    certificate.canonical["path"] = dst.name
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


# ---- one at a time


@contextmanager
def alone(dst: str, progress: Progress) -> Iterator[None]:
    """Only one pull into a place at a time: others wait, and say so."""
    import filelock

    from zoo.hub import cache

    name = hashlib.sha256(dst.encode()).hexdigest()[:32]
    path = cache.home() / "zoo" / "pulls" / f"{name}.lock"
    try:
        cache.plain_folders(path.parent, cache.home())
        if path.is_symlink():
            raise OSError(f"{path} is a link; a lock was expected")
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            progress.note(f"another process is pulling to {dst}: waiting for it")
            lock.acquire()
    except OSError as error:  # a home that can't be written: the conversion has a lock of its own
        if isinstance(error, cache.Linked):
            cache.say_once(error, progress.note)
        yield
        return
    try:
        yield
    finally:
        lock.release()
