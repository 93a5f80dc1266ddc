"""A source in an object store: opened by ranged reads of its headers, fetched file by file.

As for the Hub (`zoo.remote`), headers are laid out in a folder of sparse files, which the readers for a disk open.
"""

from __future__ import annotations

import fnmatch
import os
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.base import MAX_JSON, WEIGHT_SUFFIXES, Checkpoint, inside, leads_out
from zoo.formats.canonical import JSON
from zoo.formats.safetensors import MAX_HEADERS, header_length
from zoo.remote import NEEDED, NoHeaders, gguf_header
from zoo.stores import AT_ONCE, INCOMPLETE, Store, Stored

FIRST = 256 << 10  # bytes of a safetensors file's start that are asked for at once: most headers are shorter
SMALL = (*NEEDED, JSON, "parity.json", "adapter_config.json")  # read to say what it is, and to make a plan


@dataclass
class StoredSource:
    """A checkpoint in a store: its files by name, and those whose bytes the store told no hash of when they came."""

    store: Store
    files: dict[str, Stored]
    folder: str = ""  # in which the checkpoint lies
    unhashed: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return self.store.url

    @property
    def weights(self) -> list[str]:
        return [n for n in self.files if n.endswith(WEIGHT_SUFFIXES)]

    def path(self, file: str) -> str:
        """The name below the store's root of a file of the checkpoint."""
        return os.path.normpath(os.path.join(self.folder, file))

    def small(self, name: str) -> bytes:
        """A small file, whole, its hash checked where the store tells one."""
        file = self.files[name]
        if file.size > MAX_JSON:
            raise ZooError(f"{self}: {name} has {file.size:,} bytes, too many for what it should be: refused")
        with tempfile.TemporaryFile() as f:
            self.fetch(name, f.fileno())
            f.seek(0)
            return f.read()

    def fetch(self, name: str, fd: int, **how: Any) -> None:
        if not self.store.fetch(self.files[name], fd, **how):
            self.unhashed.add(name)

    def provenance(self) -> dict[str, Any]:
        """What zoo.json says of where this came from."""
        return {
            "kind": "store",
            "url": self.store.url,
            "files": {
                f.name: {
                    "size": f.size,
                    **({f.hash[0]: f.hash[1]} if f.hash else {"tag": f.tag, "compared": False}),
                }
                for f in self.files.values()
            },
        }


def at(url: str) -> tuple[StoredSource, str | None]:
    """What lies at `url`, and the name of the file of weights that it names, if it names one. Raises ZooError if nothing is
    there, or a conversion into it has not ended."""
    chosen = None
    if url.endswith(WEIGHT_SUFFIXES):
        url, _, chosen = url.rpartition("/")
    store = Store(url)
    files = store.files()
    if not files:
        raise ZooError(f"{store}: there is nothing (no such bucket or folder, or it is empty)")
    if INCOMPLETE in files:
        raise ZooError(
            f"{store}: not complete ({INCOMPLETE} is there): run the conversion into it again to its end, or remove what is there"
        )
    if chosen is not None and chosen not in files:
        raise ZooError(f"{store}: there is no file {chosen!r}")
    return StoredSource(store, files), chosen


@contextmanager
def mirror(source: StoredSource, headers: bool = True) -> Iterator[Path]:
    """A folder of sparse files with the names, sizes and `headers` of the source's; gone when the context ends. Errors
    within name the store."""
    with tempfile.TemporaryDirectory(prefix="zoo-headers-") as temporary:
        root = Path(temporary)
        try:
            _lay_out(source, root)
            if headers:
                _fill_headers(source, root)
            yield root
        except ZooError as error:  # a path that the user has never seen would only puzzle
            if temporary not in str(error):
                raise
            raise type(error)(str(error).replace(temporary, str(source))) from None


@contextmanager
def described(url: str) -> Iterator[Path]:
    """What lies at `url`, a checkpoint or a canonical folder, by its headers: a path to open, gone when the context ends."""
    source, chosen = at(url)
    with mirror(source) as root:
        if JSON not in source.files:
            _refuse_headless(source, chosen)
        yield root if chosen is None else root / chosen


def canonical_at(url: str) -> StoredSource | None:
    """The canonical folder at `url`, if what lies there is one."""
    source, _ = at(url)
    return source if JSON in source.files else None


@contextmanager
def opened(
    url: str, format: str | None = None, file: str | None = None
) -> Iterator[tuple[StoredSource, Checkpoint]]:
    """The checkpoint at `url` by its headers alone, and the source of its files, those of one set of weights."""
    source, chosen = at(url)
    if chosen is not None and file is not None:
        raise ZooError(f"{source} is one file: there is nothing to choose with --file")
    if JSON in source.files:
        raise ZooError(
            f"{source}: is a canonical checkpoint already (it has {JSON}); `zoo pull {source} --to FOLDER` brings it here"
        )
    with mirror(source) as root:
        _refuse_headless(source, file or chosen)
        entry = root
        if (name := file or chosen) is not None:
            entry = (
                root / name
                if not leads_out(name) and (root / name).is_dir()
                else inside(root, name, "--file")
            )
        ckpt = open_checkpoint(entry, format)
        found = StoredSource(source.store, source.files, ckpt.root.relative_to(root).as_posix())
        mine = {found.path(n) for n in (*ckpt.files, *ckpt.carried)}
        found.files = {n: f for n, f in source.files.items() if n in mine}
        yield found, ckpt


def _refuse_headless(source: StoredSource, file: str | None) -> None:
    weights = [file] if file is not None and file in source.files else source.weights
    if weights and not any(n.endswith((".safetensors", ".gguf")) for n in weights):
        raise NoHeaders(
            f"{source}: the headers of {weights[0]} can't be read from afar: copy it to this disk, and convert it there"
        )


def _lay_out(source: StoredSource, root: Path) -> None:
    try:
        for name, file in source.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            with open(root / name, "xb") as f:
                if any(fnmatch.fnmatchcase(os.path.basename(name), p) for p in SMALL):
                    f.write(source.small(name))
                else:
                    f.truncate(file.size)
    except OSError as e:
        raise ZooError(f"{source}: a file called {name!r:.200} can't be one here: {e.strerror}") from None
    except UnicodeEncodeError:
        raise ZooError(f"{source}: a file called {name!r:.200} can't be one here: no text") from None


def _fill_headers(source: StoredSource, root: Path) -> None:
    shards = [n for n in source.weights if n.endswith(".safetensors")]
    kept = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, len(shards), AT_ONCE):  # no more ahead of what is written
            some = shards[first : first + AT_ONCE]
            for name, start in zip(some, pool.map(lambda n: _header(source, n), some)):
                if (kept := kept + len(start)) > MAX_HEADERS:
                    raise ZooError(f"{source}: over {MAX_HEADERS >> 20} MiB of headers: refused")
                with open(root / name, "r+b") as filled:
                    filled.write(start)
    for name in source.weights:
        if name.endswith(".gguf"):

            def read(start: int, end: int, name: str = name) -> bytes:
                return source.store.span(name, start, end)

            gguf_header(str(source), name, source.files[name].size, root, read)


def _header(source: StoredSource, name: str) -> bytes:
    """The start of a safetensors file: the length of its header, and the header."""
    size = source.files[name].size
    have = source.store.read(name, 0, min(FIRST, size))
    end = 8 + header_length(have[:8], size, f"{source}: {name}")
    if end > len(have):
        have += source.store.span(name, len(have), end)
    assert struct.unpack("<Q", have[:8])[0] == end - 8
    return have[:end]
