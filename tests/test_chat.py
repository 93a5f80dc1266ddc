"""`zoo chat`, and what `zoo generate -` reads: lines from a pipe, with a model that is tiny."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_text_cli import folder

import zoo
from zoo.cli import chat, cli
from zoo.cli._state import State
from zoo.model import Decoder
from zoo.text import Text
from zoo.text.sampling import Sampling

TEMPLATE = "{% for m in messages %}{{ {'system': 'w3', 'user': 'w1', 'assistant': 'w2'}[m.role] + ' ' + m.content + ' ' }}{% endfor %}w2"

END = 11


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It speaks words w0, w1, ..., a space before each, and has a chat template."""
    root = folder(tmp_path_factory.mktemp("chat"), tokenizer_config={"chat_template": TEMPLATE})
    tokenizer = json.loads((root / "tokenizer.json").read_text())
    tokenizer["decoder"] = None  # which puts spaces between words
    (root / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((root / "config.released.json").read_text())
    (root / "config.released.json").write_text(json.dumps({**config, "eos_token_id": END}))
    (root / "generation_config.json").unlink(missing_ok=True)
    return root


def zoo_(*args: Any, typed: str | bytes = "") -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], input=typed)


def test_a_prompt_of_one_dash_is_what_stdin_has(talker: Path) -> None:
    given = json.loads(zoo_("generate", talker, "w5 w6", "--raw", "-n", 3, "--json").stdout)
    piped = json.loads(zoo_("generate", talker, "-", "--raw", "-n", 3, "--json", typed="w5 w6\n").stdout)
    assert piped["prompt_tokens"] == [5, 6] and piped["tokens"] == given["tokens"]
    assert zoo_("generate", talker, "-", "--ids", "-n", 1, "--json", typed="5 6").exit_code == 0
    assert "PROMPT is empty" in zoo_("generate", talker, "-", "--raw", typed="").stderr
    assert "stdin is not UTF-8" in str(zoo_("generate", talker, "-", typed=b"\xff").exception)


def test_each_line_is_answered_and_what_was_said_before_is_known(talker: Path) -> None:
    done = zoo_("chat", talker, "--system", "w9", "-n", 4, "--json", typed="w5\n\n  w6 \n/exit\nw7\n")
    messages = json.loads(done.stdout)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages][::3] == ["w9", "w6"]
    text = f"w3 w9 w1 w5 w2 {messages[2]['content']} w1 w6 w2"
    alone = json.loads(zoo_("generate", talker, text, "--raw", "-n", 4, "--json").stdout)
    assert messages[4]["content"] == alone["text"]
    streamed = zoo_("chat", talker, "--system", "w9", "-n", 4, typed="w5\nw6\n")  # until the pipe ends
    assert streamed.stdout.splitlines() == [messages[2]["content"], messages[4]["content"]]
    assert "cut after 4 tokens" in streamed.stderr and streamed.exit_code == 0


def test_a_template_that_leaves_the_system_prompt_out_is_named(talker: Path, tmp_path: Path) -> None:
    root = folder(tmp_path, tokenizer_config={"chat_template": "{{ messages[-1].content }} w2"})
    assert "the chat template leaves --system out" in zoo_("chat", root, "--system", "w9").stderr
    assert "leaves" not in zoo_("chat", talker, "--system", "w9").stderr


def test_without_a_chat_template_there_is_no_chat(tmp_path: Path) -> None:
    error = zoo_("chat", folder(tmp_path)).exception
    assert "no chat template" in str(error) and "zoo generate" in str(error)


def test_only_what_is_new_is_read_and_ctrl_c_ends_an_answer(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "ROOM", 20)
    talk = chat.Conversation(zoo.load(talker), Text(talker), Sampling(0.0, 0))
    lengths, run = list[int](), Decoder.run

    def counted(self: Decoder, ids: Any, cache: Any = None) -> Any:
        lengths.append(ids.shape[1])
        if len(lengths) == stop:
            raise KeyboardInterrupt
        return run(self, ids, cache)

    monkeypatch.setattr(Decoder, "run", counted)
    stop = 0
    said = [talk.answer(q, 4) for q in ("w5", "w6", "w7")]
    # The last token of an answer was not read yet; beyond 20 tokens all is read once more.
    assert lengths == [3, 1, 1, 1, 4, 1, 1, 1, 17, 1, 1, 1]
    fresh = chat.Conversation(zoo.load(talker), Text(talker), Sampling(0.0, 0))
    assert [fresh.answer(q, 4, show=False) for q in ("w5", "w6", "w7")] == said
    capsys.readouterr()

    stop = len(lengths) + 3
    cut = talk.answer("w8", 4)
    assert len(cut.split()) == 2 and capsys.readouterr() == (f"{cut}\n", "stopped\n")
    stop = 0
    talk.answer("w9", 4)
    assert lengths[-4] == 1 + sum(1 + len(m["content"].split()) for m in talk.messages[:-1])
    stop = len(lengths) + 1  # before it has said anything
    before = [*talk.messages]
    assert talk.answer("w4", 4) == "" and talk.messages == before

    stop = len(lengths) + 2
    monkeypatch.setattr(State, "stopped", signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        talk.answer("w8", 4)
