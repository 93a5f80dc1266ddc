"""Certificate: `parity.json`, what was compared with what, how far apart it was, and what that was judged by.

Written once beside the canonical files; `check` hashes everything it names again and says whether it still
holds. The schema is `parity.schema.json` beside this module. A certificate never says "passed" about what
was not done: that is listed under `not_checked`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.errors import ZooError
from zoo.formats.base import TEMPLATES, inside, leads_out, read_json
from zoo.untrusted.plain import write_plain
from zoo.verify import limits

if TYPE_CHECKING:
    from zoo.verify.sharing import Sharing

SCHEMA = "zoo-parity-1"
MAX_FILES = 20_000
"""Of a folder, twice as many as it may carry."""
MAX_CHECKS = 1000
"""Of a level: there are some ten."""
READERS = 8
"""Files, or tensors, that are looked at at once."""
FILE = "parity.json"
SIGNATURE = "model.sig"
"""Of all files of a folder, the certificate too: see `zoo.sign`."""
BESIDE = (FILE, SIGNATURE, "report.html")
"""What zoo writes of a folder, into it, and no certificate is about."""
LEVELS = ("plan", "bytes", "layers", "logits", "decode")
DTYPES = ("fp32", "bf16", "fp16")
"""What both sides can be computed in."""
NUMERIC = LEVELS[2:]
"""The levels that run both sides."""
NO_TRANSFORMERS = "transformers is not installed (pip install 'zoo-weights[upstream]')"
NOT_COMPARED = (
    "neither the source's bytes nor logits were compared, so nothing is known of the values: name the source, or a "
    "golden file, with --against SRC"
)
SHAPES_ALONE = "shapes alone, no value"
"""What a certificate of the plan is of."""
ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What JSON raises that is no certificate, where it is read as one."""
Verdict = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One judged number. It passes when `value` is at most (`at_least`: at least) `bound`, unless it is `blind`: it compared
    nothing, or the bound is none or so wide that whatever there is would pass.

    `why` says where the bound comes from. `compared`: of how many tensors, elements, tokens or files the value is; None where a
    certificate does not say. `scale`: the largest |logit|, which limits how wide the bound of an error of logits may be. `value` and
    `bound` of an exact check count differences: 0 and 0.
    """

    name: str
    value: float
    bound: float
    why: str
    compared: int | None
    scale: float = 1.0
    at_least: bool = False

    @property
    def blind(self) -> str | None:
        """Why it judges nothing; None: it does."""
        return limits.blind(self.name, self.value, self.bound, self.at_least, self.scale, self.compared)

    @property
    def passed(self) -> bool:
        within = self.value >= self.bound if self.at_least else self.value <= self.bound
        return within and math.isfinite(self.value) and self.blind is None

    @property
    def margin(self) -> float | None:
        """How many times the value fits into the bound (bound / value); None where that says nothing."""
        a, b = (self.value, self.bound) if self.at_least else (self.bound, self.value)
        return a / b if b > 0 and math.isfinite(a) and math.isfinite(b) else None

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> Check:
        at_least, compared = {"<=": False, ">=": True}[d["relation"]], d.get("compared")
        if not isinstance(d["name"], str) or type(compared) not in (int, type(None)):
            raise ValueError(f"a check {d['name']!r:.80} that compared {compared!r:.80}")
        scale = float(d.get("scale", 1.0))
        return cls(d["name"], float(d["value"]), float(d["bound"]), d["why"], compared, scale, at_least)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": _number(self.value),
            "relation": ">=" if self.at_least else "<=",
            "bound": _number(self.bound),
            "margin": self.margin,
            "passed": self.passed,
            "compared": self.compared,
            "scale": _number(self.scale),
            "why": self.why,
        }


@dataclass
class Level:
    """The result of one level. `figures` are the measurements behind the checks, for the report."""

    name: str
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, name: str, differing: int, of: int, why: str) -> None:
        """Add a check that none `of` so many differ. Where there are none, there is nothing to check."""
        if of:
            self.checks.append(Check(name, differing, 0, why, of))

    @property
    def verdict(self) -> Verdict:
        if not self.checks:
            return "skipped"
        return "passed" if all(c.passed for c in self.checks) else "failed"

    @property
    def tightest(self) -> Check | None:
        """The failed check if there is one, else the one with the least margin."""
        failed = [c for c in self.checks if not c.passed]
        measured = failed or [c for c in self.checks if c.margin is not None] or self.checks
        return min(measured, key=lambda c: c.margin if c.margin is not None else 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "checks": [c.to_json() for c in self.checks],
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
            "figures": self.figures,
        }


@dataclass
class Certificate:
    """What `zoo.verify` returns."""

    canonical: dict[str, Any]
    source: dict[str, Any] | None
    rules: dict[str, Any] | None
    oracle: dict[str, Any]
    dtype: str
    levels: list[Level] = field(default_factory=list)
    inputs: dict[str, Any] | None = None
    not_checked: list[str] = field(default_factory=list)
    disagreements: list[dict[str, Any]] = field(default_factory=list)
    diagnosis: dict[str, Any] | None = None
    faults: dict[str, Any] | None = None
    timing: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=lambda: {"type": "cpu"})
    created: str = ""
    kept: str = ""  # what became of `parity.json`, for people
    need: dict[str, Any] | None = None  # what was foreseen of memory, reads and time
    required: str | None = None  # the level without which nothing is proven, as the user has it
    places: dict[str, str] = field(
        default_factory=dict
    )  # absolute paths of this machine, and what is written for them

    @property
    def passed(self) -> bool:
        """True only if something was judged, values too where they were to be, and nothing failed."""
        judged = any(level.verdict == "passed" for level in self.levels)
        sound = not self.failed and not self._missed_faults and not self.values_unseen
        return judged and sound and not self.lacking

    @property
    def lacking(self) -> str | None:
        """The level that was required and did not pass."""
        level = None if self.required is None else self.level(self.required)
        return self.required if level is None or level.verdict != "passed" else None

    @property
    def rests_on(self) -> str | None:
        """The last level that passed: what the verdict can say no more than."""
        return next((n for n in reversed(LEVELS) if (x := self.level(n)) and x.verdict == "passed"), None)

    @property
    def headline(self) -> str:
        """The verdict for people. Where no logits were compared it says what was: it must not read like a proof of them."""
        if self.passed and self.rests_on not in ("logits", "decode"):
            return f"PASSED ({self.rests_on} only)"
        return self.verdict.upper()

    @property
    def values_unseen(self) -> bool:
        """Values were to be compared, and no level that looks at them passed or failed: shapes alone say nothing.

        Where only the plan level was asked for, bytes are not among what was not checked, and that level is enough.
        """
        seen = any(x.name != "plan" and x.verdict != "skipped" for x in self.levels)
        return not seen and any(text.startswith("bytes: ") for text in self.not_checked)

    @property
    def failed(self) -> bool:
        """A level failed."""
        return any(level.verdict == "failed" for level in self.levels)

    @property
    def _missed_faults(self) -> int:
        return int(self.faults["applicable"] - self.faults["caught"]) if self.faults else 0

    @property
    def verdict(self) -> str:
        return "passed" if self.passed else "failed"

    def level(self, name: str) -> Level | None:
        return next((x for x in self.levels if x.name == name), None)

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = _clean({
            "schema": SCHEMA,
            "verdict": self.verdict,
            "rests_on": self.rests_on,
            "required_level": self.required,
            "created": self.created,
            "dtype": self.dtype,
            "canonical": self.canonical,
            "source": self.source,
            "rules": self.rules,
            "oracle": self.oracle,
            "inputs": self.inputs,
            "levels": {x.name: x.to_json() for x in self.levels},
            "not_checked": self.not_checked,
            "disagreements": self.disagreements,
            "diagnosis": self.diagnosis,
            "faults": self.faults,
            "timing": self.timing,
            "need": self.need,
            "versions": self.versions,
            "machine": machine(),
            "device": self.device,
        }, _said_instead(self.places))  # fmt: skip
        return out

    def write(self, folder: Path, name: str = FILE) -> Path:
        """Write `parity.json` into the canonical folder, or `folder / name`, whole or not at all."""
        path = folder / name
        write_plain(path, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        return path


ELSEWHERE = "-o FILE keeps this one elsewhere"


def keep(cert: Certificate, folder: Path, own: bool | None = True) -> None:
    """Write the certificate into the folder, where that can be written and holds none that says more, none of a failure
    that this run did not look at again, and none of another source, unless this is of the folder's `own`: what it was converted
    from. None is written of a failure against anything else than that, where it is known: another model's files say nothing of the conversion."""
    if own is False and cert.failed:
        cert.kept = f"nothing was kept: this is a failure against other files than the folder was converted from; {ELSEWHERE}"
        return
    try:
        old = read_json(folder / FILE, "") if (folder / FILE).exists() else {}
    except ZooError:
        old = {}
    try:
        why, more = _stands(old, cert, folder, own), False
        if old and sound(old):
            more = _says_more(old, cert)
    except ODD:  # not as zoo writes it: it says nothing
        why, more = None, False
    if why is not None:
        cert.kept = f"{FILE} is still that of {old.get('created')}, {why}"
        return
    if (cert.passed or cert.values_unseen) and not cert.failed and more:
        cert.kept = f"{FILE} is still that of {old.get('created')}, which has more levels"
        return
    try:
        cert.write(folder)
        cert.kept = f"{FILE} written"
    except OSError as e:
        cert.kept = f"{FILE} not written: {e.strerror}"


