"""`verify`: the levels in order, each judged, and a certificate of all of them.

plan -> bytes -> layers -> logits -> decode. The first two need only the source's files; the others an oracle
and torch. A level that can't be judged is listed under `not_checked`, with the reason, and never passes.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo import families
from zoo._version import __version__
from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.formats.base import Checkpoint
from zoo.formats.opening import open_checkpoint
from zoo.printable import decimal
from zoo.quant import foreign
from zoo.quant.schemes import scheme
from zoo.spec import Spec
from zoo.verify import certificate, exact, inputs
from zoo.verify.certificate import LEVELS, NO_TRANSFORMERS, NUMERIC, Certificate, Check, Level
from zoo.verify.compare import Clock
from zoo.verify.device import chosen, described
from zoo.verify.device import exact as exact_on
from zoo.verify.exact import plan_of
from zoo.verify.need import Need, needed
from zoo.verify.numeric import NO_DECODE, Comparison, follow
from zoo.verify.oracle import (
    DTYPES,
    CannotLoad,
    DequantisedWhole,
    NoUpstream,
    Oracle,
    Transformers,
    from_pretrained_files,
    upstream_available,
)
from zoo.verify.ranks import Ranks
from zoo.verify.reading import Window
from zoo.verify.sharing import Sharing
from zoo.verify.stage import Progress, Stage, silent

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from zoo.mapping.plan import Plan

StrPath = str | os.PathLike[str]


@dataclass
class Against:
    """What a canonical folder is compared with: a source's files, an oracle, either or both."""

    checkpoint: Checkpoint | None = None
    path: Path | None = None
    oracle: Oracle | None = None
    why_no_source: str | None = None
    why_no_oracle: str | None = None
    written: Plan | None = None  # the reading of a GGUF that was made of the folder
    cleanup: tempfile.TemporaryDirectory[str] | None = None


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
    wanted = wanted_by(level)
    say = progress or silent
    started, clock = time.perf_counter(), Clock()
    on = chosen(device)
    file = None
    if Path(canon).is_file():
        if not isinstance(against, str | os.PathLike) or not Path(against).is_dir():
            raise ZooError(
                f"{canon}: a file is held against the canonical folder it was written of (--against CANON)"
            )
        file, canon, against, write = Path(canon), against, canon, False
    folder = canonical.read(canon)
    ranks = None
    if mesh is not None and mesh.size() > 1:
        if self_test:
            raise ZooError("the self-test is for one process: ranks share a whole model")
        ranks = Ranks(mesh, on)
    numeric = [n for n in NUMERIC if n in wanted]
    need = why_streamed = None
    if level == "decode" or self_test:
        stream = bool(stream)
    if numeric and (ranks is None or ranks.first):
        with clock("what it needs"):
            need, why_streamed = foreseen(
                folder,
                against,
                dtype,
                on,
                stream,
                "decode" in numeric,
                max_length,
                say,
                1 if ranks is None else ranks.mesh.size(),
            )
    stream = bool(stream) or why_streamed is not None
    sharing = None
    if ranks is not None:
        stream = ranks.said(stream and bool(numeric))
        if ranks.said(stream and _recorded(against)):
            raise ZooError(
                "ranks stream where upstream reads the weights; a recording, or another oracle, is for one process"
            )
        if stream:
            sharing = Sharing(ranks.mesh)
        elif not ranks.first:
            return follow(folder, dtype, ranks)
    # Of processes and processors of their own, while Python opens.
    aside = ThreadPoolExecutor(3, "zoo-verify")
    hashing = aside.submit(_canonical, folder, sharing)
    texts = aside.submit(inputs.texts, folder.root, folder.spec.vocab_size) if numeric else None
    say("opening the source")
    with clock("opening"):
        window = Window(sharing) if stream else None
        other = resolve(folder, against) if file is None else _file_of(folder, file)
        hashing_source = aside.submit(_source, folder, other, sharing)
        aside.shutdown(wait=False)
        if file is not None:
            _open_reading(other, folder, dtype, window, bool(numeric), on)
        elif numeric and other.oracle is None and other.checkpoint is not None:
            _open_oracle(other, folder, other.checkpoint, dtype, window, on)
        held = contextlib.ExitStack()
    try:
        held.enter_context(exact_on(on))
        why_not = _why_not(folder, other, stream, level)
        if why_not and (level in NUMERIC or self_test):
            raise ZooError(f"{folder.root}: {level or 'the self-test'} can't be judged: {why_not}")
        if self_test and not numeric:
            raise ZooError("the self-test compares logits: ask for a level that does")
        with clock("hashes"):
            canonical_files, source_files = hashing.result(), hashing_source.result()
            if sharing is not None:
                _merge(sharing, canonical_files, source_files)
        cert = Certificate(
            canonical=canonical_files, source=source_files, rules=None, dtype=dtype,
            oracle=other.oracle.describe() if other.oracle else {"kind": "none", "why": other.why_no_oracle},
            disagreements=_disagreements(folder.spec, other.oracle), required=require,
            versions=versions(), device=described(on) | ({} if ranks is None else {"ranks": ranks.mesh.size()}),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            places=_places(folder, other), need=None if need is None else need.to_json(),
        )  # fmt: skip
        # Ours and bytes go along with an oracle that reads its weights, not with a recording.
        in_pass = window if numeric and not why_not and hasattr(other.oracle, "drive_both") else None
        with clock("plan and bytes"):
            of_bytes = _exact_levels(cert, folder, other, wanted, in_pass, say)
        if numeric and why_not:
            cert.not_checked.append(f"{', '.join(numeric)}: {why_not}")
        elif numeric:
            assert other.oracle is not None
            try:
                asked, measured = Comparison(
                    folder, other.oracle, other.checkpoint, wanted, dtype, stream, in_pass, on, max_length, n_greedy,
                    say, clock, None if stream else ranks,
                ).into(cert, of_bytes, texts)  # fmt: skip
                if sharing is not None and not sharing.first:
                    return sharing.of_first(cert)
                if why_streamed is not None:
                    cert.not_checked = [
                        f"{x}; streamed, since {why_streamed}" if x.endswith(NO_DECODE) else x
                        for x in cert.not_checked
                    ]
            except NoUpstream as e:  # streamed, it loads as it runs
                if level in NUMERIC or self_test:
                    raise
                cert.not_checked.append(f"{', '.join(numeric)}: {e}")
                self_test = False
                if of_bytes is not None and cert.level("bytes") is None:
                    with clock("plan and bytes"):
                        cert.levels.append(of_bytes.level())
            if self_test and not cert.failed:
                from zoo.verify import selftest

                plan = None if other.checkpoint is None else plan_of(folder, other.checkpoint)
                with clock("self-test"):
                    cert.faults = selftest.run(
                        folder, other.oracle, asked, measured.spread, dtype, plan, say, on
                    )
        total = time.perf_counter() - started
        clock.seconds["the rest"] = total - sum(clock.seconds.values())
        cert.timing = {k: round(v, 3) for k, v in clock.seconds.items()} | {"total": round(total, 3)}
        judged = {x.name for x in cert.levels if x.verdict != "skipped"}
        if not judged or (level is not None and level not in judged and not cert.failed):
            what = f"{level} can't" if judged else "nothing can"
            raise ZooError(f"{folder.root}: {what} be compared: {'; '.join(cert.not_checked)}")
        if write and (sharing is None or sharing.first):
            certificate.keep(cert, folder.root)
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


