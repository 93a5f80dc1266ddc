"""Files that zoo made, opened so that no link planted in their place leads anywhere else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_plain(path: str | os.PathLike[str], flags: int, *, dir_fd: int | None = None) -> int:
    """A descriptor of the plain file at `path` (below the folder `dir_fd`), made if `flags` say so.

    Raises OSError where a link lies there, of either kind (a second name of somebody's file), or no file at all. Only
    the last part of `path` is looked at: what is above it must be a folder that is held, or trusted.
    """
    flags_now = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags_now, 0o666, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "is a link, and zoo did not make it", os.fspath(path)) from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EEXIST, "is a link or no file, and zoo did not make it", os.fspath(path))
    if flags & os.O_TRUNC:  # only now that it is known to be ours
        os.ftruncate(fd, 0)
    return fd


def open_file(path: str | os.PathLike[str]) -> int:
    """A descriptor of a file to be read. Raises OSError where none is there: a pipe is not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "is no file", os.fspath(path))


def first_text(path: str | os.PathLike[str]) -> str:
    """The first 4 KiB of a plain file, of which no more is expected. Raises OSError where it is none, UnicodeDecodeError."""
    fd = open_file(path)
    try:
        return os.read(fd, 4096).decode()
    finally:
        os.close(fd)


def by_descriptor(fd: int, folder: Path) -> Path:
    """A path of the open folder `fd`, called `folder`, that stays its own when somebody puts another in its place: for libraries
    that open files by path. Where the system has none (it is Linux's) the folder's own."""
    held = Path(f"/proc/self/fd/{fd}")
    return held if held.exists() else folder


def write_plain(path: Path, data: bytes) -> None:
    """`data` at `path`, whole or not at all, in place of whatever has the name: a link there is replaced, not followed. What is no
    file (a pipe, a terminal, /dev/stdout wherever that leads) is written to."""
    if path.absolute().parts[1:2] in (("dev",), ("proc",)) or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with open(open_plain(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as f:
            f.write(data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
