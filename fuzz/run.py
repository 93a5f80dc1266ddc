"""Fuzz zoo's readers: `make fuzz SECONDS=600`, or `python fuzz/run.py --seconds 60 [--target header]`.

Mutations of valid inputs, without coverage: bytes flipped, cut, repeated and spliced, and values of JSON replaced by
those that have hurt. The counts go to benchmarks/results/fuzz.json; an input that fails is kept in fuzz/found/, to
become a test in tests/test_fuzz.py. Numbers are seeded: the same --seed tries the same inputs in the same order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from targets import TARGETS, judged, seeds

ROOT = Path(__file__).parent
SLOW = 5.0  # seconds for one input
ODD: list[Any] = [
    None, True, -1, 0, 2**63, 10**19, 1e308, float("inf"), float("nan"), "", "x" * 300, "../x", "\x1b]0;", [], [[]], {},
    {"a": 1}, [0] * 2000, "9" * 5000, "*", "\ud800",
]  # fmt: skip


def replaced(x: Any, rng: random.Random) -> Any:
    """A value of JSON with one of its parts replaced, left out or doubled."""
    if rng.random() < 0.15 or not isinstance(x, dict | list) or not x:
        return rng.choice(ODD)
    if isinstance(x, list):
        at = rng.randrange(len(x))
        return [*x[:at], replaced(x[at], rng), *x[at + rng.choice((0, 1, 1)) :]]
    key = rng.choice(list(x))
    out = dict(x)
    value = out.pop(key)
    if (chance := rng.random()) < 0.9:
        out[key if chance > 0.1 else rng.choice(("../x", "a" * 300, "9" * 5000, "w.0.*", ""))] = replaced(
            value, rng
        )
    return out


def mutated(data: bytes, rng: random.Random) -> bytes:
    if data[:1] in (b"{", b"[") and rng.random() < 0.7:
        lines = data.split(b"\n")  # a file each, where a target reads several
        at = rng.randrange(len(lines))
        try:
            x = json.loads(lines[at])
        except (ValueError, RecursionError):  # what a guided run has made of it
            x = None
        for _ in range(rng.randint(1, 4)):
            x = replaced(x, rng)
        lines[at] = json.dumps(x).encode("utf-8", "replace")
        return b"\n".join(lines)
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at, n = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 40))
        match rng.randrange(4):
            case 0:
                out[at : at + n] = rng.randbytes(n)
            case 1:
                del out[at : at + n]
            case 2:
                out[at:at] = bytes(out[at : at + n]) * rng.choice((1, 2, 50))
            case _:
                out[at : at + n] = rng.choice((b"\xff", b"\0", b"\x7f")) * n
    return bytes(out)


def fuzz(name: str, seconds: float, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed} {name}")
    corpus, executions, found = seeds(name), 0, []
    slowest = 0.0
    TARGETS[name](corpus[0])  # is read, or what is tried is a part of the reader
    for data in corpus:  # what they begin with is no failure, or all else is none either
        judged(name, data)
    start = time.monotonic()
    while not executions or time.monotonic() - start < seconds:
        data = mutated(rng.choice(corpus), rng)
        began = time.monotonic()
        try:
            judged(name, data)
            why = ""
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:200]
        took = time.monotonic() - began
        slowest, executions = max(slowest, took), executions + 1
        if why or took > SLOW:
            kept = ROOT / "found" / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(data)
            found.append({"input": kept.name, "why": why or f"took {took:.1f} s"})
            if len(found) > 20:
                break
    return {"executions": executions, "slowest_s": round(slowest, 3), "found": found}


def command(doc: str | None, target: str, fuzz: Callable[[str, float, int], dict[str, Any]]) -> int:
    """The command line of a fuzzer, called `make TARGET`: `fuzz(name, seconds, seed)` runs one target, and says of it at least
    `executions` and `found`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="in all, shared by the targets")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="where the counts are written")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    results = {name: fuzz(name, args.seconds / len(names), args.seed) for name in names}
    said = {
        "command": f"make {target} SECONDS={args.seconds:g}", "seed": args.seed,
        "executions": sum(r["executions"] for r in results.values()), "targets": results,
    }  # fmt: skip
    print(text := json.dumps(said, indent=1))
    if args.output:
        args.output.write_text(text + "\n")
    return int(any(r["found"] for r in results.values()))


if __name__ == "__main__":
    sys.exit(command(__doc__, "fuzz", fuzz))
