"""Is a folder that somebody downloaded or copied whole, and unaltered?

Three questions, each as far as it can be answered:

files     are the release's files here, with their sizes and hashes? By the Hub's list, by a certificate, by what huggingface-hub
          noted beside a download or calls its blobs, or by a clone's index; the first of these that there is.
headers   do the files hold what their own headers and the index say?
tensors   is every tensor of the architecture in its place?

Unusual here: a hash that was found right before is computed again, since a disk may have changed its mind.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zoo import card
from zoo.errors import ZooError, translated
from zoo.formats import canonical, open_checkpoint, sets
from zoo.formats.base import TensorRef, files_below, inside, leads_out, place_of, read_json, refuse_pointer
from zoo.formats.opening import UNENDED, refuse_cache, snapshot_of
from zoo.formats.safetensors import INDEX
from zoo.formats.sets import Ambiguous
from zoo.hub import cache, clone, repo
from zoo.hub.files import RemoteFile
from zoo.hub.http import Progress, Watch
from zoo.pull import stored
from zoo.verify import certificate

StrPath = str | os.PathLike[str]
NOTES = Path(".cache/huggingface/download")
"""Where huggingface-hub notes beside a download (`local_dir`) what it fetched: commit, etag and time, a line each."""
MAX_NOTE = 4096  # bytes
SMALL = 1 << 20
"""Bytes of a file of a clone that git-lfs hardly keeps."""
NEEDED = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Endings of what a model is not read right without, beside its weights."""
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pth", ".pt")
NOT_THE_MODELS = (".cache/", ".git/", ".huggingface/")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})$", re.ASCII)
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.\w+$)")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass
class Report:
    """What was found. `against`: what says how the bytes should be; None: nothing does. `problems` make it not whole, `remedy`: what
    mends them, where that is known. `vouched`: files whose hash was computed; `read`: those that the model is read from."""

    folder: Path | str
    against: str | None = None
    vouched: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    tensors: int = 0
    family: str | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remedy: str | None = None

    @property
    def hashed(self) -> int:
        return len(self.vouched)

    @property
    def whole(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        if self.problems:
            return "NOT whole and unaltered"
        if self.against is None:
            return "whole, as far as its headers tell; nothing here says what its bytes should be: name its repository, owner/name"
        if not self.hashed:
            return f"whole, as far as headers and sizes tell: {self.against} has no hashes"
        if unseen := sorted(self.read - self.vouched):
            return f"whole, as far as headers and sizes tell: {self.against} has no hash of {_some(unseen)}"
        return f"whole and unaltered: {self.hashed} files hashed against {self.against}"

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "whole": self.whole,
            "verdict": self.verdict,
            "against": self.against,
            "files_hashed": self.hashed,
            "tensors": self.tensors,
            "family": self.family,
            "problems": self.problems,
            "notes": self.notes,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class Listed:
    """The files that a folder should have. `repo` and `commit`: whose, where that is known; `guessed`: the commit is only the branch's
    newest. `clones`: they are called as git does, large ones by their pointers."""

    files: Mapping[str, RemoteFile]
    repo: str | None = None
    commit: str | None = None
    guessed: bool = False
    clones: bool = False


@translated
def check(
    folder: StrPath,
    name: str | None = None,
    *,
    revision: str | None = None,
    by: StrPath | None = None,
    signed_by: StrPath | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look a folder over. `name`: the repository that it should be, at `revision`; `by`: a certificate that lists its files;
    `signed_by`: the public key by which it should be signed. A folder of the Hub's cache stands for its snapshot.

    Raises ZooError where the folder, the certificate or the repository can't be read at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ZooError(f"{folder}: no folder; a single file is looked at by `zoo inspect`")
    if name is not None and by is not None:
        raise ZooError("a repository and a certificate: name one of them")
    folder, notes = _meant(folder, name, revision)
    report = Report(folder, notes=notes)
    listed = _listed(folder, name, revision, None if by is None else Path(by), report)
    _unended(folder, report)
    if listed is not None:
        _files(folder, listed, report, Watch(progress))
        _remedy(folder, listed, report)
    if signed_by is not None:
        _signature(folder, Path(signed_by), report)
    _tensors(folder, report)
    return report


def check_store(url: str, *, by: Path | None = None, progress: Progress | None = None) -> Report:
    """The same of what lies at a store's `url`, every byte of which is read: held to the certificate in it or `by`, else to
    the hashes that the store tells.

    Raises ZooError as `check`, and for a place into which a conversion has not ended.
    """
    source, chosen = stored.at(url)
    if chosen is not None:
        raise ZooError(f"{source}: a single file is looked at by `zoo inspect`")
    report, watch = Report(source.store.url), Watch(progress)
    with stored.mirror(source) as root:
        certified = by or (root / certificate.FILE if canonical.detect(root) else None)
        if certified is not None and certified.is_file():
            report.against = f"the certificate {by or certificate.FILE}"
            listed = _certified(certified, root, report)
            if bad := next((n for n in listed if leads_out(n)), None):
                raise ZooError(f"{report.against} lists {bad!r}, which lies outside of the folder")
            report.problems += [f"{n}: missing" for n in listed if n not in source.files]
            if added := sorted(source.files.keys() - listed.keys() - {*certificate.BESIDE}):
                report.notes.append(f"here, and not of it: {_some(added)}")
            for name, file in source.files.items():
                if (said := listed.get(name)) is None:
                    continue
                report.vouched.add(name)
                if source.store.sha256(file, watch.advance) != said.sha256:
                    report.problems.append(f"{name}: its hash is another: altered, or damaged")
        else:
            unhashed = []
            for name, file in source.files.items():
                agrees = source.store.agrees(file, source.store.chunks(name, watch.advance))
                if agrees is None:
                    unhashed.append(name)
                else:
                    report.vouched.add(name)
                if agrees is False:
                    report.problems.append(f"{name}: its bytes are not those of the store's hash: damaged")
            report.against = "the store's own hashes" if report.hashed else None
            if report.hashed and unhashed:
                report.notes.append(f"the store tells no hash of: {_some(unhashed)}")
        _tensors(root, report)
        report.problems = [p.replace(str(root), source.store.url) for p in report.problems]
        report.notes = [n.replace(str(root), source.store.url) for n in report.notes]
    return report


# ---------------------------------------------------------------------------------------------------
# What it should be


def _meant(folder: Path, name: str | None, revision: str | None) -> tuple[Path, list[str]]:
    """The folder that the model's files are in: of one of the Hub's cache the snapshot, and a note."""
    of_it = folder / f"models--{name.replace('/', '--')}" if name else folder
    at = of_it if of_it.is_dir() else folder
    asked = (at if at.name == "snapshots" else at / "snapshots") / (revision or "")
    held = asked if _COMMIT.fullmatch(asked.name) and asked.is_dir() else snapshot_of(at)
    if held == folder:
        refuse_cache(folder)
        return folder, []
    return held, [f"{folder} is a folder of the Hub's cache: its snapshot {held.name} is looked at"]


def _listed(
    folder: Path, name: str | None, revision: str | None, by: Path | None, report: Report
) -> Listed | None:
    """The files that the folder should have; None if nothing says."""
    noted, commits = _noted(folder)
    cached = _SNAPSHOT.search(folder.resolve().as_posix())
    if name is not None:
        if canonical.detect(folder):
            raise ZooError(
                f"{folder}: a canonical folder, whose files are zoo's and none of {name}: `zoo check {folder}` holds it to its own certificate, "
                "`zoo verify` to the release"
            )
        known = {*commits, *([cached[3]] if cached else []), *filter(None, [clone.commit(folder)])}
        at = revision or (known.pop() if len(known) == 1 else None)
        snapshot = repo.resolve(name, at)
        where = "the Hub's list" if snapshot.listed else "what the cache holds"
        report.against = f"{where} of {name}, commit {snapshot.commit[:12]}"
        return Listed({f.path: f for f in snapshot.files}, name, snapshot.commit, at is None)
    if by is not None:
        report.against = f"the certificate {by}"
        return Listed(_certified(by, folder, report))
    own = folder / certificate.FILE
    if own.is_file() and (canonical.detect(folder) or _lists_weights(own, folder)):
        report.against = f"its certificate {certificate.FILE}"
        return Listed(_certified(own, folder, report))
    if noted:
        report.against = (
            f"what huggingface-hub noted of its download, commit {_some(sorted(c[:12] for c in commits))}"
        )
        report.notes.append(
            "files that were never downloaded are not known here: name the repository, owner/name"
        )
        return Listed(noted)
    if blobs := _blobs(folder):
        report.against = "the cache's blobs, which are called by their hashes"
        return Listed(blobs, *((f"{cached[1]}/{cached[2]}", cached[3]) if cached else ()))
    if ids := clone.blobs(folder):
        report.against = f"git's index of this clone, commit {(clone.commit(folder) or 'unknown')[:12]}"
        return Listed({n: _of_hash(folder, n, blob) for n, blob in ids.items()}, clones=True)
    return None


def _lists_weights(file: Path, folder: Path) -> bool:
    """Whether a certificate is of weights that are here, as one is that was pushed with an export."""
    try:
        return any(n.endswith(WEIGHTS) for n in _certified(file, folder, Report(folder)) if _here(folder, n))
    except ZooError:
        return False


def _here(folder: Path, name: str) -> bool:
    return not leads_out(name) and certificate.is_there(folder, name)


def _noted(folder: Path) -> tuple[dict[str, RemoteFile], set[str]]:
    """What huggingface-hub wrote down beside a download, and of which commits."""
    root, found, commits = folder / NOTES, {}, set()
    for name in sorted(files_below(root)) if root.is_dir() else ():
        note, path = root / name, name.removesuffix(".metadata")
        if note.suffix != ".metadata":
            continue
        about = note.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_NOTE:
            raise ZooError(
                f"{note}: no file, or too large a one, for what huggingface-hub notes of a download: remove it"
            )
        lines = note.read_text(errors="replace").splitlines()[:2]
        if len(lines) == 2 and _HASH.fullmatch(lines[1].strip('"')):
            found[path] = _of_hash(folder, path, lines[1].strip('"'))
            commits.add(lines[0])
    return found, commits


def _blobs(folder: Path) -> dict[str, RemoteFile]:
    """Of a snapshot of the Hub's cache: its links, whose targets are called by their hashes."""
    found = {}
    for path in sorted(files_below(folder)):
        link = folder / path
        if link.is_symlink() and _HASH.fullmatch(blob := Path(link.readlink()).name):
            found[path] = _of_hash(folder, path, blob)
    return found


def _of_hash(folder: Path, path: str, blob: str) -> RemoteFile:
    """A file of which the hash alone is known; its size is what it has here."""
    size = (folder / path).stat().st_size if certificate.is_there(folder, path) else 0
    return RemoteFile(path, size, blob if len(blob) == 64 else None, blob if len(blob) == 40 else None)


def _certified(file: Path, folder: Path, report: Report) -> dict[str, RemoteFile]:
    """The files that a certificate lists, of its canonical folder or of its source: whichever has more of what is here. Where
    it proves nothing of the model, that is noted: its hashes may be right all the same."""
    said = read_json(file, "it is the certificate", given=True)
    sides = [s.get("files") for s in (said.get("canonical"), said.get("source")) if isinstance(s, dict)]
    lists = [s for s in sides if isinstance(s, dict) and s]
    for names in lists:
        certificate.refuse_list(names, str(file))
    try:
        made = [
            {n: RemoteFile(n, int(f["bytes"]), str(f["sha256"]), None) for n, f in s.items()} for s in lists
        ]
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise ZooError(f"{file}: not as zoo writes it ({e!r:.200}); verify again") from None
    if not made:
        raise ZooError(f"{file}: it lists no files; verify again")
    if doubts := certificate.doubts(said):
        report.notes.append(
            f"the certificate lists these files, and proves nothing of the model: {doubts[0]}"
        )
    best = max(made, key=lambda m: sum(_here(folder, n) for n in m))
    if card.FILE in best and card.of_an_export(
        folder, [card.FILE]
    ):  # where the authors' own was, which is beside it
        theirs = best.pop(card.FILE)
        best[card.THEIRS] = replace(theirs, path=card.THEIRS)
    return best


# ---------------------------------------------------------------------------------------------------
# What it is


def _files(folder: Path, wanted: Listed, report: Report, watch: Watch) -> None:
    listed = wanted.files
    if bad := next((n for n in listed if leads_out(n)), None):
        raise ZooError(f"{report.against} lists {bad!r}, which lies outside of the folder")
    there = {n: f for n, f in listed.items() if certificate.is_there(folder, n)}
    missing = [n for n in listed if n not in there]
    here = {}
    for n, f in there.items():  # what leads out is not opened, and the others are held to the list
        try:
            inside(folder, n, str(report.against))
            here[n] = f
        except ZooError as e:
            report.problems.append(str(e))
    if not there:
        report.problems.append(f"none of its {len(listed)} files is here, by {report.against}")
    weights = {_PART.sub("", n) for n in here if n.endswith(WEIGHTS)}
    stems = {_PART.sub("", n) for n in here}
    needed = [n for n in missing if _is_needed(n, weights, stems)]
    report.problems += [f"{n}: {_absent(folder / n)}" for n in needed]
    if left := sorted(set(missing) - set(needed)):
        report.notes.append(f"not here, and not needed to read the model: {_some(left)}")
    sizes = {n: (folder / n).stat().st_size for n in here}
    for n, f in here.items():
        if sizes[n] != f.size:
            report.problems.append(
                _instead(folder, n) or f"{n}: {sizes[n]:,} bytes, expected {f.size:,}: fetch it again"
            )
    same = [f for n, f in here.items() if sizes[n] == f.size and f.blob]
    with ThreadPoolExecutor(min(certificate.READERS, certificate.cores())) as pool:
        for f, found in zip(same, pool.map(lambda f: _hash(folder / f.path, f, watch, wanted.clones), same)):
            report.vouched.add(f.path)
            if found != f.blob:
                report.problems.append(
                    _instead(folder, f.path)
                    or f"{f.path}: its hash is {found[:16]}..., expected {f.blob[:16]}...: altered, or damaged"
                )
    added = sorted(
        n
        for n in files_below(folder)
        if n not in listed
        and not n.startswith(NOT_THE_MODELS)
        and n not in certificate.BESIDE
        and not _is_unended(n)
    )
    if added:
        report.notes.append(f"here, and not of it: {_some(added)}")


def _is_needed(path: str, weights: Collection[str], stems: Collection[str]) -> bool:
    """Whether a file that is missing is one that the model is read from: a part of weights of which others are here, any
    weights if none are, a config or a tokenizer's file. `weights`, `stems`: names of what is here, without their parts."""
    if path.endswith(WEIGHTS):
        return not weights or (_PART.search(path) is not None and _PART.sub("", path) in weights)
    if "/" in path or not path.endswith(NEEDED):
        return False
    index = path.removesuffix(".index.json")
    return index == path or index in stems or not weights


def _absent(path: Path) -> str:
    """What is said of a file that is not there."""
    if not path.is_symlink():
        return "missing"
    return f"a link to {path.readlink()}, where there is nothing: was it copied without the files, or are they on another disk?"


def _instead(folder: Path, name: str) -> str | None:
    """What was saved in the place of weights, or of a JSON file, if that can be told."""
    if not name.endswith((*WEIGHTS, ".json")):
        return None
    with open(folder / name, "rb") as f:
        start = f.read(64)
    try:
        refuse_pointer(start, name, text=name.endswith(".json"))
    except ZooError as e:
        return str(e)
    return None


def _hash(path: Path, file: RemoteFile, watch: Watch, clones: bool) -> str:
    """The hash of what is here, of the kind that `file` is listed with."""

    def whole(digest: cache.Hasher) -> str:
        cache.hash_prefix(path, file.size, digest, watch)
        return digest.hexdigest()

    found = "" if clones and file.size > SMALL else whole(cache.hasher(file))
    if clones and found != file.blob:  # of what git-lfs keeps the list has the pointer
        watch.advance(-file.size if found else 0)
        found = clone.pointer(whole(hashlib.sha256()), file.size)
        if found != file.blob and file.size > SMALL:
            watch.advance(-file.size)
            found = whole(cache.hasher(file))
    return found


def _unended(folder: Path, report: Report) -> None:
    """Notes downloads that have not ended: beside the files, and where huggingface-hub keeps the parts of them."""
    found = sorted(n for n in files_below(folder) if _is_unended(n))
    if (blobs := folder.parent.parent / "blobs").is_dir() and _SNAPSHOT.search(folder.resolve().as_posix()):
        found += sorted(f"{blobs}/{p.name}" for p in blobs.iterdir() if _is_unended(p.name))
    if found:
        report.notes.append(
            f"downloads that have not ended, of which nothing is read: {_some(found)}; if nothing is missing, remove them"
        )


def _is_unended(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in UNENDED)


def _remedy(folder: Path, listed: Listed, report: Report) -> None:
    """What mends a folder that is not whole, as far as its list tells."""
    if report.whole:
        return
    if listed.guessed:
        report.notes.append(
            f"nothing here says of which commit it is: it was held to {listed.repo}'s newest. If it is of an earlier one, name that with --revision"
        )
    if listed.repo is not None:
        cached = _SNAPSHOT.search(folder.resolve().as_posix())
        files = "the files named here" + (" and what their links lead to" if cached else "")
        into = "" if cached else f" --local-dir {shlex.quote(str(folder))}"
        report.remedy = f"to mend it, remove {files}; `hf download {listed.repo} --revision {listed.commit}{into}` fetches what is not there"
    elif listed.clones:
        report.remedy = (
            "to mend it, `git lfs pull` fetches what is missing, and `git checkout FILE` takes a change back"
        )


def _signature(folder: Path, key: Path, report: Report) -> None:
    from zoo.sign import check as held
    from zoo.sign import listed

    try:
        n = held(folder, key)
    except ZooError as e:
        report.problems.append(str(e))
        return
    told = f"the signature {certificate.SIGNATURE}, by the key {key}"
    if report.against is None:
        signed = listed(folder / certificate.SIGNATURE)  # now that it holds
        report.against, report.vouched = told, {str(f.get("name")) for f in signed}
    else:
        report.notes.append(f"{n} files are as they were signed: {told}")


def _tensors(folder: Path, report: Report) -> None:
    """Headers, index, and every tensor in its place."""
    from zoo.families import NoFamily
    from zoo.mapping.plan import make_plan

    try:
        if canonical.detect(folder):
            found = canonical.read(folder)
            report.tensors, report.family = len(found.tensors), found.spec.family
            report.read = {canonical.JSON, *found.files}
            _beside(found, report)
            return
        ckpt = open_checkpoint(folder)
        report.tensors = len(ckpt.tensors)
        if INDEX in ckpt.carried:
            _index(folder, ckpt.tensors, report)
        report.read = {*ckpt.files, *(n for n in ("config.json",) if n in ckpt.carried)}
        report.notes += ckpt.notes
        report.family = make_plan(ckpt).family.name
    except Ambiguous:
        _each(folder, report)
    except NoFamily as e:
        report.notes.append(f"whether every tensor is in place was not looked at: {e}")
    except ZooError as e:
        named = {p.partition(":")[0] for p in report.problems}
        if not any(str(e).startswith(f"{folder / n}:") for n in named):  # told already
            report.problems.append(str(e))


def _each(folder: Path, report: Report) -> None:
    """Of several sets of weights (a GGUF's block types) the headers of each."""
    found = sets.here(folder)
    report.notes.append(
        f"{len(found)} sets of weights ({_some([s.name for s in found])}): the headers of each were looked at; whether every tensor is in "
        "place `zoo inspect` says of one that is named"
    )
    for weights in found:
        try:
            opened = open_checkpoint(folder / weights.name)
        except ZooError as e:
            named = {p.partition(":")[0] for p in report.problems}
            if not any(str(e).startswith(f"{folder / n}:") for n in named):
                report.problems.append(str(e))
            continue
        report.tensors += len(opened.tensors)
        report.read |= {*weights.files}


def _beside(found: canonical.Canonical, report: Report) -> None:
    """What a canonical folder says that it holds beside its tensors, and what else is in it."""
    from zoo.mapping.export import HEADED

    carried = [
        place_of(found.root, n).relative_to(found.root).as_posix() for n in found.json.get("carried", [])
    ]
    missing = [n for n in carried if not certificate.is_there(found.root, n)]
    named = {p.partition(":")[0] for p in report.problems}
    report.problems += [f"{n}: missing, which {canonical.JSON} lists" for n in missing if n not in named]
    if found.source["format"] in HEADED and not certificate.is_there(found.root, canonical.SOURCE):
        report.problems.append(
            f"{canonical.SOURCE}: missing, of which the release's own files are made again"
        )
    own = {*carried, *found.files, canonical.JSON, INDEX, *canonical.BESIDE, *certificate.BESIDE}
    if report.against is None and (added := sorted(n for n in files_below(found.root) if n not in own)):
        report.notes.append(f"here, and not of it: {_some(added)}")


def _index(folder: Path, tensors: Mapping[str, TensorRef], report: Report) -> None:
    """What the index leaves out, or counts otherwise, though it contradicts no header."""
    told = read_json(folder / INDEX, "it lists the shards")
    if left := [n for n in tensors if n not in told["weight_map"]]:
        report.notes.append(f"{INDEX}: does not list {_some(left)}, which the files have")
    about, nbytes = told.get("metadata"), sum(t.nbytes for t in tensors.values())
    said = about.get("total_size") if isinstance(about, dict) else None
    if said is not None and said != nbytes:
        report.notes.append(f"{INDEX}: says total_size {said!r:.40}; the tensors have {nbytes}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
