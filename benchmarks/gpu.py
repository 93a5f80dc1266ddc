"""Speed on one GPU, beside transformers in the same run.

    python benchmarks/gpu.py [--shapes NAME ...] [--parts speed compiled batch long load] [--out FILE]

Models are random weights of released shapes (`SHAPES`), some with fewer layers so that both sides fit. Per
shape: prefill of 2048 tokens (all logits; after a rest each; both sides in turn where both fit, since the host
that launches kernels may be twice as fast a second later), decode at batch 1 after it, memory. "of copy" is the bytes of
weights that a token visits, over the time it takes, over what a device-to-device copy moves (measured
first, bytes read plus bytes written). `compiled` adds transformers compiled with a static cache; `batch`
decode at batch 1 to 64 (of codes: 1 and 16); `long` a prompt of 32768 tokens; `load` a canonical checkpoint from disk.
Results are appended to benchmarks/results/gpu.json with device, versions, command and date.
Exit code 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from about import command
from random_codes import components
from table import speed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# name -> (config in manifests/configs, layers or None for all, scheme of the weights)
SHAPES: dict[str, tuple[str, int | None, str | None]] = {
    "Llama 3.2 1B": ("llama-3.2-1b-instruct", None, None),
    "Llama 3.1 8B": ("llama-3.1-8b", None, None),
    "Llama 3.1 8B fp8": ("llama-3.1-8b", None, "fp8-tensor"),
    "Llama 3.1 8B int4": ("llama-3.1-8b", None, "int4-group128"),
    "Llama 3.1 8B AWQ": ("llama-3.1-8b", None, "awq4-group128"),
    "gpt-oss-20b": ("gpt-oss-20b", None, None),
    "gpt-oss-20b mxfp4": ("gpt-oss-20b", None, "mxfp4"),
    "Qwen3-30B-A3B, 24 layers": ("qwen3-30b-a3b", 24, None),
    "Qwen3-30B-A3B fp8, 24 layers": ("qwen3-30b-a3b", 24, "fp8-block"),
    "Qwen3-30B-A3B int4, 24 layers": ("qwen3-30b-a3b", 24, "int4-group128"),
    "Qwen3-Next-80B-A3B, 8 layers": ("qwen3-next-80b-a3b", 8, None),
    "Llama 4 Scout, 8 layers": ("llama4-scout-17b-16e-instruct", 8, None),
    "DeepSeek-V3, 1 dense + 2 MoE layers": ("deepseek-v3", 3, None),
}
BATCHES = (
    "Llama 3.1 8B",
    "Qwen3-30B-A3B, 24 layers",
    *(name for name, (_, _, scheme) in SHAPES.items() if scheme),
)
LONG = ("Llama 3.1 8B", "gpt-oss-20b")
PROMPT, NEW, LOADS, PAIRS = 2048, 64, 7, 15
REST = 0.3
"""Seconds before each prompt, on both sides. One after the other they take an H100 to its 700 W within seconds, and its clock
from 1.98 to 1.3-1.65 GHz: then what ran before decides (DeepSeek-V3's prompt 28.4 ms after a rest, 29.5 without)."""
ROOM = 8 << 30  # bytes beside the weights of both sides, for what a prompt needs


def config_of(file: str, layers: int | None) -> dict[str, Any]:
    """A released config without its quantisation, cut to `layers`."""
    config: dict[str, Any] = json.loads((ROOT / f"manifests/configs/{file}.config.json").read_text())
    for c in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "auto_map"):
            c.pop(key, None)
    text = config.get("text_config") or config
    if layers is not None:
        all_layers = text["num_hidden_layers"]
        text["num_hidden_layers"] = layers
        for key, value in text.items():
            if isinstance(value, list) and len(value) == all_layers:
                text[key] = value[:layers]
        if text.get("moe_layers"):
            text["moe_layers"] = [i for i in text["moe_layers"] if i < layers]
        if text.get("first_k_dense_replace"):
            text["first_k_dense_replace"] = 1
    return config


def in_turn(runs: list[Callable[[], object]], rounds: int, rest: float = 0.0) -> list[list[float]]:
    """Milliseconds of each run in each round, after two rounds that are not counted; `rest`: seconds before each."""
    import torch

    taken: list[list[float]] = [[] for _ in runs]
    for i in range(rounds + 2):
        for run, ms in zip(runs, taken, strict=True):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            time.sleep(rest)
            a.record()
            run()
            b.record()
            b.synchronize()
            if i >= 2:
                ms.append(a.elapsed_time(b))
    return taken


def median_ms(run: Callable[[], object], times: int = 9, rest: float = 0.0) -> float:
    """Median over `times` runs, after two that are not counted."""
    return statistics.median(in_turn([run], times, rest)[0])


