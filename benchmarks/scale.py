"""On paper: the largest releases from hub to proof, on one node of 8 GPUs and on a cluster of 16. Makes docs/scale.md's table.

python benchmarks/scale.py

Bytes are those of the releases' own headers (tests/data/tensors/). Rates are measured ones, of smaller models, and are named in
`RATES` with where they lie; what a node's disk and network give is assumed, and said so. Nothing here was run at this size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests/data/tensors"
RELEASES = {"DeepSeek-V3": "deepseek-r1", "Kimi K2": "kimi-k2-instruct"}  # R1 has V3's tensors


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def rates() -> dict[str, float]:
    """GB/s of one process, measured: fetching with hashes, converting, hashing, comparing bytes."""
    pull = measured("pull-speed.json")
    convert = next(r for r in measured("convert.json")["results"] if r["case"] == "moe")
    speed = measured("verify-gpu-speed.json")["speed"][0]
    both = 2 * speed["bytes"] / 1e9
    return {
        "pull": pull["bytes"] / 1e9 / pull["wall_s"]["zoo pull"],
        "convert": convert["source_bytes"] / 1e9 / convert["seconds"]["zoo"],
        "hash": both / speed["seconds"]["hashes"],
        "bytes": both / speed["seconds"]["plan and bytes"],
    }


@dataclass(frozen=True)
class Site:
    """`disk` and `network`: GB/s of a node, assumed; `shared`: of the file system that several nodes share, in all."""

    name: str
    nodes: int
    disk: float
    network: float
    shared: float

    @property
    def store(self) -> float:
        return self.disk if self.nodes == 1 else min(self.shared, self.nodes * self.disk)


SITES = (
    Site("one node, local NVMe", 1, 6.0, 1.25, 6.0),
    Site("16 nodes, a shared file system", 16, 3.0, 1.25, 40.0),
)


def steps(
    size: float, site: Site, rate: dict[str, float], processes: int = 8
) -> list[tuple[str, float, float, float]]:
    """(step, GB read, GB written, minutes) of a release of `size` GB."""
    whole = site.nodes * processes
    one = min(site.store, site.disk)
    return [
        (
            "pull, in parts",
            size,
            size,
            size / min(site.nodes * site.network, rate["pull"] * whole, site.store) / 60,
        ),
        ("convert, in parts", size, size, 2 * size / min(site.store, 2 * rate["convert"] * whole) / 60),
        ("hashes of both sides", 2 * size, 0, 2 * size / min(one, rate["hash"]) / 60),
        ("plan, bytes, layers, logits: one pass", 2 * size, 0, 2 * size / min(one, rate["bytes"]) / 60),
    ]


def table() -> str:
    rate = rates()
    lines = [
        "| release | site | step | read, GB | written, GB | minutes |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, file in RELEASES.items():
        size = json.loads((LISTS / f"{file}.tensors.json").read_text())["bytes"] / 1e9
        for site in SITES:
            found = steps(size, site, rate)
            for step, read, written, minutes in found:
                lines.append(
                    f"| {name} | {site.name} | {step} | {read:,.0f} | {written:,.0f} | {minutes:.1f} |"
                )
            lines.append(
                f"| **{name}** | **{site.name}** | **all** | **{sum(s[1] for s in found):,.0f}** | "
                f"**{sum(s[2] for s in found):,.0f}** | **{sum(s[3] for s in found):.0f}** |"
            )
    return "\n".join(lines)


def main() -> None:
    print("\n".join(f"{k}: {v:.2f} GB/s" for k, v in rates().items()))
    print(table())


if __name__ == "__main__":
    main()