def _why_not(folder: canonical.Canonical, other: Against, stream: bool, level: str | None) -> str | None:
    """Why the numeric levels, or the one asked for, can't be judged; None if they can."""
    if other.oracle is None:
        return other.why_no_oracle
    if folder.layers is not None and len(folder.layers) < folder.spec.n_layers:
        return f"the folder has {len(folder.layers)} of {folder.spec.n_layers} layers"
    return NO_DECODE if stream and level == "decode" else None


def foreseen(
    folder: canonical.Canonical,
    against: StrPath | Oracle | None,
    dtype: str,
    on: torch.device,
    stream: bool | None,
    decodes: bool,
    max_length: int,
    say: Progress,
    ranks: int = 1,
) -> tuple[Need | None, str | None]:
    """What the run will need, and said; and why the two models are streamed, where `stream` leaves that open. None where
    upstream is not run here. `ranks`: how many have a part of ours each."""
    path = _recorded_source(folder) if against is None else against
    if not isinstance(path, str | os.PathLike) or not Path(path).exists() or _is_golden(Path(path)):
        return None, None
    if not upstream_available():
        return None, None
    need = needed(folder, Path(path), dtype, on, bool(stream), decodes, max_length, ranks)
    if need.fits or stream is not None:
        say(Stage(str(need), seconds=need.seconds))
        return need, None
    what = f"both sides take {decimal(need.memory)} in {dtype}, and {decimal(need.available or 0)} can be had"
    if not _can_stream(Path(path)):
        say(
            f"{what}; only folders of safetensors, and GGUF files, are streamed without being asked to (--stream)"
        )
        return need, None
    need = needed(folder, Path(path), dtype, on, True, False, max_length)
    say(Stage(f"{need}: streaming, since {what}", seconds=need.seconds))
    return need, what