def copy_bandwidth() -> float:
    """TB/s of a device-to-device copy of 4 GiB, bytes read plus bytes written: the best of three ways."""
    import torch

    a = torch.randn(2**31, dtype=torch.bfloat16, device="cuda")
    b = torch.empty_like(a)
    ways: list[Callable[[], object]] = [
        lambda: b.copy_(a), lambda: torch.add(a, 0, out=b), lambda: torch.neg(a, out=b)
    ]  # fmt: skip
    return max(2 * a.nbytes / median_ms(w) / 1e9 for w in ways)


def free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# --- ours ---------------------------------------------------------------------------------------------------


def our_model(config: dict[str, Any], scheme: str | None) -> Any:
    """A decoder with random weights on the GPU, quantised where a release would be."""
    import torch

    from zoo.families import spec_of
    from zoo.model import Decoder

    model = Decoder(spec_of(config))
    bf16 = torch.bfloat16
    for name, m in model.matrices():
        experts = m.weight.dim() == 3
        if scheme is None or "router" in name or name == "head" or name.endswith("kv_up"):
            continue
        if scheme == "mxfp4" and not experts:
            continue
        *lead, _, k = m.weight.shape
        with torch.device("cuda"):
            m.quantise(scheme, components(scheme, m.parts, k, *lead))
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        dtype = torch.float32 if leaf == "selection_bias" else bf16
        t = torch.empty(p.shape, dtype=dtype, device="cuda")
        t = t.fill_(1.0) if "norm" in name else t.normal_(0, 0.02)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(t, requires_grad=False))
    return model


def active_bytes(model: Any, tokens: int = 1) -> int:
    """Bytes of weights that so many tokens visit: all but the embedding (unless it is the head) and idle experts, of which
    there are as many as if each token chose evenly and by itself."""
    from zoo.spec import MoE

    total = 0
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name == "embed.weight" and not model.spec.tied:
            continue
        share = 1.0
        part = name.split(".")
        if len(part) > 3 and part[2] == "moe" and part[3] in ("gate_up", "up", "down"):
            ffn = model.spec.layers[int(part[1])].ffn
            assert isinstance(ffn, MoE)
            share = 1 - (1 - ffn.router.top_k / ffn.n_experts) ** tokens
        total += int(t.nbytes * share)
    return total


def our_step(model: Any, batch: int, prompt: int) -> tuple[Any, Any]:
    """A captured decode step after `prompt` tokens, and its cache."""
    import torch

    from zoo.model.graph import Step

    cache = model.cache(batch, prompt + NEW * 8)
    ids = torch.randint(0, model.spec.vocab_size, (batch, prompt), device="cuda")
    with torch.inference_mode():
        model.finish(model.run(ids, cache)[:, -1:])
    return Step(model, cache, batch), cache


def our_decode_ms(step: Any) -> float:
    def run() -> None:
        for _ in range(NEW):
            step(step.best)

    return median_ms(run, 5) / NEW


def ours(model: Any, name: str, parts: list[str], row: dict[str, Any], copy: float) -> None:
    import torch

    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    active = active_bytes(model)
    row["active GB"] = active / 1e9
    ids = torch.randint(0, model.spec.vocab_size, (1, PROMPT), device="cuda")
    if "speed" in parts:
        row["prefill ms"] = median_ms(lambda: model(ids), rest=REST)
        free()
        captured = model.captured(1, PROMPT)
        row["prefill captured ms"] = median_ms(lambda: captured(ids), rest=REST)
        del captured
        free()
        step, cache = our_step(model, 1, PROMPT)
        held = weights + sum(t.nbytes for t in cache.tensors())
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row["decode ms"] = our_decode_ms(step)
        row["of copy"] = active / row["decode ms"] / 1e9 / copy
        row["memory over weights and cache"] = torch.cuda.max_memory_allocated() / held - 1
        row["reserved over weights and cache"] = torch.cuda.memory_reserved() / held - 1
        del step, cache
        free()
    if "batch" in parts and name in BATCHES:
        row["decode ms by batch"], row["GB by batch"] = {}, {}
        for batch in (1, 2, 4, 8, 16, 32, 64) if SHAPES[name][2] is None else (1, 16):
            step, cache = our_step(model, batch, 128)
            row["decode ms by batch"][batch] = our_decode_ms(step)
            row["GB by batch"][batch] = active_bytes(model, batch) / 1e9
            del step, cache
            free()
    if "long" in parts and name in LONG:
        long = torch.randint(0, model.spec.vocab_size, (1, 32768), device="cuda")
        cache = model.cache(1, 32768)

        def prefill() -> None:
            cache.reset()
            with torch.inference_mode():
                model.finish(model.run(long, cache)[:, -1:])

        row["prefill 32768 ms"] = median_ms(prefill, 2)
        row["cache GB at 32768"] = sum(t.nbytes for t in cache.tensors()) / 1e9
        del cache
        step, cache = our_step(model, 1, 32768)
        row["decode ms at 32768"] = our_decode_ms(step)
        del step, cache
    free()


