"""What the released formats cost beside plain bytes: reading headers, decoding blocks, memory.

    python benchmarks/formats.py [PART ...] [--rounds 7] [--gb 2] [--json FILE]

- decode: nanoseconds of CPU per element of every block type and quantisation scheme, one thread, best of rounds.
  Beside it, copying as many bytes as come out.
- headers: seconds to open a GGUF, a pickle and a safetensors file of the same ~1,000 tensors.
- gguf, int4: converting `--gb` of output, as `convert.py` measures it: time beside `cp` of the output (median of
  the rounds' ratios) and peak RSS.

The conversions of the other formats (fp8, mxfp4, pickle, meta) are cases of `convert.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import convert as bench
import numpy as np
import torch
from about import machine

from zoo.formats import open_checkpoint
from zoo.formats.base import ITEMSIZE
from zoo.quant import dequantise, ggml, host


def cpu_seconds(f: Callable[[], Any], rounds: int) -> float:
    """CPU time, since the machine may be shared."""
    f()
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        f()
        best = min(best, time.process_time() - began)
    return best


def decode(rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows, columns = 512, 7168
    n = rows * columns
    cases: list[tuple[str, str, Callable[[], Any], int]] = []
    for name in ggml.TYPES:
        raw = rng.integers(0, 120, ggml.nbytes(name, (rows, columns)), dtype=np.uint8)
        cases.append(
            (name, "fp32", lambda raw=raw, name=name: ggml.dequantise(raw, name, (rows, columns)), 4)
        )

    def scheme(name: str, dtype: torch.dtype, **parts: torch.Tensor) -> None:
        short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        cases.append((name, short, lambda: dequantise(name, parts, (rows,), dtype), dtype.itemsize))
        arrays = {
            k: p.numpy() if p.dtype in (torch.uint8, torch.int32) else p.float().numpy()
            for k, p in parts.items()
        }
        if parts["weight"].dtype == torch.float8_e4m3fn:
            arrays["weight"] = parts["weight"].view(torch.uint8).numpy()
        to = {"bf16": "BF16", "fp32": "F32"}[short]
        cases.append(
            (f"{name} (numpy)", short, lambda: host.dequantise(name, arrays, to, name), dtype.itemsize)
        )

    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    byte = torch.from_numpy(rng.integers(0, 256, (rows, columns // 32, 16), dtype=np.uint8))
    words = torch.from_numpy(rng.integers(-(2**31), 2**31, (rows, columns // 8)).astype(np.int32))
    for dtype in (torch.bfloat16, torch.float32):
        scheme("fp8-block", dtype, weight=codes, scale=torch.rand(rows // 128, columns // 128))
        scheme("mxfp4", dtype, weight=byte, scale=torch.full((rows, columns // 32), 120, dtype=torch.uint8))
        scheme("int4-group32", dtype, weight=words, scale=torch.rand(rows, columns // 32).bfloat16())
    out = []
    for name, dtype_, f, size in cases:
        copied = np.zeros(n * size, dtype=np.uint8)
        seconds, copy = cpu_seconds(f, rounds), cpu_seconds(copied.copy, rounds)
        out.append(
            {"type": name, "to": dtype_, "ns_per_element": seconds / n * 1e9, "copy_ns": copy / n * 1e9}
        )
        print(
            f"{name:20} to {dtype_}: {seconds / n * 1e9:6.2f} ns per element (copying it: {copy / n * 1e9:.2f})"
        )
    return out


def headers(rounds: int) -> list[dict[str, Any]]:
    """~1,000 tensors in each container; seconds to open it."""
    config, tensors = bench.dense(0.2)
    tensors = [t for t in tensors if "layers.0." in t[0]]
    small = [(n.replace("layers.0.", f"layers.{i}."), d, (8, 32)) for i in range(112) for n, d, _ in tensors]
    out = []
    with tempfile.TemporaryDirectory() as tmp:
        st, pickled, gguf = Path(tmp, "safetensors"), Path(tmp, "pickle"), Path(tmp, "w.gguf")
        bench.write(st, config, small)
        bench.as_pickle(st, pickled)
        write_gguf(gguf, [(f"blk.{i}.attn_q.weight", "BF16", (8, 32)) for i in range(len(small))])
        for path in (st, pickled, gguf):
            began, took = 0.0, []
            for _ in range(rounds):
                began = time.perf_counter()
                n = len(open_checkpoint(path).tensors)
                took.append(time.perf_counter() - began)
            out.append(
                {
                    "format": path.stem if path.is_dir() else "gguf",
                    "tensors": n,
                    "seconds": statistics.median(took),
                }
            )
            print(f"opening {out[-1]['format']:12} {n:,} tensors: {out[-1]['seconds'] * 1e3:.1f} ms")
    return out


# --- conversions --------------------------------------------------------------------------------------------


def write_gguf(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], layers: int = 1) -> None:
    """A GGUF of sound blocks: scales of about one, random codes."""

    def string(s: str) -> bytes:
        return struct.pack("<Q", len(s)) + s.encode()

    fields: dict[str, str | int | float] = {
        "general.architecture": "llama", "llama.block_count": layers, "llama.context_length": 8192,
        "llama.embedding_length": 2048, "llama.feed_forward_length": 8192, "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8, "llama.rope.dimension_count": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 500000.0,
    }  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors) + 1, len(fields))
    for key, value in fields.items():
        head += string(key)
        if isinstance(value, str):
            head += struct.pack("<I", 8) + string(value)
        else:
            head += struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)
    numbers = {"F32": 0, "BF16": 30, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}
    at, infos, sizes = 0, b"", []
    for name, kind, shape in [*tensors, ("token_embd.weight", "Q8_0", (2048, 2048))]:
        dims = shape[::-1]
        infos += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, numbers[kind], at)
        n = ggml.nbytes(kind, shape) if ggml.is_block_type(kind) else math.prod(shape) * ITEMSIZE[kind]
        sizes.append((kind, n))
        at += -(-n // 32) * 32
    block: dict[str, bytes] = {}
    with path.open("wb") as f:
        f.write(head + infos)
        f.write(b"\0" * (-f.tell() % 32))
        for kind, n in sizes:
            if kind not in block:
                block_type = ggml.is_block_type(kind)
                nbytes = ggml.nbytes(kind, (32 if kind == "Q8_0" else 256,)) if block_type else ITEMSIZE[kind]
                raw = np.random.default_rng(0).integers(0, 100, (4096, nbytes), dtype=np.uint8)
                half = np.frombuffer(struct.pack("<e", 0.01), np.uint8)
                for start in {"Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, ()):
                    raw[:, start : start + 2] = half
                block[kind] = raw.tobytes()
            for a in range(0, n, len(block[kind])):
                f.write(memoryview(block[kind])[: min(len(block[kind]), n - a)])
            f.write(b"\0" * (-n % 32))


def gguf(gb: float, path: Path) -> None:
    """A Llama of 2048 channels as Q4_K_M files mix it: Q4_K, and Q6_K for v and half of down; fp32 comes out."""
    d, ff, kv = 2048, 8192, 512
    per_layer = 4 * (2 * d * d + 2 * kv * d + 3 * d * ff)
    n = max(1, round(gb * 1e9 / per_layer))
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("output_norm.weight", "F32", (d,))]
    for i in range(n):
        b = f"blk.{i}."
        tensors += [(f"{b}{name}.weight", "F32", (d,)) for name in ("attn_norm", "ffn_norm")]
        shapes = {
            "attn_q": (d, d),
            "attn_k": (kv, d),
            "attn_output": (d, d),
            "ffn_gate": (ff, d),
            "ffn_up": (ff, d),
        }
        tensors += [(f"{b}{name}.weight", "Q4_K", shape) for name, shape in shapes.items()]
        tensors += [
            (f"{b}attn_v.weight", "Q6_K", (kv, d)),
            (f"{b}ffn_down.weight", "Q6_K" if i % 2 else "Q4_K", (d, ff)),
        ]
    path.mkdir(parents=True)
    write_gguf(path / "w.gguf", tensors, n)


def int4(gb: float, path: Path) -> None:
    """Experts as Kimi K2 Thinking packs them, under the names of the benchmark's MoE; bf16 comes out."""
    config, tensors = bench.moe(gb)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}},
    }  # fmt: skip
    out: list[Any] = []
    shapes: dict[str, tuple[int, int]] = {}
    for name, dtype, shape in tensors:
        if ".experts." not in name:
            out.append((name, dtype, shape))
            continue
        shapes[name + "_shape"] = shape
        out += [
            (name + "_packed", "U8", (shape[0], shape[1] // 2)),
            (name + "_scale", "BF16", (shape[0], shape[1] // 32)),
        ]
        out.append((name + "_shape", "U8", (16,)))
    bench.write(path, config, out)
    for file in path.glob("*.safetensors"):  # the same bytes as 32-bit words, and two 64-bit numbers
        with file.open("r+b") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(n))
            for name, t in header.items():
                if name.endswith("_packed"):
                    t["dtype"], t["shape"] = "I32", [t["shape"][0], t["shape"][1] // 4]
                elif name.endswith("_shape"):
                    t["dtype"], t["shape"] = "I64", [2]
                    f.seek(8 + n + t["data_offsets"][0])
                    f.write(struct.pack("<2q", *shapes[name]))
                elif name.endswith("_scale"):  # sound ones: 1.0
                    begin, end = t["data_offsets"]
                    f.seek(8 + n + begin)
                    f.write(b"\x80\x3f" * ((end - begin) // 2))
            raw = json.dumps(header, separators=(",", ":")).encode()
            f.seek(8)
            f.write(raw + b" " * (n - len(raw)))


def conversion(case: str, rounds: int, gb: float) -> dict[str, Any]:
    maker, dtype = {"gguf": (gguf, ""), "int4": (int4, "bf16")}[case]
    with tempfile.TemporaryDirectory() as tmp:
        source, out, kept, copied = (Path(tmp, n) for n in ("source", "out", "kept", "copied"))
        maker(gb, source)
        command = [sys.executable, "-c", bench.CONVERT, str(source), str(out), dtype]
        bench.timed(command)
        out.rename(kept)
        runs = []
        for _ in range(rounds):
            bench.warm(source)
            bench.warm(kept)
            run = {"cp": bench.timed(["cp", "-r", str(kept), str(copied)])}
            bench.shutil.rmtree(copied)
            bench.warm(source)
            run["zoo"] = bench.timed(command)
            bench.shutil.rmtree(out)
            runs.append(run)
        result = {
            "case": case, "source_bytes": bench.size(source), "output_bytes": bench.size(kept), "runs": runs,
            "ratio": statistics.median(r["zoo"]["wall"] / r["cp"]["wall"] for r in runs),
            "cpu_seconds": statistics.median(r["zoo"]["cpu"] for r in runs),
            "rss_mib": max(r["zoo"]["rss_mib"] for r in runs),
        }  # fmt: skip
    print(
        f"{case}: {result['source_bytes'] / 1e9:.2f} GB to {result['output_bytes'] / 1e9:.2f} GB in {result['ratio']:.2f} x cp of "
        f"the output; {result['cpu_seconds']:.1f} s of CPU; {result['rss_mib']:.0f} MiB"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("decode", "headers", "gguf", "int4")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(parts)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := [p for p in args.parts if p not in parts]:
        parser.error(f"no part {unknown[0]!r}; known: {', '.join(parts)}")
    bench.touch_memory()
    results: dict[str, Any] = {"machine": machine("formats.py")}
    for part in args.parts or parts:
        if part in ("decode", "headers"):
            results[part] = {"decode": decode, "headers": headers}[part](args.rounds)
        else:
            results[part] = conversion(part, args.rounds, args.gb)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
