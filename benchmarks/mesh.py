"""A model that several GPUs share, beside one GPU in the same run.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 benchmarks/mesh.py [--parts speed large] [--warm] [--rounds N] [--tmp DIR] [--out FILE]
    torchrun --nproc-per-node 2 benchmarks/mesh.py --tiny        # on a CPU, with gloo: whether it runs, no figures

`speed`: Llama 3.1 8B, random bf16 weights on disk: load, a prompt of 2048 tokens (all logits; launched and captured) and
decode at batch 1 after it, by one GPU and by all, one after the other and one again; how far logits are apart.
`large`: the shape of Llama 3.1 70B, all layers or as many as --tmp has room for: load, generate, decode. Loads take turns
with plain reads of the same files by as many processes and threads, in the state of the page cache that is said. "of copy"
is the bytes of weights that all ranks read for a token, over the time it takes, over what device-to-device copies on all
cards at once move (bytes read plus bytes written).

Rank 0 prints a line of JSON for each figure as it comes, and appends all to --out. Exit code 2 without GPUs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import config_of, zoo_json
from over_ranks import CHUNK, Bench, cold, place, plain_read, started

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPT, NEW, ROUNDS, LOADS = 2048, 64, 9, 3
REST = 0.3  # seconds before each prompt, see gpu.py


# --- files ---------------------------------------------------------------------------------------------------


def spec_of_shape(stem: str, layers: int | None, tiny: bool) -> Any:
    from zoo.families import spec_of

    config = config_of(stem, 2 if tiny else layers)
    if tiny:
        config |= {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
                   "intermediate_size": 128, "vocab_size": 512}  # fmt: skip
    return spec_of(config)


def written(bench: Bench, spec: Any, folder: Path) -> int:
    """A canonical folder of random bf16 weights, a file for each layer, written by all ranks at once; its bytes."""
    import torch

    from zoo.layout import layout

    if bench.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    bench.wait()
    files: dict[str, list[Any]] = {}
    for slot in layout(spec).values():
        n = 0 if slot.layer is None else slot.layer + 1
        files.setdefault(f"model-{n + 1:05}-of-{spec.n_layers + 1:05}.safetensors", []).append(slot)
    pool = torch.randn(1 << (20 if bench.tiny else 27), generator=torch.Generator().manual_seed(0))
    pool = (pool * 0.02).to(torch.bfloat16)
    noise, ones = memoryview(pool.view(torch.uint8).numpy()), torch.ones(1 << 16, dtype=torch.bfloat16)  # type: ignore[arg-type]
    of_ones = memoryview(ones.view(torch.uint8).numpy())  # type: ignore[arg-type]

    def one(name: str) -> None:
        header: dict[str, Any] = {}
        at = 0
        for s in files[name]:
            header[s.name] = {"dtype": "BF16", "shape": list(s.shape), "data_offsets": [at, at + 2 * s.size]}
            at += 2 * s.size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb", buffering=0) as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for k, s in enumerate(files[name]):
                source = of_ones if "norm" in s.name else noise
                left, start = 2 * s.size, 2 * 4099 * k % (len(source) // 2)
                while left:
                    left -= f.write(source[start : start + min(left, CHUNK, len(source) - start)])
                    start = 0 if start else start + CHUNK if start + CHUNK < len(source) else 0

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(one, list(files)[bench.rank :: bench.n]))
    if bench.rank == 0:
        index = {s.name: name for name, slots in files.items() for s in slots}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
        (folder / "zoo.json").write_text(json.dumps(zoo_json(spec)))
    bench.wait()
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def loads(bench: Bench, folder: Path, size: int, what: str) -> Any:
    """The model, loaded by all ranks; and the rates of that, in turn with plain reads."""
    import zoo

    model, rates = None, dict[str, list[float]]()
    for state, rounds in (("page cache dropped", 1), ("page cache warm", 1 if bench.tiny else LOADS)):
        for _ in range(rounds):
            for way in ("plain read", "load"):
                if state == "page cache dropped" and not cold(bench):
                    break
                model = None
                bench.free()

                def load() -> None:
                    nonlocal model
                    model = zoo.load(folder, device=bench.device, mesh=bench.mesh)
                    if bench.tiny:  # mapped: read what is there
                        for p in model.parameters():
                            p.sum()

                took = bench.seconds(load if way == "load" else lambda: plain_read(bench, folder))
                rates.setdefault(f"{way} GB/s, {state}", []).append(size / took / 1e9)
    for state in ("page cache dropped", "page cache warm"):
        if f"load GB/s, {state}" in rates:
            pairs = zip(rates[f"load GB/s, {state}"], rates[f"plain read GB/s, {state}"], strict=True)
            bench.put(f"{what}: load over plain read, {state}", statistics.median(a / b for a, b in pairs))
    bench.put(f"{what}: rates", rates)
    return model


# --- speed ---------------------------------------------------------------------------------------------------


def prompt_of(bench: Bench, spec: Any, length: int) -> Any:
    import torch

    g = torch.Generator().manual_seed(0)
    return torch.randint(spec.vocab_size, (1, length), generator=g).to(bench.device)


def decode_ms(bench: Bench, model: Any, prompt: Any, together: bool) -> float:
    """A step at batch 1 after the prompt; captured, on a GPU."""
    import torch

    from zoo.model.graph import Step, capturable

    cache = model.cache(1, prompt.shape[1] + NEW * (bench.args.rounds + 4))
    with torch.inference_mode():
        model.finish(model.run(prompt, cache)[:, -1:])
        if bench.device.type == "cuda" and not capturable(model, 1):
            raise RuntimeError("a step of this model cannot be captured")
        step = Step(model, cache, 1) if capturable(model, 1) else None
        token = prompt[:, 0]

        def run() -> None:
            nonlocal token
            for _ in range(NEW):
                if step is not None:
                    step(step.best)
                else:
                    token = model.finish(model.run(token[:, None], cache))[:, -1].argmax(-1)

        return bench.median_ms(run, together=together) / NEW


def speeds(bench: Bench, model: Any, who: str, together: bool) -> dict[str, float]:
    prompt = prompt_of(bench, model.spec, 64 if bench.tiny else PROMPT)
    found = {"prefill ms": bench.median_ms(lambda: model(prompt), REST, together)}
    captured = model.captured(*prompt.shape)
    found["prefill captured ms"] = bench.median_ms(lambda: captured(prompt), REST, together)
    del captured
    bench.free()
    found["decode ms"] = decode_ms(bench, model, prompt, together)
    bench.free()
    for what, ms in found.items():
        bench.put(f"{who}: {what}", ms)
    return found


def read_for_a_token(model: Any) -> int:
    """Bytes of a dense model's weights that a rank reads for a token: all but the embedding, unless it is the head."""
    return sum(p.nbytes for n, p in model.named_parameters() if n != "embed.weight" or model.spec.tied)


