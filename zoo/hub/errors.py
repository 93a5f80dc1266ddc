"""Every way a Hub can say no, as one message for people: which repository and file, what is wrong, what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import constants

from zoo.errors import ZooError

Kind = Literal[
    "gated",
    "token",
    "repo",
    "revision",
    "file",
    "path",
    "network",
    "offline",
    "content",
    "disk",
    "cancelled",
    "server",
]


class HubError(ZooError):
    """A pull can't go on. The text is for people; `kind` is for programs, and so is the HTTP `status`, if that is why."""

    def __init__(self, message: str, kind: Kind, status: int | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.status = status


class Cancelled(HubError):
    """The caller's `cancel` event was set, or another file of the same download failed."""

    def __init__(self) -> None:
        super().__init__("stopped; run the same command again to go on from here", "cancelled")


class Transient(Exception):
    """Something that a later try may not meet. `wait` is what the server asked for, in seconds."""

    def __init__(
        self, reason: str, *, wait: float | None = None, unreachable: bool = False, slow: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait = wait
        self.slow = slow  # it was there, and gave next to nothing, or no HTTP
        self.unreachable = unreachable  # no connection could be made at all


class Damaged(Exception):
    """The bytes are not the ones that the repository lists."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class About:
    """What a request is for, so that its failure can be explained."""

    repo: str
    revision: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}, file {self.file}" if self.file else self.repo


def refusal(status: int, headers: Mapping[str, str], about: About, *, sent_token: bool) -> HubError:
    """The error for a 4xx answer of the Hub or of its storage host."""
    error = _refusal(status, headers, about, sent_token)
    error.status = status
    return error


def _refusal(status: int, headers: Mapping[str, str], about: About, sent_token: bool) -> HubError:
    code, said = headers.get("X-Error-Code"), headers.get("X-Error-Message", "")
    page = f"{constants.ENDPOINT}/{about.repo}"
    if code == "GatedRepo":
        if sent_token:
            todo = f"Accept its licence at {page} with the account of your token ({token_source()}), then run this again."
            if status == 403:
                todo += " If you already did, the authors may still have to approve it."
            return HubError(f"{about.repo} is gated and your account may not read it yet. {todo}", "gated")
        return HubError(
            f"{about.repo} is gated. Accept its licence at {page}, then log in with `hf auth login` "
            "(or set HF_TOKEN) and run this again.",
            "gated",
        )
    if status == 401 and sent_token and code is None:
        return HubError(
            f"{constants.ENDPOINT} refused your token ({token_source()}): it is mistyped, expired or revoked. "
            "Log in again with `hf auth login`, or remove the token: public repositories need none.",
            "token",
        )
    if code == "RevisionNotFound":
        return HubError(
            f"{about.repo} has no revision {about.revision!r}. See its branches and tags at {page}/tree/main.",
            "revision",
        )
    if code == "EntryNotFound" and about.file is not None:
        return HubError(
            f"{about.repo} has no file {about.file!r} at revision {about.revision}. "
            f"See its files at {page}/tree/{about.revision}.",
            "file",
        )
    if code == "RepoNotFound" or status == 401:
        who = (
            "your account may not see it"
            if sent_token
            else "it is private and you are not logged in (`hf auth login`)"
        )
        return HubError(
            f"{constants.ENDPOINT} has no repository {about.repo!r}, or {who}. Check the spelling: owner/name.",
            "repo",
        )
    if said == "Access to this resource is disabled.":
        return HubError(f"{about.repo} was disabled by the Hub or by its owner.", "repo")
    what = f"{constants.ENDPOINT} answered {status}{f' ({said})' if said else ''} for {about}"
    if status == 403:
        return HubError(f"{what}. Check that your token may read this repository: {page}.", "token")
    if status == 404:
        return HubError(f"{what}. If HF_ENDPOINT is set, check that it names a Hub.", "repo")
    return HubError(f"{what}. See {page}; if it looks well there, run this again later.", "server")


def token_source() -> str:
    """Where the token in use comes from, never the token itself."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return f"from {name}"
    return f"from {constants.HF_TOKEN_PATH}"


def bytes_text(n: float) -> str:
    """1234567 -> '1.23 MB' (decimal units, as the Hub shows them)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"
