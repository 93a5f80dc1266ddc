"""The wheel that is built from this checkout works where there is no checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import click
import pytest

import zoo

ROOT = Path(zoo.__file__).parents[1]
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(out.glob("zoo-*.whl"))


def test_it_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"zoo", "converters", "manifests"}
    for file in (
        "zoo/cli/list.py",
        "zoo/py.typed",
        "converters/llama.py",
        "manifests/gpt2.toml",
        "manifests/configs/gpt2.config.json",
    ):
        assert file in names, file


def test_installed_elsewhere_it_lists_and_shows(wheel: Path, tmp_path: Path) -> None:
    # Of its dependencies only click is put there, which is all that these commands need: `make demo` installs all.
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    shutil.copytree(Path(click.__file__).parent, site / "click")
    python = str(tmp_path / "env" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    for args, expected in (
        (["list", "smollm2"], "smollm2-135m"),
        (["show", "gpt2"], "learned, 1,024 positions"),
    ):
        done = subprocess.run(
            [str(tmp_path / "env" / "bin" / "zoo"), *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0 and expected in done.stdout, done.stderr