def _recorded(against: StrPath | Oracle | None) -> bool:
    """Whether it is a recording, or an oracle that is no path."""
    if against is None:
        return False
    return not isinstance(against, str | os.PathLike) or _is_golden(Path(against))


def _can_stream(path: Path) -> bool:
    """Whether it is a GGUF file, or a folder where upstream would read safetensors files."""
    if path.is_file():
        return path.suffix == ".gguf"
    if not (path / "config.json").is_file():
        return False
    names = from_pretrained_files(path)
    return names is not None and all(n.endswith(".safetensors") for n in names)


# ---------------------------------------------------------------------------------------------------
# What to compare with


def resolve(folder: canonical.Canonical, against: StrPath | Oracle | None) -> Against:
    """Open the source that `against` stands for; and the oracle, if it is one or a recording."""
    if against is not None and not isinstance(against, str | os.PathLike):
        return Against(oracle=against, why_no_source="the oracle was given as an object")
    if against is not None and _is_golden(Path(against)):
        from zoo.verify.golden import Golden

        source = _recorded_source(folder)
        golden = Golden(Path(against), folder.spec.family)
        if source is None:
            return Against(oracle=golden, why_no_source="compared with a recording; the source is not here")
        return Against(open_checkpoint(source), source, golden)
    path = _recorded_source(folder) if against is None else Path(against)
    if path is None and (values := folder.source.get("values")):
        why = f"its values are no release's ({values.get('by')}, from {values.get('from')}); name what they should equal with --against"
        return Against(why_no_source=why, why_no_oracle=why)
    if path is None:
        where = folder.source.get("path") or folder.source.get("root") or "an unknown place"
        return Against(
            why_no_source=f"the source it was converted from ({where}) is not there any more",
            why_no_oracle=f"the source ({where}) is not there any more; name one with --against",
        )
    if not path.exists():
        raise ZooError(f"{path}: no such file or folder to verify against")
    return Against(open_checkpoint(path), path)


def _file_of(folder: canonical.Canonical, file: Path) -> Against:
    """A GGUF written of the folder."""
    from zoo.verify import written

    plan = written.of(folder, file)
    return Against(plan.checkpoint, file, written=plan)


