"""Canonical folders, adapters, trainers' checkpoints, templates, plugins and fellows' files that once did harm: each test builds one."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import verified
from safetensors.torch import load_file, save_file

import zoo
from zoo import families, manifest, plugins, sign
from zoo.cli import _common, cli
from zoo.cli._ranks import together
from zoo.errors import ZooError
from zoo.formats import canonical, dcp, open_checkpoint
from zoo.formats.base import read_json
from zoo.hub import HubError
from zoo.mapping import merge
from zoo.mapping.execute import convert
from zoo.mapping.lora import extract
from zoo.mapping.parts import Part, of_process
from zoo.mapping.plan import make_plan
from zoo.model.generate import pick
from zoo.push import _refusals
from zoo.text import template
from zoo.untrusted import bounded
from zoo.untrusted.printable import printable, printable_json

TURNED = "\u202e\u2066"
"""What has the text behind it written the other way round."""


@pytest.fixture
def canon(tmp_path: Path) -> Path:
    return verified.copy(verified.canonical("llama"), tmp_path / "canon")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (folder := tmp_path / "elsewhere").mkdir()
    (folder / "secret").write_text('{"peft_type": "LORA"}')
    return folder / "secret"


def described(canon: Path, change: Callable[[dict[str, Any]], object]) -> None:
    told = json.loads((canon / "zoo.json").read_text())
    change(told)
    (canon / "zoo.json").write_text(json.dumps(told))


# ---- links out of a folder, and what is no file


@pytest.mark.parametrize("name", ["source.zip", "parity.json", "model.sig", "zoo.json"])
def test_no_file_of_a_canonical_folder_is_read_through_a_link_that_leads_out(
    canon: Path, secret: Path, name: str
) -> None:
    (canon / name).unlink(missing_ok=True)
    (canon / name).symlink_to(secret)
    with pytest.raises(ZooError, match="outside the checkpoint"):
        canonical.read(canon)


def test_a_pipe_in_place_of_the_kept_headers_is_not_waited_for(canon: Path) -> None:
    (canon / "source.zip").unlink()
    os.mkfifo(canon / "source.zip")
    with pytest.raises(ZooError, match="not a regular file"):
        canonical.read(canon)


def test_an_adapters_config_and_a_trainers_metadata_are_not_read_through_links(
    tmp_path: Path, secret: Path
) -> None:
    for folder, name in ((tmp_path / "adapter", merge.CONFIG), (tmp_path / "saved", dcp.METADATA)):
        folder.mkdir()
        (folder / name).symlink_to(secret)
    with pytest.raises(ZooError, match="outside the checkpoint"):
        merge.read_adapter(tmp_path / "adapter")
    with pytest.raises(ZooError, match="outside the checkpoint"):
        dcp.open_saved(tmp_path / "saved")


def test_a_file_that_the_user_names_may_be_a_link(tmp_path: Path, secret: Path) -> None:
    (link := tmp_path / "mine.json").symlink_to(secret)
    assert read_json(link, "", given=True) == {"peft_type": "LORA"}


def test_a_drawing_is_not_written_through_a_link(tmp_path: Path, secret: Path, canon: Path) -> None:
    before = secret.read_text()
    (picture := tmp_path / "a.svg").symlink_to(secret)
    assert _common.run(cli, ["show", f"{canon}/", "--svg", str(picture)]) == 0
    assert secret.read_text() == before
    assert picture.read_text().startswith("<svg")


# ---- numbers and counts


def test_of_a_canonical_folder_the_source_is_as_zoo_writes_it(canon: Path) -> None:
    for change in (
        lambda j: j["source"].pop("family"), lambda j: j["source"].update(prefix=[1]), lambda j: j["source"].update(n_ranks=None),
        lambda j: j["source"].update(config=[1]), lambda j: j.update(carried=["a.json"] * 2), lambda j: j["source"].update(n_ranks=10**9),
    ):  # fmt: skip
        before = (canon / "zoo.json").read_text()
        described(canon, change)
        with pytest.raises(ZooError, match="not as zoo writes it"):
            canonical.read(canon)
        (canon / "zoo.json").write_text(before)


def test_a_config_has_no_more_fields_than_any_release() -> None:
    with pytest.raises(ZooError, match="20000 fields"):
        families.spec_of({f"k{n}": [] for n in range(20_000)})
    with pytest.raises(ZooError, match="20000 fields"):
        families.find({"text_config": {f"k{n}": [] for n in range(20_000)}})


def test_an_adapter_of_patterns_or_tensors_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "MATCHING", 0.0)
    told = {"peft_type": "LORA", "alpha_pattern": {f"x{n}": 1.0 for n in range(100)}}
    with pytest.raises(ZooError, match="takes too long"):
        _ = merge.Adapter(tmp_path, told).alphas
    monkeypatch.setattr(merge, "MAX_TENSORS", 1)
    (tmp_path / merge.CONFIG).write_text(json.dumps(told))
    save_file({n: torch.ones(2, 2) for n in ("m.lora_A.weight", "m.lora_B.weight")}, tmp_path / merge.WEIGHTS)
    with pytest.raises(ZooError, match="2 tensors"):
        merge.read_adapter(tmp_path)


def test_no_adapter_is_extracted_of_differences_that_are_no_numbers(tmp_path: Path, canon: Path) -> None:
    tuned = shutil.copytree(canon, tmp_path / "tuned")
    file = next(tuned.glob("model-*.safetensors"))
    tensors = load_file(file)
    tensors["layers.0.attn.out.weight"][0, 0] = math.nan
    save_file(tensors, file)
    with pytest.raises(ZooError, match="NaN or infinity"):
        extract(canon, tuned, tmp_path / "out")


def test_parsing_leaves_the_collector_as_it_was() -> None:
    import gc

    assert gc.isenabled()
    with pytest.raises(ValueError, match="Expecting"):
        bounded.parse_json("[")
    assert gc.isenabled()


# ---- templates, tokens, terminals


def test_a_template_makes_no_novel_of_a_question() -> None:
    asked = [{"role": "user", "content": "a" * 1000}]
    assert len(template.render("{{ messages[0].content * 8 }}", asked, {})) == 8000
    with pytest.raises(ZooError, match="chat template makes 400000 characters"):
        template.render("{{ 'a b ' * 100000 }}", asked, {})


def test_a_token_is_drawn_at_any_temperature_and_share() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert pick(logits, 1e-320).item() == pick(logits, 1.0, top_p=1e-320).item() == 1
    with pytest.raises(ZooError, match="NaN or infinity"):
        pick(torch.tensor([[math.nan, 1.0]]), 1.0)


def test_a_cache_beyond_all_memory_is_refused(canon: Path) -> None:
    with pytest.raises(ZooError, match="no memory on cpu for a cache"):
        zoo.load(canon).cache(1, 1 << 60)


def test_text_is_not_turned_round() -> None:
    assert printable(f"a{TURNED}b") == r"a\u202e\u2066b"
    assert json.loads(said := printable_json(json.dumps(TURNED, ensure_ascii=False))) == TURNED
    assert said.isascii()


def test_a_warnings_text_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.formatwarning
    try:
        _common.run(cli, ["--version"])
        text = warnings.formatwarning("of \x1b]0;", UserWarning, "x\x9b.py", 1, "")
        assert not set(text) & {"\x1b", "\x9b"}
    finally:
        warnings.formatwarning = before


# ---- plugins, keys, hubs, fellows, environments


def test_a_plugins_release_is_called_so_that_links_and_files_can_have_its_name() -> None:
    told = {"family": "llama", "formats": ["safetensors"], "sources": [{"kind": "hub", "repo": "x/y"}]}
    assert manifest.build("a-1.5b", told | {"name": "a-1.5b"}).name == "a-1.5b"
    for name in ("a onclick=alert(1) b", "a\x1b]0;", "a\nb"):
        with pytest.raises(ZooError, match="name: expected"):
            manifest.build(name, told | {"name": name})
    with pytest.raises(ZooError, match="licence: expected a line of text"):
        manifest.build("a", told | {"name": "a", "licence": f"mit{TURNED}\nqwen3"})


def test_a_manifest_that_is_no_toml_is_a_zoo_error() -> None:
    for text in ("a = " + "[" * 100_000, "a = " + "9" * 5000):
        with pytest.raises(ZooError, match="not TOML"):
            manifest._parse("x", text)


def test_entry_points_that_are_no_text_break_no_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (info := tmp_path / "x-1.dist-info").mkdir()
    (info / "METADATA").write_text("Name: x\nVersion: 1\n")
    (info / "entry_points.txt").write_bytes(b"[zoo.broken]\na = b\n\xff")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="broken entry points"):
        assert plugins.entries("zoo.broken") == ()
    plugins.entries.cache_clear()


def test_a_key_is_a_small_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ZooError, match="not a key in PEM"):
        sign.is_encrypted(tmp_path / "pipe")


def test_what_a_false_hub_makes_the_library_raise_is_said_in_a_sentence() -> None:
    with pytest.raises(HubError, match="answered what no Hub does"), _refusals("me/x"):
        {}["id"]
    with pytest.raises(HubError, match="UnboundLocalError"), _refusals("me/x"):
        raise UnboundLocalError("operation")  # of an object that was not asked for


def test_a_mistake_of_zoos_own_is_not_put_down_to_the_hub() -> None:
    for what in ("None.private", "__import__('json').loads(7)"):
        code = compile(what, "push.py", "eval")
        with pytest.raises((AttributeError, TypeError)), _refusals("me/x"):
            eval(code, {"__name__": "zoo.push"})


@pytest.mark.parametrize(
    "lines", [[{"step": [1], "said": []}], [{"step": "x"}], [{"finished": True, "said": 7}], [{"step": "x", "said": [{}]}], [7]]
)  # fmt: skip
def test_what_another_part_has_not_written_is_not_believed(tmp_path: Path, lines: list[Any]) -> None:
    source = verified.ROOT / "llama-float32-source"
    verified.canonical("llama")
    plan = make_plan(open_checkpoint(source))
    convert(plan, tmp_path / "out", part=Part(1, 2))
    steps = "".join(json.dumps(x | {"synced": True} if isinstance(x, dict) else x) + "\n" for x in lines)
    (tmp_path / "out.partial" / ".zoo-part-2-of-2.jsonl").write_text(steps)
    convert(plan, tmp_path / "out", part=Part(2, 2))
    assert canonical.read(tmp_path / "out").tensors


def test_ranks_and_ports_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, world in (("\u0660", "2"), ("0", "9" * 5000)):
        with pytest.raises(ZooError, match="expected a rank"):
            of_process({"RANK": rank, "WORLD_SIZE": world})
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "99999",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ZooError, match="MASTER_PORT=99999"), together("cpu"):
        pass
    for address, port in (
        ("", "29500"),
        ("256.256.256.256", "29500"),
        ("x" * 5000, "29500"),
        ("localhost", "0"),
    ):
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("MASTER_ADDR", address)
        with pytest.raises(ZooError, match="expected a host, a port"), together("cpu"):
            pass