# --- transformers -------------------------------------------------------------------------------------------


def their_model(config: dict[str, Any]) -> Any:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "config.json").write_text(json.dumps(config))
        c = transformers.AutoConfig.from_pretrained(d).get_text_config()
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(c, dtype=torch.bfloat16)
    return model.eval()


def theirs(model: Any, name: str, parts: list[str], row: dict[str, Any]) -> None:
    import torch

    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), device="cuda")
    with torch.inference_mode():
        if "speed" in parts:
            if "transformers prefill ms" not in row:
                row["transformers prefill ms"] = median_ms(lambda: model(ids, use_cache=True), rest=REST)
            row["transformers decode ms"] = their_decode_ms(model, ids, 8)
        if "long" in parts and name in LONG:
            long = torch.randint(0, model.config.vocab_size, (1, 32768), device="cuda")
            try:
                run = lambda: model(long, use_cache=True, logits_to_keep=1)  # noqa: E731
                row["transformers prefill 32768 ms"] = median_ms(run, 1)
            except torch.OutOfMemoryError:
                row["transformers prefill 32768 ms"] = "out of memory"
        if "batch" in parts and name in BATCHES:
            row["transformers decode ms by batch"] = {
                b: their_decode_ms(model, ids[:, :128].expand(b, -1), 4) for b in (1, 8, 64)
            }
    if "compiled" in parts:
        try:
            row["transformers compiled decode ms"] = their_compiled_ms(model, ids)
        except Exception as e:
            row["transformers compiled decode ms"] = f"failed: {str(e)[:200]}"


def side_by_side(model: Any, their: Any, row: dict[str, Any]) -> None:
    """The prompt by both, in turn."""
    import torch

    ids = torch.randint(0, model.spec.vocab_size, (1, PROMPT), device="cuda")
    captured = model.captured(1, PROMPT)
    runs: dict[str, Callable[[], object]] = {
        "prefill": lambda: model(ids),
        "prefill captured": lambda: captured(ids),
        "transformers prefill": lambda: their(ids, use_cache=True),
    }
    with torch.inference_mode():
        taken = dict(zip(runs, in_turn(list(runs.values()), PAIRS, REST), strict=True))
    for what, ms in taken.items():
        row[f"{what} ms"] = statistics.median(ms)
    for what in ("prefill", "prefill captured"):
        ratios = [t / ms for t, ms in zip(taken["transformers prefill"], taken[what], strict=True)]
        row[f"{what} ratio"] = statistics.median(ratios)


def their_decode_ms(model: Any, ids: Any, steps: int) -> float:
    out = model(ids, use_cache=True, logits_to_keep=1)
    state = {"token": out.logits[:, -1:].argmax(-1), "cache": out.past_key_values}

    def run() -> None:
        for _ in range(steps):
            out = model(state["token"], past_key_values=state["cache"], use_cache=True)
            state["token"], state["cache"] = out.logits[:, -1:].argmax(-1), out.past_key_values

    return median_ms(run, 3) / steps


def their_compiled_ms(model: Any, ids: Any) -> float:
    """A static cache, and the forward compiled with CUDA graphs."""
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW * 8)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False)
    with torch.inference_mode():
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        state = {"token": out.logits[:, -1:].argmax(-1), "at": PROMPT}

        def run() -> None:
            for _ in range(NEW):
                at = torch.tensor([[state["at"]]], device="cuda")
                logits = step(state["token"], position_ids=at, past_key_values=cache, use_cache=True).logits
                state["token"] = logits[:, -1:].argmax(-1).clone()
                state["at"] += 1

        run()
        return median_ms(run, 3) / NEW


# --- loading ------------------------------------------------------------------------------------------------


