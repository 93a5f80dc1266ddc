"""Proves families against upstream, and writes what came of it in their own rows, and in no others'.

    python tests/prove.py NAME [NAME ...]     families, or variants of them; `make prove FAMILY=NAME`
    python tests/prove.py                     all of them: `make proofs`
    python tests/prove.py --releases NAME     after adding releases: only their configs, where the proof is of what the family is
    python tests/prove.py --stamp             after changes that leave every family as it was proven: `make stamp`

Each variant of a family's case (`tests/families/<name>.py`) is saved by upstream's class with every parameter perturbed,
converted, verified at all levels (fp32, CPU) with seeded faults, which must move numbers, exported, and compared with the
source to the byte; the main variant is also verified in bf16, and layer by layer (`--stream`) to the same figures. Each config of a
release is counted with upstream's class on the meta device. Then the tests run that `make test` leaves to this (marked `proof`):
that the test models show what they should, and what is asked of every variant and every config. What fails is printed with the verifier's diagnosis.

Written, where all of a family passes: its rows of docs/families.md (and there, what docs/gallery.toml says is missing), its versions in manifests/proofs.json (see
`zoo.proof`), its counts in tests/data/tensors/counts.json. A variant alone writes nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROOFS, TABLE = ROOT / "manifests" / "proofs.json", ROOT / "docs" / "families.md"
COUNTS = ROOT / "tests" / "data" / "tensors" / "counts.json"
GALLERY = ROOT / "docs" / "gallery.toml"
# Releases whose real weights were compared with upstream, and how anyone can do it again.
WEIGHTS = {"smollm2-135m": "make demo"}

HEAD = """# Families

Written by `make prove FAMILY=NAME` and `make proofs`. Each line is a small random checkpoint of a family: saved by upstream's own
class (transformers) with every parameter perturbed and constants away from their defaults, converted, and compared
in fp32 on a CPU: logits with upstream's, cached decoding with uncached, the exported release with the source.
The bound on logits is the larger of 5e-5 and twice what upstream's own two attentions differ by, measured in
the same run. "Faults caught" is the verifier's own test: of the mistakes in its catalogue that the architecture
allows (see [verification](verification.md#seeded-faults)), how many it saw when they were made on purpose.

What it does not show: that a release's real weights convert (their names, shapes and parameter counts are held to the
release's config by other tests), and anything about lengths beyond those of the checkpoints. `zoo verify` shows
it for the release at hand.

| family | releases | checkpoint | upstream class | logits | cached decoding | greedy tokens | round trip | faults caught |
|---|---|---|---|---|---|---|---|---|
"""
NOT_UPSTREAM = """
**Without upstream.** {names}: transformers has no implementation. The decoder and the rules are held to a second
implementation, written for the tests from the vendor's serving code; that shows that both read it alike, not that the
reading is right.
"""
OF_THE_GALLERY = """
## The LLM Architecture Gallery

Of the {all} models of the public [gallery]({source}), the newest of {date}, zoo has {have}; [gallery.toml](gallery.toml) says which
release each is. These it has not:

| model | date | why not |
|---|---|---|
"""


def prove(name: str) -> dict[str, Any]:
    """What one variant shows."""
    import tiny
    import torch
    from verified import faults_unseen, streams_alike

    import zoo

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        source, canon, back = (Path(tmp) / n for n in ("source", "canon", "back"))
        tiny.make(name, source)
        zoo.convert(source, canon)
        certificate = zoo.verify(canon, against=source, self_test=True)
        zoo.export(canon, back)
        same = all(
            (back / p.name).is_file() and (back / p.name).read_bytes() == p.read_bytes()
            for p in source.iterdir()
            if p.suffix in (".safetensors", ".json")
        )
        lacks = [] if same else ["round trip"]
        lacks += faults_unseen(certificate.faults) if certificate.faults else ["no faults were seeded"]
        if name in tiny.MAIN.values():
            if not streams_alike(canon, zoo.verify(canon, against=source, level="logits", write=False)):
                lacks.append("streamed, it has other figures")
            tiny.make(name, source.with_name("bf16"), dtype="bfloat16")
            half = zoo.convert(source.with_name("bf16"), canon.with_name("bf16-canon"))
            if not zoo.verify(half, dtype="bf16", write=False).passed:
                lacks.append("bf16 lies outside upstream's own spread")
    checks = {c.name: c for level in certificate.levels for c in level.checks}
    cached = next((c for n, c in checks.items() if n.startswith("cached against uncached")), None)
    greedy = next((c for n, c in checks.items() if n.startswith("greedy tokens")), None)
    logits = checks.get("|logit error| max")

    def within(check: Any) -> str:
        return "not compared" if check is None else "within bound" if check.passed else "**beyond bound**"

    return {
        "variant": name,
        "family": tiny.VARIANTS[name].family,
        "passed": certificate.passed and not lacks,
        "figures": f"{logits.value:.1e} (at most {logits.bound:.1e})" if logits else "none",
        "failed": [c.name for c in checks.values() if not c.passed] + lacks,
        "diagnosis": certificate.diagnosis,
        "row": (
            f"| {name} | {tiny.VARIANTS[name].architecture} | {within(logits)} | {within(cached)} "
            f"| {'equal' if greedy and greedy.value == 0 else 'differ' if greedy else 'not compared'} "
            f"| {'to the byte' if same else '**differs**'} "
            f"| {certificate.faults['score'] if certificate.faults else ''} |\n"
        ),
    }


def unproven(families: list[str], jobs: int) -> list[str]:
    """Those of the families, of all if none is named, of which a test fails that `make test` leaves to this: see `is_proof`
    of zoo.testing.suite. Without names the kernels' are among them. pytest prints what failed."""
    where = [f"tests/test_families.py::Test_{name}" for name in families] or ["tests"]
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp) / "report.xml"
        how = f"-q -m proof -n {jobs} --dist loadgroup -p no:cacheprovider --junitxml".split()
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *where, *how, str(report)], cwd=ROOT
        ).returncode
        if code == pytest.ExitCode.OK:
            return []
        if code != pytest.ExitCode.TESTS_FAILED:
            sys.exit(f"pytest ended with {code}")
        bad = [c for c in ET.parse(report).iter("testcase") if {e.tag for e in c} & {"failure", "error"}]
    return [c.get("classname", "").rpartition(".Test_")[2] or c.get("name", "") for c in bad]


