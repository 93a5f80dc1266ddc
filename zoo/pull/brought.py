"""A canonical folder out of an object store, onto this disk: the same files, or none."""

from __future__ import annotations

from pathlib import Path

from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.hub import Progress
from zoo.hub.http import Watch
from zoo.mapping.folder import Folder
from zoo.pull.stored import StoredSource


def bring(source: StoredSource, dst: Path, force: bool, progress: Progress) -> Path:
    """Fetch the canonical folder in the store to `dst`, which appears when it is whole; `dst`. An interrupted run goes on.

    Each file is held to the hash that the store tells of it. Raises ZooError if one differs, if what came is no canonical
    folder, and as `Folder` does.
    """
    files = source.files
    weights = {n: f.size for n, f in files.items() if n.endswith(".safetensors")}
    advance = Watch(progress).advance
    job = repr(("bring", source.provenance()))
    with Folder(dst, weights, job, force=force, ours=canonical.wrote, durable=True) as folder:
        progress.start(sum(f.size for f in files.values()))
        progress.phase("fetching")
        for name, file in files.items():
            if name in folder.done:
                advance(file.size)
            elif name in weights:
                source.fetch(name, folder.fd(name), advance=advance)
                folder.mark(name)
            else:
                folder.write(name, source.small(name))
                advance(file.size)
        try:
            canonical.read(folder.partial)
        except ZooError as error:
            raise ZooError(str(error).replace(str(folder.partial), str(source))) from None
        folder.publish()
    if source.unhashed:
        progress.note(
            f"{source} tells no hash of {len(source.unhashed)} of its files: sizes and headers were compared"
        )
    return dst