def _stands(old: Mapping[str, Any], new: Certificate, folder: Path, own: bool | None) -> str | None:
    """Why the certificate that a folder has stays although this one is of other things; None if it need not."""
    was, now = old.get("source") or {}, new.source or {}
    if old.get("schema") != SCHEMA or (old.get("canonical") or {}).get("files") != new.canonical["files"]:
        return None
    levels = old.get("levels") or {}
    failed = [n for n in LEVELS if (levels.get(n) or {}).get("verdict") == "failed"]
    again = {x.name for x in new.levels if x.verdict != "skipped"}
    elsewhere = bool(was and now) and was.get("path") != now.get("path")
    another = elsewhere and was.get("files") != now.get("files")
    if was and not own:
        if another:
            return f"of {was.get('path')}, and this is of another source; {ELSEWHERE}"
        if elsewhere and not failed and (folder / str(was.get("path"))).exists():
            return f"of {was.get('path')}, whose files are the same; {ELSEWHERE}"
        if not now and new.failed and not failed:
            return f"of {was.get('path')}, and this is of no files; {ELSEWHERE}"
    if another or (was and now and was.get("files") != now.get("files")):
        return None
    if failed and not new.failed and not again.issuperset(failed) and old.get("dtype") == new.dtype:
        return f"which failed at {', '.join(failed)}, and this run did not compare that; {ELSEWHERE}"
    return None


