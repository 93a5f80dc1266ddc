"""`verify`: the levels in order, each judged, and a certificate of all of them.

plan -> bytes -> layers -> logits -> decode. The first two need only the source's files; the others an oracle
and torch. A level that can't be judged is listed under `not_checked`, with the reason, and never passes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo import families
from zoo._version import __version__
from zoo.errors import ZooError, translated
from zoo.formats import canonical
from zoo.formats.base import Checkpoint
from zoo.verify import against as opened
from zoo.verify import certificate, exact, inputs
from zoo.verify.against import Against, StrPath
from zoo.verify.certificate import LEVELS, NUMERIC, Certificate, Level
from zoo.verify.device import chosen, described
from zoo.verify.device import exact as exact_on
from zoo.verify.exact import plan_of
from zoo.verify.golden import is_golden
from zoo.verify.need import foreseen
from zoo.verify.numeric import NO_DECODE, Comparison, follow
from zoo.verify.oracle import DTYPES, NoUpstream, Oracle
from zoo.verify.ranks import Ranks
from zoo.verify.reading import Window
from zoo.verify.settings import Settings
from zoo.verify.sharing import Sharing
from zoo.verify.stage import Progress, silent

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def _refuse_other_way_round(canon: StrPath, against: StrPath) -> None:
    """A canonical folder is compared with files that others open; which are these, and what makes them, is said."""
    if (Path(canon) / canonical.JSON).is_file():
        raise ZooError(
            f"{against}: a canonical folder like {canon}: compare with files that others open: `zoo export {against} FOLDER`, and "
            f"`zoo verify {canon} --against FOLDER`"
        )
    raise ZooError(
        f"{canon}: no canonical folder, and {against} is one: the other way round, `zoo verify {against} --against {canon} -o FILE` holds it to "
        "these files"
    )


@translated
def verify(
    canon: StrPath,
    against: StrPath | Oracle | None = None,
    *,
    level: str | None = None,
    dtype: str = "fp32",
    stream: bool | None = None,
    device: str | torch.device = "cpu",
    self_test: bool = False,
    max_length: int = inputs.MAX_CROSSED,
    n_greedy: int = 64,
    require: str | None = None,
    write: bool = True,
    progress: Progress | None = None,
    mesh: DeviceMesh | None = None,
) -> Certificate:
    """Compare a canonical folder with upstream's implementation, or a GGUF with the canonical folder that it was written of.

    Args:
        canon: A canonical folder; or a GGUF: then `against` is the canonical folder, and no certificate is kept.
        against: A checkpoint's path, a golden file, or an oracle; None: the source that the folder was converted from, where
            that still exists.
        level: How far to go: "plan", "bytes", "layers", "logits", "decode", each with those before it; None: as far as can
            be judged here.
        dtype: What both sides compute in: "fp32", "bf16", "fp16".
        stream: One layer in memory at a time; None: where both models do not fit into memory whole.
        device: Where both sides compute: "cpu", "cuda", "cuda:1", "auto".
        self_test: Also inject every seeded fault that applies, and require that it is caught.
        max_length: Limits of the model (windows, ...) are crossed up to this many tokens.
        n_greedy: Tokens that both sides generate.
        require: The level without which the verdict is "failed", whatever else agrees.
        write: Keep the certificate as `parity.json` in the folder.
        progress: Called with what is being done, in words.
        mesh: Ranks; each calls this, on a device of its own. They share ours, as in `zoo.load`, and the first does the rest and
            has upstream; streamed, each has some of the texts and reads a part of each weight, and the first judges. It writes;
            all get its certificate.

    Returns:
        What was compared, with values, bounds and their reasons.

    Raises:
        ZooError: The folder is not sound, there is nothing to compare it with, or the `level` or the `self_test` that was
            asked for can't be done.
    """
    if level is not None and level not in LEVELS:
        raise ZooError(f"unknown level {level!r}; expected one of {', '.join(LEVELS)}")
    if require is not None and require not in wanted_by(level):
        raise ZooError(
            f"require is {require!r}; expected one of the levels asked for: {', '.join(wanted_by(level))}"
        )
    if dtype not in DTYPES:
        raise ZooError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not (isinstance(against, str | os.PathLike | None) or hasattr(against, "describe")):
        raise ZooError(
            f"against is {against!r:.60}; expected the path of a checkpoint or of a golden file, an oracle, or None"
        )
    started = time.perf_counter()
    how = Settings(
        wanted_by(level), dtype, chosen(device), bool(stream), max_length, n_greedy, progress or silent
    )
    file = None
    if Path(canon).is_file():
        if not isinstance(against, str | os.PathLike) or not Path(against).is_dir():
            raise ZooError(
                f"{canon}: a file is held against the canonical folder it was written of (--against CANON)"
            )
        file, canon, against, write = Path(canon), against, canon, False
    elif isinstance(against, str | os.PathLike) and (Path(against) / canonical.JSON).is_file():
        _refuse_other_way_round(canon, against)
    folder = canonical.read(canon)
    ranks = None
    if mesh is not None and mesh.size() > 1:
        if self_test:
            raise ZooError("the self-test is for one process: ranks share a whole model")
        ranks = Ranks(mesh, how.device)
    need = why_streamed = None
    if how.numeric and (ranks is None or ranks.first):
        may_stream = stream is None and level != "decode" and not self_test
        with how.clock("what it needs"):
            need, why_streamed = foreseen(
                folder, against, how, may_stream, 1 if ranks is None else ranks.mesh.size()
            )
    how = replace(how, stream=how.stream or why_streamed is not None)
    sharing = None
    if ranks is not None:
        how = replace(how, stream=ranks.said(how.stream and bool(how.numeric)))
        if ranks.said(how.stream and _recorded(against)):
            raise ZooError(
                "ranks stream where upstream reads the weights; a recording, or another oracle, is for one process"
            )
        if how.stream:
            sharing = Sharing(ranks.mesh)
        elif not ranks.first:
            return follow(folder, dtype, ranks)
    # Of processes and processors of their own, while Python opens.
    aside = ThreadPoolExecutor(4, "zoo-verify")
    hashing = aside.submit(_canonical, folder, sharing)
    texts = aside.submit(inputs.texts, folder.root, folder.spec.vocab_size) if how.numeric else None
    how.say("opening the source")
    with how.clock("opening"):
        window = Window(sharing) if how.stream else None
        other = opened.resolve(folder, against) if file is None else opened.file_of(folder, file)
        hashing_source = aside.submit(_source, folder, other, sharing)
        # In another dtype upstream sets torch's own meanwhile, of all threads.
        early = how.numeric and not how.stream and dtype == "fp32" and file is None
        unheard = replace(how, say=silent)
        exactly = aside.submit(_exact_levels, folder, other, unheard, None, hashing) if early else None
        aside.shutdown(wait=False)
        if file is not None:
            opened.open_reading(other, folder, how, window)
        elif how.numeric and other.oracle is None and other.checkpoint is not None:
            opened.open_oracle(other, folder, other.checkpoint, how, window)
        held = contextlib.ExitStack()
    try:
        held.enter_context(exact_on(how.device))
        why_not = _why_not(folder, other, how.stream, level)
        if why_not and (level in NUMERIC or self_test):
            raise ZooError(f"{folder.root}: {level or 'the self-test'} can't be judged: {why_not}")
        if self_test and not how.numeric:
            raise ZooError("the self-test compares logits: ask for a level that does")
        cert = Certificate(
            canonical={}, source=None, rules=None, dtype=dtype,
            oracle=other.oracle.describe() if other.oracle else {"kind": "none", "why": other.why_no_oracle},
            disagreements=opened.disagreements(folder.spec, other.oracle), required=require,
            versions=versions(), device=described(how.device) | ({} if ranks is None else {"ranks": ranks.mesh.size()}),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            places=_places(folder, other), need=None if need is None else need.to_json(),
        )  # fmt: skip
        # Ours and bytes go along with an oracle that reads its weights, not with a recording.
        in_pass = window if how.numeric and not why_not and hasattr(other.oracle, "drive_both") else None
        how.say("plan and bytes")
        with how.clock("plan and bytes"):
            found = exactly.result() if exactly else _exact_levels(folder, other, how, in_pass, hashing)
            cert.rules, of_bytes = found.rules, found.of_bytes
            cert.levels += found.levels
            cert.not_checked += found.not_checked
        if how.numeric and why_not:
            cert.not_checked.append(f"{', '.join(how.numeric)}: {why_not}")
        elif how.numeric:
            compared = Comparison(folder, other, how, in_pass, of_bytes, None if how.stream else ranks)
            try:
                asked, measured = compared.into(cert, texts)
                if sharing is not None and not sharing.first:
                    _enter_hashes(cert, hashing, hashing_source, sharing)
                    return sharing.of_first(cert)
                if why_streamed is not None:
                    cert.not_checked = [
                        f"{x}; streamed, since {why_streamed}" if x.endswith(NO_DECODE) else x
                        for x in cert.not_checked
                    ]
            except NoUpstream as e:  # streamed, it loads as it runs
                if level in NUMERIC or self_test:
                    raise
                cert.not_checked.append(f"{', '.join(how.numeric)}: {e}")
                self_test = False
                if of_bytes is not None and cert.level("bytes") is None:
                    with how.clock("plan and bytes"):
                        cert.levels.append(of_bytes.level())
            if self_test and not cert.failed:
                from zoo.verify import selftest

                plan = None if other.checkpoint is None else plan_of(folder, other.checkpoint)
                assert other.oracle is not None
                with how.clock("self-test"):
                    cert.faults = selftest.run(folder, other.oracle, asked, measured.spread, plan, how)
        with how.clock("hashes"):  # made while models computed
            _enter_hashes(cert, hashing, hashing_source, sharing)
        total = time.perf_counter() - started
        seconds = how.clock.seconds
        seconds["the rest"] = total - sum(seconds.values())
        cert.timing = {k: round(v, 3) for k, v in seconds.items()} | {"total": round(total, 3)}
        judged = {x.name for x in cert.levels if x.verdict != "skipped"}
        if not judged or (level is not None and level not in judged and not cert.failed):
            what = f"{level} can't" if judged else "nothing can"
            raise ZooError(f"{folder.root}: {what} be compared: {'; '.join(cert.not_checked)}")
        if write and (sharing is None or sharing.first):
            certificate.keep(cert, folder.root, against is None or _is_own(folder, other))
        if ranks is not None:
            if sharing is None:
                ranks.said(None)
            cert = ranks.said(cert) if sharing is None else sharing.of_first(cert)
        return cert
    finally:
        held.close()
        if other.cleanup is not None:
            other.cleanup.cleanup()


def wanted_by(level: str | None) -> tuple[str, ...]:
    """The levels up to one, all by default."""
    return LEVELS[: LEVELS.index(level or LEVELS[-1]) + 1]


def _is_own(folder: canonical.Canonical, other: Against) -> bool | None:
    """Whether it is compared with what it was converted from, by whatever way that was named; None where that is not known."""
    source = opened.recorded_source(folder)
    return None if source is None or other.path is None else source.samefile(other.path)


def _recorded(against: StrPath | Oracle | None) -> bool:
    """Whether it is a recording, or an oracle that is no path."""
    if against is None:
        return False
    return not isinstance(against, str | os.PathLike) or is_golden(Path(against))


def _why_not(folder: canonical.Canonical, other: Against, stream: bool, level: str | None) -> str | None:
    """Why the numeric levels, or the one asked for, can't be judged; None if they can."""
    if other.oracle is None:
        return other.why_no_oracle
    if folder.layers is not None and len(folder.layers) < folder.spec.n_layers:
        return f"the folder has {len(folder.layers)} of {folder.spec.n_layers} layers"
    return NO_DECODE if stream and level == "decode" else None


