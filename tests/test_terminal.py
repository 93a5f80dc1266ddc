"""What people see on a terminal: nothing wider than it. Pipes get what they always got."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from verified import canonical, copy

from zoo import manifest
from zoo.cli import _progress, _schemas, cli
from zoo.cli._common import run, shortened
from zoo.verify.stage import Stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen(monkeypatch: pytest.MonkeyPatch, columns: int, *args: str, out: io.StringIO | None = None) -> str:
    """What a command writes to a terminal of so many columns."""
    out = out or Terminal()
    with monkeypatch.context() as m:
        m.setenv("COLUMNS", str(columns))
        m.setattr("sys.stdout", out)
        run(cli, args)
    return out.getvalue()


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_nothing_is_wider_than_the_window(
    columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    canon = str(canonical("llama"))
    several = ("qwen3-next-80b-a3b-instruct-fp8", "llama4", "gpt2", "deepseek-v3", "qwen3-8b")
    for args in (
        ("list",),
        ("list", "qwen3", "fp8"),
        ("show", "deepseek-v3"),
        ("show", *several),
        ("inspect", canon, "--tensors"),
        ("plan", f"{canon}-source", "--tensors"),
        ("verify", canon, "--level", "plan", "-o", str(tmp_path / "c.json")),
    ):
        lines = click.unstyle(seen(monkeypatch, columns, *args)).splitlines()
        # What has no spaces, a path of this test's, is left whole, to be copied.
        wide = [line for line in lines if len(line) > columns and " " in line.strip()]
        assert lines and not wide, (args, wide[:3])


def test_a_narrow_list_has_whole_names_and_says_what_it_left_out_and_what_words_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = seen(monkeypatch, 80, "list")
    head, *rows = text.split("\n\n")[0].splitlines()
    assert head.split() == "NAME RELEASED PARAMS WEIGHTS PROVEN".split()
    assert [row.split()[0] for row in rows] == [m.name for m in manifest.load_all()]
    assert "left out in 80 columns: FAMILY, ACTIVE, FORMATS, LICENCE, GATED; --json has all" in text
    assert "rules: its family's conversion" in text and "GATED:" not in text
    wide = seen(monkeypatch, 200, "list")
    assert "left out" not in wide and "?: not known" in wide


def test_verdicts_are_coloured_on_a_terminal_and_only_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = ("verify", str(canonical("llama")), "--level", "plan", "-o", str(tmp_path / "c.json"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert seen(monkeypatch, 90, *args).startswith("\x1b[32mPASSED\x1b[0m (plan only)")
    damaged = copy(canonical("llama"), tmp_path / "damaged")
    (shard,) = damaged.glob("*.safetensors")
    shard.write_bytes((data := shard.read_bytes())[:-1] + bytes([data[-1] ^ 1]))
    failed = seen(monkeypatch, 90, "verify", str(damaged), "--level", "bytes", *args[4:])
    assert failed.startswith("\x1b[31mFAILED\x1b[0m") and failed.count("\x1b[31mFAILED") > 1
    assert "\x1b" not in seen(monkeypatch, 90, *args, out=io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert seen(monkeypatch, 90, *args).startswith("PASSED (plan only)")


def test_a_pipe_has_all_columns_whatever_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = [seen(monkeypatch, columns, "list", out=io.StringIO()) for columns in (40, 200)]
    assert piped[0] == piped[1] and len(piped[0].splitlines()) == 1 + len(manifest.load_all())
    assert max(map(len, piped[0].splitlines())) > 120 and "…" not in piped[0]


def test_names_are_cut_in_the_middle_and_sentences_at_the_end() -> None:
    assert shortened("qwen3-next-80b-a3b-instruct-fp8", 12) == "qwen3-…t-fp8"
    assert shortened("Gemma Terms of Use", 12) == "Gemma Terms…"
    assert [len(shortened("abcdefgh", n)) for n in range(1, 10)] == [1, 2, 3, 4, 5, 6, 7, 8, 8]


# --- JSON ---------------------------------------------------------------------------------------------------


def leaves(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def test_every_command_that_prints_json_has_its_schema_and_prints_it() -> None:
    # tests/conftest.py holds to them what commands print in all other tests.
    jsonschema = pytest.importorskip("jsonschema")
    prints = {name for name, command in leaves(cli) if any("--json" in p.opts for p in command.params)}
    assert prints == set(_schemas.COMMANDS)
    for name in sorted(prints):
        done = CliRunner().invoke(cli, [*name.split(), "--json-schema"])
        assert done.exit_code == 0, done.output
        jsonschema.Draft202012Validator.check_schema(json.loads(done.output))


def test_a_field_that_is_missing_or_of_another_type_is_no_match() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    release = {"name": "a", "family": "b", "sources": [], "formats": [], "vendor": None, "proven": None}
    held = jsonschema.Draft202012Validator(_schemas.schema("list"))
    assert held.is_valid([release]) and held.is_valid({"error": "no"})
    assert not held.is_valid([release | {"params_total": "8B"}])
    assert not held.is_valid([{k: v for k, v in release.items() if k != "vendor"}])


# --- what takes long ----------------------------------------------------------------------------------------


def test_errors_and_notes_are_folded_too_and_a_command_in_them_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    for args, whole in (
        (("list", "--has", "nonsense"), "short convolution"),
        (("list", "--has", "MLA"), "not listed:"),
        (("verify", "qwen3-0.6b"), "`zoo verify` does that first"),
        (("plan", str(canonical("llama"))), "`zoo export` gives"),
    ):
        out = Terminal()
        with monkeypatch.context() as m:
            m.setattr("sys.stderr", out)
            m.setattr("sys.stdout", Terminal())
            run(cli, args)
        lines = click.unstyle(out.getvalue()).splitlines()
        assert lines and not [x for x in lines if len(x) > 50 and " " in x.strip() and "`" not in x], lines
        assert " ".join(" ".join(lines).split()).count(whole) == 1, lines
        assert all(x.count("`") % 2 == 0 for x in lines), lines


def test_stages_that_are_over_stay_with_their_seconds_and_the_one_at_work_has_a_bar_where_its_end_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_progress.Stages, "EVERY", 1000)  # drawn when something is said
    out = Terminal()
    stages = _progress.Stages(out)
    stages("opening the source")
    stages(Stage("needs little", seconds=100))
    stages("bytes")
    for n in range(4):
        stages(Stage(f"fault {n + 1} of 4: \x1b]0;x", done=n, of=4))
    stages.close()
    lines = [line for line in out.getvalue().replace("\r\x1b[K", "\n").split("\n") if line]
    # What says how long it will take took no time itself.
    over = [line for line in lines if re.fullmatch(r"  .*  \d+\.\d s|  needs little", line)]
    assert [line.split("  ")[1][:12] for line in over] == [
        "opening the ",
        "needs little",
        "bytes",
        "fault 4 of 4",
    ]
    drawn = [line for line in lines if line not in over]
    assert any(re.match(r"  0:00  opening the source", line) for line in drawn)  # nothing is known of its end
    assert any(re.match(r"  \[ {24}\] 0:00, about 1:(39|40) left  bytes", line) for line in drawn)
    assert any(re.match(r"  \[#{18} {6}\] 0:00, .*fault 4 of 4", line) for line in drawn)
    assert "\x1b]" not in out.getvalue()
