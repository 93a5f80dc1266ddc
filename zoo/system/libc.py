"""Two calls of Linux for which Python has no name. Elsewhere they do nothing, and say so."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENODEV}


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def reserve(fd: int, size: int) -> bool:
    """Give the file blocks for all of its `size` bytes, unwritten; whether the file system can. Raises OSError where
    they do not fit.

    `os.posix_fallocate` would write into every block where the file system cannot, and take as long as the copy."""
    libc = _libc()
    # musl has one name for both
    fallocate = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if fallocate is None or size == 0:
        return False
    if not fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def populate(address: int, nbytes: int) -> bool:
    """Ask for all pages of mapped memory at once; whether that worked. A file that is too short, or a disk that fails,
    is then reported here, where touching the page would kill the process. Other threads run meanwhile, which mmap's
    own `madvise` does not let them."""
    libc = _libc()
    return libc is not None and not libc.madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _POPULATE_READ
    )
