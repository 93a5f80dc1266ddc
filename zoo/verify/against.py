"""What a canonical folder is compared with: a source's files, and an oracle that reads them, or gives what it recorded."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import families
from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.formats.base import Checkpoint
from zoo.formats.opening import open_checkpoint
from zoo.quant import foreign
from zoo.quant.schemes import scheme
from zoo.spec import Spec
from zoo.verify.certificate import NO_TRANSFORMERS, Check
from zoo.verify.golden import Golden, is_golden
from zoo.verify.oracle import (
    CannotLoad,
    DequantisedWhole,
    NoUpstream,
    Oracle,
    Transformers,
    from_pretrained_files,
    upstream_available,
)
from zoo.verify.reading import Window
from zoo.verify.settings import Settings

if TYPE_CHECKING:
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


def resolve(folder: canonical.Canonical, against: StrPath | Oracle | None) -> Against:
    """Open the source that `against` stands for; and the oracle, if it is one or a recording."""
    if against is not None and not isinstance(against, str | os.PathLike):
        return Against(oracle=against, why_no_source="the oracle was given as an object")
    if against is not None and is_golden(Path(against)):
        source = recorded_source(folder)
        golden = Golden(Path(against), folder.spec.family)
        if source is None:
            return Against(oracle=golden, why_no_source="compared with a recording; the source is not here")
        return Against(open_checkpoint(source), source, golden)
    path = recorded_source(folder) if against is None else Path(against)
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


def file_of(folder: canonical.Canonical, file: Path) -> Against:
    """A GGUF written of the folder."""
    from zoo.verify import written

    plan = written.of(folder, file)
    return Against(plan.checkpoint, file, written=plan)


def open_reading(out: Against, folder: canonical.Canonical, how: Settings, window: Window | None) -> None:
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
    elif how.numeric:
        try:
            oracle = _upstream(folder.spec, how, window, path)
        except (CannotLoad, NoUpstream) as e:  # an export of the folder would say nothing of the file
            out.why_no_oracle = str(e)
        else:
            # Its loader drops many a field: the experts of Mixtral, the caps of Gemma 2 where they are not 50 and 30.
            out.why_no_oracle = written.read_otherwise(folder, oracle.model.config.to_dict())
            out.oracle = None if out.why_no_oracle else oracle


def recorded_source(folder: canonical.Canonical) -> Path | None:
    """What the folder was converted from, where that still exists."""
    recorded = folder.source.get("path") or folder.source.get("root")
    return Path(recorded) if recorded and isinstance(recorded, str) and Path(recorded).exists() else None


def open_oracle(
    out: Against, folder: canonical.Canonical, ckpt: Checkpoint, how: Settings, window: Window | None
) -> None:
    """Upstream's model of a source, or why there is none. `window`: what it is streamed through; None: it is loaded whole."""
    upstream = functools.partial(_upstream, folder.spec, how, window)
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
                out.oracle = upstream(path)
                return
            note = f"upstream was given {ckpt.chosen} alone, {why_chosen}"
            if window is None:
                path, out.cleanup = alone(ckpt)
            out.oracle = upstream(path, note, ckpt.files)
            return
    except DequantisedWhole as e:
        note = (
            f"{str(e).removesuffix('.')}, so it was given what zoo's formulas say that the codes stand for, under the source's "
            "names: those formulas have tests of their own"
        )
        plan = _dequantising(folder, ckpt)
        try:
            out.oracle = upstream(ckpt.root, note, ckpt.files, plan)
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
    plain = how.dtype if folder.quant and (path is not None or ckpt.format == "mistral") else None
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
        out.oracle = upstream(given_path, note)
    except CannotLoad as e:
        assert out.cleanup is not None
        out.cleanup.cleanup()
        raise ZooError(f"{why}, so it was given an export, and that failed: {e}") from e
    except NoUpstream as e:
        out.why_no_oracle = str(e)


def disagreements(spec: Spec, oracle: Oracle | None) -> list[dict[str, Any]]:
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
    how: Settings,
    window: Window | None,
    path: Path,
    note: str | None = None,
    files: Iterable[str] | None = None,
    plan: Plan | None = None,
) -> Transformers:
    """Upstream's model of the checkpoint, corrected where it is known to be on the other side of a disagreement."""
    if window is not None:
        from zoo.verify.stream import StreamedTransformers

        oracle: Transformers = StreamedTransformers(path, how.dtype, note, files, how.device, window, plan)
    else:
        oracle = Transformers(path, how.dtype, note, how.device)
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


def _dequantising(folder: canonical.Canonical, ckpt: Checkpoint) -> Plan:
    from zoo.mapping.plan import make_plan

    return make_plan(ckpt, families.get(folder.spec.family, folder.source.get("package")), "fp32")
