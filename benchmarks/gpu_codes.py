"""One product with codes at a time, at released shapes, as `zoo.kernels.codes` or `stream` makes it and without them.

    python benchmarks/gpu_codes.py [--schemes NAME ...] [--out FILE]

Each is replayed in a CUDA graph over copies of the weight of more than a GPU's cache. Without: by arithmetic of fp32 for one
row (tiles widened one by one for experts), the weight expanded to bf16 for several. "of copy" is the bytes of codes and scales
over the time over what a device-to-device copy moves in the same run. Experts: those of a token, or all that tokens choose,
sorting and summing included. "bf16 ms": the same of a plain weight. A scheme with a star has its columns in groups of an order of their
own. Exit code 2 if there is no GPU.
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
] + [
    (what, scheme, n, k, t)
    for scheme in ("nvfp4", "int8-channel", "fp8-block-1x32", "gptq8-group128", "mlx8-group64", "gptq4-group128*")
    for what, n, k in (("8B gate_up", 28672, 4096), ("8B down", 4096, 14336), ("8B qkv", 6144, 4096))
    for t in (1, 16, 2048)
]  # fmt: skip
# (what, scheme, experts, d, d_ff, top_k, tokens)
EXPERTS = [
    (what, scheme, n, d, f, top_k, t)
    for what, scheme, n, d, f, top_k in (
        ("Qwen3-30B-A3B", "fp8-block", 128, 2048, 768, 8),
        ("Qwen3-30B-A3B", "int4-group128", 128, 2048, 768, 8),
        ("Qwen3-30B-A3B", "nvfp4", 128, 2048, 768, 8),
        ("Qwen3-30B-A3B", "int8-channel", 128, 2048, 768, 8),
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


def stored(scheme: str, parts: tuple[int, ...], k: int, *lead: int) -> tuple[Any, int]:
    """A random weight as kernels read it, and the bytes that it is released with."""
    import torch

    from zoo.kernels import weights

    if scheme == "bf16":
        plain = torch.randn(*lead, sum(parts), k, dtype=torch.bfloat16) / 10
        return weights.plain(plain), plain.nbytes
    c = components(scheme, parts, k, *lead)
    return weights.quantised(scheme.rstrip("*"), c, parts), sum(x.nbytes for x in c.values())


def product(scheme: str, n: int, k: int, t: int) -> tuple[list[Callable[[], Any]], float]:
    """Runs of x [t, k] times weights [n, k], and the bytes of one."""
    import torch
    from torch.nn import functional as F

    from zoo.kernels import linear, weights
    from zoo.spec import MLP

    first, size = stored(scheme, (n,), k)
    made = [first, *(stored(scheme, (n,), k)[0] for _ in range(max(1, min(24, int(ENOUGH / size)))))]
    x, spec = torch.randn(t, k, dtype=torch.bfloat16), MLP(n // 2)

    def run(w: Any) -> Any:
        if t == 1 and n > 2 * k:
            return linear.gated_linear(x, w, spec)
        if linear.few_rows(x, w):
            return linear.linear(x, w)
        dense = w.codes if scheme == "bf16" else weights.laid_out(w, x.dtype)
        return F.linear(weights.ordered(x, w), dense)

    return [lambda w=w: run(w) for w in made], size


def experts(scheme: str, n: int, d: int, f: int, top_k: int, t: int) -> tuple[list[Callable[[], Any]], float]:
    """Runs of t tokens by experts, and the bytes of those that one token chooses."""
    import torch

    from zoo.kernels import experts as kernels
    from zoo.spec import MLP

    made = [(stored(scheme, (f, f), d, n), stored(scheme, (d,), f, n)) for _ in range(2)]
    size = sum(nbytes for _, nbytes in made[0]) * top_k / n
    x, shares = torch.randn(t, d, dtype=torch.bfloat16), torch.rand(t, top_k, dtype=torch.bfloat16)
    runs = []
    for i in range(12 if t <= 16 else 4):
        chosen = torch.stack([torch.randperm(n)[:top_k] for _ in range(t)]).int()
        (up, _), (down, _) = made[i % 2]
        runs.append(
            lambda chosen=chosen, ab=(up, down): kernels.experts(x, chosen, shares, *ab, MLP(f))  # type: ignore[misc]
        )
    return runs, size


def row(
    what: str, made: tuple[list[Callable[[], Any]], float], few: bool, t: int, copy: float
) -> dict[str, Any]:
    """`few`: whether `zoo.kernels.codes` has a part in it."""
    from zoo.kernels import codes, stream

    runs, size = made
    out: dict[str, Any] = {"what": what, "rows": t}
    own = codes.serves, codes.pays, stream.serves, stream.serves_experts
    if few:
        try:
            codes.serves = codes.pays = lambda x, w: False
            stream.serves = stream.serves_experts = lambda *_: False
            before = runs[0]().float()
            out["without ms"] = replayed_ms(runs)
        finally:
            codes.serves, codes.pays, stream.serves, stream.serves_experts = own
        after = runs[0]().float()
        out["differ by"] = float((after - before).norm() / before.norm())
    out["ms"] = replayed_ms(runs)
    if t == 1:
        for key in ("without ms", "ms"):
            out["of copy" + ", without" * (key != "ms")] = size / out[key] / 1e9 / copy
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu-codes.json")
    parser.add_argument("--schemes", nargs="+", help="these alone")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu_codes.py needs a CUDA GPU; torch sees none here.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {**versions("gpu_codes.py"), "copy TB/s": copy_bandwidth(), "rows": []}
    free()
    plain: dict[tuple[Any, ...], float] = {}
    with torch.device("cuda"):
        for make, cases, few in ((product, PRODUCTS, 16), (experts, EXPERTS, 1 << 20)):
            for what, scheme, *sizes in cases:
                if args.schemes and scheme not in args.schemes:
                    continue
                name = f"{what} {scheme} {sizes[0]} x {sizes[1]}"
                if make is experts:
                    name = f"{what} {scheme}, {sizes[3]} of {sizes[0]} experts of {sizes[2]} x {sizes[1]}"
                t = sizes[-1]
                r = row(name, make(scheme, *sizes), t <= few, t, result["copy TB/s"])
                free()
                if (shape := (make, *sizes)) not in plain:
                    plain[shape] = replayed_ms(make("bf16", *sizes)[0])
                    free()
                result["rows"].append(r | {"bf16 ms": plain[shape]})
                print(
                    {k: round(v, 4) if isinstance(v, float) else v for k, v in result["rows"][-1].items()},
                    flush=True,
                )
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
