"""The Hub's cache as every other tool knows it, and two things of our own in it.

HF_HUB_CACHE/models--org--name/blobs/<hash>                   contents, named by sha256 (LFS) or git blob id
                               blobs/<hash>.zoo.incomplete    ours: a part; `hf cache` lists and prunes it
                               snapshots/<commit>/<path>      a link to its blob
                               refs/<branch or tag>           the commit it was last seen at
                               trees/<commit>.json            the commit's file list
HF_HUB_CACHE/.locks/models--org--name/<hash>.lock             shared with the library: one writer per blob
HF_HOME/zoo/verified/<hash>-<size>-<mtime>-<inode>            ours: this very file was hashed and is right
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import filelock
from huggingface_hub import constants

from zoo.formats.base import WEIGHT_SUFFIXES, is_stray
from zoo.hub.errors import Damaged
from zoo.hub.files import MAX_FILES, RemoteFile, Snapshot
from zoo.hub.http import MAX_JSON, Watch
from zoo.untrusted.bounded import parse_json
from zoo.untrusted.plain import first_text, open_plain, write_plain

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
SETTLED = 300.0  # seconds after which written data is taken to have reached the disk
_links_told: set[str] = set()
_telling = threading.Lock()


class Linked(OSError):
    """A link lies where zoo makes folders of its own."""


class Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


def folder(repo: str) -> Path:
    """The cache folder of a repository."""
    return _root(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def home() -> Path:
    """HF_HOME, below which zoo keeps what is its own."""
    return _root(constants.HF_HOME)


@functools.cache
def _root(at: str) -> Path:
    return Path(at).expanduser().resolve()


def blob_path(repo: str, file: RemoteFile) -> Path:
    return folder(repo) / "blobs" / file.blob


def part_path(repo: str, file: RemoteFile) -> Path:
    return folder(repo) / "blobs" / f"{file.blob}.zoo.incomplete"


def snapshot_folder(snapshot: Snapshot) -> Path:
    return folder(snapshot.repo) / "snapshots" / snapshot.commit


def lock_path(repo: str, name: str) -> Path:
    at = folder(repo)
    return at.parent / ".locks" / at.name / f"{name}.lock"


# ---- contents


def hasher(file: RemoteFile) -> Hasher:
    """What computes the hash that `file` is listed with. Git hashes a blob with its length in front."""
    return hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def find(snapshot: Snapshot, file: RemoteFile) -> Path | None:
    """The cached contents of `file`, if something of the right size is there; not necessarily intact."""
    pointer = snapshot_folder(snapshot) / file.path
    for path in (blob_path(snapshot.repo, file), pointer) if file.blob else (pointer,):
        # A link in the snapshot to some other blob is not this file; without links the file itself lies there.
        if (
            path == pointer
            and path.is_symlink()
            and file.blob
            and os.path.basename(os.readlink(path)) != file.blob
        ):
            continue
        with suppress(OSError):
            if path.is_file() and path.stat().st_size == file.size:
                return path
    return None


def cached(snapshot: Snapshot, path: str) -> Path | None:
    """Where the cache has `path` (a file of the snapshot), verified earlier or now, or None. Makes no request.

    Hashes the file, once, if no one did before. A damaged file counts as absent.
    """
    file = snapshot.file(path)
    at = find(snapshot, file)
    if at is None:
        return None
    try:
        verify(at, file, Watch())
    except Damaged:
        return None
    return at


def verify(path: Path, file: RemoteFile, watch: Watch) -> None:
    """Raise Damaged unless `path` holds `file`; remembered, so that the same file isn't hashed again."""
    if not file.blob or is_verified(path, file):
        watch.advance(file.size)
        return
    digest = hasher(file)
    hash_prefix(path, file.size, digest, watch)
    if digest.hexdigest() != file.blob:
        watch.advance(-file.size)
        raise Damaged(file.blob, digest.hexdigest())
    mark_verified(path, file, watch)


def hash_prefix(path: Path | int, length: int, digest: Hasher, watch: Watch) -> None:
    """Feed the first `length` bytes of a file, or of a descriptor (which stays open), to `digest`; advance over them."""
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0, closefd=not isinstance(path, int)) as f:
        f.seek(0)
        while length > 0 and (n := f.readinto(buffer[: min(len(buffer), length)])):
            watch.check()
            digest.update(buffer[:n])
            watch.advance(n)
            length -= n


# ---- what was verified


def identity(path: Path, file: RemoteFile) -> str:
    """What changes when the file at `path` is touched or replaced."""
    stat = path.stat()
    return f"{file.blob}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def _mark(path: Path, file: RemoteFile) -> Path:
    return home() / "zoo" / "verified" / identity(path, file)


