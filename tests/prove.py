"""Proves every family against upstream, and writes what came of it: docs/families.md and manifests/proofs.json.

    python tests/prove.py [VARIANT ...] [--jobs 2]

For each small checkpoint of `tiny`: saved by upstream's class with every parameter perturbed, converted, verified
at all levels (fp32, CPU), exported, and compared with the source to the byte. The rules' version is noted: a test
fails when a family's rules have changed since.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PROOFS, TABLE = ROOT / "manifests" / "proofs.json", ROOT / "docs" / "families.md"
# Releases whose real weights were compared with upstream, and how anyone can do it again.
WEIGHTS = {"smollm2-135m": "make demo"}

HEAD = """# Families

Written by `make proofs`. Each line is a small random checkpoint of a family: saved by upstream's own class
(transformers {upstream}) with every parameter perturbed and constants away from their defaults, converted, and compared
in fp32 on a CPU: logits with upstream's, cached decoding with uncached, the exported release with the source.
The bound on logits is the larger of 5e-5 and twice what upstream's own two attentions differ by, measured in
the same run. "Faults caught" is the verifier's own test: of the mistakes in its catalogue that the architecture
allows (see [verification](verification.md#seeded-faults)), how many it saw when they were made on purpose.

What it does not show: that a release's real weights convert (their names, shapes and parameter counts are held to the
release's config by other tests), and anything about lengths beyond those of the checkpoints. `zoo verify` shows
it for the release at hand.

| family | releases | checkpoint | upstream class | max logit error | bound | cached vs uncached | greedy tokens | round trip | faults caught |
|---|---|---|---|---|---|---|---|---|---|
"""
NOT_UPSTREAM = """
**Without upstream.** {names}: transformers has no implementation. The decoder and the rules are held to a second
implementation, written for the tests from the vendor's serving code; that shows that both read it alike, not that the
reading is right.
"""


def prove(name: str) -> dict[str, Any]:
    """What one checkpoint shows."""
    import tiny
    import torch

    import zoo
    from zoo import families

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
    checks = {c.name: c for level in certificate.levels for c in level.checks}
    logits = checks["|logit error| max"]
    cached = next((c for n, c in checks.items() if n.startswith("cached against uncached")), None)
    greedy = next((c for n, c in checks.items() if n.startswith("greedy tokens")), None)
    family = certificate.canonical["family"]
    return {
        "variant": name,
        "family": family,
        "rules": families.get(family).rules["hf"].version,
        "class": tiny.VARIANTS[name].architecture,
        "logits": logits.value,
        "bound": logits.bound,
        "cached": cached.value if cached else None,
        "greedy": "equal" if greedy and greedy.value == 0 else "differ" if greedy else "not compared",
        "round_trip": same,
        "faults": certificate.faults["score"] if certificate.faults else "",
        "passed": certificate.passed and same,
        "failed": [c.name for c in checks.values() if not c.passed],
    }


def table(results: Iterable[dict[str, Any]]) -> str:
    import transformers

    from zoo import families, manifest

    releases: dict[str, int] = {}
    for m in manifest.load_all():
        releases[m.family] = releases.get(m.family, 0) + 1
    results = sorted(results, key=lambda r: (r["family"], r["variant"]))
    lines = [HEAD.format(upstream=transformers.__version__)]
    before = None
    for r in results:
        first = r["family"] != before
        before = r["family"]
        lines.append(
            f"| {r['family'] if first else ''} | {releases.get(r['family'], 0) if first else ''} | {r['variant']} "
            f"| {r['class']} | {r['logits']:.1e} | {r['bound']:.1e} "
            f"| {'' if r['cached'] is None else format(r['cached'], '.1e')} | {r['greedy']} "
            f"| {'to the byte' if r['round_trip'] else '**differs**'} | {r['faults']}{'' if r['passed'] else ' **failed**'} |\n"
        )
    missing = sorted(set(families.families()) - {r["family"] for r in results})
    if missing:
        lines.append(NOT_UPSTREAM.format(names=", ".join(missing)))
    lines.append(
        "\n**With real weights.** " + "; ".join(f"{n}: `{how}`" for n, how in WEIGHTS.items()) + ".\n"
    )
    return "".join(lines)


def proofs(results: Iterable[dict[str, Any]]) -> str:
    results = list(results)
    proven = sorted({r["family"] for r in results} - {r["family"] for r in results if not r["passed"]})
    rules = {r["family"]: r["rules"] for r in results}
    found = {
        "about": {
            "written by": "make proofs",
            "see": "docs/families.md",
            "rules": "the hash of a family's rules then",
        },
        "families": dict.fromkeys(proven, "rules"),
        "releases": dict.fromkeys(WEIGHTS, "weights"),
        "rules": {name: rules[name] for name in proven},
    }
    return json.dumps(found, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", help="only these, and write nothing")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    import tiny

    results = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for r in pool.map(prove, args.variants or sorted(tiny.VARIANTS)):
            results.append(r)
            why = f"  FAILED: {', '.join(r['failed']) or 'round trip'}" if not r["passed"] else ""
            print(f"{r['variant']:28} logits {r['logits']:.1e} (at most {r['bound']:.1e}){why}", flush=True)
    if not args.variants:
        PROOFS.write_text(proofs(results), encoding="utf-8")
        TABLE.write_text(table(results), encoding="utf-8")
    if failed := [r["variant"] for r in results if not r["passed"]]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
