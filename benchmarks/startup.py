"""How long the command line takes to start, beside `python -c "import click"`.

    python benchmarks/startup.py [--rounds 15] [--json FILE]

Medians of interleaved runs, in the interpreter that runs this file. And how long `zoo plan` takes of a checkpoint
with the 92,000 headers of DeepSeek-V3's release, over holes (needs tests/ beside this folder, and torch); and what the
largest headers cost that are read, of a processor and by the clock. --before names another checkout, whose `zoo list` is run in turn with this one's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from about import machine

ROOT = Path(__file__).resolve().parents[1]
CLICK = [sys.executable, "-c", "import click"]
ZOO = [sys.executable, "-c", "from zoo.cli import main; main()"]  # what the installed script runs
COMMANDS = {
    "import click": CLICK,
    "zoo --help": [*ZOO, "--help"],
    "zoo list": [*ZOO, "list"],
    "zoo show qwen3-8b": [*ZOO, "show", "qwen3-8b"],
    "zoo show qwen3-8b llama-3.1-8b": [*ZOO, "show", "qwen3-8b", "llama-3.1-8b"],
}


def measure(rounds: int, before: Path | None = None) -> dict[str, Any]:
    runs = {name: (command, ROOT) for name, command in COMMANDS.items()}
    if before is not None:
        runs["zoo list, before"] = (COMMANDS["zoo list"], before)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(rounds + 1):
        for name, (command, root) in runs.items():
            env = os.environ | {"PYTHONPATH": str(root)}
            began = time.perf_counter()
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
            if n:  # the first round fills caches
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    return {name: {"ms": 1000 * s, "times_click": s / median["import click"]} for name, s in median.items()}


def plan(rounds: int) -> dict[str, Any]:
    """Median seconds of `zoo plan`, start-up included."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny

    from zoo.testing.names import holes

    config = json.loads((ROOT / "manifests/configs/deepseek-v3.config.json").read_text())
    env, taken = os.environ | {"PYTHONPATH": str(ROOT)}, []
    with tempfile.TemporaryDirectory() as tmp:
        tensors = tiny.released_tensors(config, mtp=1, quantised=True)
        source = holes(Path(tmp), config, tensors)
        for _ in range(rounds):
            began = time.perf_counter()
            subprocess.run([*ZOO, "plan", str(source)], env=env, check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - began)
    return {"tensors": len(tensors), "seconds": statistics.median(taken), "goal": 3.0}


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 512,
}  # fmt: skip


def large() -> dict[str, str]:
    """Headers at the limits of what is read: of 262,144 tensors, and of 100 MB of keys that are each another."""
    tensors = ",".join(
        f'"model.layers.{i}.w":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(1 << 18)
    )
    keys = ",".join(f'"{i:056}":0' for i in range(100 * 10**6 // 61))[: 100 * 10**6]
    few = ",".join(f'"{i:0100}":0' for i in range(100 * 10**6 // 105))
    return {
        "262,144 tensors": f"{{{tensors}}}",
        "100 MB of keys, more than are read": f"{{{keys}}}",
        "100 MB of keys": f'{{"__metadata__":{{{few}}}}}',
    }


def cost(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Of one run, which may refuse what it is given."""
    began = time.perf_counter()
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    return {
        "exit": os.waitstatus_to_exitcode(status), "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "s": round(time.perf_counter() - began, 2),
    }  # fmt: skip


def limits(rounds: int) -> dict[str, Any]:
    """What the largest headers cost, and beside them a small one: medians."""
    env, out = os.environ | {"PYTHONPATH": str(ROOT)}, {}
    for name, header in {
        "one tensor": '{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        **large(),
    }.items():
        with tempfile.TemporaryDirectory() as tmp:
            (Path(tmp) / "config.json").write_text(json.dumps(LLAMA))
            raw = header.encode()
            (Path(tmp) / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
            for command in ("inspect", "plan"):
                taken = [cost([*ZOO, command, tmp], env) for _ in range(rounds)]
                out[f"zoo {command}, {name}"] = {k: statistics.median(t[k] for t in taken) for k in taken[0]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = measure(args.rounds, args.before)
    for name, f in figures.items():
        print(f"{name:32} {f['ms']:6.0f} ms  {f['times_click']:.2f}x")
    planned = plan(max(3, args.rounds // 3))
    print(f"zoo plan, {planned['tensors']:,} tensors: {planned['seconds']:.2f} s")
    largest = limits(max(1, args.rounds // 5))
    for name, f in largest.items():
        print(f"{name:50} {f['cpu_s']:5.2f} s of a processor, {f['s']:5.2f} s, exit {f['exit']:.0f}")
    if args.json:
        about = {"figures": figures, "plan": planned, "limits": largest, "machine": machine("startup.py")}
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
