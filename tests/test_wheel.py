"""The wheel that is built from this checkout works where there is no checkout."""

from __future__ import annotations

import email
import re
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
    return next(out.glob("zoo_weights-*.whl"))


def test_it_claims_one_import_name_and_holds_all_data_in_it(wheel: Path) -> None:
    # `converters` and `manifests` are other people's distributions on PyPI: the last one installed would win.
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"zoo"}
    for file in (
        "zoo/cli/list.py",
        "zoo/py.typed",
        "zoo/converters/llama.py",
        "zoo/manifests/gpt2.toml",
        "zoo/manifests/configs/gpt2.config.json",
    ):
        assert file in names, file
    assert not [name for name in names if name.endswith(".pyc")]


def test_what_it_says_of_itself_is_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        said = email.message_from_bytes(archive.read(path))
    assert said["Name"] == "zoo-weights" and said["Version"] == zoo.__version__
    assert said["License-Expression"] == "Apache-2.0" and said["Requires-Python"] == ">=3.11"
    assert "\n# zoo" in f"\n{said.get_payload()}"  # the README is the project's page
    extras = set(said.get_all("Provides-Extra"))
    named = {
        extra
        for file in (*ROOT.glob("zoo/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md")
        for extra in re.findall(r"zoo-weights\[(\w+)\]", file.read_text(encoding="utf-8"))
    }
    assert named and named <= extras  # what messages and docs tell people to install


def test_installed_elsewhere_it_lists_and_shows(wheel: Path, tmp_path: Path) -> None:
    # Of its dependencies only click is put there, which is all that these commands need: `make demo` installs all.
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    shutil.copytree(Path(click.__file__).parent, site / "click")
    python = str(tmp_path / "env" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    for stranger in ("converters", "manifests"):  # somebody else's, installed after it
        (site / stranger).mkdir()
        (site / stranger / "__init__.py").write_text("raise ImportError('this is not zoo')")
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
