"""What all tests share: one thread each, no token of the person who runs them, GPU tests only where there is one."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C; what they start must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
for folder in (str(ROOT), str(ROOT / "tests")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A family without GGUFs, say, has nothing to ask of them: that is no test that was skipped.
    items[:] = [i for i in items if not any(_nothing_to_ask(m) for m in i.iter_markers("skip"))]
    if any(hasattr(getattr(item, "function", None), "asks") for item in items):
        from zoo.testing.suite import is_proof

        for item in items:
            if is_proof(item):
                item.add_marker(pytest.mark.proof)
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needs_gpu:
        return
    cuda = False
    if importlib.util.find_spec("torch") is not None:
        import torch

        cuda = torch.cuda.is_available()
    for item in needs_gpu:
        if not cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _nothing_to_ask(mark: pytest.Mark) -> bool:
    return str(mark.kwargs.get("reason", "")).startswith("got empty parameter set")