def boot() -> str:
    """What tells one run of the machine from the next, or nothing where that can't be told."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def is_verified(path: Path, file: RemoteFile) -> bool:
    """Whether this very file (size, time and inode) was hashed before.

    A file that was verified while still fresh may have been in memory only, so that mark ends with a reboot.
    """
    try:
        return first_text(_mark(path, file)) in ("", boot())
    except (OSError, UnicodeDecodeError):
        return False


def mark_verified(path: Path, file: RemoteFile, watch: Watch) -> None:
    """Remember that `path` holds `file`. Does nothing where the cache can't be written, and says so of a link."""
    try:
        mark = _mark(path, file)
        plain_folders(mark.parent, home())
        settled = time.time() - path.stat().st_mtime > SETTLED
        write_plain(mark, b"" if settled else boot().encode())
    except Linked as error:
        say_once(error, watch.note)
    except OSError:
        pass


def say_once(error: Linked, note: Callable[[str], None]) -> None:
    """Note once in a process that zoo keeps nothing of its own behind a link."""
    with _telling:
        if str(error) in _links_told:
            return
        _links_told.add(str(error))
    note(
        f"{error}, and zoo writes through none: which files were hashed is not remembered, and each is hashed every time. Put a folder "
        f"in the link's place, or set HF_HOME ({home()}) to a folder on the disk that it leads to"
    )


# ---- links and names


