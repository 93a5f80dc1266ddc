"""What all tests share: one thread each, no token of the person who runs them, GPU tests only where there is one."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

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


@pytest.fixture(autouse=True)
def _json_is_what_its_schema_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command prints as JSON in any test is held to the schema that `--json-schema` prints."""
    if "zoo.cli" not in sys.modules:  # nothing here prints any
        return
    from zoo.cli import _common, _progress

    plain, tell = _common.json_text, _progress.Events.tell

    def held(data: object) -> str:
        text = plain(data)
        _hold(json.loads(text))
        return text

    def told(self: _progress.Events, event: str, **data: object) -> None:
        _hold(json.loads(json.dumps({"event": event, **data})))
        tell(self, event, **data)

    monkeypatch.setattr(_common, "json_text", held)
    monkeypatch.setattr(_progress.Events, "tell", told)


def _hold(data: object) -> None:
    import click

    context = click.get_current_context(silent=True)
    name = " ".join(context.command_path.split()[1:]) if context is not None else ""
    if name and (validator := _validator(name)) is not None:
        error = next(iter(validator.iter_errors(data)), None)
        assert error is None, f"zoo {name} --json: {error.json_path}: {error.message[:500]}"


@functools.cache
def _validator(name: str) -> Any:
    from zoo.cli._schemas import COMMANDS, schema

    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator(schema(name)) if name in COMMANDS else None


def _nothing_to_ask(mark: pytest.Mark) -> bool:
    return str(mark.kwargs.get("reason", "")).startswith("got empty parameter set")
