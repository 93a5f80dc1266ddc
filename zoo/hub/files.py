"""A repository at one commit, and its files: what transfers are about."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from urllib.parse import quote

from huggingface_hub import constants

from zoo.hub.errors import About, HubError
from zoo.untrusted.alike import alike

MAX_FILES = 100_000
"""Of a repository."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit. It has `sha256` if the repository keeps it in LFS, else `git_sha1`, its git blob id; neither if
    a cache without links holds it and no list says what it should be (see `hub.hashed`)."""

    path: str
    size: int  # bytes
    sha256: str | None
    git_sha1: str | None
    # What the library's own file list keeps besides; of no use to a transfer over HTTP.
    lfs_pointer: str | None = field(default=None, repr=False, compare=False)
    xet_hash: str | None = field(default=None, repr=False, compare=False)
    hashed_here: bool = field(default=False, compare=False)  # `sha256` is what was found, not what was to be

    @property
    def blob(self) -> str:
        """The name of its contents in the Hub's cache: the hash."""
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: what every transfer starts from."""

    repo: str
    revision: str  # as asked: a branch, a tag or a commit
    commit: str
    files: tuple[RemoteFile, ...]  # sorted by path
    listed: bool = True  # by the Hub; else made of what its cache happens to hold, and told to nobody

    def file(self, path: str) -> RemoteFile:
        """The file at `path`. Raises HubError, with the nearest names, if there is none."""
        if path in self._by_path:
            return self._by_path[path]
        near = alike(path, self._by_path)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise HubError(f"{self.repo} has no file {path!r} at commit {self.commit}.{hint}", "file")

    @functools.cached_property
    def _by_path(self) -> dict[str, RemoteFile]:
        return {f.path: f for f in self.files}

    def url(self, path: str) -> str:
        """Where the Hub serves `path` of this very commit."""
        return f"{constants.ENDPOINT}/{self.repo}/resolve/{self.commit}/{quote(path)}"

    def about(self, path: str | None = None) -> About:
        """What messages about this snapshot, or one file of it, call it."""
        return About(self.repo, self.revision, path)