def summed(bench: Bench, value: float) -> float:
    import torch
    import torch.distributed as dist

    x = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(x, group=bench.side)
    return float(x)


def copy_bandwidth(bench: Bench) -> float:
    """TB/s that device-to-device copies move, of all cards at once."""
    from gpu import copy_bandwidth as of_this_card

    bench.wait()
    found = of_this_card() if bench.device.type == "cuda" else 0.0
    bench.free()
    return summed(bench, found)


def of_copy(bench: Bench, model: Any, ms: float, copy: float) -> float | None:
    """The share of `copy` TB/s, of all cards, that a step of so many ms takes for its weights; None on a CPU."""
    read = summed(bench, read_for_a_token(model))
    return read / ms / 1e9 / copy if copy else None


def sum_us(bench: Bench, d: int) -> float:
    """Microseconds of a sum of [1, 1, d] over ranks, as decode has two of for each layer; captured, on a GPU."""
    import torch

    from zoo.model.across import Across

    across, x, n = Across(bench.mesh), torch.zeros(1, 1, d, dtype=torch.bfloat16, device=bench.device), 64
    across.meet()

    def run() -> None:
        for _ in range(n):
            across.sum(x)

    if bench.device.type != "cuda":
        return bench.median_ms(run) * 1e3 / n
    run()
    graph = torch.cuda.CUDAGraph()
    bench.wait()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return bench.median_ms(graph.replay) * 1e3 / n


