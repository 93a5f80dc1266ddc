"""A conversion into an object store.

A store cannot rename a folder, so that one appears whole there by its order of writing:

    zoo-incomplete.json   first: what will be written. While it is there, zoo's readers refuse the place
    weights, small files  each compared with what was made here, by the store's own hash, else by reading it back
    zoo.json              after all others
                          then what an old folder left is removed, and zoo-incomplete.json last

The folder is made on this disk, under HF_HOME, and goes once it is sent, just before zoo-incomplete.json does. A run that was
killed is started again: what the store has already, with the same size and hash, is not sent again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.formats.base import files_below
from zoo.formats.canonical import JSON
from zoo.hub.http import Watch
from zoo.pull.progress import Quiet
from zoo.pull.run import alone, convert, pull
from zoo.pull.source import StrPath, is_local
from zoo.pull.stored import StoredSource, mirror
from zoo.stores import INCOMPLETE, SENDING, Store, Stored
from zoo.untrusted.bounded import parse_json
from zoo.untrusted.plain import open_plain

if TYPE_CHECKING:
    from zoo.hub import Progress


def convert_to_store(
    src: StrPath, url: str, *, force: bool = False, progress: Progress | None = None, **how: Any
) -> str:
    """Convert `src` (a path, a release's name, owner/repo on the Hub, or the URL of a store) to a canonical folder at `url`;
    `url`. `how`: as for `convert`, or for `pull` where `src` is remote.

    `force` replaces a canonical folder there. Raises ZooError as those do, and if the store refuses, or something else is
    there.
    """
    progress = progress or Quiet()
    store = Store(url)
    with alone(store.url, progress):
        _left(store, force)
        here = _scratch(store)
        if is_local(src):
            convert(src, here, force=True, progress=progress, **how)
        else:
            pull(os.fspath(src), here, progress=progress, **how)
        send(here, store, force, progress)
        shutil.rmtree(here.parent)  # before the place is complete: then nobody comes back for it
        store.remove([INCOMPLETE])
    return store.url


def send(folder: Path, store: Store, force: bool, progress: Progress) -> None:
    """Have the files of the canonical folder `folder` in the store, zoo.json last, and `INCOMPLETE` still beside them."""
    there = _left(store, force)
    names = sorted(files_below(folder), key=lambda n: (n == JSON, not n.endswith(".safetensors"), n))
    sizes = {n: (folder / n).stat().st_size for n in names}
    progress.start(sum(sizes.values()))
    progress.phase(f"sending to {store}")
    advance = Watch(progress).advance
    files = sorted({*names, *there} - {INCOMPLETE})
    store.put(INCOMPLETE, json.dumps({"files": files}).encode())

    def one(name: str) -> None:
        fd = open_plain(folder / name, os.O_RDONLY)
        try:
            if name in there and store.holds(there[name], fd):
                advance(sizes[name])
                return
            store.send(name, fd, advance)
            if not store.holds(store.file(name), fd):
                raise ZooError(f"{store}: {name} is not what was sent: run it again")
        finally:
            os.close(fd)

    with ThreadPoolExecutor(SENDING) as pool:
        try:
            for _ in pool.map(one, names[:-1]):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    one(names[-1])
    store.remove(n for n in there if n not in {*names, INCOMPLETE})


def _left(store: Store, force: bool) -> dict[str, Stored]:
    """What is in the place already, all of it zoo's to replace. Raises ZooError if it is not."""
    there = store.files()
    if INCOMPLETE in there:
        try:
            mine = set(parse_json(store.span(INCOMPLETE, 0, there[INCOMPLETE].size))["files"])
        except (ValueError, LookupError, TypeError):
            mine = set()
    elif JSON in there and not force:
        raise ZooError(f"{store}: exists already; choose another destination, or replace it with --force")
    elif JSON in there:
        with mirror(StoredSource(store, there), headers=False) as root:
            mine = set(there) if canonical.wrote(root) else set()
    else:
        mine = set()
    if others := sorted(set(there) - mine - {INCOMPLETE}):
        raise ZooError(
            f"{store}: holds what zoo did not write ({others[0]}{', ...' if others[1:] else ''}): choose another destination"
        )
    return there


def _scratch(store: Store) -> Path:
    """Where the folder is made that will be sent; the same for the same place. Raises ZooError where it can't be made."""
    from zoo.hub import cache

    place = cache.home() / "zoo" / "stores" / hashlib.sha256(store.url.encode()).hexdigest()[:32]
    try:
        cache.plain_folders(place, cache.home())
    except OSError as error:
        raise ZooError(f"{store}: what is sent there is made on this disk first: {error}") from None
    return place / "canonical"
