"""The worked plugin in `examples/plugin`: built, installed where nothing else is, and used as a stranger's package would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.model.load import load

ROOT = Path(zoo.__file__).parents[1]
pytest.importorskip("hatchling")
transformers = pytest.importorskip("transformers")

CONFIG = {
    "vocab_size": 131, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 7, "sliding_window": 5, "max_position_embeddings": 64,
    "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed plugin in it, and nothing else."""
    out = tmp_path_factory.mktemp("plugin")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=ROOT / "examples" / "plugin", check=True, capture_output=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(out / "site"),
    ]
    subprocess.run([*pip, str(next(out.glob("*.whl")))], check=True)
    return out / "site"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint by upstream's own class, every parameter perturbed."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vaultgemma")
    model = transformers.VaultGemmaForCausalLM(transformers.VaultGemmaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(path)
    return path


def run(*args: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`zoo ...` in a process of its own, with the plugin on its path or without."""
    path = os.pathsep.join(map(str, [ROOT] if site is None else [ROOT, site]))
    command = [sys.executable, "-c", "from zoo.cli import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


def test_its_release_is_listed_and_shown(site: Path) -> None:
    listed = run("list", "vaultgemma", site=site)
    assert listed.returncode == 0 and "vaultgemma-1b" in listed.stdout, listed.stderr
    shown = run("show", "google/vaultgemma-1b", site=site)
    assert shown.returncode == 0 and "vaultgemma" in shown.stdout, shown.stderr
    assert run("show", "vaultgemma-1b").returncode == 1, "without it zoo does not know the release"


def test_its_family_converts_has_upstreams_logits_and_is_recorded(
    site: Path, release: Path, tmp_path: Path
) -> None:
    done = run("convert", str(release), str(tmp_path / "zoo"), site=site)
    assert done.returncode == 0, done.stderr
    source = json.loads((tmp_path / "zoo" / "zoo.json").read_text())["source"]
    assert (source["family"], source["package"]) == (
        "vaultgemma",
        {"name": "zoo-vaultgemma", "version": "0.1.0"},
    )
    ids = torch.arange(22).reshape(2, 11) * 5 % CONFIG["vocab_size"]
    with torch.inference_mode():
        upstream = transformers.AutoModelForCausalLM.from_pretrained(release, attn_implementation="eager")
        ours = load(tmp_path / "zoo")(ids)
        assert (ours - upstream(ids).logits).abs().max() <= 5e-5


def test_where_the_package_is_missing_it_is_named(site: Path, release: Path, tmp_path: Path) -> None:
    assert run("convert", str(release), str(tmp_path / "zoo"), site=site).returncode == 0
    assert "zoo-vaultgemma 0.1.0" in " ".join(run("inspect", str(tmp_path / "zoo")).stdout.split())
    exported = run("export", str(tmp_path / "zoo"), str(tmp_path / "back"))
    assert exported.returncode == 1
    assert "pip install 'zoo-vaultgemma==0.1.0'" in exported.stderr
    assert run("export", str(tmp_path / "zoo"), str(tmp_path / "back"), site=site).returncode == 0
