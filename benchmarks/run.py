"""All benchmarks, one after the other; figures go to benchmarks/results/, with the machine's description.

python benchmarks/run.py          on this machine's CPU and disk
python benchmarks/run.py --gpu    those that need a CUDA device
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPU = {
    "startup": ["startup.py"],
    "gallery": ["gallery.py"],
    "convert": ["convert.py", "--upstream"],
    "formats": ["formats.py"],
    "pull-speed": ["pull.py", "speed"],
    "pull-kills": ["pull.py", "kills"],
    "kills": ["kills.py"],
    "pull-disk": ["pull.py", "disk", "--shards", "8"],
    "verify-time": ["verify.py", "time"],
    "verify-memory": ["verify.py", "memory"],
}
GPU = {"gpu": ["gpu.py"], "gpu-parity": ["gpu_parity.py"], "gpu-shapes": ["gpu_shapes.py"]}
OWN_FILE = ("gpu",)  # keeps a history itself


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"some of {', '.join([*CPU, *GPU])}")
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    known = CPU | GPU
    if unknown := [n for n in args.names if n not in known]:
        parser.error(f"no benchmark {unknown[0]!r}; known: {', '.join(known)}")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    failed = []
    for name in args.names or (GPU if args.gpu else CPU):
        script, *rest = known[name]
        keep = [] if name in OWN_FILE else ["--json", str(results / f"{name}.json")]
        print(f"\n== {name}: {' '.join([script, *rest])}", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, str(HERE / script), *rest, *keep])
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