def _open_reading(
    out: Against,
    folder: canonical.Canonical,
    dtype: str,
    window: Window | None,
    needs_oracle: bool,
    device: torch.device,
) -> None:
    """Upstream's reading of a GGUF written of the folder, where it holds the folder's values."""
    from zoo.verify import written

    plan, file = out.written, out.path
    assert plan is not None
    path, rounded = readable(plan.checkpoint), written.rounded_types(folder, plan)
    if rounded:
        out.why_no_oracle = (
            f"the file rounds the folder's values to {', '.join(rounded)}: they are held to that rounding; `zoo convert "
            f"{file} FOLDER` and `zoo verify FOLDER` compare what is left with upstream's reading of it"
        )
    elif not upstream_available():
        out.why_no_oracle = NO_TRANSFORMERS
    elif path is None:
        out.why_no_oracle = "upstream cannot read a GGUF of several files"
    elif needs_oracle:
        try:
            oracle = _upstream(folder.spec, path, dtype, None, window, device)
        except (CannotLoad, NoUpstream) as e:  # an export of the folder would say nothing of the file
            out.why_no_oracle = str(e)
        else:
            # Its loader drops many a field: the experts of Mixtral, the caps of Gemma 2 where they are not 50 and 30.
            out.why_no_oracle = written.read_otherwise(folder, oracle.model.config.to_dict())
            out.oracle = None if out.why_no_oracle else oracle


def _recorded_source(folder: canonical.Canonical) -> Path | None:
    recorded = folder.source.get("path") or folder.source.get("root")
    return Path(recorded) if recorded and isinstance(recorded, str) and Path(recorded).exists() else None


def _is_golden(path: Path) -> bool:
    from zoo.verify.golden import is_golden

    return bool(is_golden(path))


def _open_oracle(
    out: Against,
    folder: canonical.Canonical,
    ckpt: Checkpoint,
    dtype: str,
    window: Window | None,
    device: torch.device,
) -> None:
    if not upstream_available():
        out.why_no_oracle = NO_TRANSFORMERS
        return
    path, why_chosen = readable(ckpt), "as asked for: left to itself it reads other files"
    if path == ckpt.root and ckpt.chosen is None and len(ckpt.files) == 1 and not from_pretrained_files(path):
        ckpt = replace(ckpt, chosen=next(iter(ckpt.files)))
        why_chosen = "under a name that it looks for: left to itself it finds no weights there"
    why = f"upstream cannot read {ckpt.format} files"
    try:
        if path is not None:
            if path != ckpt.root or ckpt.chosen is None or _takes_the_same(ckpt):
                out.oracle = _upstream(folder.spec, path, dtype, None, window, device)
                return
            note = f"upstream was given {ckpt.chosen} alone, {why_chosen}"
            if window is None:
                path, out.cleanup = alone(ckpt)
            out.oracle = _upstream(folder.spec, path, dtype, note, window, device, ckpt.files)
            return
    except DequantisedWhole as e:
        note = (
            f"{str(e).removesuffix('.')}, so it was given what zoo's formulas say that the codes stand for, under the source's "
            "names: those formulas have tests of their own"
        )
        plan = _dequantising(folder, ckpt)
        try:
            out.oracle = _upstream(folder.spec, ckpt.root, dtype, note, window, device, ckpt.files, plan)
        except NoUpstream as e:
            out.why_no_oracle = str(e)
        return
    except CannotLoad as e:
        # Of a plain folder of plain weights an export would be the same files again.
        quantised = folder.quant or foreign.said(ckpt.config)
        if ckpt.format != "gguf" and (window is not None or not quantised):
            out.why_no_oracle = str(e)
            return
        why = str(e).removesuffix(".")
    except NoUpstream as e:
        out.why_no_oracle = str(e)
        return
    # Of fp8 in Mistral's format, too, an export would keep a form that upstream's classes do not read.
    plain = dtype if folder.quant and (path is not None or ckpt.format == "mistral") else None
    given = (
        "the canonical weights"
        if plain is None
        else f"the source, converted again and dequantised to {plain},"
    )
    independent = "the bytes level is independent of that"
    if any(scheme(q).module for q in folder.quant.values()) or (
        not folder.quant and foreign.said(ckpt.config)
    ):
        independent += ", but for what a code stands for: that formula has tests of its own"
    note = (
        f"{why}, so it was given {given} under its own names: a mistake that import and export share would not show here "
        f"({independent})"
    )
    try:
        given_path, out.cleanup = _exported(folder, ckpt, plain)
    except ZooError as e:
        out.why_no_oracle = f"{why}, and it cannot be given an export: {e}"
        return
    try:
        out.oracle = _upstream(folder.spec, given_path, dtype, note, window, device)
    except CannotLoad as e:
        assert out.cleanup is not None
        out.cleanup.cleanup()
        raise ZooError(f"{why}, so it was given an export, and that failed: {e}") from e
    except NoUpstream as e:
        out.why_no_oracle = str(e)


