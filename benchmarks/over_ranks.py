"""What the benchmarks of several ranks share: start-up, waiting for each other, rows of figures, a folder, plain reads."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reading
from about import machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
THREADS, CHUNK = 8, 1 << 24
"""Of a plain read, on each rank."""


class Bench:
    """The ranks of this run, and what rank 0 writes down."""

    def __init__(self, args: argparse.Namespace, script: str) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.tiny, self.rows, self.args, self.script = args.tiny, dict[str, Any](), args, script
        self.good = True
        long = datetime.timedelta(hours=1)
        if self.tiny:
            self.device = torch.device("cpu")
            dist.init_process_group("gloo", timeout=long)
        else:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", timeout=long, device_id=self.device)
        self.mesh = init_device_mesh(self.device.type, (self.n,))
        self.side = dist.new_group(backend="gloo", timeout=long)  # to wait without keeping a GPU busy

    def put(self, what: str, value: object) -> None:
        if self.rank == 0:
            self.rows[what] = value
            print(json.dumps({what: value}), flush=True)

    def keep(self) -> None:
        """All rows so far into `--out`."""
        if self.rank == 0 and self.args.out:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            self.args.out.write_text(json.dumps({**machine(self.script), **self.rows}, indent=1) + "\n")

    def end(self) -> None:
        import torch.distributed as dist

        self.keep()
        self.wait()
        dist.destroy_process_group()

    def wait(self) -> None:
        import torch
        import torch.distributed as dist

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.side)

    def of_first(self, value: Any) -> Any:
        from zoo.together import of_first

        return of_first(value, self.side)

    def seconds(self, run: Callable[[], object], together: bool = True) -> float:
        """How long a run takes: of all ranks together, from when all are ready until all are done."""
        if together:
            self.wait()
        start = time.perf_counter()
        kept = run()
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        if together:
            self.wait()
        took = time.perf_counter() - start
        del kept
        return took

    def median_ms(self, run: Callable[[], object], rest: float = 0.0, together: bool = True) -> float:
        """Median over rounds, after two that are not counted."""
        taken = []
        for i in range((2 if self.tiny else self.args.rounds) + 2):
            time.sleep(0 if self.tiny else rest)
            took = self.seconds(run, together)
            if i >= 2:
                taken.append(took)
        return 1e3 * statistics.median(taken)

    def free(self) -> None:
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def started(args: argparse.Namespace, script: str, doc: str) -> Bench | None:
    """The ranks, if this is one of them and has a GPU where one is needed; None after saying what is missing."""
    import torch

    if "RANK" not in os.environ:
        print(doc.split("\n\n")[1], file=sys.stderr)
        return None
    if not args.tiny and torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        print(
            f"benchmarks/{script} needs a GPU for each rank; torch sees {torch.cuda.device_count()}.",
            file=sys.stderr,
        )
        return None
    bench = Bench(args, script)
    if bench.device.type == "cuda":
        bench.put("device", [torch.cuda.get_device_name(), bench.n, torch.__version__])
    return bench


def plain_read(bench: Bench, folder: Path) -> None:
    """This rank's share of the files' bytes, in runs of neighbours, from first to last."""
    pieces = reading.runs(sorted(folder.glob("*.safetensors")), bench.rank, bench.n)
    reading.seconds_of(pieces, THREADS, CHUNK)


def cold(bench: Bench) -> bool:
    """Whether the page cache could be dropped."""
    done = False
    if bench.rank == 0 and not bench.tiny and not getattr(bench.args, "warm", False):
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
            done = True
        except OSError:
            pass
    return bool(bench.of_first(done))


@contextmanager
def place(bench: Bench, tmp: Path | None) -> Iterator[Path]:
    """A folder of rank 0's making, gone at the end."""
    made = bench.of_first(tempfile.mkdtemp(prefix="zoo-mesh-", dir=tmp) if bench.rank == 0 else None)
    try:
        yield Path(made)
    finally:
        if bench.rank == 0:
            shutil.rmtree(made, ignore_errors=True)