def link(snapshot: Snapshot, file: RemoteFile) -> None:
    """Make `file` appear in the snapshot's folder: a link to its blob, where links can be made, else a hard link."""
    pointer, blob = snapshot_folder(snapshot) / file.path, blob_path(snapshot.repo, file)
    if not blob.exists():
        return  # a cache without links: the file itself is there
    plain_folders(pointer.parent, folder(snapshot.repo))
    new = pointer.with_name(f".{file.blob[:16]}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        if constants.HF_HUB_DISABLE_SYMLINKS:
            raise NotImplementedError
        os.symlink(os.path.relpath(blob, pointer.parent), new)
    except (OSError, NotImplementedError):
        new.unlink(missing_ok=True)
        try:
            os.link(blob, new)
        except (OSError, NotImplementedError):
            shutil.copyfile(blob, new)
    os.replace(new, pointer)


def plain_folders(path: Path, root: Path) -> None:
    """Create `path` below `root` out of real folders: one that is a link would lead writes elsewhere. `root` may be a link to a
    folder of its own name, as of a model that was moved to a larger disk. Raises `Linked`, and OSError."""
    root.mkdir(parents=True, exist_ok=True)
    if root.is_symlink() and root.name != root.resolve().name:
        raise Linked(f"{root} is a link to a folder of another name; a folder was expected")
    at = root
    for part in path.relative_to(root).parts:
        at /= part
        if at.is_symlink():
            raise Linked(f"{at} is a link; a folder was expected")
        at.mkdir(exist_ok=True)


def is_linked(snapshot: Snapshot, file: RemoteFile) -> bool:
    pointer = snapshot_folder(snapshot) / file.path
    return pointer.exists() and (
        not pointer.is_symlink() or os.path.basename(os.readlink(pointer)) == file.blob
    )


def read_ref(repo: str, revision: str) -> str | None:
    """The commit at which a branch or tag was last seen, or None."""
    with suppress(OSError, UnicodeDecodeError):
        return first_text(folder(repo) / "refs" / revision).strip() or None
    return None


def write_ref(snapshot: Snapshot) -> None:
    """Let other tools, and offline runs, find the snapshot by its branch or tag."""
    if not snapshot.listed:
        return
    if snapshot.revision == snapshot.commit or read_ref(snapshot.repo, snapshot.revision) == snapshot.commit:
        return
    ref = folder(snapshot.repo) / "refs" / snapshot.revision
    plain_folders(ref.parent, folder(snapshot.repo))
    new = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    new.unlink(missing_ok=True)
    with open(open_plain(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as f:
        f.write(snapshot.commit)
    os.replace(new, ref)


# ---- file lists


def read_tree(repo: str, commit: str) -> list[dict[str, Any]] | None:
    """The commit's file list, if this or another tool has fetched it before.

    Not trusted, as if it were not there: a list with a file that has no git blob id, which the Hub never sends, or
    without a file that the snapshot links to, or weights in it. Tools (zoo among them, once) have made such lists of what was cached.
    """
    # Undocumented; seen in huggingface-hub 2.4 (pin: >=2.4,<3). Its own reader takes whatever lies there, however large: of it
    # only what an entry is called comes from there.
    try:
        from huggingface_hub._tree_cache import TREE_CACHE_FORMAT_VERSION, TreeCacheEntry

        fd = os.open(folder(repo) / "trees" / f"{commit}.json", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as f:
            if not stat.S_ISREG((found := os.fstat(fd)).st_mode) or found.st_size > MAX_JSON:
                return None
            told = parse_json(f.read(MAX_JSON))
        if told["format_version"] != TREE_CACHE_FORMAT_VERSION or len(told["files"]) > MAX_FILES:
            return None
        entries = {path: TreeCacheEntry.from_json(e) for path, e in told["files"].items()}
        if not _is_whole(repo, commit, entries):
            return None
        return [
            {
                "path": path,
                "size": e.size if e.lfs_sha256 is None else e.lfs_size,
                "sha256": e.lfs_sha256,
                "git_sha1": e.blob_id,
                "xet_hash": e.xet_hash,
            }
            for path, e in entries.items()
        ]
    except (
        ImportError, OSError, ValueError, LookupError, TypeError, AttributeError,
    ):  # it is fetched again  # fmt: skip
        return None


def _is_whole(repo: str, commit: str, entries: Mapping[str, Any]) -> bool:
    """Of entries as the library has them."""
    ids = all(isinstance(e.blob_id, str) and _GIT.fullmatch(e.blob_id) for e in entries.values())
    belong = (
        e["path"] for e in read_snapshot(repo, commit) if _is_hashed(e) or e["path"].endswith(WEIGHT_SUFFIXES)
    )
    return ids and all(path in entries for path in belong)


def write_tree(snapshot: Snapshot) -> None:
    """Keep the commit's file list where the library keeps it, for offline runs and for other tools; only what the Hub
    said, all of it. One that is not trusted gives way."""
    if not snapshot.listed or not all(f.git_sha1 or f.lfs_pointer for f in snapshot.files):
        return
    with suppress(ImportError, AttributeError, TypeError, OSError):
        from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache  # as above

        at = str(folder(snapshot.repo))
        plain_folders(folder(snapshot.repo) / "trees", folder(snapshot.repo))
        if read_tree(snapshot.repo, snapshot.commit) is None:
            entries = {
                f.path: TreeCacheEntry(
                    size=f.size,
                    blob_id=f.git_sha1 or f.lfs_pointer or "",
                    lfs_sha256=f.sha256,
                    lfs_size=f.size if f.sha256 else None,
                    xet_hash=f.xet_hash,
                )
                for f in snapshot.files
            }
            write_tree_cache(at, snapshot.commit, entries)


def read_snapshot(repo: str, commit: str) -> list[dict[str, Any]]:
    """A file list made from what the cache holds of a commit. The blobs' names are their hashes; a file that is no link
    (a cache copied by `cp -L` or docker) has none. What systems strew about is left out."""
    root = folder(repo) / "snapshots" / commit
    entries: list[dict[str, Any]] = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and not is_stray(path.name):
            blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
            entries.append(
                {
                    "path": path.relative_to(root).as_posix(),
                    "size": path.stat().st_size,
                    "sha256": blob if _SHA256.fullmatch(blob) else None,
                    "git_sha1": blob if _GIT.fullmatch(blob) else None,
                    "xet_hash": None,
                }
            )
    return entries


def _is_hashed(entry: dict[str, Any]) -> bool:
    return entry["sha256"] is not None or entry["git_sha1"] is not None


def snapshots(repo: str) -> list[str]:
    """The commits of which the cache holds files."""
    with suppress(OSError):
        return sorted(p.name for p in (folder(repo) / "snapshots").iterdir() if _GIT.fullmatch(p.name))
    return []


# ---- locks


@contextmanager
def locked(path: Path, what: str, watch: Watch) -> Iterator[None]:
    """Hold a lock among processes, saying so when it must be waited for. It ends with its process, however that ends."""
    for root, own in (
        (_root(constants.HF_HUB_CACHE), ".locks"),
        (home(), "zoo"),
    ):  # not what people keep beside these
        if path.is_relative_to(root / own):
            plain_folders(path.parent, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():  # some versions of filelock would empty what it leads to
        raise OSError(f"{path} is a link; a lock was expected")
    lock: filelock.BaseFileLock = filelock.FileLock(path, mode=0o664)
    waiting = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except NotImplementedError:  # a file system without flock
            lock = filelock.SoftFileLock(path)
        except filelock.Timeout:
            if not waiting:
                watch.note(f"another process is fetching {what}: waiting for it")
                waiting = True
            watch.sleep(0.1)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()