def _disagreements(spec: Spec, oracle: Oracle | None) -> list[dict[str, Any]]:
    """Those known of this model, each with how the oracle stood to it."""
    corrected = getattr(oracle, "corrected", [])
    of_zoo = isinstance(oracle, Transformers)
    return [
        d.to_json()
        | {"oracle": "corrected" if d.about in corrected else "as it is" if of_zoo else "not known"}
        for d in families.disagreements(spec)
    ]


def _upstream(
    spec: Spec,
    path: Path,
    dtype: str,
    note: str | None,
    window: Window | None,
    device: torch.device,
    files: Iterable[str] | None = None,
    plan: Plan | None = None,
) -> Transformers:
    """Upstream's model of the checkpoint, corrected where it is known to be on the other side of a disagreement."""
    if window is not None:
        from zoo.verify.stream import StreamedTransformers

        oracle: Transformers = StreamedTransformers(path, dtype, note, files, device, window, plan)
    else:
        oracle = Transformers(path, dtype, note, device)
    for d in families.disagreements(spec):
        if d.correct is not None:
            d.correct(oracle.model)
            oracle.corrected.append(d.about)
    return oracle


def readable(ckpt: Checkpoint) -> Path | None:
    """The path that transformers can load this checkpoint from, or None."""
    if ckpt.format == "gguf" and len(ckpt.files) == 1:
        return ckpt.path(next(iter(ckpt.files)))
    if (
        "hf" in ckpt.naming
        and (ckpt.root / "config.json").is_file()
        and ckpt.format in ("safetensors", "pickle")
    ):
        return ckpt.root
    return None


def _takes_the_same(ckpt: Checkpoint) -> bool:
    return from_pretrained_files(ckpt.root) == tuple(sorted(ckpt.files))


def alone(ckpt: Checkpoint) -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """A folder of links to the files of the set that was chosen, under the names that `from_pretrained` looks for."""
    assert ckpt.chosen is not None
    holder = tempfile.TemporaryDirectory(prefix="zoo-verify-")
    root, here = Path(holder.name), ckpt.root.resolve()
    for name in ckpt.carried:
        if name != "config.json" and not name.endswith(".index.json"):
            (root / name).symlink_to(here / name)
    config = {k: v for k, v in ckpt.config.items() if k != "transformers_weights"}
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    whole = "pytorch_model.bin" if ckpt.format == "pickle" else "model.safetensors"
    if ckpt.chosen in ckpt.files:
        (root / whole).symlink_to((here / ckpt.chosen).resolve())
    else:
        # What zoo reads is read as a stranger's: a link that leads out is refused.
        shutil.copyfile(here / ckpt.chosen, root / f"{whole}.index.json")
        for name in ckpt.files:
            (root / name).symlink_to((here / name).resolve())
    return root, holder


