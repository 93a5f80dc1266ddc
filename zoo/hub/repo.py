"""A name and a revision -> a commit and the list of its files, none of which can name a place outside its folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from zoo.hub import cache
from zoo.hub.errors import About, HubError
from zoo.hub.files import MAX_FILES, RemoteFile, Snapshot
from zoo.hub.http import Progress, Watch, get_json
from zoo.untrusted.patience import patience

MAX_PAGES = 200  # of a file list; the Hub's have 1,000 files each
LISTING = 45.0  # seconds for all pages of a file list, and 4 more for each 1,000 files on them
MAX_PATH = 1024  # characters
NO_ROUTE = (400, 404, 405, 501)  # how servers say that they don't know what was asked for

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def resolve(repo: str, revision: str | None = None, progress: Progress | None = None) -> Snapshot:
    """The commit that `revision` (a branch, tag or commit; default `main`) of `repo` names, and its files.

    Two API calls; one if `revision` is a commit, none if that commit's file list is in the cache. Offline, the cache
    alone answers. Every path, size and hash is checked before it is believed.

    Raises HubError: gated or private, a refused token, no such repo or revision, no network, offline and not cached,
    a path that would leave its folder.
    """
    revision = revision or constants.DEFAULT_REVISION
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise HubError(
            f"{repo!r} is not the name of a repository: owner/name was expected.", "repo"
        ) from None
    if (why := _why_unsafe(revision)) is not None:
        raise HubError(f"{revision!r} is not a revision: {why}.", "revision")
    watch = Watch(progress)
    about = About(repo, revision)
    commit = revision if _COMMIT.fullmatch(revision) else None
    if is_offline_mode():
        return _resolve_offline(about, commit, watch)
    try:
        api = f"{constants.ENDPOINT}/api/models/{repo}"
        names: set[str] | None = None
        if commit is None:
            answer, _ = get_json(f"{api}/revision/{quote(revision, safe='')}", about, watch)
            commit = answer.get("sha") if isinstance(answer, dict) else None
            if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
                raise HubError(f"{constants.ENDPOINT} named no commit for {repo} at {revision!r}.", "server")
            names = {str(path) for path, _ in _siblings(answer)} or None
        entries = cache.read_tree(repo, commit)
        if entries is None or (names is not None and names != {e["path"] for e in entries}):
            entries = _listing(api, commit, about, watch)
        return Snapshot(repo, revision, commit, _files(entries, repo))
    except HubError as error:
        held = cache.read_ref(repo, revision)
        if error.kind != "network" or held is None:
            raise
        raise HubError(f"{error} The cache holds {revision!r} as commit {held}.", "network") from None


def _resolve_offline(about: About, commit: str | None, watch: Watch) -> Snapshot:
    """What the cache holds. A file list that no Hub sent serves here, and is not passed off as one."""
    repo, revision = about.repo, about.revision
    commit = commit or cache.read_ref(repo, revision)
    if commit is None and revision == constants.DEFAULT_REVISION:
        held = cache.snapshots(repo)
        if len(held) > 1:
            raise HubError(
                f"HF_HUB_OFFLINE is set, and the cache ({cache.folder(repo)}) does not say which commit of {repo} "
                f"{revision!r} is. It holds {', '.join(held)}: name one of them as the revision.",
                "offline",
            )
        if held:
            commit = revision = held[0]
            watch.note(
                f"the cache does not say which commit of {repo} {about.revision!r} is: taking the only one, {commit}"
            )
    if commit is not None and _COMMIT.fullmatch(commit):
        entries = cache.read_tree(repo, commit)
        listed = entries is not None
        if entries is None:
            entries = cache.read_snapshot(repo, commit)
        if entries:
            return Snapshot(repo, revision, commit, _files(entries, repo, hashless=not listed), listed)
    raise HubError(
        f"HF_HUB_OFFLINE is set and {about.repo} at revision {about.revision!r} is not in the cache "
        f"({constants.HF_HUB_CACHE}){_held_instead(about, commit)}. Unset it and run this again.",
        "offline",
    )


def _held_instead(about: About, commit: str | None) -> str:
    """What the cache holds of a repository where it does not hold what was asked for."""
    at = cache.folder(about.repo) / "snapshots"
    said = ""
    if commit is not None and commit != about.revision:
        said = f": it calls that {commit[:60]}, of which it has no file"
    if (
        commit is not None
        and _COMMIT.fullmatch(commit)
        and any(p.is_symlink() for p in (at / commit).rglob("*"))
    ):
        said = f": of {commit} it has links whose files are gone"
    others = [c for c in cache.snapshots(about.repo) if c != commit and cache.read_snapshot(about.repo, c)]
    return said + (
        f"; it holds {', '.join(others)}, each of which can be named as the revision" if others else ""
    )


def _tree(url: str, about: About, watch: Watch) -> Iterator[dict[str, Any]]:
    """The entries of all pages of a file list. Folders are left out; anything not a file is refused."""
    following: str | None = url
    seen, count, began = set[str](), 0, time.monotonic() - watch.waited
    while following is not None and following not in seen:
        seen.add(following)
        if len(seen) > MAX_PAGES:
            raise HubError(f"{about.repo} lists its files on more than {MAX_PAGES} pages: refused.", "server")
        page, following = get_json(following, about, watch)
        if not isinstance(page, list):
            raise HubError(f"{constants.ENDPOINT} sent no file list for {about.repo}.", "server")
        if not page:  # the end, whatever link it bears: pages could follow without one
            return
        count += len(page)
        if count > MAX_FILES:
            raise HubError(f"{about.repo} lists more than {MAX_FILES} files: refused.", "path")
        took = time.monotonic() - watch.waited - began
        if following is not None and took > (LISTING + 0.004 * count) * patience():
            raise HubError(
                f"{about.repo}: after {took:.0f} s its file list has {count} files and goes on: too slow. Run this again "
                "later, or with ZOO_PATIENCE=4.",
                "network",
            )
        for entry in page:
            kind = entry.get("type") if isinstance(entry, dict) else None
            if kind == "directory":
                continue
            if kind != "file":
                raise HubError(f"{about.repo} lists {entry!r:.200}, which is not a file: refused.", "path")
            lfs = entry.get("lfs") or {}
            if not isinstance(lfs, dict):
                raise HubError(f"{about.repo} lists {entry!r:.200}, which is not a file: refused.", "path")
            yield {
                "path": entry.get("path"),
                "size": lfs.get("size", entry.get("size")),
                "sha256": lfs.get("oid"),
                "git_sha1": entry.get("oid"),
                "xet_hash": entry.get("xetHash"),
            }


def _listing(api: str, commit: str, about: About, watch: Watch) -> list[dict[str, Any]]:
    """The commit's file list; from what is known of the commit where a proxy or mirror serves no list."""
    try:
        return list(_tree(f"{api}/tree/{commit}?recursive=true&expand=false", about, watch))
    except HubError as error:
        if error.status not in NO_ROUTE:
            raise
    answer, _ = get_json(f"{api}/revision/{commit}?blobs=true", about, watch)
    entries = []
    for path, entry in _siblings(answer):
        lfs = entry.get("lfs")
        lfs = lfs if isinstance(lfs, dict) else {}
        entries.append(
            {
                "path": path,
                "size": lfs.get("size", entry.get("size")),
                "sha256": lfs.get("sha256"),
                "git_sha1": entry.get("blobId"),
                "xet_hash": None,
            }
        )
    if not entries or any(e["size"] is None or not (e["sha256"] or e["git_sha1"]) for e in entries):
        raise HubError(
            f"{constants.ENDPOINT} does not list the files of {about.repo} with their sizes and hashes (neither by "
            "/tree nor by ?blobs=true), as proxies and mirrors of the Hub sometimes don't. Unset HF_ENDPOINT, or "
            "fetch the repository by other means and give the folder to `zoo convert`.",
            "server",
        )
    return entries


