"""Verification on a GPU: every tiny variant, verified there and on the CPU, whole and streamed.

    python benchmarks/gpu_verify.py [variant ...] [--main] [--jobs 12] [--json FILE]
    python benchmarks/gpu_verify.py --speed llama-3.1-8b [--dtypes bf16 fp32] [--tmp DIR] [--json FILE]

For each variant: converted, then `zoo.verify` in fp32 on the CPU and on the GPU, in bf16 and streamed on the GPU. All must
pass. Then a norm's eps is forgotten in the copy (where that moves anything): both devices must call it wrong, in the same
layer. `--speed`: random weights of a released shape are written to disk and converted, and all levels are timed, hashes
and bytes included, files in the page cache. Needs tests/ beside it, transformers, and a CUDA device. Exit code 1 if anything fails, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from gpu import versions

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def failing(cert: Any) -> list[str]:
    checks = [
        f"{x.name}: {c.name} {c.value:.2g} > {c.bound:.2g}"
        for x in cert.levels
        for c in x.checks
        if not c.passed
    ]
    return checks or ([] if cert.passed else [f"verdict {cert.headline}; {cert.not_checked}"])


def margin(cert: Any) -> float:
    """The largest share of its bound that any figure of layers, logits or decode takes."""
    shares = [c.value / c.bound for x in cert.levels[2:] for c in x.checks if c.bound and not c.at_least]
    return max(shares, default=0.0)


def check(name: str) -> dict[str, Any]:
    import tiny
    import torch
    from verified import rewrite

    import zoo
    from zoo.verify.faults import CATALOGUE

    torch.set_num_threads(1)
    out: dict[str, Any] = {"variant": name, "failed": []}
    with tempfile.TemporaryDirectory() as holder:
        source = tiny.make(name, Path(holder) / "source")
        canon = zoo.convert(source, Path(holder) / "canon")
        runs: dict[str, dict[str, Any]] = {
            "cpu": {}, "cuda": {"device": "cuda"}, "cuda bf16": {"device": "cuda", "dtype": "bf16"},
            "cuda streamed": {"device": "cuda", "stream": True},
        }  # fmt: skip
        for what, how in runs.items():
            start = time.perf_counter()
            try:
                cert = zoo.verify(canon, write=False, **how)
            except Exception as e:
                out["failed"].append(f"{what}: {type(e).__name__}: {e}\n{traceback.format_exc()[-900:]}")
                continue
            out[what] = {"share of bound": margin(cert), "seconds": time.perf_counter() - start}
            out["failed"] += [f"{what}: {x}" for x in failing(cert)]
            if (
                cert.level("logits") is None
            ):  # upstream doesn't load it here: some classes need packages beside
                out.setdefault("not judged", {})[what] = cert.not_checked
        fault = CATALOGUE["norm_eps"]
        if not out["failed"] and "not judged" not in out and fault.sites(zoo.spec(canon)):
            wrong = rewrite(Path(shutil.copytree(canon, Path(holder) / "wrong")), fault.inject)
            found = {
                d: zoo.verify(wrong, source, level="logits", device=d, write=False) for d in ("cpu", "cuda")
            }
            where = {d: (c.passed, (c.diagnosis or {}).get("layer")) for d, c in found.items()}
            out["fault"] = {d: list(w) for d, w in where.items()}
            if where["cpu"] != where["cuda"]:
                out["failed"].append(f"norm_eps forgotten: (passed, layer) {where}")
    return out


def written(config: dict[str, Any], folder: Path) -> int:
    """A checkpoint of random weights, of the names and shapes of a release with this config, in bf16, experts of mxfp4 as such;
    its bytes."""
    import math

    import tiny
    import torch
    from safetensors.torch import save_file

    shapes = {n: t.shape if hasattr(t, "shape") else t[1] for n, t in tiny.released_tensors(config).items()}
    if (config.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        stacked = [n for n in shapes if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
        for name in stacked:
            n, columns, rows = shapes.pop(name)
            shapes |= {
                f"{name}_blocks": (n, rows, columns // 32, 16),
                f"{name}_scales": (n, rows, columns // 32),
            }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    pool = torch.randn(1 << 26).to(torch.bfloat16)
    codes = torch.randint(0, 256, (1 << 26,), dtype=torch.uint8)

    def values(n: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        numbers = math.prod(shape)
        if name.endswith("_scales"):  # with codes of 2.9 on average, weights of about the size below
            return torch.randint(118, 121, shape, dtype=torch.uint8)
        of = codes if name.endswith("_blocks") else pool
        repeats = -(-(numbers + 4096) // len(of))
        at = (n * 131) % 4096
        x = (of.repeat(repeats) if repeats > 1 else of)[at : at + numbers].view(shape)
        if of is codes:
            return x.clone()
        return (1 + 0.1 * x) if len(shape) == 1 else x * (0.7 / math.sqrt(shape[-1]))

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(math.prod(s) for s in shards[-1].values()) > 2 << 30:
            shards.append({})
        shards[-1][name] = tuple(shape)
    index = {}

    def one(k: int) -> int:
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {n: values(i, n, s) for i, (n, s) in enumerate(shards[k].items())}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shards[k], file))
        return (folder / file).stat().st_size

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        total = sum(threads.map(one, range(len(shards))))
    about = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(about))
    return total


def released_config(stem: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / "manifests" / "configs" / f"{stem}.config.json").read_text())
    return config


def speed(stem: str, dtypes: list[str], tmp: Path | None) -> list[dict[str, Any]]:
    """Seconds of all levels of a model of a release's shape, by dtype."""
    import zoo

    rows = []
    with tempfile.TemporaryDirectory(dir=tmp) as holder:
        start = time.perf_counter()
        size = written(released_config(stem), Path(holder) / "source")
        print(f"{stem}: {size / 1e9:.1f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        canon = zoo.convert(Path(holder) / "source", Path(holder) / "canon")
        print(f"converted in {time.perf_counter() - start:.0f} s", flush=True)
        for dtype in dtypes:
            cert = zoo.verify(
                canon, device="cuda", dtype=dtype, write=False, progress=lambda s: print(f"  {s}", flush=True)
            )
            rows.append({
                "model": stem, "bytes": size, "dtype": dtype, "verdict": cert.verdict, "seconds": cert.timing,
                "not passed": failing(cert), "not checked": cert.not_checked, "share of bound": margin(cert),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def guarded(name: str) -> dict[str, Any]:
    try:
        return check(name)
    except Exception as e:
        return {
            "variant": name,
            "failed": [f"{type(e).__name__}: {str(e)[-300:]}", traceback.format_exc()[-900:]],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("variant", nargs="*")
    parser.add_argument("--main", action="store_true", help="only the main variant of each family")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument(
        "--speed", metavar="STEM", help="a config in manifests/configs: time all levels of its shape"
    )
    parser.add_argument("--dtypes", nargs="*", default=["bf16", "fp32"])
    parser.add_argument("--tmp", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import tiny
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu_verify.py needs a CUDA GPU; torch sees none here.", file=sys.stderr)
        return 2
    if args.speed:
        rows = speed(args.speed, args.dtypes, args.tmp)
        if args.json:
            args.json.write_text(json.dumps({**versions("gpu_verify.py"), "speed": rows}, indent=1) + "\n")
        return int(any(r["verdict"] != "passed" for r in rows))
    os.environ["OMP_NUM_THREADS"] = "1"
    can = sorted(n for n, v in tiny.VARIANTS.items() if not getattr(v, "without_upstream", False))
    names = args.variant or (sorted(tiny.MAIN.values()) if args.main else can)
    start, rows = time.time(), []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        for row in pool.map(guarded, names):
            rows.append(row)
            shares = "  ".join(
                f"{k} {v['share of bound']:.2f}" for k, v in row.items() if "cpu" in k or "cuda" in k
            )
            print(f"{'FAIL' if row['failed'] else 'ok':5}{row['variant']:24}{shares}", flush=True)
            for what, why in row.get("not judged", {}).items():
                print(f"     {what}: {why}", flush=True)
            for failure in row["failed"]:
                print(f"     {failure}", flush=True)
    bad = sum(bool(r["failed"]) for r in rows)
    print(f"{len(rows) - bad} of {len(rows)} variants agree ({time.time() - start:.0f} s)")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**versions("gpu_verify.py"), "variants": rows}, indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
