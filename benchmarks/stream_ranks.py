"""What streaming and loading are made of, on one GPU and on several: copying from files, passes over layers, `zoo.load(mesh=)`.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 benchmarks/stream_ranks.py [--parts copying streaming loading] [--layers 12]
        [--buffers 4] [--readers 16] [--cold] [--tmp DIR | --kept DIR] [--out FILE]
    torchrun --nproc-per-node 2 benchmarks/stream_ranks.py --tiny        # on a CPU, with gloo: whether it runs, no figures

So many layers of the shape of Llama 3.1 70B, of random bf16 weights, as a release and as the canonical folder made of it.

`copying`: GB/s of `zoo.model.upload` from these files to one GPU, and to all at once; the same while the main
thread starts small kernels, and how many of these a second beside how many without; and of threads that read and copy nowhere.
`streaming`: `zoo.verify` up to logits in bf16, by one GPU and by all, in turn; the first of each loads kernels. Seconds of a
layer, by phase, are medians without the first and the last; "brought" is from asking for a layer until its bytes are there.
`loading`: the folder by all ranks, in turn with plain reads of the same files (of 8 threads on each), warm, and with --cold from the
disk too; and rank 0's phases.

--buffers (MiB) and --readers: several are tried one after the other. Needs tests/ beside it, and transformers. Rank 0 prints
lines of JSON, and writes all to --out. Exit code 1 if a verdict is not "passed", 2 without GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import reading
from over_ranks import Bench, cold, place, plain_read, started

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SPAN, COPIED = 1 << 28, 4 << 30
"""Bytes of a weight, about; and bytes that a rank copies to see how fast that goes."""
TINY = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def made(bench: Bench, folder: Path) -> Path:
    """A release of these layers, and its canonical folder; the latter."""
    from gpu import config_of
    from gpu_verify import written

    import zoo

    if bench.rank == 0 and not (folder / "canonical").is_dir():
        config = config_of("llama-3.1-70b", bench.args.layers) | (TINY if bench.tiny else {})
        began = time.perf_counter()
        size = written(config, folder / "source")
        zoo.convert(folder / "source", folder / "canonical")
        bench.put(
            "layers, GB of the release, seconds to make",
            [bench.args.layers, size / 1e9, time.perf_counter() - began],
        )
    bench.wait()
    return folder / "canonical"


def variants(bench: Bench) -> Iterator[str]:
    """Sets the size of buffers and the number of threads; what they are."""
    from zoo.model import upload
    from zoo.verify import carrying

    for mib, readers in itertools.product(bench.args.buffers, bench.args.readers):
        upload.READERS, upload.BUFFER = readers, mib << 20
        carrying.READERS = carrying.MOST_READERS = readers
        carrying.BUFFER = mib << 20
        yield f"{readers} threads, buffers of {mib} MiB"


# --- copying -------------------------------------------------------------------------------------------------


def spans(bench: Bench, folder: Path) -> list[tuple[Path, int]]:
    """Parts of files, of other bytes on each rank as far as there are others."""
    found = [
        (file, at)
        for file in sorted(folder.parent.glob("*/*.safetensors"))
        for at in range(0, file.stat().st_size - SPAN, SPAN)
    ]
    own = found[bench.rank :: bench.n]
    return own[: COPIED // SPAN]


def copied(bench: Bench, parts: list[tuple[Path, int]], together: bool, busy: bool) -> tuple[float, float]:
    """Seconds of copying, and small kernels that the main thread started a second."""
    import torch

    from zoo.model import upload

    lanes = upload.Lanes(torch.cuda.Stream(bench.device), upload.READERS, upload.BUFFER)
    into = torch.empty(SPAN, dtype=torch.uint8, device=bench.device)
    step = max(1, -(-SPAN // upload.BUFFER // lanes.readers)) * upload.BUFFER
    cuts = range(0, SPAN, step)

    def copy(some: list[tuple[Path, int]]) -> float:
        runs = [lanes.fill(path, at + x, into[x : x + step], torch.uint8) for path, at in some for x in cuts]
        kernels = small_kernels(lambda: all(r.done() for r in runs[-8:])) if busy else 0.0
        for r in runs:
            r.result()
        lanes.stream.synchronize()
        return kernels

    copy(parts[:2])  # buffers are made
    kernels = 0.0

    def timed() -> None:
        nonlocal kernels
        kernels = copy(parts)

    took = bench.seconds(timed, together)
    lanes.close()
    return took, kernels


def small_kernels(until: Callable[[], bool]) -> float:
    """How many a second are started, until that is so."""
    import torch

    x, n, began = torch.zeros(16, device="cuda"), 0, time.perf_counter()
    while not until():
        for _ in range(100):
            x.add_(1)
        n += 100
    return n / (time.perf_counter() - began)


def copying(bench: Bench, folder: Path) -> None:
    import torch

    if bench.tiny:
        return
    parts = spans(bench, folder)
    pieces = [(path, at, at + SPAN) for path, at in parts]
    size = len(parts) * SPAN / 1e9
    pinned = torch.empty(SPAN, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(SPAN, dtype=torch.uint8, device=bench.device)

    def pure() -> None:
        for _ in range(20):
            there.copy_(pinned, non_blocking=True)

    pure()
    bench.put("pinned memory to all GPUs at once, GB/s", bench.n * 20 * SPAN / 1e9 / bench.seconds(pure))
    if bench.rank == 0:
        alone = bench.seconds(pure, together=False)
        bench.put("pinned memory to one GPU, GB/s", 20 * SPAN / 1e9 / alone)
        end = time.perf_counter() + 0.3
        bench.put("small kernels a second", small_kernels(lambda: time.perf_counter() > end))
    bench.wait()
    for mib, threads in itertools.product(bench.args.buffers, bench.args.readers):
        if bench.rank == 0:
            took = min(reading.seconds_of(pieces, threads, mib << 20) for _ in range(2))
            bench.put(f"read by one process, {threads} threads, {mib} MiB each, GB/s", size / took)
    bench.wait()
    for what in variants(bench):
        row: dict[str, Any] = {}
        if bench.rank == 0:
            row["one, GB/s"] = size / copied(bench, parts, False, False)[0]
            took, kernels = copied(bench, parts, False, True)
            row |= {"one beside kernels, GB/s": size / took, "kernels a second": kernels}
        bench.wait()
        row["all, GB/s"] = bench.n * size / copied(bench, parts, True, False)[0]
        bench.put(f"copied: {what}", row)


# --- streaming -----------------------------------------------------------------------------------------------


class Phases:
    """What a pass spends on each layer. `exact`: who brings a layer waits for the GPU, too."""

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.clocks: list[Any] = []
        self.layers: list[dict[str, float]] = []
        self.brought: list[float] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        from zoo.verify import run
        from zoo.verify.carrying import Carrier
        from zoo.verify.reading import Window

        settings, let_go, bring = run.Settings, Window.let_go, Carrier._bring

        def made(*args: Any) -> Any:
            found = settings(*args)
            self.clocks.append(found.clock)
            return found

        def left(window: Window) -> None:
            with self.clocks[-1]("the next"):  # what is under way is counted up to here
                pass
            self.layers.append({"at": time.perf_counter()} | self.clocks[-1].seconds)
            let_go(window)

        def brought(carrier: Any, coming: Any) -> None:
            began = time.perf_counter()
            bring(carrier, coming)
            if self.exact:
                carrier.copying.synchronize()
                carrier.joining.synchronize()
            self.brought.append(time.perf_counter() - began)

        run.Settings, Window.let_go, Carrier._bring = made, left, brought  # type: ignore[assignment, misc, method-assign]
        try:
            yield
        finally:
            run.Settings, Window.let_go, Carrier._bring = settings, let_go, bring  # type: ignore[misc, method-assign]

    def of_a_layer(self) -> dict[str, float]:
        """Medians."""
        steps = [
            {k: v - a.get(k, 0.0) for k, v in b.items()} for a, b in itertools.pairwise(self.layers[1:-1])
        ]
        names = dict.fromkeys(k for s in steps for k in s)
        found = {
            "a layer" if k == "at" else k: statistics.median(s.get(k, 0.0) for s in steps) for k in names
        }
        found = {k: round(v, 4) for k, v in found.items() if v > 1e-4}
        if self.brought[2:]:
            found["brought"] = round(statistics.median(self.brought[1:-1]), 4)
        return found


def streaming(bench: Bench, folder: Path) -> None:
    import zoo
    from zoo.verify import certificate

    if bench.args.no_hashes:
        certificate.sha256 = lambda path: "0" * 64

    def one(mesh: Any, exact: bool) -> dict[str, Any]:
        phases = Phases(exact)
        began = time.perf_counter()
        with phases.noted():
            cert = zoo.verify(
                folder, level="logits", dtype="bf16", device=bench.device, mesh=mesh, stream=True, write=False
            )
        passing = phases.layers[-2]["at"] - phases.layers[0]["at"] if len(phases.layers) > 2 else 0.0
        return {
            "verdict": cert.verdict, "seconds": time.perf_counter() - began, "layers but the first": passing,
            "of a layer": phases.of_a_layer(), "timing": cert.timing,
        }  # fmt: skip

    first = True
    for what in variants(bench):
        rounds = bench.args.rounds + first
        first = False
        for k in range(rounds):
            exact = bench.args.exact and k == rounds - 1
            name = f"{what}, run {k + 1}" + (", exact" if exact else "")
            if bench.rank == 0:
                row = one(None, exact)
                bench.put(f"streamed by one, {name}", row)
                bench.good &= row["verdict"] == "passed"
                bench.free()
            bench.wait()
            row = one(bench.mesh, exact)
            bench.put(f"streamed by {bench.n}, {name}", row)
            bench.good &= row["verdict"] == "passed"
            bench.keep()
            bench.free()
            bench.wait()


# --- loading -------------------------------------------------------------------------------------------------


@contextmanager
def load_phases(spent: dict[str, float]) -> Iterator[None]:
    """Seconds of what `zoo.load` calls."""
    from zoo.model import across, upload

    load = sys.modules["zoo.model.load"]  # the package has a function of that name
    places: list[tuple[Any, str, str]] = [
        (load.canonical, "read", "opening"), (load, "Decoder", "modules"), (load, "split", "cuts"), (load, "share_out", "cuts"),
        (load.Source, "fill", "asking for tensors"), (across.Across, "meet", "meeting"), (upload.Upload, "__exit__", "waiting"),
    ]  # fmt: skip

    def timed(call: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[what] = spent.get(what, 0.0) + time.perf_counter() - began

        return run

    was = [getattr(where, name) for where, name, _ in places]
    for (where, name, what), call in zip(places, was, strict=True):
        setattr(where, name, timed(call, what))
    try:
        yield
    finally:
        for (where, name, _), call in zip(places, was, strict=True):
            setattr(where, name, call)


def loading(bench: Bench, folder: Path) -> None:
    import zoo

    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    states = ["warm"] * bench.args.rounds + ["cold"] * bench.args.cold
    for what in variants(bench):
        plain_read(bench, folder)
        for k, state in enumerate(states):
            if state == "cold" and not cold(bench):
                continue
            read = bench.seconds(lambda: plain_read(bench, folder))
            if state == "cold":
                cold(bench)
            spent: dict[str, float] = {}
            with load_phases(spent):
                took = bench.seconds(lambda: zoo.load(folder, device=bench.device, mesh=bench.mesh))
            bench.free()
            row = {"plain read GB/s": size / read / 1e9, "load GB/s": size / took / 1e9, "of it": read / took,
                   "seconds": took, "phases": {k: round(v, 4) for k, v in spent.items()}}  # fmt: skip
            bench.put(f"loaded, {state}: {what}, round {k + 1}", row)
            bench.keep()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts: dict[str, Callable[[Bench, Path], None]] = {
        "copying": copying, "streaming": streaming, "loading": loading
    }  # fmt: skip
    parser.add_argument("--parts", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with gloo")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--buffers", type=int, nargs="*", default=[4], help="MiB")
    parser.add_argument("--readers", type=int, nargs="*", default=[16])
    parser.add_argument("--cold", action="store_true", help="load with the page cache dropped, too")
    parser.add_argument(
        "--exact", action="store_true", help="the last run of each waits for bytes to be there"
    )
    parser.add_argument("--no-hashes", action="store_true", help="do not hash files")
    parser.add_argument("--tmp", type=Path)
    parser.add_argument("--kept", type=Path, help="where the files are, or are made and left")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = started(args, "stream_ranks.py", __doc__ or "")
    if bench is None:
        return 2
    with place(bench, args.tmp) if args.kept is None else nullcontext(args.kept) as tmp:
        folder = made(bench, tmp)
        for name in args.parts:
            began = time.perf_counter()
            parts[name](bench, folder)
            bench.put(f"{name}: seconds", time.perf_counter() - began)
            bench.keep()
    bench.end()
    return int(not bench.good)


if __name__ == "__main__":
    sys.exit(main())