# ---------------------------------------------------------------------------------------------------
# Levels


@dataclass
class _Exact:
    """The levels plan and bytes, ready for the certificate."""

    rules: dict[str, Any] | None = None
    levels: list[Level] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    of_bytes: exact.Bytes | None = None
    """By what bytes are compared later, as they pass a window."""


def _exact_levels(
    folder: canonical.Canonical,
    other: Against,
    how: Settings,
    window: Window | None,
    files: Future[dict[str, Any]],
) -> _Exact:
    """The levels plan and bytes. With a `window`, bytes are compared as they pass there. `files`: the folder's hashes."""
    out = _Exact()
    plan, why = other.written, other.why_no_source
    if plan is not None:
        from zoo.verify import written

        out.rules = {"family": plan.family.name, "naming": plan.naming, "version": plan.rules_version}
        for name, level in (("plan", written.written_plan_level), ("bytes", written.written_bytes_level)):
            if name in how.wanted:
                how.say(name)
                t = time.perf_counter()
                out.levels.append(level(folder, plan))
                out.levels[-1].seconds = time.perf_counter() - t
        return out
    if other.checkpoint is not None:
        how.say("planning")
        plan = plan_of(folder, other.checkpoint)
        out.rules = {"family": plan.family.name, "naming": plan.naming, "version": plan.rules_version}
        if folder.source.get("family_given"):
            out.rules["family_given"] = True
    if "plan" in how.wanted:
        how.say("plan")
        t = time.perf_counter()
        made = exact.plan_level(folder, plan, why)
        made.seconds = time.perf_counter() - t
        if other.checkpoint is not None:
            if (same := opened.files_level(other.checkpoint)) is not None:
                made.checks.append(same)
            made.notes += [n for n in other.checkpoint.notes if n.startswith("weights: ")]
        made.notes += _unknown_fields(folder, other.checkpoint)
        out.levels.append(made)
    if "bytes" not in how.wanted:
        return out
    if plan is None:
        if changed := certificate.departed(folder.root, files.result()["files"]):
            raise ZooError(
                f"{folder.root / changed}: not what {certificate.FILE} vouches for, and {why}: convert again, or delete "
                f"{certificate.FILE} if the change is meant"
            )
        out.not_checked.append(f"bytes: {why}")
    elif window is not None:
        out.of_bytes = exact.Bytes(folder, plan, window=window)
        window.riders.append(out.of_bytes)
    else:
        how.say("bytes")
        out.levels.append(exact.bytes_level(folder, plan))
    return out


