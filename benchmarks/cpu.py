"""Speed on a CPU, beside transformers: dense and mixture-of-experts shapes in bf16, the two taken in turn.

    python benchmarks/cpu.py [--threads 2] [--pairs 5] [--without-amx]

Random weights (the same number of threads and tokens on both sides). Each figure is the median over pairs of
runs that follow each other, and the ratio is the median of the pairs' ratios, so that a noisy neighbour hits
both. Of a prompt each side's share of the rate of one large product is given: more than 1 / transformers' share no
implementation can be faster. `--without-amx`: neither side uses the CPU's AMX, as on one that has AVX-512's bf16 only. Results are
appended to benchmarks/results/cpu.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from about import command, cpu, machine
from gpu import active_bytes
from random_codes import components

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPT, NEW = 256, 16
QWEN = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 32768, "head_dim": 128, "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "dense, 1.7B shape, 2 layers": QWEN | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8,
    },
    "64 experts of 768, top 8, 2 layers": QWEN | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 64,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "output_router_logits": False,
    },
}  # fmt: skip


def our_model(config: dict[str, Any], scheme: str | None = None) -> Any:
    """A decoder with random weights, quantised where a release would be."""
    import torch

    from zoo.families import spec_of
    from zoo.model import Decoder

    model = Decoder(spec_of(config))
    for name, m in model.matrices() if scheme else ():
        if "router" not in name and name != "head":
            *lead, _, k = m.weight.shape
            m.quantise(scheme, components(scheme, m.parts, k, *lead))
    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        t = torch.empty(p.shape, dtype=torch.bfloat16)
        t = t.fill_(1.0) if "norm" in name else t.normal_(0, 0.02)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(t, requires_grad=False))
    return model


def their_model(config: dict[str, Any]) -> Any:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "config.json").write_text(json.dumps(config))
        c = transformers.AutoConfig.from_pretrained(d)
    return transformers.AutoModelForCausalLM.from_config(c, dtype=torch.bfloat16).eval()


def pairs(ours: Callable[[], object], theirs: Callable[[], object], times: int) -> tuple[float, float, float]:
    """Medians in ms, and the median ratio theirs / ours."""

    def once(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    once(ours), once(theirs)
    taken = [(once(ours), once(theirs)) for _ in range(times)]
    a, b = zip(*taken, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in taken)


def product_rate(rows: int, n: int, times: int) -> float:
    """GB/s of weights that torch's bf16 product of `rows` rows with a weight [n, 2048] reads."""
    import torch

    w, x = torch.randn(n, 2048).bfloat16(), torch.randn(rows, 2048).bfloat16()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        taken.append(time.perf_counter() - start)
    return w.nbytes / statistics.median(taken) / 1e9


def device(amx: bool) -> str:
    """The processor, what it multiplies bf16 with, and how many cores there are."""
    m = machine("cpu.py")
    flags = cpu("flags").split()
    named = {"avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX"}
    has = [name for flag, name in named.items() if flag in flags]
    what = f" with {', '.join(has[:-1])} and {has[-1]}" if len(has) > 1 else ""
    unused = ", which is not used" if "AMX" in has and not amx else ""
    return f"{m['cpu']}{what}{unused}, a machine of {m['cores']} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--without-amx", action="store_true")
    args = parser.parse_args()
    if args.without_amx:  # oneDNN reads it when torch is imported
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    import torch
    import transformers

    if args.without_amx:
        from zoo.kernels.cpu import tiles

        tiles.available = lambda: False
    numba = version("numba") if importlib.util.find_spec("numba") else None
    torch.set_num_threads(args.threads)
    rows = []
    limit, most = product_rate(1, 65536, 9), product_rate(PROMPT, 6144, 15)
    for name, config in SHAPES.items():
        ours, theirs = our_model(config), their_model(config)
        ids = torch.randint(0, config["vocab_size"], (1, PROMPT))

        def decode_ours(ours: Any = ours, ids: Any = ids) -> None:
            for _ in ours.stream(ids[:, :8], NEW):
                pass

        def decode_theirs(theirs: Any = theirs, ids: Any = ids) -> None:
            theirs.generate(ids[:, :8], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

        def prefill_theirs(theirs: Any = theirs, ids: Any = ids) -> None:
            with torch.inference_mode():
                theirs(ids)

        for what, a, b in (
            (f"prefill of {PROMPT}", lambda ours=ours, ids=ids: ours(ids), prefill_theirs),
            (f"decode of {NEW}", decode_ours, decode_theirs),
        ):
            x, y, ratio = pairs(a, b, args.pairs)
            rows.append({"what": f"{name}: {what}", "zoo ms": x, "transformers ms": y, "ratio": ratio})
            if what.startswith("decode"):  # its prompt of 8 is another pass, of more rows
                rows[-1]["GB/s"] = active_bytes(ours) / (x / NEW) / 1e6
                rows[-1]["GB/s of one product"] = limit
            else:
                for side, taken in (("zoo", x), ("transformers", y)):
                    rows[-1][f"{side} of one product's rate"] = active_bytes(ours) / taken / 1e6 / most
            print(
                f"{rows[-1]['what']:55} zoo {x:8.0f} ms  transformers {y:8.0f} ms  {ratio:.2f}x", flush=True
            )
    out = ROOT / "benchmarks/results/cpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "device": device(not args.without_amx), "threads": args.threads, "torch": torch.__version__,
        "transformers": transformers.__version__, "numba": numba, "command": command("cpu.py"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "rows": rows,
    }  # fmt: skip
    runs = json.loads(out.read_text()) if out.exists() else []
    out.write_text(json.dumps([*runs, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
