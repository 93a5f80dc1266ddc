"""A Python file that defines `logits` is an oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from verified import ROOT, broken, canonical

from zoo.cli.verify import command
from zoo.verify.compare import form_of

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
        ("raise SystemExit(0)", "raised SystemExit while it was run"),
        ("def logits(ids): exit(0)", r"raised SystemExit: 0"),
        (
            "import torch\ndef logits(ids): return torch.zeros(len(ids), 140)",
            "140 logits for a token, the vocabulary has 131",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, said: str, code: Path) -> None:
    code.write_text(text)
    result = CliRunner().invoke(command, [str(canonical("llama")), "--oracle", str(code), "-o", "/dev/null"])
    assert result.exit_code == 1 and said in str(result.exception)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x, None),
        (lambda x: x - 3, None),
        (lambda x: x.log_softmax(-1), "log-probabilities"),
        (lambda x: x.softmax(-1), "probabilities: give what softmax"),
        (lambda x: x.bfloat16().float(), "all numbers of bf16"),
        (lambda x: x.half(), "all numbers of fp16"),
        (torch.zeros_like, "one number throughout"),
    ],
)
def test_what_is_given_in_place_of_logits_is_called_that(
    change: Callable[[torch.Tensor], torch.Tensor], said: str | None
) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 4
    found = form_of(change(logits), "fp32")
    assert found is None if said is None else found is not None and found.startswith(said)
    assert form_of(logits.bfloat16(), "bf16") is None


def test_probabilities_in_place_of_logits_are_the_cause_that_is_named(code: Path, tmp_path: Path) -> None:
    code.write_text(code.read_text().rstrip() + ".log_softmax(-1)\n")
    made = tmp_path / "parity.json"
    result = CliRunner().invoke(
        command, [str(canonical("llama")), "--oracle", str(code), "-o", str(made), "--max-length", "8"]
    )
    assert result.exit_code == 1
    assert "the oracle's logits are log-probabilities: give what log_softmax is made of" in result.stdout
    assert "does not read" not in result.stdout  # a cause is named
