"""A Python file that defines `logits` is an oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from verified import ROOT, broken, canonical

from zoo.cli.verify import command

CODE = """
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained({source!r}, dtype="float32").eval()

def logits(ids):
    return model(input_ids=ids[None], use_cache=False).logits[0]
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    canonical("llama")
    path = tmp_path / "vendor.py"
    path.write_text(CODE.format(source=str(ROOT / "llama-float32-source")))
    return path


def test_a_right_model_agrees_and_a_wrong_one_does_not(code: Path, tmp_path: Path) -> None:
    right = CliRunner().invoke(
        command, [str(canonical("llama")), "--oracle", str(code), "-o", str(tmp_path / "a.json")]
    )
    assert right.exit_code == 0, right.output
    assert right.stdout.startswith("PASSED  ") and "logits() of vendor.py" in right.stdout
    wrong = broken("llama", "rope_rows_interleaved", tmp_path / "c")
    result = CliRunner().invoke(command, [str(wrong), "--oracle", str(code)])
    assert result.exit_code == 1 and result.stdout.startswith("FAILED")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "defines no function logits"),
        ("1 / 0", "raised ZeroDivisionError while it was run"),
        ("def logits(ids): return ids", "expected floating"),
        ("def logits(ids): raise KeyError('w')", "raised KeyError"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, said: str, code: Path) -> None:
    code.write_text(text)
    result = CliRunner().invoke(command, [str(canonical("llama")), "--oracle", str(code), "-o", "/dev/null"])
    assert result.exit_code == 1 and said in str(result.exception)
