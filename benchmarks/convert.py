"""What converting costs: time beside `cp -r` of the same files, peak memory, beside transformers' load and save.

    python benchmarks/convert.py [CASE ...] [--gb 3.05] [--rounds 5] [--json FILE] [--upstream]

Cases: dense, moe (renames, fusing, stacking: bytes move in the kernel); transposed (GPT-2's [in, out]),
interleaved (gpt-oss in bf16: transposed and gate/up rows alternating), pickle (a `.bin`), meta (rank files in
interleaved RoPE order); fp8, mxfp4 (dequantised to bf16), cast (bf16 to fp32); export (of `dense`).

Files of random bytes, no holes, on the file system of --tmp. Every run is a process of its own, start-up
included, with the byte code that an installed package has; source in the page cache; nothing left to write from the run before. A round is one run of each,
and the figure is the median of the rounds' ratios. Where the output is larger than the source, `cp` copies the
output instead.

First of all, free memory is written to once: where a virtual machine gets its memory from the host only when it is
touched, that costs seconds per GB, and whichever command came first would pay it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from about import machine

ROOT = Path(__file__).resolve().parents[1]
Tensors = Iterator[tuple[str, str, tuple[int, ...]]]
SIZE = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}

PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
SAYING = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("zoo").setLevel(logging.DEBUG)
"""
CONVERT = (
    SAYING
    + """
from zoo.formats import open_checkpoint
from zoo.mapping.execute import convert
from zoo.mapping.plan import make_plan
convert(make_plan(open_checkpoint(sys.argv[1]), dtype=sys.argv[3] or None), sys.argv[2])
"""
    + PEAK
)
EXPORT = (
    SAYING
    + """
from zoo.mapping.export import export
export(sys.argv[1], sys.argv[2])
"""
    + PEAK
)
UPSTREAM = (
    """
import sys
import transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""
    + PEAK
)


# --- checkpoints ----------------------------------------------------------------------------------------------

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True, "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}  # fmt: skip
_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 1024, "head_dim": 64,
    "intermediate_size": 3072, "moe_intermediate_size": 384, "num_experts": 64, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "torch_dtype": "bfloat16",
}  # fmt: skip
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_positions": 1024,
    "vocab_size": 50257, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "torch_dtype": "bfloat16",
}  # fmt: skip
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
    "num_local_experts": 16, "num_experts_per_tok": 4, "experts_per_token": 4, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "rms_norm_eps": 1e-5, "rope_theta": 150000,
    "sliding_window": 128, "swiglu_limit": 7.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": True, "torch_dtype": "bfloat16", "initial_context_length": 4096,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 4096},
}  # fmt: skip


def _attention(base: str, c: dict[str, Any]) -> Tensors:
    d, h = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * h, c["num_key_value_heads"] * h
    for name, shape in (("q", (q, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, q))):
        yield f"{base}self_attn.{name}_proj.weight", "BF16", shape
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{base}{name}.weight", "BF16", (d,)


def _layers(gb: float, ends: int, per_layer: Callable[[int], list[Any]]) -> int:
    """How many layers make `gb` of tensors."""
    one = sum(_nbytes(t) for t in per_layer(0))
    return max(2, round((gb * 1e9 - ends) / one))


def _nbytes(t: tuple[str, str, tuple[int, ...]]) -> int:
    n = SIZE[t[1]]
    for d in t[2]:
        n *= d
    return n


def dense(gb: float, **sizes: int) -> tuple[dict[str, Any], list[Any]]:
    c = _LLAMA | sizes
    d, f = c["hidden_size"], c["intermediate_size"]

    def layer(i: int) -> list[Any]:
        base = f"model.layers.{i}."
        mlp = [
            (f"{base}mlp.{n}_proj.weight", "BF16", s)
            for n, s in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f)))
        ]
        return [*_attention(base, c), *mlp]

    return _model(c, gb, layer)


def moe(gb: float) -> tuple[dict[str, Any], list[Any]]:
    c = dict(_MOE)
    d, f = c["hidden_size"], c["moe_intermediate_size"]

    def layer(i: int) -> list[Any]:
        base = f"model.layers.{i}."
        out = [*_attention(base, c), (f"{base}mlp.gate.weight", "BF16", (c["num_experts"], d))]
        out += [(f"{base}self_attn.{n}_norm.weight", "BF16", (c["head_dim"],)) for n in "qk"]
        for e in range(c["num_experts"]):
            for n, s in (("down", (d, f)), ("gate", (f, d)), ("up", (f, d))):
                out.append((f"{base}mlp.experts.{e}.{n}_proj.weight", "BF16", s))
        return out

    return _model(c, gb, layer)


def interleaved(gb: float, blocks: bool = False) -> tuple[dict[str, Any], list[Any]]:
    c = dict(_GPT_OSS)
    d, f, n = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]

    def layer(i: int) -> list[Any]:
        base = f"model.layers.{i}."
        out = [*_attention(base, c), (f"{base}self_attn.sinks", "BF16", (c["num_attention_heads"],))]
        for name, shape in (("q", c["num_attention_heads"] * 64), ("k", 512), ("v", 512), ("o", d)):
            out.append((f"{base}self_attn.{name}_proj.bias", "BF16", (shape,)))
        out += [(f"{base}mlp.router.weight", "BF16", (n, d)), (f"{base}mlp.router.bias", "BF16", (n,))]
        e = f"{base}mlp.experts."
        out += [(f"{e}gate_up_proj_bias", "BF16", (n, 2 * f)), (f"{e}down_proj_bias", "BF16", (n, d))]
        if not blocks:
            return [*out, (f"{e}gate_up_proj", "BF16", (n, d, 2 * f)), (f"{e}down_proj", "BF16", (n, f, d))]
        for name, rows, columns in (("gate_up_proj", 2 * f, d), ("down_proj", d, f)):
            out.append((f"{e}{name}_blocks", "U8", (n, rows, columns // 32, 16)))
            out.append((f"{e}{name}_scales", "U8", (n, rows, columns // 32)))
        return out

    if blocks:
        c["quantization_config"] = {"quant_method": "mxfp4"}
    c, tensors = _model(c, gb, layer)
    kinds = ("sliding_attention", "full_attention")
    return c | {"layer_types": [kinds[i % 2] for i in range(c["num_hidden_layers"])]}, tensors


def mxfp4(gb: float) -> tuple[dict[str, Any], list[Any]]:
    return interleaved(gb / 3, blocks=True)


def fp8(gb: float) -> tuple[dict[str, Any], list[Any]]:
    c, tensors = dense(gb)
    c["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    out = []
    for name, dtype, shape in tensors:
        if name.endswith("_proj.weight"):
            out.append((name, "F8_E4M3", shape))
            out.append((f"{name}_scale_inv", "F32", tuple(-(-n // 128) for n in shape)))
        else:
            out.append((name, dtype, shape))
    return c, out


def transposed(gb: float) -> tuple[dict[str, Any], list[Any]]:
    c = dict(_GPT2)
    d = c["n_embd"]
    linear = (
        ("attn.c_attn", (d, 3 * d)),
        ("attn.c_proj", (d, d)),
        ("mlp.c_fc", (d, 4 * d)),
        ("mlp.c_proj", (4 * d, d)),
    )

    def layer(i: int) -> list[Any]:
        out = []
        for name, shape in linear:
            out += [
                (f"transformer.h.{i}.{name}.weight", "BF16", shape),
                (f"transformer.h.{i}.{name}.bias", "BF16", shape[1:]),
            ]
        for name in ("ln_1", "ln_2"):
            out += [(f"transformer.h.{i}.{name}.{x}", "BF16", (d,)) for x in ("weight", "bias")]
        return out

    ends = [
        ("transformer.wte.weight", "BF16", (c["vocab_size"], d)),
        ("transformer.wpe.weight", "BF16", (1024, d)),
    ]
    ends += [(f"transformer.ln_f.{x}", "BF16", (d,)) for x in ("weight", "bias")]
    n = _layers(gb, sum(map(_nbytes, ends)), layer)
    return c | {"n_layer": n}, [*ends, *(t for i in range(n) for t in layer(i))]


def _model(
    c: dict[str, Any], gb: float, layer: Callable[[int], list[Any]]
) -> tuple[dict[str, Any], list[Any]]:
    d, v = c["hidden_size"], c["vocab_size"]
    ends = [("model.embed_tokens.weight", "BF16", (v, d)), ("model.norm.weight", "BF16", (d,))]
    if not c["tie_word_embeddings"]:
        ends.append(("lm_head.weight", "BF16", (v, d)))
    n = _layers(gb, sum(map(_nbytes, ends)), layer)
    return c | {"num_hidden_layers": n}, [*ends, *(t for i in range(n) for t in layer(i))]


def normal() -> bytes:
    """Numbers of bf16 as weights are, 32 MiB. Of random bytes one in 64 is subnormal, and a CPU takes a hundred times as long to compute
    with those."""
    import torch

    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) / 32
    return bytes(x.bfloat16().view(torch.uint8).numpy().data) * 16


def write(
    folder: Path, config: dict[str, Any], tensors: list[Any], shard: float = 1e9, block: bytes | None = None
) -> None:
    """Shards of random bytes, or of `block` again and again; scales are ones, so that they are sound."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[list[Any]] = [[]]
    for t in tensors:
        if shards[-1] and sum(map(_nbytes, shards[-1])) + _nbytes(t) > shard:
            shards.append([])
        shards[-1].append(t)
    weight_map = {}
    if block is None:  # no huge exponents, no NaN in any dtype
        block = bytes(b & 0xBF for b in os.urandom(1 << 20)) * 32
    for k, part in enumerate(shards):
        name = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for t in part:
            header[t[0]] = {"dtype": t[1], "shape": t[2], "data_offsets": [at, at + _nbytes(t)]}
            weight_map[t[0]] = name
            at += _nbytes(t)
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / name, "wb") as f:
            f.write(struct.pack("<Q", len(raw)) + raw)
            for t in part:
                n = _nbytes(t)
                if t[0].endswith("scale_inv"):
                    f.write(struct.pack("<f", 1.0) * (n // 4))
                    continue
                for a in range(0, n, len(block)):
                    f.write(memoryview(block)[: min(len(block), n - a)])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def as_pickle(source: Path, target: Path) -> None:
    """The same tensors as one `pytorch_model.bin` (needs torch)."""
    import torch
    from safetensors.torch import load_file

    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors: dict[str, torch.Tensor] = {}
    for f in sorted(source.glob("*.safetensors")):
        tensors |= load_file(f)
    torch.save(tensors, target / "pytorch_model.bin")


def as_meta(source: Path, target: Path, ranks: int = 2) -> None:
    """The same tensors as Meta's rank files (needs torch). Only shapes matter here, not the order of rows."""
    import torch
    from safetensors.torch import load_file

    target.mkdir()
    c = json.loads((source / "config.json").read_text())
    params = {
        "dim": c["hidden_size"], "n_layers": c["num_hidden_layers"], "n_heads": c["num_attention_heads"],
        "n_kv_heads": c["num_key_value_heads"], "vocab_size": c["vocab_size"], "norm_eps": c["rms_norm_eps"],
        "rope_theta": c["rope_theta"], "ffn_dim_multiplier": 1.5, "multiple_of": 1024,
    }  # fmt: skip
    (target / "params.json").write_text(json.dumps(params))
    tensors: dict[str, torch.Tensor] = {}
    for f in sorted(source.glob("*.safetensors")):
        tensors |= load_file(f)
    names = {
        "model.embed_tokens": ("tok_embeddings", 0), "model.norm": ("norm", None), "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None), "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
        "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1), "mlp.gate_proj": ("feed_forward.w1", 0),
        "mlp.up_proj": ("feed_forward.w3", 0), "mlp.down_proj": ("feed_forward.w2", 1),
    }  # fmt: skip
    tensors["output.weight"] = tensors["model.embed_tokens.weight"]
    for r in range(ranks):
        out = {}
        for name, t in tensors.items():
            module = name.removesuffix(".weight")
            parts = module.split(".")
            key = ".".join(parts[3:]) if "layers" in parts else module
            new, axis = names.get(key, ("output", 0))
            full = f"layers.{parts[2]}.{new}.weight" if "layers" in parts else f"{new}.weight"
            out[full] = t if axis is None else t.chunk(ranks, axis)[r].clone()
        torch.save(out, target / f"consolidated.{r:02}.pth")


# --- measuring --------------------------------------------------------------------------------------------------


def timed(command: list[str]) -> dict[str, Any]:
    """Wall and CPU seconds of a command, the peak RSS (MiB) if it prints it last, and what it says before; with nothing left to
    write from the one before. (The RSS that wait4 gives is at least the parent's: a child starts as its copy.)"""
    os.sync()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)[:200]}")
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "rss_mib": int(said[-1]) / 1024 if said else 0.0,
        "said": said[:-1],
    }