def _siblings(answer: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(path, what is said of it) of each file in an answer about a commit."""
    siblings = answer.get("siblings") if isinstance(answer, dict) else None
    for entry in siblings if isinstance(siblings, list) else ():
        if isinstance(entry, dict):
            yield entry.get("rfilename"), entry


def _files(entries: Iterable[dict[str, Any]], repo: str, hashless: bool = False) -> tuple[RemoteFile, ...]:
    """Checked files from raw entries {path, size, sha256, git_sha1, xet_hash}; one of the hashes is there, unless
    `hashless`."""
    files: dict[str, RemoteFile] = {}
    for entry in entries:
        path, size, sha256, git_sha1 = entry["path"], entry["size"], entry["sha256"], entry["git_sha1"]
        check_path(path, repo)
        if path in files:
            raise HubError(f"{repo} lists {path!r} twice: refused.", "path")
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise HubError(f"{repo} lists {path!r} with size {size!r}: refused.", "path")
        for value, pattern in ((sha256, _SHA256), (git_sha1, _COMMIT), (entry["xet_hash"], _SHA256)):
            if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
                raise HubError(f"{repo} lists {path!r} with hash {value!r:.200}: refused.", "path")
        if sha256 is None and git_sha1 is None and not hashless:
            raise HubError(f"{repo} lists {path!r} without a hash: refused.", "path")
        plain, pointer = (git_sha1, None) if sha256 is None else (None, git_sha1)
        files[path] = RemoteFile(path, size, sha256, plain, pointer, entry["xet_hash"])
    for path in files:
        while (path := path.rpartition("/")[0]) != "":
            if path in files:
                raise HubError(f"{repo} lists {path!r} both as a file and as a folder: refused.", "path")
    return tuple(sorted(files.values(), key=lambda f: f.path))


def check_path(path: object, repo: str) -> str:
    """`path` if it stays inside the folder it is put in, on any system. Raises HubError otherwise.

    Meant for every name that comes from outside: the Hub's file list, a checkpoint's index.
    """
    why = "it is no text" if not isinstance(path, str) else _why_unsafe(path)
    if why is not None:
        raise HubError(
            f"{repo} names a file {path!r:.200}, which is not safe to write: {why}. Refused.", "path"
        )
    assert isinstance(path, str)
    return path


def _why_unsafe(path: str) -> str | None:
    if not path or len(path) > MAX_PATH:
        return f"its length is {len(path)}"
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in path):
        return "it has control characters"
    if "\\" in path:
        return "it has a backslash"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "it is absolute"
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "it has empty, '.' or '..' parts"
    if any(len(part.encode()) > 255 for part in parts):
        return "a part of it is too long"
    if os.name == "nt" and any(re.search(r'[<>:"|?*]|[. ]$', part) for part in parts):
        return "Windows has no such name"
    return None