def count(family: str) -> tuple[dict[str, Any], list[str]]:
    """Upstream's count of every config of the family's releases, and where ours is another."""
    import tiny

    from zoo import families
    from zoo.layout import active_params, total_params
    from zoo.testing import full_size

    counts, wrong = {}, []
    for stem in full_size.stems().get(family, ()):
        config = full_size.read(stem)
        counts[stem] = theirs = full_size.upstream_count(tiny.CASES[family], config)
        spec = families.spec_of(config)
        buffers = full_size.buffers(spec)  # there; stored like parameters
        ours = {
            "total": total_params(spec) - buffers,
            "active": active_params(spec) - buffers,
            "tied": spec.tied,
        }
        wrong += [
            f"{stem}: {k} is {v:,} here, {theirs[k]:,} upstream" for k, v in ours.items() if v != theirs[k]
        ]
    return counts, wrong


def rows_of(table: str) -> dict[str, list[str]]:
    """Family -> the lines of its variants, without their first two columns."""
    found: dict[str, list[str]] = {}
    name = ""
    proofs = table.partition("|---|")[2].partition("\n## ")[0]
    for line in re.findall(r"^\|(.*\|)$", proofs, re.M):
        first, _, rest = line.partition("|")
        name = first.strip() or name
        found.setdefault(name, []).append("|" + rest.partition("|")[2] + "\n")
    return found


def table(rows: dict[str, list[str]]) -> str:
    import tiny

    from zoo import manifest

    releases: dict[str, int] = {}
    for m in manifest.load_all():
        releases[m.family] = releases.get(m.family, 0) + 1
    out = [HEAD]
    for name in sorted(rows):
        for n, row in enumerate(sorted(rows[name])):
            out.append(f"| {name} | {releases.get(name, 0)} {row}" if n == 0 else f"|  |  {row}")
    if without := sorted(name for name, case in tiny.CASES.items() if case.without_upstream):
        out.append(NOT_UPSTREAM.format(names=", ".join(without)))
    weights = "; ".join(f"{n}: `{how}`" for n, how in WEIGHTS.items())
    return "".join([*out, f"\n**With real weights.** {weights}.\n", gallery()])


def gallery() -> str:
    """How much of the public gallery of architectures there is, and why the rest is not."""
    listed = tomllib.loads(GALLERY.read_text(encoding="utf-8"))
    models = listed["models"]
    missing = {name: model for name, model in models.items() if "missing" in model}
    head = OF_THE_GALLERY.format(
        all=len(models),
        have=len(models) - len(missing),
        source=listed["source"],
        date=max(model["date"] for model in models.values()),
    )
    return head + "".join(f"| {n} | {m['date']} | {m['missing']} |\n" for n, m in missing.items())


def versions(family: str) -> tuple[str, str]:
    """The family's version over its releases, and over its variants; see `zoo.proof`."""
    import tiny

    from zoo import families, proof
    from zoo.testing.build import read_config
    from zoo.testing.built import checkpoint

    case, of = tiny.CASES[family], families.get(family)
    specs = [families.spec_of(read_config(checkpoint(case, v))) for v in case.variants]
    return proof.version(of, proof.release_specs(of)), proof.version(of, specs)