TOUCH = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]))
for at in range(0, len(memory), mmap.PAGESIZE):
    memory[at] = 1
"""


def touch_memory(most: int = 64 << 30) -> None:
    """Write to nearly all memory that is free, in a process of its own, which gives it back."""
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    free = int(next(line.split()[1] for line in meminfo if line.startswith("MemAvailable"))) << 10
    subprocess.run([sys.executable, "-c", TOUCH, str(min(most, free - (1 << 30)))], check=False)


def warm(folder: Path) -> None:
    for p in folder.iterdir():
        with open(p, "rb") as f:
            while f.read(16 << 20):
                pass


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


CASES: dict[str, tuple[Callable[[float], tuple[dict[str, Any], list[Any]]], str, float]] = {
    # name: (maker, dtype, the goal as a multiple of cp)
    "dense": (dense, "", 1.1),
    "moe": (moe, "", 1.1),
    "export": (dense, "", 1.1),
    "transposed": (transposed, "", 2.0),
    "interleaved": (interleaved, "", 2.0),
    "pickle": (dense, "", 2.0),
    "meta": (dense, "", 2.0),
    "fp8": (fp8, "bf16", 3.0),
    "mxfp4": (mxfp4, "bf16", 3.0),
    "cast": (dense, "fp32", 3.0),
}


def measure(case: str, tmp: Path, gb: float, rounds: int, upstream: bool) -> dict[str, Any]:
    maker, dtype, goal = CASES[case]
    source, out, copied = tmp / "source", tmp / "out", tmp / "copied"
    config, tensors = maker(gb)
    write(source, config, tensors)
    if case in ("pickle", "meta"):
        (as_pickle if case == "pickle" else as_meta)(source, tmp / "made")
        shutil.rmtree(source)
        (tmp / "made").rename(source)
    command = [sys.executable, "-c", CONVERT, str(source), str(out), dtype]
    if case == "export":
        canon = tmp / "canon"
        subprocess.run(
            [sys.executable, "-c", CONVERT, str(source), str(canon), ""],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        shutil.rmtree(source)
        source = canon
        command = [sys.executable, "-c", EXPORT, str(source), str(out)]
    result: dict[str, Any] = {
        "case": case,
        "goal": goal,
        "source_bytes": size(source),
        "source_tensors": len(tensors),
    }
    original = source
    if dtype:  # the yardstick is copying what comes out
        timed(command)
        original = tmp / "yardstick"
        out.rename(original)
    result["output_bytes"] = size(original)
    runs = []
    for _ in range(rounds):
        warm(source)
        warm(original)
        run = {"cp": timed(["cp", "-r", str(original), str(copied)])}
        shutil.rmtree(copied)
        warm(source)
        run["zoo"] = timed(command)
        shutil.rmtree(out)
        runs.append(run)
    if upstream and case in ("dense", "moe"):
        run = timed([sys.executable, "-c", UPSTREAM, str(source), str(out)])
        shutil.rmtree(out)
        result["upstream"] = run | {"ratio": run["wall"] / statistics.median(r["cp"]["wall"] for r in runs)}
    result["runs"] = runs
    result["ratio"] = statistics.median(r["zoo"]["wall"] / r["cp"]["wall"] for r in runs)
    result["cpu_ratio"] = statistics.median(r["zoo"]["cpu"] / r["cp"]["cpu"] for r in runs)
    result["rss_mib"] = max(r["zoo"]["rss_mib"] for r in runs)
    result["seconds"] = {k: statistics.median(r[k]["wall"] for r in runs) for k in ("cp", "zoo")}
    shutil.rmtree(tmp)
    tmp.mkdir()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--gb", type=float, default=3.05)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tmp", type=Path, default=None, help="a folder on the file system to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--upstream", action="store_true", help="also transformers' load and save")
    args = parser.parse_args()
    if unknown := [c for c in args.cases if c not in CASES]:
        parser.error(f"no case {unknown[0]!r}; known: {', '.join(CASES)}")
    touch_memory()
    results = []
    print(
        f"{'case':12} {'GB':>6} {'cp s':>7} {'zoo s':>7} {'ratio':>6} {'goal':>5} {'CPU':>6} {'RSS MiB':>8}"
    )
    for case in args.cases or CASES:
        with tempfile.TemporaryDirectory(dir=args.tmp) as tmp:
            work = Path(tmp) / "work"
            work.mkdir()
            r = measure(case, work, args.gb, args.rounds, args.upstream)
        results.append(r)
        print(
            f"{case:12} {r['output_bytes'] / 1e9:6.2f} {r['seconds']['cp']:7.2f} {r['seconds']['zoo']:7.2f} "
            f"{r['ratio']:6.2f} {r['goal']:5.2f} {r['cpu_ratio']:6.2f} {r['rss_mib']:8.0f}",
            flush=True,
        )
        for run in r["runs"]:
            print("  " + "; ".join(run["zoo"]["said"]), flush=True)
        if "upstream" in r:
            u = r["upstream"]
            print(
                f"  transformers load + save: {u['wall']:.1f} s, {u['ratio']:.1f} x cp, {u['rss_mib']:.0f} MiB",
                flush=True,
            )
        if args.json:
            args.json.write_text(
                json.dumps({"machine": machine("convert.py"), "results": results}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