def speed(bench: Bench, tmp: Path) -> None:
    import torch

    import zoo

    spec, folder = spec_of_shape("llama-3.1-8b", None, bench.tiny), tmp / "speed"
    size = written(bench, spec, folder)
    bench.put("8B: GB", size / 1e9)
    bench.put("sum over ranks us", sum_us(bench, spec.d_model))
    copy = copy_bandwidth(bench)
    bench.put("copy TB/s, all cards", copy)
    prompt, whole, one = prompt_of(bench, spec, 64), None, dict[str, float]()
    if bench.rank == 0:
        alone = zoo.load(folder, device=bench.device)
        whole = alone(prompt).float()
        one = speeds(bench, alone, "8B, one", together=False)
        del alone
        bench.free()
    bench.wait()
    model = loads(bench, folder, size, "8B")
    logits = model(prompt).float()
    all_of = speeds(bench, model, f"8B, {bench.n} ranks", together=True)
    same = [x.cpu() for x in bench_gather(bench, logits.cpu())]
    bench.put("8B: all ranks have the same bits", all(torch.equal(same[0], x) for x in same))
    share = of_copy(bench, model, all_of["decode ms"], copy)
    if bench.rank == 0:
        assert whole is not None
        error = (whole - logits).abs()
        bench.put("8B: |logit difference| p50, max, largest logit", [float(error.median()), float(error.max()), float(whole.abs().max())])  # fmt: skip
        bench.put("8B: top-1 agreement", float((whole.argmax(-1) == logits.argmax(-1)).float().mean()))
        bench.put("8B: decode of copy, all ranks", share)
    del model
    bench.free()
    bench.wait()
    if bench.rank == 0:
        again = speeds(bench, zoo.load(folder, device=bench.device), "8B, one again", together=False)
        for what in one:
            bench.put(
                f"8B: {what}, one over {bench.n} ranks",
                statistics.mean((one[what], again[what])) / all_of[what],
            )
        bench.free()
    bench.wait()
    if bench.rank == 0:
        shutil.rmtree(folder)


def bench_gather(bench: Bench, x: Any) -> list[Any]:
    import torch
    import torch.distributed as dist

    found = [torch.empty_like(x) for _ in range(bench.n)]
    dist.all_gather(found, x.contiguous(), group=bench.side)
    return found


def large(bench: Bench, tmp: Path) -> None:
    import torch

    whole = spec_of_shape("llama-3.1-70b", None, bench.tiny)
    from zoo.layout import layout

    of_layers = [2 * sum(s.size for s in layout(whole).values() if s.layer == i) for i in (None, 0)]
    room = bench.of_first(0.85 * shutil.disk_usage(tmp).free)
    layers = min(whole.n_layers, bench.args.layers or int((room - of_layers[0]) // of_layers[1]))
    spec, folder = spec_of_shape("llama-3.1-70b", layers, bench.tiny), tmp / "large"
    start = time.perf_counter()
    size = written(bench, spec, folder)
    bench.put("70B: layers, GB, seconds to write", [spec.n_layers, size / 1e9, time.perf_counter() - start])
    model = loads(bench, folder, size, "70B")
    copy = copy_bandwidth(bench)
    ids = prompt_of(bench, spec, 16)
    took = bench.seconds(lambda: bench.put("70B: generated", model.generate(ids, 32)[0, 16:].tolist()))
    bench.put("70B: seconds of a prompt of 16 and 32 tokens", took)
    prompt = prompt_of(bench, spec, 64 if bench.tiny else PROMPT)
    bench.put("70B: prefill ms", bench.median_ms(lambda: model(prompt), REST))
    ms = decode_ms(bench, model, prompt, together=True)
    bench.put("70B: decode ms", ms)
    bench.put("70B: decode of copy, all ranks", of_copy(bench, model, ms, copy))
    if bench.device.type == "cuda":
        bench.put("70B: GB held by a rank", torch.cuda.max_memory_allocated() / 1e9)
    del model
    bench.free()
    bench.wait()
    if bench.rank == 0:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts: dict[str, Callable[[Bench, Path], None]] = {"speed": speed, "large": large}
    parser.add_argument("--parts", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with gloo")
    parser.add_argument("--warm", action="store_true", help="leave the page cache alone")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="that medians are of (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, help="of the 70B shape; default: what --tmp has room for")
    parser.add_argument("--tmp", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = started(args, "mesh.py", __doc__ or "")
    if bench is None:
        return 2
    with place(bench, args.tmp) as tmp:
        for name in args.parts:
            parts[name](bench, tmp)
    bench.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
