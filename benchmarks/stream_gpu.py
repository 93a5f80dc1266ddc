"""Streaming on a GPU: the rate at which a pass gets through the weights, beside the rate at which the same files are read.

    python benchmarks/stream_gpu.py [STEM ...] --json FILE [--tmp DIR] [--gigabytes N] [--streamed]
        random weights of released shapes (default: llama-3.1-8b; gpt-oss-20b with its experts in mxfp4) are written to disk and
        converted. `zoo verify --dtype bf16`: all levels unstreamed with all of the GPU (not with --streamed); up to logits streamed
        with as many gigabytes of it (6; 12 for experts that upstream dequantises a layer of), files in the page cache, and again
        with the files put out of it just before the pass
    python benchmarks/stream_gpu.py --tiny --device cpu --json FILE
        the same steps with small shapes, to see that they work

By several GPUs: benchmarks/stream_ranks.py.

A pass reads the source and the canonical folder, both once: its rate is the bytes of both over the seconds of the phases waiting for
files, oracle (both ways), ours, metrics, and plan and bytes. The raw rate: 8 threads that read runs of 256 MiB of these files (from
the disk: of the first 6 GB) into buffers of their own. Needs tests/ beside it, transformers, and, of the disk, twice a checkpoint: 33 GB. Exit code 1 if
a verdict is not "passed", 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reading

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
READERS, BUFFER = 8, 1 << 24
PASS = ("waiting for files", "oracle", "oracle, second way", "ours", "metrics", "plan and bytes")
LIMITS = {"llama-3.1-8b": 6.0, "gpt-oss-20b": 12.0}
TINY = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def child(canon: str, device: str, stream: str, gigabytes: float, cold: str) -> None:
    """One verification, as a line of JSON. Empty `stream`, `cold`: not."""
    import torch

    import zoo
    from zoo.verify.reading import Window

    files = weights(Path(canon).parent)
    if gigabytes and device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    left: list[float] = []
    let_go = Window.let_go

    def noted(self: Window) -> None:
        left.append(time.perf_counter())
        let_go(self)

    Window.let_go = noted  # type: ignore[method-assign]

    def progress(text: str) -> None:
        if cold and text.startswith("layers and logits"):  # what was hashed is in the cache again
            put_out(files)

    began = time.perf_counter()
    cert = zoo.verify(
        canon,
        level="logits" if stream else None,
        dtype="bf16",
        device=device,
        stream=bool(stream),
        write=False,
        progress=progress,
    )
    seconds = time.perf_counter() - began
    passing = sum(cert.timing.get(phase, 0.0) for phase in PASS)
    size = sum(f.stat().st_size for f in files)
    failed = [
        f"{x.name}: {c.name} {c.value:.3g} > {c.bound:.3g}"
        for x in cert.levels
        for c in x.checks
        if not c.passed
    ]
    steps = sorted(
        b - a for a, b in itertools.pairwise(left[1:-1])
    )  # not the first layer, nor what comes after the last
    print(json.dumps({
        "verdict": cert.verdict, "failed": failed, "not checked": cert.not_checked, "seconds": seconds, "timing": cert.timing,
        "pass": passing, "bytes_per_second": size / passing, "seconds a layer": steps[len(steps) // 2] if steps else None,
        "tokens": (cert.inputs or {}).get("tokens"),
        "gpu_memory": torch.cuda.max_memory_reserved() if device == "cuda" else None,
    }))  # fmt: skip


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def put_out(files: list[Path]) -> None:
    """Out of the page cache, as far as nobody has them mapped."""
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_rate(files: list[Path]) -> float:
    """Bytes a second."""
    return sum(f.stat().st_size for f in files) / reading.seconds_of(reading.runs(files), READERS, BUFFER)


def first(files: list[Path], size: float) -> list[Path]:
    """So many that they have that size."""
    out: list[Path] = []
    for file in files:
        if sum(f.stat().st_size for f in out) < size:
            out.append(file)
    return out


def measure(stem: str, args: argparse.Namespace, out: dict[str, Any], keep: Callable[[], None]) -> None:
    """Into `out`; what is cut short is kept by then."""
    from gpu_verify import released_config, written

    import zoo

    config = released_config(stem)
    if args.tiny:
        config |= TINY
        config |= (
            {"layer_types": config["layer_types"][: TINY["num_hidden_layers"]]}
            if "layer_types" in config
            else {}
        )
        config |= {"num_local_experts": 4} if "num_local_experts" in config else {}
    with tempfile.TemporaryDirectory(prefix="zoo-bench-", dir=args.tmp) as holder:
        folder, began = Path(holder), time.perf_counter()
        size = written(config, folder / "source")
        canon = zoo.convert(folder / "source", folder / "canonical")
        files, gigabytes = weights(folder), args.gigabytes or LIMITS.get(stem, 6.0)
        out |= {"model": stem, "bytes": size, "gigabytes": gigabytes}
        print(f"{stem}: {size / 1e9:.1f} GB made in {time.perf_counter() - began:.0f} s", flush=True)
        raw_rate(files)
        rates = {"page cache": raw_rate(files)}
        some = first(files, 6e9)
        put_out(some)
        rates["disk"] = raw_rate(some)
        out["raw bytes per second"] = rates
        print("  read at " + ", ".join(f"{r / 1e9:.2f} GB/s ({k})" for k, r in rates.items()), flush=True)
        for name, stream, limit, cold in (
            *([] if args.streamed else [("unstreamed, page cache", "", 0.0, "")]),
            ("streamed, page cache", "1", gigabytes, ""),
            ("streamed, disk", "1", gigabytes, "1"),
        ):
            ran = verified(canon, args.device, stream, limit, cold)
            if ran.returncode:
                out[name] = {"verdict": "error", "error": ran.stderr[-2000:]}
                keep()
                print(f"  {name}: {ran.stderr[-600:]}", flush=True)
                continue
            row = json.loads(ran.stdout.splitlines()[-1])
            row["share of the read rate"] = row["bytes_per_second"] / rates[name.split(", ")[1]]
            out[name] = row
            keep()
            print(
                f"  {name}: {row['verdict']} in {row['seconds']:.1f} s, the pass {row['pass']:.1f} s, "
                f"{row['bytes_per_second'] / 1e9:.2f} GB/s, {row['share of the read rate']:.2f} of the read rate",
                flush=True,
            )


def verified(
    canon: Path, device: str, stream: str, limit: float, cold: str
) -> subprocess.CompletedProcess[str]:
    """`child`, in a process of its own."""
    command = [sys.executable, __file__, "--child", str(canon), device, stream, str(limit), cold]
    return subprocess.run(command, capture_output=True, text=True)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        canon, device, stream, gigabytes, cold = sys.argv[2:]
        child(canon, device, stream, float(gigabytes), cold)
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stem", nargs="*", default=["llama-3.1-8b", "gpt-oss-20b"])
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tmp", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/stream_gpu.py needs a CUDA GPU; torch sees none here.", file=sys.stderr)
        return 2
    if args.device == "cuda":
        from gpu import versions

        about: dict[str, Any] = dict(versions("stream_gpu.py"))
    else:
        from about import machine

        about = machine("stream_gpu.py")
    rows: list[dict[str, Any]] = []
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        args.json.write_text(json.dumps({**about, "models": rows}, indent=1) + "\n")

    for stem in args.stem:
        rows.append({})
        measure(stem, args, rows[-1], keep)
    ran = [row for model in rows for row in model.values() if isinstance(row, dict) and "verdict" in row]
    return int(any(row["verdict"] != "passed" for row in ran))


if __name__ == "__main__":
    sys.exit(main())
