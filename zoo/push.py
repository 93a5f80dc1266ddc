"""A canonical folder on the Hub: `zoo push CANON owner/name`.

What is uploaded is what anybody's software opens: the folder exported to Hugging Face names (the release's own bytes where it is
as it was converted), its model card, and its certificate. One commit: the repository has all of it or none.

The transport of what is sent is huggingface_hub's, with its session, token and endpoint, under limits (`zoo/hub/upload.py`); it skips what
the Hub has already, so that an upload that was interrupted goes on where it stopped. What is read comes by zoo's own. A certificate is held against the folder, file by file, before anything is sent: one that
failed, or that is of other weights, stops it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo import card, hub
from zoo._version import __version__
from zoo.errors import ZooError, translated
from zoo.formats import canonical
from zoo.formats.base import WEIGHT_SUFFIXES
from zoo.hub import HubError, upload
from zoo.mapping.execute import Progress
from zoo.mapping.export import export, sizes
from zoo.sign import sign
from zoo.verify import certificate

StrPath = str | os.PathLike[str]
_STALE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|parity\.json|model\.sig")
"""Files of an earlier push that would stand beside those of this one: weights, and what was said of those."""
_ALSO = (
    *WEIGHT_SUFFIXES, ".model", ".jinja", "adapter_config.json", "chat_template.json", "generation_config.json", "tekken.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
"""Endings of what software may take for a part of this model, where it stays in the repository."""
MAX_CARD = 1 << 20
"""Bytes of a card: zoo writes none so long."""


@dataclass
class Pushed:
    """What was uploaded, or would be: `files` with their bytes. `url`: of the commit; None: nothing was sent."""

    repo: str
    files: dict[str, int]
    certificate: str
    url: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.repo,
            "files": self.files,
            "bytes": sum(self.files.values()),
            "certificate": self.certificate,
            "url": self.url,
            "notes": self.notes,
        }


@translated
def push(
    canon: StrPath,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    unproven: bool = False,
    key: StrPath | None = None,
    password: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Upload the canonical folder `canon`, exported, to the repository `repo` ("owner/name") of the Hub, which is made if there is none.

    `private`: whether a new repository is (None: it is); one that is there stays as it is. `revision`: the branch, made if there is none.
    `dtype`: as in `zoo.export`. `unproven`: although the certificate does not hold. `key`: sign what is
    uploaded with it (`zoo.sign`). `dry_run`: only say what would be uploaded.
    Raises ZooError for a certificate that does not hold, and as `export` does; HubError for what the Hub refuses.
    """
    root = Path(canon)
    _refuse_name(repo)
    if not dry_run:
        _refuse_no_token()
    if root.exists() and not canonical.detect(root):
        raise ZooError(
            f"{root}: no canonical folder, which is what `zoo push` exports and proves. A GGUF, or a folder that is exported already, goes as it "
            f"is: `hf upload {repo} {root}`"
        )
    canonical.read(root)
    problems = _problems(root)
    if problems and not unproven:
        listed = "".join(f"\n  {p}" for p in problems[:8])
        raise ZooError(
            f"{root}: its certificate does not hold: it would be published as proof of what it is not of. `zoo verify {root}` proves the "
            f"folder as it is now; --unproven uploads it with a card that says this:{listed}"
        )
    about = card.About(repo, problems)
    out = Pushed(repo, sizes(root, dtype, about), _told(root, problems))
    if problems is not None:
        out.files[certificate.FILE] = (root / certificate.FILE).stat().st_size
    if dry_run:
        if key is not None:
            out.notes.append(f"{certificate.SIGNATURE}, the signature of these, goes along")
        return out
    with tempfile.TemporaryDirectory(
        prefix=f".{root.resolve().name}-push-", dir=root.resolve().parent
    ) as made:
        folder = export(root, Path(made) / "hf", dtype=dtype, card=about, progress=progress)
        if problems is not None:
            shutil.copyfile(root / certificate.FILE, folder / certificate.FILE)
        if key is not None:
            out.files[certificate.SIGNATURE] = sign(folder, key, password).stat().st_size
        with _refusals(repo), _bars(), upload.bounded(len(out.files), sum(out.files.values())):
            _upload(folder, out, private, revision)
    return out


def _problems(root: Path) -> list[str] | None:
    """What the certificate says that is not so; None if there is none."""
    return certificate.check(root, source=False) if (root / certificate.FILE).is_file() else None


def _told(root: Path, problems: list[str] | None) -> str:
    if problems is None:
        return f"none: nobody has compared these weights with upstream (`zoo verify {root}`)"
    return "does NOT hold: " + "; ".join(problems[:3]) if problems else "holds"


