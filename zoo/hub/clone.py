"""What a git clone says that its files should be: `.git/index`, which lists what was checked out, and the commit of `.git/HEAD`.

Nothing of git is run, whose settings in a stranger's folder can name programs. Of a file that git-lfs keeps the index has the id of its
pointer, a text that the file's own hash and size determine: so it says what the file should be, too.

Source: git's Documentation/gitformat-index.txt; git-lfs' docs/spec.md.
"""

from __future__ import annotations

import hashlib
import re
import struct
from contextlib import suppress
from pathlib import Path

from zoo.errors import ZooError
from zoo.hub.files import MAX_FILES
from zoo.untrusted.plain import first_text

MAX_INDEX = 64 << 20
"""Bytes; of 100,000 files it has some 10 MB."""
MAX_PATH = 4096
"""Bytes of a name. Version 4 says each by what it shares with the one before: 100,000 that share a million bytes are 100 GB."""
FILE = 0o100000
_COMMIT, _REF = re.compile(r"[0-9a-f]{40}"), re.compile(r"ref: (refs(/[\w-][\w.-]*)+)")


def commit(root: Path) -> str | None:
    """The commit that was checked out, if anything says."""
    git = root / ".git"
    with suppress(OSError, UnicodeDecodeError):
        head = first_text(git / "HEAD").strip()
        if (m := _REF.fullmatch(head)) is not None:
            head = _named(git, m[1])
        return head if _COMMIT.fullmatch(head) else None
    return None


def _named(git: Path, ref: str) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return first_text(git / ref).strip()
    lines = [line.split(" ") for line in first_text(git / "packed-refs").splitlines()]
    return next((line[0] for line in lines if line[1:] == [ref]), "")


def blobs(root: Path) -> dict[str, str]:
    """Each file that was checked out, and the id of its blob; none where the folder is no clone. Raises ZooError for an index that is
    none."""
    at = root / ".git" / "index"
    if not at.is_file() or at.is_symlink() or (root / ".git").is_symlink():
        return {}
    if (size := at.stat().st_size) > MAX_INDEX:
        raise ZooError(f"{at}: {size} bytes (limit {MAX_INDEX})")
    data = at.read_bytes()
    try:
        return _parse(data)
    except (struct.error, ValueError, IndexError) as e:
        raise ZooError(f"{at}: not as git writes it ({e!s:.100}): `git reset` makes it anew") from None


def _parse(data: bytes) -> dict[str, str]:
    magic, version, n = struct.unpack_from(">4sII", data)
    if magic != b"DIRC" or version not in (2, 3, 4) or n > MAX_FILES:
        raise ValueError(f"version {version}, {n} files")
    at, path, out = 12, b"", {}
    for _ in range(n):
        start = at
        (mode,) = struct.unpack_from(">I", data, at + 24)
        blob, (flags,) = data[at + 40 : at + 60].hex(), struct.unpack_from(">H", data, at + 60)
        at += 64 if flags & 0x4000 else 62
        if version == 4:  # what of the path before is left out at its end
            drop, byte = 0, 0x80
            for _ in range(4):
                byte, at = data[at], at + 1
                drop = drop + (byte & 0x7F)
                if not byte & 0x80:
                    break
                drop = (drop + 1) << 7
            path = path[: len(path) - drop]
        else:
            path = b""
        end = data.index(b"\0", at)
        path += data[at:end]
        if len(path) > MAX_PATH:
            raise ValueError(f"a name of {len(path)} bytes")
        at = end + 1 if version == 4 else start + (end - start + 8) // 8 * 8
        if mode & 0o170000 == FILE:  # no link, no submodule
            out[path.decode(errors="surrogateescape")] = blob
    return out


def pointer(sha256: str, size: int) -> str:
    """The id of the blob that git has of a file which git-lfs keeps."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return hashlib.sha1(b"blob %d\0%s" % (len(text), text), usedforsecurity=False).hexdigest()
