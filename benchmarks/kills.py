"""What writes folders, stopped at any moment, on a disk that others fill, and twice at once: what has the final name is whole.

    python benchmarks/kills.py [--kills 60] [--full 10] [--races 20] [--ways convert merge]

Runs are forked from this process, which has imported everything: a SIGKILL lands in zoo's work, not in Python's start. In a round up to
five are killed at random moments, then one may end; its bytes are held against those of a run that nothing disturbed, and so is
whatever has the final name after each kill. Disks that fill up are of memory, which takes root. Pulling: `pull.py kills`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from about import machine
from convert import dense, write
from safetensors.torch import load_file, save_file

import zoo
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping import execute
from zoo.mapping.parts import Part
from zoo.mapping.plan import make_plan

PARTS = 3
UUID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
Way = list[Callable[[Path], object]]
"""A process each; all of them make one folder."""


def ways(work: Path, gb: float) -> dict[str, Way]:
    source, canon, adapter = work / "source", work / "canon", work / "adapter"
    write(source, *dense(gb, hidden_size=1024, intermediate_size=2048, vocab_size=8192), shard=gb * 1e9 / 4)
    plan = make_plan(open_checkpoint(source))
    zoo.convert(source, canon)
    hidden = plan.spec.d_model
    lora = {
        f"base_model.model.model.layers.{i}.mlp.up_proj.lora_{half}.weight": torch.randn(shape).bfloat16()
        for i in range(plan.spec.n_layers)
        for half, shape in (("A", (4, hidden)), ("B", (_rows(plan, i), 4)))
    }
    adapter.mkdir()
    save_file(lora, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(told))
    state = {k: t for f in sorted(source.glob("*.safetensors")) for k, t in load_file(f).items()}

    def part(k: int) -> Callable[[Path], object]:
        how = Part(k, PARTS, together=True)
        return lambda dst: execute.convert(plan, dst, shard_size=plan.nbytes // 7, part=how, threads=1)

    return {
        "convert": [lambda dst: zoo.convert(source, dst)],
        "parts": [part(k + 1) for k in range(PARTS)],
        "merge": [lambda dst: zoo.merge(canon, adapter, dst)],
        "save": [lambda dst: zoo.save(state, like=canon, to=dst)],
        **{
            f"export {f}": [lambda dst, f=f: zoo.export(canon, dst, f)]
            for f in ("hf", "source", "gguf", "dcp")
        },  # type: ignore[misc]
    }


def _rows(plan: Any, layer: int) -> int:
    return int(plan.checkpoint.tensors[f"model.layers.{layer}.mlp.up_proj.weight"].shape[0])


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, or of a file. torch gives each of its checkpoints a number of its own."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        str(p.relative_to(path)): hashlib.sha256(UUID.sub(b"", p.read_bytes())).hexdigest() for p in files
    }


def start(call: Callable[[Path], object], dst: Path, errors: Path) -> int:
    """The number of a process that does it: it ends with 0, with 1 for a ZooError, with 3 for anything else."""
    if pid := os.fork():
        return pid
    code = 0
    try:
        call(dst)
    except ZooError:
        code = 1
    except BaseException:
        with errors.open("a") as f:
            traceback.print_exc(file=f)
        code = 3
    os._exit(code)


def ended(pid: int) -> int:
    """Its exit code; below 0 for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_rest(way: Way, dst: Path, errors: Path) -> list[int]:
    return [ended(p) for p in [start(call, dst, errors) for call in way]]