def load_row(folder: Path) -> dict[str, Any]:
    """A canonical checkpoint of half the 8B shape, from disk to the GPU, the page cache dropped where allowed: medians of
    rounds in which each way takes its turn."""
    import safetensors.torch
    import torch

    import zoo

    file, layers, scheme = SHAPES["Llama 3.1 8B"]
    config = config_of(file, 16)
    model = our_model(config, scheme)
    write_canonical(model, folder)
    files = sorted(folder.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files)
    del model
    free()

    def cold() -> bool:
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError:
            return False
        return True

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        kept = run()
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        del kept
        free()
        return size / took / 1e9

    def read() -> None:
        buffer = bytearray(2**24)
        for f in files:
            with open(f, "rb", buffering=0) as h:
                while h.readinto(buffer):
                    pass

    ways: dict[str, Callable[[], object]] = {
        "read": read,
        "zoo.load": lambda: zoo.load(folder, device="cuda"),
        "safetensors": lambda: [safetensors.torch.load_file(f, device="cuda") for f in files],
    }
    row: dict[str, Any] = {"GB": size / 1e9, "rounds": LOADS}
    for state in ("cold", "warm"):
        if state == "cold" and not cold():  # not allowed
            continue
        rates: list[dict[str, float]] = []
        for _ in range(LOADS):
            rates.append({})
            for what, run in ways.items():
                if state == "cold":
                    cold()
                rates[-1][what] = timed(run)
        for what in ways:
            row[f"{what} GB/s, {state}"] = statistics.median(r[what] for r in rates)
        row[f"zoo.load of read, {state}"] = statistics.median(r["zoo.load"] / r["read"] for r in rates)
    return row


def write_canonical(model: Any, folder: Path) -> None:
    """The model's tensors as a canonical folder of files of about 4 GB."""
    import safetensors.torch

    shards: list[dict[str, Any]] = [{}]
    for name, t in model.state_dict().items():
        if sum(x.nbytes for x in shards[-1].values()) > 4e9:
            shards.append({})
        shards[-1][name] = t.cpu()
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        safetensors.torch.save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for s in shards for t in s.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "zoo.json").write_text(json.dumps(zoo_json(model.spec)))


def zoo_json(spec: Any) -> dict[str, Any]:
    """zoo.json of a canonical folder of random weights."""
    from zoo.layout import VERSION

    source = {
        "path": "random", "format": "safetensors", "family": spec.family, "naming": "hf", "prefix": [], "config": {}, "n_ranks": 1,
    }  # fmt: skip
    said = {"layout_version": VERSION, "zoo_version": "0", "spec": spec.to_dict(), "quant": {}}
    return said | {"source": source, "extras": {}}


# --- the run ------------------------------------------------------------------------------------------------


def versions(script: str) -> dict[str, str]:
    import torch
    import transformers
    import triton

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "transformers": transformers.__version__, "command": command(script),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def fill(row: dict[str, Any], args: argparse.Namespace, copy: float) -> None:
    """Measures both sides of one shape."""
    import torch

    name, their = row["shape"], None
    file, layers, scheme = SHAPES[name]
    config = config_of(file, layers)
    beside = not args.ours and scheme is None  # transformers would expand quantised weights first
    model = our_model(config, scheme)
    with noted(row):
        ours(model, name, args.parts, row, copy)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if (
        beside
        and "speed" in args.parts
        and 2 * weights + ROOM < torch.cuda.get_device_properties(0).total_memory
    ):
        with noted(row):
            their = their_model(config)
            side_by_side(model, their, row)
    del model
    free()
    if beside:
        with noted(row):
            theirs(their or their_model(config), name, args.parts, row)


@contextmanager
def noted(row: dict[str, Any]) -> Iterator[None]:
    """What fails is written down, and the rest goes on."""
    try:
        yield
    except Exception as e:
        row.setdefault("failed", []).append(f"{type(e).__name__}: {str(e)[-500:]}")
        traceback.print_exc()


def rows(args: argparse.Namespace, copy: float) -> Iterator[dict[str, Any]]:
    for name in args.shapes or SHAPES:
        row: dict[str, Any] = {"shape": name}
        fill(row, args, copy)
        free()
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES))
    parser.add_argument(
        "--parts", nargs="*", default=["speed"], choices=["speed", "compiled", "batch", "long", "load"]
    )
    parser.add_argument("--ours", action="store_true", help="leave transformers out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA GPU; torch sees none here.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {**versions("gpu.py"), "copy TB/s": copy_bandwidth(), "rows": []}
    free()
    print(f"{result['device']}, torch {result['torch']}, copy {result['copy TB/s']:.2f} TB/s", flush=True)
    for row in rows(args, result["copy TB/s"]):
        result["rows"].append(row)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if found := {r["shape"]: r for r in result["rows"] if "decode ms" in r and "prefill captured ms" in r}:
        print(speed(found), flush=True)
    if "load" in args.parts:
        with tempfile.TemporaryDirectory() as d:
            result["load"] = load_row(Path(d))
        print(json.dumps(result["load"]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(args.out.read_text()) if args.out.exists() else []
    args.out.write_text(json.dumps([*runs, result], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
