"""One product with codes at a time, at released shapes, as `zoo.kernels.codes` or `quads` makes it and without them.

    python benchmarks/gpu_codes.py [--out FILE]

Each is replayed in a CUDA graph over copies of the weight of more than a GPU's cache. Without: by arithmetic of fp32 for one
row (tiles widened one by one for experts), the weight expanded to bf16 for several. "of copy" is the bytes of codes and scales
over the time over what a device-to-device copy moves in the same run. Experts: those of a token, or all that tokens choose,
sorting and summing included. Exit code 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import copy_bandwidth, free, median_ms, versions
from random_codes import components

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# (what, scheme, rows, columns, rows of x); gated where there is one row of gate and up.
PRODUCTS = [
    (what, scheme, n, k, t)
    for scheme in ("fp8-channel", "int4-group128", "awq4-group128")
    for what, n, k in (("8B gate_up", 28672, 4096), ("8B down", 4096, 14336), ("8B qkv", 6144, 4096), ("8B o", 4096, 4096))
    for t in (1, 16)
]  # fmt: skip
# (what, scheme, experts, d, d_ff, top_k, tokens)
EXPERTS = [
    (what, scheme, n, d, f, top_k, t)
    for what, scheme, n, d, f, top_k in (
        ("Qwen3-30B-A3B", "fp8-block", 128, 2048, 768, 8),
        ("Qwen3-30B-A3B", "int4-group128", 128, 2048, 768, 8),
        ("gpt-oss-20b", "mxfp4", 32, 2880, 2880, 4),
    )
    for t in (1, 16, 2048)
]  # fmt: skip
ENOUGH = 400e6  # bytes of weights, of which the cache holds little


def replayed_ms(runs: list[Callable[[], object]]) -> float:
    """Milliseconds of one of the runs, one after the other in a graph: median of replays."""
    import torch

    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return median_ms(graph.replay, 5) / len(runs)


def product(scheme: str, n: int, k: int, t: int) -> tuple[list[Callable[[], Any]], float]:
    """Runs of x [t, k] times weights [n, k], and the bytes of one."""
    import torch
    from torch.nn import functional as F

    from zoo.kernels import linear, weights
    from zoo.spec import MLP

    first = components(scheme, (n,), k)
    size = sum(c.nbytes for c in first.values())
    more = [components(scheme, (n,), k) for _ in range(max(1, min(24, int(ENOUGH / size))))]
    stored = [weights.quantised(scheme, c, (n,)) for c in (first, *more)]
    x, spec = torch.randn(t, k, dtype=torch.bfloat16), MLP(n // 2)

    def run(w: Any) -> Any:
        if t == 1 and n > 2 * k:
            return linear.gated_linear(x, w, spec)
        if linear.few_rows(x, w):
            return linear.linear(x, w)
        return F.linear(x, weights.expanded(w, x.dtype))

    return [lambda w=w: run(w) for w in stored], size


def experts(scheme: str, n: int, d: int, f: int, top_k: int, t: int) -> tuple[list[Callable[[], Any]], float]:
    """Runs of t tokens by experts, and the bytes of those that one token chooses."""
    import torch

    from zoo.kernels import experts as kernels
    from zoo.kernels import weights
    from zoo.spec import MLP

    made = [(components(scheme, (f, f), d, n), components(scheme, (d,), f, n)) for _ in range(2)]
    size = sum(c.nbytes for part in made[0] for c in part.values()) * top_k / n
    stored = [(weights.quantised(scheme, a, (f, f)), weights.quantised(scheme, b, (d,))) for a, b in made]
    x, shares = torch.randn(t, d, dtype=torch.bfloat16), torch.rand(t, top_k, dtype=torch.bfloat16)
    runs = []
    for i in range(12 if t <= 16 else 4):
        chosen = torch.stack([torch.randperm(n)[:top_k] for _ in range(t)]).int()
        runs.append(
            lambda chosen=chosen, ab=stored[i % 2]: kernels.experts(x, chosen, shares, *ab, MLP(f))  # type: ignore[misc]
        )
    return runs, size


def row(what: str, made: tuple[list[Callable[[], Any]], float], t: int, copy: float) -> dict[str, Any]:
    from zoo.kernels import codes, quads

    runs, size = made
    out: dict[str, Any] = {"what": what, "rows": t}
    own = codes.serves, codes.pays, quads.serves
    try:
        codes.serves = codes.pays = quads.serves = lambda x, w: False
        before = runs[0]().float()
        out["without ms"] = replayed_ms(runs)
    finally:
        codes.serves, codes.pays, quads.serves = own
    after = runs[0]().float()
    out["ms"] = replayed_ms(runs)
    out["differ by"] = float((after - before).norm() / before.norm())
    if t == 1:
        out["of copy, without"], out["of copy"] = (
            size / out[key] / 1e9 / copy for key in ("without ms", "ms")
        )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu-codes.json")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu_codes.py needs a CUDA GPU; torch sees none here.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {**versions("gpu_codes.py"), "copy TB/s": copy_bandwidth(), "rows": []}
    free()
    with torch.device("cuda"):
        for what, scheme, n, k, t in PRODUCTS:
            made = product(scheme, n, k, t)
            result["rows"].append(row(f"{what} {scheme} {n} x {k}", made, t, result["copy TB/s"]))
        for what, scheme, n, d, f, top_k, t in EXPERTS:
            made = experts(scheme, n, d, f, top_k, t)
            name = f"{what} {scheme}, {top_k} of {n} experts of {f} x {d}"
            result["rows"].append(row(name, made, t, result["copy TB/s"]))
    for r in result["rows"]:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()}, flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