def standing(folder: Path) -> str | None:
    """What may be said of a folder's certificate without hashing anything: its verdict, and whether files have been
    written since, by sizes and times. None if there is none."""
    if not (folder / FILE).is_file():
        return None
    data = read_json(folder / FILE, "it is the certificate")
    try:
        when = datetime.datetime.fromisoformat(data["created"]).timestamp() + 1  # it is in whole seconds
        refuse_list(recorded := data["canonical"]["files"], str(folder))
        now = {n: (folder / n).stat() for n in recorded if not leads_out(n) and (folder / n).is_file()}
        odd = [n for n, was in recorded.items() if n not in now or now[n].st_size != was["bytes"]]
        odd += [n for n, s in now.items() if s.st_mtime > when and n not in odd]
        odd += [n for n in canonical_files(folder) if n not in recorded]
        levels = [n for n, x in data["levels"].items() if x["verdict"] == "passed"]
        verdict, why_not = data["verdict"], contradictions(data)
    except (*ODD, OSError) as e:
        raise ZooError(f"{folder / FILE}: not as zoo writes it ({e!r:.200}); verify again") from None
    said = f"{verdict} on {data['created']}, up to {levels[-1] if levels else 'nothing'}"
    if why_not:
        return f"nothing is proven: its certificate contradicts itself ({why_not[0]}); `zoo verify {folder}` makes another"
    if levels == ["plan"]:
        said += f" ({SHAPES_ALONE})"
    if odd:
        listed = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        return f"not as it is now: {listed} changed since ({said}); `zoo verify {folder} --check-certificate` hashes it"
    return f"{said}; sizes and times of files are as then"


