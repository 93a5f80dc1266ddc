"""Parity on a GPU: every tiny family in fp32 and bf16, by the kernels, against transformers.

    python benchmarks/gpu_parity.py [family ...] [--jobs 12] [--recorded DIR] [--json FILE]
    python benchmarks/gpu_parity.py --record DIR

For each family: one pass in fp32 (tf32 off), the same tokens decoded one by one with a static cache, and as
a captured CUDA graph; all against transformers' fp32 logits, to 1e-4. A LongRoPE's text that passes the original context is
read past it in one piece, and decoded from there (`from`): beyond it all angles are others, and a cache cannot grow into it.
The same run twice, and a captured pass, must be equal to the bit. In bf16, medians over tokens must lie within transformers'
own spread (eager, sdpa, fp32). Needs tests/ beside it, transformers, and a CUDA device. Exit code 1 if any family fails.
transformers computes on the CPU: there, or beforehand on another machine (`--record`; another version may be there).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gpu import versions

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
VERSION = "transformers.txt"  # in a recording: of which transformers it is
TOLERANCE = 1e-4
# Multiplies the rounding of its first layer by 15; upstream in fp32 is 4e-5 away from itself in fp64.
AMPLIFIED = {"qwen3_next": 2e-4}


def record(folder: Path) -> None:
    """Write each family's tensors and transformers' logits to `folder`."""
    import tiny
    import torch
    import transformers
    from built import built

    folder.mkdir(parents=True, exist_ok=True)
    (folder / VERSION).write_text(transformers.__version__)
    for name in sorted(tiny.VARIANTS):
        both = {}
        for dtype in ("float32", "bfloat16"):
            b = built(name, dtype)
            both[dtype] = {
                "spec": b.spec.to_dict(),
                "tensors": b.tensors,
                "ids": b.ids,
                "upstream": b.upstream,
            }
        torch.save(both, folder / f"{name}.pt")


def check(name: str, recorded: Path | None) -> dict[str, Any]:
    """What a family's logits differ by, and what failed."""
    import torch
    from built import built as made
    from built import decoder

    from zoo.model.graph import Pass, Step
    from zoo.model.rope import far_from
    from zoo.spec import Spec

    def built(name: str, dtype: str = "float32") -> Any:
        if recorded is None:
            return made(name, dtype)
        b = torch.load(recorded / f"{name}.pt", weights_only=True)[dtype]
        return SimpleNamespace(**b | {"spec": Spec.from_dict(b["spec"])})

    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    out: dict[str, Any] = {"family": name, "failed": []}
    tolerance = AMPLIFIED.get(name, TOLERANCE)

    def expect(what: str, ok: bool) -> None:
        if not ok:
            out["failed"].append(what)

    def worst(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.float().cpu() - b.float().cpu()).abs().max().item()

    b = built(name)
    model = decoder(b.spec, b.tensors).cuda()
    ids = b.ids.cuda()
    T = ids.shape[1]
    border = max((n for n in far_from(b.spec) if n < T), default=0)
    cut = max(T - 8, border + 1)
    if border:
        out["from"] = cut
    logits = model(ids)
    out["fp32 one pass"] = worst(logits, b.upstream["eager"])
    expect("fp32 one pass", out["fp32 one pass"] <= tolerance)
    expect("the same run twice", torch.equal(logits, model(ids)))
    graph = model.captured(*ids.shape)
    expect("the pass is captured", isinstance(graph, Pass))
    graph(ids.flip(-1))
    expect("a captured pass", torch.equal(logits, graph(ids)))
    cache = model.cache(len(ids), T + 3)
    pieces = [model(ids[:, :cut], cache)] + [model(ids[:, t : t + 1], cache) for t in range(cut, T)]
    out["fp32 cached"] = worst(torch.cat(pieces, 1), b.upstream["eager"])
    expect("fp32 cached", out["fp32 cached"] <= tolerance)
    one = ids[:1]
    cache = model.cache(1, T + 3)
    pieces = [model(one[:, :cut], cache)]
    step = Step(model, cache, 1)
    pieces += [step(one[:, t])[:, None].clone() for t in range(cut, T)]
    out["fp32 graph"] = worst(torch.cat(pieces, 1), b.upstream["eager"][:1])
    expect("fp32 graph", out["fp32 graph"] <= tolerance)

    b = built(name, "bfloat16")
    model = decoder(b.spec, b.tensors).cuda()
    logits = model(b.ids.cuda())

    def median(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.float().cpu() - b.float().cpu()).abs().amax(-1).flatten().quantile(0.5).item()

    eager, sdpa, exact = (b.upstream[k] for k in ("eager", "sdpa", "fp32"))
    out["bf16 median"] = median(logits, exact)
    out["bf16 upstream"] = max(median(eager, exact), median(sdpa, exact))
    expect("bf16 within upstream's spread", out["bf16 median"] <= 1.25 * out["bf16 upstream"])
    expect("bf16 the same run twice", torch.equal(logits, model(b.ids.cuda())))
    cache = model.cache(len(b.ids), T + 3)
    ids = b.ids.cuda()
    pieces = [model(ids[:, :cut], cache)] + [model(ids[:, t : t + 1], cache) for t in range(cut, T)]
    out["bf16 cached median"] = median(torch.cat(pieces, 1), exact)
    expect("bf16 cached", out["bf16 cached median"] <= 1.25 * out["bf16 upstream"])
    return out


def guarded(name: str, recorded: Path | None) -> dict[str, Any]:
    try:
        return check(name, recorded)
    except Exception as e:
        return {
            "family": name,
            "failed": [f"{type(e).__name__}: {str(e)[-300:]}", traceback.format_exc()[-700:]],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", nargs="*")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--record", type=Path, help="only compute transformers' side, and keep it there")
    parser.add_argument("--recorded", type=Path, help="where it was kept")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.record:
        record(args.record)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu_parity.py needs a CUDA GPU; torch sees none here.", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.recorded:
        known = sorted(p.stem for p in args.recorded.glob("*.pt"))
    else:
        import tiny

        known = sorted(tiny.VARIANTS)
    names = args.family or known
    start, rows = time.time(), []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        for row in pool.map(guarded, names, itertools.repeat(args.recorded)):
            rows.append(row)
            numbers = "  ".join(f"{k} {v:.1e}" for k, v in row.items() if isinstance(v, float))
            numbers += f"  decoded from {row['from']} on" if "from" in row else ""
            print(f"{'FAIL' if row['failed'] else 'ok':5}{row['family']:22}{numbers}", flush=True)
            for failure in row["failed"]:
                print(f"     {failure}", flush=True)
    bad = sum(bool(r["failed"]) for r in rows)
    print(f"{len(rows) - bad} of {len(rows)} families agree ({time.time() - start:.0f} s)")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        about = versions("gpu_parity.py")
        if args.recorded:
            about["transformers"] = (args.recorded / VERSION).read_text()
        args.json.write_text(json.dumps({**about, "families": rows}, indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