def _unknown_fields(folder: canonical.Canonical, ckpt: Checkpoint | None) -> list[str]:
    """Notes on the fields of the config that zoo does not know: the source's, or, where that is gone, as recorded."""
    config = folder.source.get("config") if ckpt is None else ckpt.config
    if not isinstance(config, dict):
        return []
    try:
        family = families.get(folder.spec.family, folder.source.get("package"))
        return families.read(config, family, f"{folder.root / canonical.JSON}: the source's config")[1]
    except ZooError as e:
        return [f"which fields of the config zoo does not know was not looked at: {e}"]


# ---------------------------------------------------------------------------------------------------
# Provenance


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {"zoo": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("transformers", "safetensors", "tokenizers", "numpy"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def _enter_hashes(
    cert: Certificate,
    canonical_files: Future[dict[str, Any]],
    source_files: Future[dict[str, Any] | None],
    sharing: Sharing | None,
) -> None:
    """Both sides' hashes, of ranks that hashed some files each those of all. All ranks enter them together."""
    cert.canonical, cert.source = canonical_files.result(), source_files.result()
    sides = cert.canonical, cert.source
    for of in (
        () if sharing is None else sharing.all([None if side is None else side["files"] for side in sides])
    ):
        for side, files in zip(sides, of, strict=True):
            if side is not None and files is not None:
                side["files"] = dict(sorted((side["files"] | files).items()))


def _canonical(folder: canonical.Canonical, sharing: Sharing | None = None) -> dict[str, Any]:
    return {
        "path": folder.root.resolve().name,
        "family": folder.spec.family,
        "layout_version": folder.json.get("layout_version"),
        "files": certificate.hash_files(folder.root, certificate.canonical_files(folder.root), sharing),
    }


def _places(folder: canonical.Canonical, other: Against) -> dict[str, str]:
    """What is written for the absolute paths of this machine: what the folder is called, and the way from it."""
    home = folder.root.resolve()
    recorded = [Path(p) for p in map(folder.source.get, ("path", "root")) if isinstance(p, str)]
    golden = getattr(other.oracle, "path", None)
    found = [p for p in (other.path, golden, *recorded) if isinstance(p, Path)]
    if other.checkpoint is not None:
        found.append(other.checkpoint.root)
    out = {
        str(p): os.path.relpath(p.resolve(), home) for x in found for p in (x, x.resolve()) if p.is_absolute()
    }
    out |= {str(p): home.name for p in (folder.root, home) if p.is_absolute()}
    return out | ({} if other.cleanup is None else {other.cleanup.name: "(made for this)"})


def _source(
    folder: canonical.Canonical, other: Against, sharing: Sharing | None = None
) -> dict[str, Any] | None:
    ckpt = other.checkpoint
    if ckpt is None or other.path is None:
        return None
    return {
        "path": os.path.relpath(other.path.resolve(), folder.root.resolve()),
        "format": ckpt.format,
        "naming": list(ckpt.naming),
        "files": certificate.hash_files(ckpt.root, [*ckpt.files, *ckpt.carried], sharing),
    }


__all__ = ["Level", "verify"]
