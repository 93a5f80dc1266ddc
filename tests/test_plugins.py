"""Families of other packages: found by their entry points, and no better than those of the package itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zoo import families
from zoo.errors import ZooError

MODULE = """
import dataclasses
from converters.qwen3 import FAMILY as QWEN
FAMILY = dataclasses.replace(QWEN, name={name!r}, model_types=({model_type!r},), architectures=({architecture!r},))
"""

Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package with one family (name, model type, architecture)."""

    def add(name: str, model_type: str, architecture: str) -> None:
        module = f"plugin_{name}"
        (tmp_path / f"{module}.py").write_text(
            MODULE.format(name=name, model_type=model_type, architecture=architecture)
        )
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[zoo.families]\n{name} = {module}:FAMILY\n")
        families.refresh()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield add
    for module in [m for m in sys.modules if m.startswith("plugin_")]:
        del sys.modules[module]
    families.refresh()


def test_an_installed_package_adds_a_family(install: Install) -> None:
    config = {"architectures": ["OwnForCausalLM"], "model_type": "own"}
    with pytest.raises(ZooError, match="OwnForCausalLM"):
        families.find(config)
    install("own", "own", "OwnForCausalLM")
    assert families.find(config).name == "own"
    assert families.find({"model_type": "own"}).name == "own"
    assert families.get("own").name == "own"
    assert "own" in families.families()


def test_it_cannot_take_a_release_from_a_family_of_ours(install: Install) -> None:
    install("thief", "qwen3", "Qwen3ForCausalLM")
    assert families.find({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}).name == "qwen3"
    install("qwen3", "qwen3", "Qwen3ForCausalLM")
    assert families.families()["qwen3"].model_types == ("qwen3",)
    assert families.families()["qwen3"].spec.__module__ == "converters.qwen3"


def test_of_a_wrapper_that_several_claim_the_one_that_knows_the_text_model_gets_it(install: Install) -> None:
    wrapper = "Mistral3ForConditionalGeneration"
    ours = families.find({"architectures": [wrapper], "text_config": {"model_type": "mistral"}}).name
    install("own", "own_text", wrapper)
    assert (
        families.find({"architectures": [wrapper], "text_config": {"model_type": "own_text"}}).name == "own"
    )
    assert families.find({"architectures": [wrapper], "text_config": {"model_type": "mistral"}}).name == ours