def _upload(folder: Path, out: Pushed, private: bool | None, revision: str | None) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    api = HfApi(library_name="zoo", library_version=__version__)
    there = api.repo_exists(out.repo)
    if there:
        is_private = bool(api.repo_info(out.repo).private)
        if private and not is_private:
            raise ZooError(f"{out.repo}: is public, and --private was asked for: nothing was uploaded")
        if private is False and is_private:
            out.notes.append(
                f"{out.repo} was private before, and stays so: its settings on the Hub change that"
            )
    else:
        api.create_repo(out.repo, private=private is not False)
    if revision is not None:
        api.create_branch(out.repo, branch=revision, exist_ok=True)
    found = hub.resolve(out.repo, revision) if there else None
    held = {f.path for f in found.files} if found else set()
    stale = [n for n in held if _STALE.fullmatch(n) and n not in out.files]
    keep = found is not None and card.FILE in held and not _is_ours(found)
    if keep and certificate.SIGNATURE in out.files:
        raise ZooError(
            f"{out.repo}: has a {card.FILE} that somebody wrote or edited, which the signature would not be of. Delete it there and push "
            "again, or push unsigned"
        )
    if keep:
        del out.files[card.FILE]
        out.notes.append(
            f"{out.repo} has a {card.FILE} that somebody wrote or edited: it was kept (delete it there, and push again)"
        )
    if left := sorted(n for n in held - {*out.files, *stale} if n.endswith(_ALSO)):
        out.notes.append(
            f"{out.repo} also has, and keeps, of somebody else or an earlier commit: {_some(left)}"
        )
    if stale:
        # the certificate and the signature first: they are no weights, and of shards there may be hundreds
        stale.sort(key=lambda n: (n not in (certificate.FILE, certificate.SIGNATURE), n))
        out.notes.append(f"removed, as of an earlier commit's weights: {_some(stale)}")
    done = (
        api.create_commit(  # `upload_folder` would ask for the list of files again, page by page without end
            out.repo,
            [
                *(CommitOperationAdd(n, folder / n) for n in sorted(out.files)),
                *(CommitOperationDelete(n, is_folder=False) for n in stale),
            ],
            revision=revision,
            commit_message=f"Upload weights, card and certificate with zoo {__version__}",
        )
    )
    out.url = f"{constants.ENDPOINT}/{out.repo}/commit/{str(done.oid)[:40]}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _is_ours(there: hub.Snapshot) -> bool:
    """Whether the card in a repository is one that zoo wrote, and nobody edited."""
    size = there.file(card.FILE).size
    return size <= MAX_CARD and card.is_ours(hub.read_range(there, card.FILE, 0, size))


# ---------------------------------------------------------------------------------------------------
# The Hub


def _refuse_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise HubError(
            "a repository on the Hub is called owner/name, of letters, digits, '-', '_' and '.', and 96 of them at most: to which should it go?",
            "repo",
        )


def _refuse_no_token() -> None:
    from huggingface_hub import constants, get_token, is_offline_mode

    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set: nothing is uploaded. Unset it and run this again.", "offline")
    if not get_token():
        raise HubError(
            f"uploading to {constants.ENDPOINT} needs a token with write access: log in with `hf auth login`, or set HF_TOKEN",
            "token",
        )


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """What the library raises, as one sentence. What zoo's own code raises is not the Hub's doing, and stays what it is."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    def said(error: BaseException) -> str:
        if isinstance(error, HfHubHTTPError):
            return f"{constants.ENDPOINT} answered {error.response.status_code} ({error.server_message or 'without a word'})"
        return f"{type(error).__name__}: {error}"

    again = "Nothing of it is to be seen there; what was sent is not sent again if you run this again"
    try:
        yield
    except HfHubHTTPError as e:
        todo = (
            f"May your token write there? (`hf auth whoami`) {again}"
            if e.response.status_code in (401, 403)
            else again
        )
        raise HubError(f"{repo}: {said(e)}. {todo}.", "server") from e
    except (
        LookupError,
        TypeError,
        AttributeError,
        NameError,
        ArithmeticError,
        AssertionError,
    ) as e:  # of what it made of an answer
        if _is_ours_to_mend(e):
            raise
        raise HubError(
            f"{repo}: {constants.ENDPOINT} answered what no Hub does ({type(e).__name__}: {e!s:.200}). Is HF_ENDPOINT one? {again}.",
            "server",
        ) from e
    except (httpx2.HTTPError, RuntimeError, ValueError) as e:
        if not isinstance(e, httpx2.HTTPError) and _is_ours_to_mend(e):
            raise
        raise HubError(
            f"{repo}: the upload failed ({said(e.__cause__ or e):.300}). {again}.", "network"
        ) from e


def _is_ours_to_mend(error: BaseException) -> bool:
    """Whether zoo's own code raised it: what comes from an answer is raised in the library, which reads it."""
    named = [
        str(frame.f_globals.get("__name__")).partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return [name for name in named if name not in sys.stdlib_module_names][-1:] == ["zoo"]


@contextmanager
def _bars() -> Iterator[None]:
    """The library's progress bars, on a terminal only."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            enable_progress_bars()