def files_level(ckpt: Checkpoint) -> Check | None:
    """That the source's files are those that upstream itself would open; None where it would open none of them, or the
    user said which."""
    if readable(ckpt) != ckpt.root or ckpt.chosen is not None:
        return None
    theirs = from_pretrained_files(ckpt.root)
    if theirs is None:
        return None
    odd = sorted(set(theirs) ^ set(ckpt.files))
    why = f"from_pretrained reads {', '.join(theirs[:3])}" + (
        f" and {len(theirs) - 3} more" if theirs[3:] else ""
    )
    return Check("files read by zoo or upstream alone", len(odd), 0, why, len({*theirs, *ckpt.files}))


def _exported(
    folder: canonical.Canonical, ckpt: Checkpoint, dtype: str | None
) -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """The folder's weights under upstream's names; with a `dtype`, the checkpoint's, converted to it first."""
    from zoo.mapping.execute import convert
    from zoo.mapping.export import export
    from zoo.mapping.plan import make_plan

    holder = tempfile.TemporaryDirectory(prefix="zoo-verify-")
    path = Path(holder.name) / "exported"
    try:
        root = folder.root
        if dtype is not None:
            root = convert(make_plan(ckpt, dtype=dtype), Path(holder.name) / "plain")
        export(root, path, format="hf")
    except BaseException:
        holder.cleanup()
        raise
    return path, holder


# ---------------------------------------------------------------------------------------------------
# Levels


def _exact_levels(
    cert: Certificate,
    folder: canonical.Canonical,
    other: Against,
    wanted: tuple[str, ...],
    window: Window | None,
    say: Progress,
) -> exact.Bytes | None:
    """The levels plan and bytes. With a `window`, bytes are compared as they pass there: by what is returned."""
    plan, why, of_bytes = other.written, other.why_no_source, None
    if plan is not None:
        from zoo.verify import written

        cert.rules = {"family": plan.family.name, "naming": plan.naming, "version": plan.rules_version}
        for name, level in (("plan", written.written_plan_level), ("bytes", written.written_bytes_level)):
            if name in wanted:
                say(name)
                t = time.perf_counter()
                cert.levels.append(level(folder, plan))
                cert.levels[-1].seconds = time.perf_counter() - t
        return None
    if other.checkpoint is not None:
        say("planning")
        plan = plan_of(folder, other.checkpoint)
        cert.rules = {"family": plan.family.name, "naming": plan.naming, "version": plan.rules_version}
        if folder.source.get("family_given"):
            cert.rules["family_given"] = True
    for name in ("plan", "bytes"):
        if name not in wanted:
            continue
        if name == "bytes" and plan is None:
            if changed := certificate.departed(folder.root, cert.canonical["files"]):
                raise ZooError(
                    f"{folder.root / changed}: not what {certificate.FILE} vouches for, and {why}: convert again, or delete "
                    f"{certificate.FILE} if the change is meant"
                )
            cert.not_checked.append(f"bytes: {why}")
            continue
        if name == "bytes" and plan is not None and window is not None:
            of_bytes = exact.Bytes(folder, plan, window=window)
            window.riders.append(of_bytes)
            continue
        say(name)
        t = time.perf_counter()
        made = exact.plan_level(folder, plan, why) if name == "plan" else exact.bytes_level(folder, plan)  # type: ignore[arg-type]
        made.seconds = time.perf_counter() - t
        if name == "plan" and other.checkpoint is not None:
            if (same := files_level(other.checkpoint)) is not None:
                made.checks.append(same)
            made.notes += [n for n in other.checkpoint.notes if n.startswith("weights: ")]
        if name == "plan":
            made.notes += _unknown_fields(folder, other.checkpoint)
        cert.levels.append(made)
    return of_bytes


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


def _dequantising(folder: canonical.Canonical, ckpt: Checkpoint) -> Plan:
    from zoo.mapping.plan import make_plan

    return make_plan(ckpt, families.get(folder.spec.family, folder.source.get("package")), "fp32")


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


def _merge(sharing: Sharing, *sides: dict[str, Any] | None) -> None:
    """Have the hashes of all ranks in each of them."""
    for of in sharing.all([None if side is None else side["files"] for side in sides]):
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
