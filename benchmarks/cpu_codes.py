"""Decoding carried codes on a CPU, beside the same model in bf16, the two taken in turn.

    python benchmarks/cpu_codes.py [--threads 2] [--pairs 7] [--only awq4-group128 ...]

Random weights of the 1.7B shape and of experts, 6 layers, and of the 8B shape, 2 layers, with a vocabulary of 4,096, so that nearly all
that a token reads is quantised. What is not read from memory (launching, norms, attention) weighs more where layers are small. Of each scheme
the median of the pairs' ratios, beside the ratio of the bytes that a token reads. `widened`: each matrix is made bf16 first, as
it is without numba. Results go to benchmarks/results/cpu-codes.json, unless only some schemes are asked for.
"""

from __future__ import annotations

import argparse
import datetime
import json
from typing import Any

from about import command
from cpu import ROOT, SHAPES, device, our_model, pairs
from gpu import active_bytes

NEW, PROMPT = 24, 1
SCHEMES = (
    "fp8-block", "fp8-channel", "int8-channel", "gptq8-group128", "mlx8-group64", "int4-group128", "int4-group32", "mxfp4", "nvfp4",
    "gptq4-group128", "awq4-group128", "packed4-group32-zeros", "mlx4-group64", "mlx4-group32",
)  # fmt: skip
DENSE, EXPERTS = SHAPES
LARGE = "dense, 8B shape, 2 layers"
MORE = {"vocab_size": 4096, "num_hidden_layers": 6}
OF_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="SCHEME", help="print these alone, of the 1.7B shape")
    args = parser.parse_args()
    import torch

    from zoo.model.linear import Weights

    torch.set_num_threads(args.threads)
    rows = []
    shapes = (
        (DENSE, SHAPES[DENSE] | MORE, args.only or SCHEMES),
        (LARGE, SHAPES[DENSE] | MORE | OF_8B, SCHEMES),
        (EXPERTS, SHAPES[EXPERTS] | MORE, ("fp8-block", "int4-group128", "nvfp4", "awq4-group128")),
    )
    for shape, config, schemes in shapes[:1] if args.only else shapes:
        plain = our_model(config)
        ids = torch.randint(0, config["vocab_size"], (1, PROMPT))

        def decode(model: Any, ids: Any = ids, new: int = NEW) -> None:
            for _ in model.stream(ids, new):
                pass

        for scheme in schemes:
            model = our_model(config, scheme)
            x, y, ratio = pairs(lambda m=model: decode(m), lambda p=plain: decode(p), args.pairs)
            of_bytes = active_bytes(plain) / active_bytes(model)
            coded = Weights.coded
            Weights.coded = lambda *_: None  # type: ignore[assignment, method-assign]
            try:
                widened = pairs(lambda m=model: decode(m, new=2), lambda p=plain: decode(p, new=2), 1)[0]
            finally:
                Weights.coded = coded  # type: ignore[method-assign]
            rows.append({
                "what": f"{shape.rpartition(',')[0]}: {scheme}", "ms per token": x / NEW, "bf16, ms": y / NEW, "faster": ratio,
                "bytes of bf16": of_bytes, "GB/s": active_bytes(model) / x * NEW / 1e6, "widened, ms": widened / 2,
            })  # fmt: skip
            print(
                f"{rows[-1]['what']:45} {x / NEW:7.2f} ms, bf16 {y / NEW:7.2f}: {ratio:.2f}x (bytes {of_bytes:.2f}x); "
                f"widened {widened / 2:.1f}",
                flush=True,
            )
    if args.only:
        return
    out = ROOT / "benchmarks/results/cpu-codes.json"
    result = {
        "device": device(True), "threads": args.threads, "torch": torch.__version__, "command": command("cpu_codes.py"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "rows": rows,
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
