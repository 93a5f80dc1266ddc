"""What is kept beside every figure: the machine, the date, and the command that measures it again."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

PLACES = ("--json", "--out", "--tmp", "--work", "--kept", "--before")
"""Options whose value is a place on the machine that measured: of no use to whoever measures again."""


def command(script: str) -> str:
    """The command line, as it is typed in a checkout."""
    args = iter(sys.argv[1:])
    said = [a for a in args if not (a in PLACES and next(args, ""))]
    return " ".join(["python", f"benchmarks/{script}", *said])


def cpu(what: str) -> str:
    """What the system says of the processor (Linux): "model name", "flags"; nothing if it does not."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(what)), "")


def machine(script: str) -> dict[str, Any]:
    """This machine (Linux), now, and the command."""
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    memory = int(next(line.split()[1] for line in meminfo if line.startswith("MemTotal"))) // 1024
    return {
        "cpu": cpu("model name") or "?",
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "command": command(script),
    }