def write(results: dict[str, list[dict[str, Any]]], counts: dict[str, Any]) -> None:
    """The rows, versions and counts of these families, all of whose variants passed."""
    import tiny

    rows = {n: r for n, r in rows_of(TABLE.read_text(encoding="utf-8")).items() if n in tiny.CASES}
    proofs = json.loads(PROOFS.read_text(encoding="utf-8")) if PROOFS.is_file() else {}
    of = {kind: dict(proofs.get(kind, {})) for kind in ("families", "variants")}
    for name, proven in results.items():
        rows[name] = [r["row"] for r in proven]
        of["families"][name], of["variants"][name] = versions(name)
    TABLE.write_text(table(rows), encoding="utf-8")
    stamp({kind: {n: v for n, v in sorted(of[kind].items()) if n in tiny.CASES} for kind in of})
    whole = json.loads(COUNTS.read_text(encoding="utf-8")) | counts
    COUNTS.write_text(json.dumps(dict(sorted(whole.items())), indent=1) + "\n", encoding="utf-8")


def stamp(known: dict[str, dict[str, str]]) -> list[str]:
    """Writes what was proven, by families and by variants, with the version of the sources if all of it is so today; else
    the families that are something else now."""
    from zoo import proof

    changed = [n for n, was in known["families"].items() if versions(n) != (was, known["variants"][n])]
    found = {
        "about": {
            "written by": "make prove FAMILY=NAME, make proofs",
            "see": "zoo/proof.py, docs/families.md",
        },
        **known,
        "releases": dict.fromkeys(WEIGHTS, "weights"),
        # Says "all as it was": only where that is so of every family, this run's or not.
        "sources": "" if changed else proof.sources_version(),
    }
    PROOFS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return changed


def as_proven(family: str) -> list[dict[str, Any]]:
    """The rows of a family whose rules and variants are those that were proven."""
    proofs = json.loads(PROOFS.read_text(encoding="utf-8"))
    if proofs["variants"].get(family) != versions(family)[1]:
        sys.exit(f"{family}: its rules or variants have changed since they were proven: prove it")
    rows = rows_of(TABLE.read_text(encoding="utf-8"))[family]
    return [{"row": row, "variant": row.split("|")[1].strip()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="families or variants; all families if none")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--releases",
        action="store_true",
        help="count the releases' configs and write the rows; run no variant, which have been proven as they are",
    )
    parser.add_argument(
        "--stamp",
        action="store_true",
        help="only say of which sources the proofs are, if every family is what it was when it was proven",
    )
    args = parser.parse_args()
    if args.stamp:
        proofs = json.loads(PROOFS.read_text(encoding="utf-8"))
        if changed := stamp({kind: proofs[kind] for kind in ("families", "variants")}):
            sys.exit(f"something else than what was proven, so prove them: {', '.join(changed)}")
        return
    import tiny

    provable = {n: [v.name for v in case.variants] for n, case in tiny.CASES.items() if case.variants}
    if unknown := [n for n in args.names if n not in provable and n not in tiny.VARIANTS]:
        sys.exit(
            f"no family or variant that upstream can run: {', '.join(unknown)}; known: {', '.join(provable)}"
        )
    whole = [n for n in (args.names or provable) if n in provable]
    alone = [n for n in args.names if n not in provable]
    failed, counts = [], {}
    results: dict[str, list[dict[str, Any]]] = {n: [] for n in whole}
    if args.releases:
        results, provable, alone = {n: as_proven(n) for n in whole}, {n: [] for n in whole}, []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for r in pool.map(prove, [v for n in whole for v in provable[n]] + alone):
            results.setdefault(r["family"], []).append(r)
            print(f"{r['variant']:28} logits {r['figures']}{'' if r['passed'] else '  FAILED'}", flush=True)
            if not r["passed"]:
                failed.append(r["variant"])
                print(f"  {', '.join(r['failed'])}\n  {json.dumps(r['diagnosis'], indent=2)}", flush=True)
    for name in whole:
        counted, wrong = count(name)
        counts |= counted
        print(f"{name:28} {len(counted)} configs counted{'' if not wrong else ':  DIFFER'}")
        for line in wrong:
            failed.append(name)
            print(f"  {line}")
    if whole:  # not for variants alone, of which nothing is written
        failed += unproven(whole if args.names else [], args.jobs)
    good = {
        n: results[n] for n in whole if n not in failed and not {r["variant"] for r in results[n]} & {*failed}
    }
    if good:
        stems = {s for n in good for s in count_stems(n)}
        write(good, {s: c for s, c in counts.items() if s in stems})
    if failed:
        sys.exit(f"failed, and nothing of their families written: {', '.join(dict.fromkeys(failed))}")


def count_stems(family: str) -> tuple[str, ...]:
    from zoo.testing import full_size

    return full_size.stems().get(family, ())


if __name__ == "__main__":
    main()