class Campaign:
    def __init__(self, way: Way, work: Path, seed: int, name: str) -> None:
        self.way, self.dst, self.errors, self.chance = way, work / name, work / "errors", random.Random(seed)
        began = time.monotonic()
        codes = at_rest(way, self.dst, self.errors)
        self.length, self.want = time.monotonic() - began, hashes(self.dst)
        self.nbytes = sum(p.stat().st_size for p in (self.dst, *self.dst.rglob("*")) if p.is_file())
        assert codes == [0] * len(way), (codes, self.errors.exists() and self.errors.read_text())
        self.figures = {
            "seconds": round(self.length, 2),
            "half_made": 0,
            "different": 0,
            "left_over": 0,
            "other_errors": 0,
        }
        self.clear()

    def clear(self) -> None:
        for path in self.dst.parent.glob("*dst*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def count(self, what: str, n: int = 1) -> None:
        self.figures[what] = self.figures.get(what, 0) + n

    def look(self) -> None:
        """After a run that did not end: absent, or whole."""
        self.count("half_made", os.path.lexists(self.dst) and hashes(self.dst) != self.want)

    def end(self) -> None:
        """A run that nothing stops gives the same bytes, and leaves nothing beside them."""
        if (
            not self.dst.exists() or len(self.way) > 1
        ):  # of parts the last may have been killed before it had tidied up
            codes = at_rest(self.way, self.dst, self.errors)
            self.count("different", codes != [0] * len(self.way))
        self.count("different", not self.dst.exists() or hashes(self.dst) != self.want)
        self.count("left_over", [p.name for p in self.dst.parent.glob("*dst*")] != [self.dst.name])
        self.clear()

    def kills(self, most: int) -> None:
        while self.figures.get("kills", 0) < most:
            for _ in range(5):
                pids = [start(call, self.dst, self.errors) for call in self.way]
                time.sleep(self.chance.uniform(0, self.length))
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                codes = [ended(p) for p in pids]
                self.count("kills", sum(c < 0 for c in codes))
                self.count("other_errors", sum(c > 1 for c in codes))
                self.look()
                if self.dst.exists():
                    break
            self.end()

    def full(self, rounds: int) -> None:
        """Its disk is filled by somebody else at a random moment, and emptied again."""
        fill = self.dst.parent / "somebody-elses"
        for _ in range(rounds):
            pids = [start(call, self.dst, self.errors) for call in self.way]
            time.sleep(self.chance.uniform(0, self.length))
            with contextlib.suppress(OSError), fill.open("wb", buffering=0) as f:
                while f.write(bytes(1 << 20)):
                    pass
            codes = [ended(p) for p in pids]
            self.count("full", sum(c == 1 for c in codes))
            self.count("other_errors", sum(c not in (0, 1) for c in codes))
            self.look()
            fill.unlink()
            self.end()

    def races(self, rounds: int) -> None:
        for _ in range(rounds):
            pids = []
            for call in [*self.way, *self.way]:
                pids.append(start(call, self.dst, self.errors))
                time.sleep(self.chance.uniform(0, self.length / 4))
            codes = [ended(p) for p in pids]
            self.count("races")
            self.count("other_errors", sum(c not in (0, 1) for c in codes))
            self.end()


@contextlib.contextmanager
def small_disk(at: Path, nbytes: int) -> Any:
    """A file system of memory of that size; None where it may not be made."""
    at.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", at], stderr=subprocess.DEVNULL
    )
    try:
        yield at if made.returncode == 0 else None
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", at], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="*", metavar="WAY")
    parser.add_argument("--kills", type=int, default=60, help="of each way")
    parser.add_argument("--full", type=int, default=10)
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--seed", type=int, default=27)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for n, (name, way) in enumerate(ways(work, args.mb / 1000).items()):
            if args.ways and name not in args.ways:
                continue
            (place := work / f"at{n}").mkdir()
            campaign = Campaign(way, place, args.seed, "dst.gguf" if "gguf" in name else "dst")
            campaign.kills(args.kills)
            campaign.races(args.races)
            with small_disk(work / f"disk{n}", 2 * campaign.nbytes + (16 << 20)) as disk:
                if disk is not None:
                    campaign.dst = disk / campaign.dst.name
                    campaign.full(args.full)
            figures[name] = campaign.figures
            print(f"{name}: {campaign.figures}", flush=True)
            if campaign.errors.exists():
                print(campaign.errors.read_text()[-2000:], flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures | {"machine": machine("kills.py")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