def _says_more(old: Mapping[str, Any], new: Certificate) -> bool:
    """Whether a certificate of the same files and source has all levels of the new one, and others."""
    if old.get("schema") != SCHEMA or old.get("verdict") != "passed" or old.get("dtype") != new.dtype:
        return False
    same = (old.get("canonical") or {}).get("files") == new.canonical["files"]
    same_source = (old.get("source") or {}).get("files") == (new.source or {}).get("files")
    had = {n for n, level in (old.get("levels") or {}).items() if level.get("verdict") == "passed"}
    return same and (same_source or new.source is None) and had > {x.name for x in new.levels if x.checks}


def departed(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """A file of the folder that is not what its certificate vouches for; None if there is none, or no certificate."""
    if not (folder / FILE).exists():
        return None
    try:
        recorded = read_json(folder / FILE, "")["canonical"]["files"]
        return next(
            (n for n, was in recorded.items() if n in files and files[n]["sha256"] != was["sha256"]), None
        )
    except (ZooError, KeyError, TypeError, AttributeError):
        return None


def _number(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)  # JSON has no infinity


def _said_instead(places: Mapping[str, str]) -> Callable[[str], str]:
    """Writes for each path what `places` says, once: a way up to / has the absolute path within it (../../root/model), and
    what was written is not looked at again. The longest path first; no part of a longer name is one."""
    if not places:
        return str
    names = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    path = re.compile(rf"(?<![\w.-])(?:{names})(?![\w-]|\.\w)")
    return lambda text: path.sub(lambda found: places[found[0]], text)


def _clean(x: Any, said: Callable[[str], str] = str) -> Any:
    """JSON-safe: no NaN or infinity, floats of six digits, which is what they are good for; no path of this machine."""
    if isinstance(x, Mapping):
        return {str(k): _clean(v, said) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_clean(v, said) for v in x]
    if isinstance(x, str):
        return said(x)
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else str(x)
    return x


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {"system": platform.system(), "cpu": cpu, "cores": cores()}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------
# Hashes


PIECE = 1 << 22
"""Bytes hashed at a time: sixteen times those of `hashlib.file_digest`. Between two pieces a thread waits for Python's lock, and
whoever imports transformers meanwhile waits for the threads."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        piece = memoryview(bytearray(min(PIECE, os.fstat(f.fileno()).st_size)))
        while n := f.readinto(piece):
            digest.update(piece[:n])
    return digest.hexdigest()


def hash_files(root: Path, names: Iterable[str], sharing: Sharing | None = None) -> dict[str, dict[str, Any]]:
    """Files at once by as many threads as there are cores: hashing one takes a core, and a disk gives more than that.
    `sharing`: ranks that hash some of them each."""
    ordered = sorted(set(names))
    if sharing is not None:
        ordered = [ordered[k] for k in sharing.mine([(root / n).stat().st_size for n in ordered])]
    with ThreadPoolExecutor(min(READERS, cores())) as pool:
        digests = pool.map(lambda n: sha256(root / n), ordered)
        return {
            n: {"sha256": digest, "bytes": (root / n).stat().st_size}
            for n, digest in zip(ordered, digests, strict=True)
        }


def canonical_files(root: Path) -> list[str]:
    """Everything in a canonical folder that the certificate vouches for: all of it but itself."""
    found = [p for p in root.iterdir() if p.name not in BESIDE]
    found += (root / TEMPLATES).glob("*.jinja")
    return [p.relative_to(root).as_posix() for p in found if p.is_file() and not p.name.startswith(".")]


def check(folder: Path, source: bool = True) -> list[str]:
    """What a folder's certificate says that is not so any more, one line each; empty if it still holds. `source`: look at
    the source's files, too, where they are.

    Raises ZooError if there is no certificate, or it isn't one of this schema.
    """
    data = read_json(folder / FILE, f"there is no certificate; write one with: zoo verify {folder}")
    if data.get("schema") != SCHEMA:
        raise ZooError(f"{folder / FILE}: schema is {data.get('schema')!r}; expected {SCHEMA!r}")
    try:
        return _problems(folder, data, source)
    except (*ODD, OSError) as e:
        raise ZooError(f"{folder / FILE}: not as zoo writes it ({e!r})") from None


def unchecked(folder: Path) -> str | None:
    """Why `check` of this folder could not look at the source; None if it could."""
    source = read_json(folder / FILE, "").get("source")
    if not source or not source.get("files"):
        return "it names no source, so none was checked"
    if not (path := folder.resolve() / source["path"]).exists():
        return f"the source ({os.path.normpath(path)}) is not there any more and was not checked"
    return None


def _problems(folder: Path, data: Mapping[str, Any], with_source: bool) -> list[str]:
    problems = _doubts(data)
    recorded = data["canonical"]["files"]
    if unvouched := sorted(_needed(folder) - recorded.keys()):
        problems.append(f"it vouches for none of {', '.join(unvouched[:4])}, which the model is read from")
    problems += _changed(folder, recorded)
    problems += [
        f"{n}: was not there when it was issued" for n in canonical_files(folder) if n not in recorded
    ]
    source = data.get("source")
    # The path is relative to the folder; one that an older zoo wrote is absolute, and stands for itself.
    if (
        with_source
        and source
        and source.get("files")
        and (root := folder.resolve() / source["path"]).exists()
    ):
        problems += [f"source {p}" for p in _source_changed(root, source)]
    if rules := data.get("rules"):
        problems += _rules_changed(rules)
    return problems


def _needed(folder: Path) -> set[str]:
    """The files of a canonical folder without which it is none."""
    from zoo.formats import canonical

    with contextlib.suppress(ZooError):  # a damaged one: what has changed is said anyway
        return {canonical.JSON, *canonical.read(folder).files}
    return {canonical.JSON}


def _source_changed(path: Path, source: Mapping[str, Any]) -> list[str]:
    """What is not so any more of the source's files. Where they lie and what they are called is the word of whoever wrote the
    certificate: only what zoo reads of a checkpoint there is opened."""
    from zoo.formats import open_checkpoint

    try:
        ckpt = open_checkpoint(path, source.get("format"))
    except ZooError as e:
        return [f"cannot be opened any more: {e!s:.300}"]
    belong = {*ckpt.files, *ckpt.carried}
    strange = [
        f"{n:.200}: "
        + ("is no file of the checkpoint there" if leads_out(n) or is_there(ckpt.root, n) else "gone")
        for n in source["files"]
        if n not in belong
    ]
    return strange + _changed(ckpt.root, {n: was for n, was in source["files"].items() if n in belong})


def doubts(data: Mapping[str, Any]) -> list[str]:
    """Why a certificate proves nothing, whatever the files are: by its own words."""
    try:
        return _doubts(data)
    except ODD as e:
        return [f"it is not as zoo writes it ({e!r:.200})"]


def sound(data: Mapping[str, Any]) -> bool:
    """Whether its verdict follows from what it compared, be that shapes alone."""
    try:
        return not contradictions(data)
    except ODD:
        return False


def _doubts(data: Mapping[str, Any]) -> list[str]:
    """The same. Raises one of `ODD` for what is no certificate."""
    out = [] if data.get("verdict") == "passed" else [f"its verdict was {data.get('verdict')!r:.100}"]
    out += contradictions(data)
    if not any(x["checks"] for n, x in data["levels"].items() if n != "plan") and data["levels"]:
        out.append(f"it compared {SHAPES_ALONE}: verify again, up to bytes at least")
    return out


def contradictions(data: Mapping[str, Any]) -> list[str]:
    """Verdicts that do not follow from the numbers beside them, and checks that judge nothing: zoo writes none, so somebody edited
    the file. Raises as `_doubts`."""
    out, levels = [], []
    out += [f"{n:.100}: is no level of a comparison" for n in data["levels"] if n not in LEVELS]
    for name, was in data["levels"].items():
        if (n := len(was["checks"])) > MAX_CHECKS:
            raise ValueError(f"level {name!r:.100} has {n:,} checks")
        level = Level(name, [Check.from_json(c) for c in was["checks"]])
        levels.append(level)
        marks = [c["passed"] for c in was["checks"]]
        # Numbers are kept to six digits: what failed by less looks equal to its bound, so only "passed" is doubted.
        for c, marked in zip(level.checks, marks, strict=True):
            if marked and not c.passed:
                beyond = f"{c.value:g} is not {'>=' if c.at_least else '<='} {c.bound:g}"
                out.append(f"{name}: {c.name!r:.100} is marked passed, but {c.blind or beyond}")
        if level.checks and not any(c.name.startswith(limits.FIRST.get(name, ())) for c in level.checks):
            out.append(f"{name}: it has no check of {' or '.join(limits.FIRST.get(name, ('anything',)))}")
        largest = was["figures"].get("largest_logit") if name == "logits" else None
        if largest is not None and any(c.scale > max(1.0, float(largest)) * (1 + 1e-5) for c in level.checks):
            out.append(
                f"{name}: its checks are of logits larger than {float(largest):g}, which was the largest"
            )
        follows = "skipped" if not marks else "passed" if all(marks) else "failed"
        if was["verdict"] != follows:
            out.append(f"{name}: its verdict is {was['verdict']!r}, but that of its checks is {follows!r}")
    if not levels:
        return ["it has no levels: nothing was compared"]
    out += _without_means(data, {x.name for x in levels if x.checks})
    whole = Certificate(
        data["canonical"], data["source"], data["rules"], data["oracle"], data["dtype"], levels,
        not_checked=data["not_checked"], faults=data["faults"],
    )  # fmt: skip
    bad = not whole.passed or any(x["verdict"] == "failed" for x in data["levels"].values())
    if data.get("verdict") == "passed" and bad:
        why = NOT_COMPARED if whole.values_unseen else "its levels or seeded faults say 'failed'"
        out.append(f"its verdict is 'passed', but {why}")
    return out


def refuse_list(files: Collection[str], who: str) -> None:
    """Raises ZooError where a certificate lists more files than a folder may hold, or one under several names: each is looked up, and
    hashed as often as it is named."""
    if len(files) > MAX_FILES:
        raise ZooError(f"{who}: its certificate lists {len(files):,} files (limit {MAX_FILES:,}): refused")
    if odd := next((n for n in files if Path(n).as_posix() != n), None):
        raise ZooError(
            f"{who}: its certificate names the file {odd!r:.100}, which zoo does not spell so: refused"
        )


def _without_means(data: Mapping[str, Any], judged: set[str]) -> list[str]:
    """What a certificate says was judged, although by its own words there was nothing to judge it by."""
    out = []
    if data["dtype"] not in DTYPES:
        out.append(f"it was computed in {data['dtype']!r:.40}, which is none of {', '.join(DTYPES)}")
    if (kind := data["oracle"].get("kind")) in (None, "none") and not judged.isdisjoint(NUMERIC):
        out.append(f"numbers were compared, but its oracle is {kind!r}")
    if "bytes" in judged and not data["source"]:
        out.append("bytes were compared, but it names no source")
    if (faults := data["faults"]) and not 0 < faults["applicable"] == len(faults["results"]):
        out.append(
            f"its self-test injected {faults['applicable']} faults and tells of {len(faults['results'])}"
        )
    if not all(isinstance(text, str) for text in data["not_checked"]) or isinstance(data["not_checked"], str):
        raise ValueError("not_checked should be a list of texts")
    return out


def _changed(root: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    out = []
    refuse_list(files, str(root))
    for name, was in files.items():
        if leads_out(name):
            raise ZooError(
                f"{root}: its certificate names the file {name!r:.100}, which is outside: not opened"
            )
        path = root / name
        if not is_there(root, name):
            out.append(f"{name}: gone")
            continue
        inside(root, name, f"{root}: its certificate")
        if path.stat().st_size != was["bytes"]:
            out.append(f"{name}: {path.stat().st_size:,} bytes, was {was['bytes']:,}")
        elif sha256(path) != was["sha256"]:
            out.append(f"{name}: content changed")
    return out


def is_there(root: Path, name: str) -> bool:
    """Whether a folder has a file that somebody's list names."""
    try:
        return (root / name).is_file()
    except (OSError, ValueError):  # a name longer than names can be
        return False


def _rules_changed(rules: Mapping[str, Any]) -> list[str]:
    from zoo import families

    try:
        now = families.get(rules["family"]).rules[rules["naming"]].version
    except (ZooError, KeyError):
        return [f"rules: family {rules.get('family')!r} ({rules.get('naming')}) is not there any more"]
    was = rules["version"]
    return [] if now == was else [f"rules of {rules['family']} ({rules['naming']}): version {now}, was {was}"]
