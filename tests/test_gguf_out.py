"""`zoo export --format gguf`, and `zoo verify x.gguf --against CANON`. What each family's file says and holds is tested with
the family (`zoo.testing.suite`)."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import vendor
import verified
from click.testing import CliRunner
from safetensors.torch import load_file

import zoo
from zoo.cli import cli
from zoo.errors import ZooError
from zoo.formats import gguf_tokenizer, gguf_vocab, open_checkpoint
from zoo.formats.base import place_of
from zoo.formats.gguf import read_header
from zoo.quant import ggml
from zoo.quant.floats import to_fp32
from zoo.testing import build
from zoo.testing import gguf as testing_gguf

CASE = tiny.CASES["llama"]
OF = CASE.gguf[0]


def byte_level(n: int) -> dict[str, Any]:
    """Fields of a tokenizer of `n` tokens: all bytes, and a few that are merged."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["t h", "th e", "Ġ the", "i n", "e r"]
    tokens = [
        "<bos>",
        "<eos>",
        *sorted(ByteLevel.alphabet()),
        *(m.replace(" ", "") for m in merges),
        "<think>",
    ]
    unused = [f"[PAD{i}]" for i in range(len(tokens), n)]
    kinds = [3, 3] + [1] * (len(tokens) - 3) + [4] + [5] * len(unused)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": [*tokens, *unused],
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<think>{{ m.content }}{% endfor %}",
    }  # fmt: skip


BYTE_LEVEL = byte_level(272)
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": [
        "<unk>",
        "<s>",
        "</s>",
        "<0x41>",
        "▁a",
        "ab",
        "  ",
        "▁ab",
        "▁",
        "a",
        "b",
        "[PAD11]",
    ],
    "tokenizer.ggml.scores": [
        0.0,
        -1000.0,
        -1000.0,
        0.0,
        0.0,
        -1.0,
        -1000.0,
        -2.0,
        -3.0,
        -4.0,
        -5.0,
        -10000.0,
    ],
    "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 4, 1, 1, 1, 1, 5],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_space_prefix": True,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": False,
}


@pytest.fixture(scope="module")
def canon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in bf16 with a tokenizer, as it comes of a GGUF that has one."""
    at = tmp_path_factory.mktemp("out")
    hf = testing_gguf.make(
        CASE, OF, at, hidden_size=96, intermediate_size=96, head_dim=32, vocab_size=len(BYTE_LEVEL["tokenizer.ggml.tokens"])
    )[0]  # fmt: skip
    file = testing_gguf.write(hf, at / "released.gguf", OF, **BYTE_LEVEL)
    return zoo.convert(file, at / "canon", dtype="bf16")


def written(canon: Path, at: Path, type: str | None = None) -> Path:
    return zoo.export(canon, at / "x.gguf", format="gguf", type=type)


def test_what_no_field_says_of_a_tokenizer_is_said(
    canon: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(canon, tmp_path / "whole")
    assert not caplog.messages
    edited = verified.copy(canon, tmp_path / "edited")
    file = place_of(edited, "tokenizer.json")
    whole = json.loads(file.read_text())
    whole["added_tokens"][-1] |= {"rstrip": True, "single_word": True}
    file.write_text(json.dumps(whole))
    written(edited, tmp_path / "stripped")
    spaces, words = caplog.messages
    assert (
        "1 added tokens take the spaces behind them along (rstrip: <think>)" in spaces
        and "single_word" in words
    )
    caplog.clear()
    told = json.loads((edited / "zoo.json").read_text())
    told["carried"] = [n for n in told["carried"] if "token" not in n]
    (edited / "zoo.json").write_text(json.dumps(told))
    written(edited, tmp_path / "none")
    assert "there is no tokenizer.json: the GGUF has no tokenizer" in caplog.text


# --- types --------------------------------------------------------------------------------------------------


def test_each_type_holds_what_the_gguf_package_makes_of_the_values(canon: Path, tmp_path: Path) -> None:
    exact = {t.name: np.array(t.data) for t in gguf.GGUFReader(written(canon, tmp_path, "f32")).tensors}
    for type in ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4_moe"):
        file = zoo.export(canon, tmp_path / f"{type}.gguf", format="gguf", type=type)
        for t in gguf.GGUFReader(file).tensors:
            matrix = exact[t.name].ndim > 1
            ends = type.startswith(("q4", "q5")) and t.name in ("token_embd.weight", "output.weight")
            ends |= type == "mxfp4_moe"  # of a model without experts
            assert t.tensor_type.name == ("F32" if not matrix else "Q8_0" if ends else type.upper()), t.name
            want = gguf.quants.quantize(exact[t.name], t.tensor_type)
            assert np.array(t.data).tobytes() == want.tobytes(), t.name


@pytest.mark.parametrize("type", ["mxfp4_moe", "tq2_0", "tq1_0"])
def test_types_of_some_tensors_are_those_of_the_gguf_package(type: str, tmp_path: Path) -> None:
    """Ternary blocks have 256 elements, and leave fp16 to both ends; of MXFP4 are the experts alone."""
    case = tiny.CASES["mixtral"]
    hf = testing_gguf.make(
        case, case.gguf[0], tmp_path, hidden_size=256, intermediate_size=32, head_dim=32, num_hidden_layers=1
    )[0]  # fmt: skip
    folder = zoo.convert(hf, tmp_path / "canon")
    exact = {
        t.name: np.array(t.data) for t in gguf.GGUFReader(written(folder, tmp_path / "f32", "f32")).tensors
    }
    file, kinds = written(folder, tmp_path, type), set()
    for t in gguf.GGUFReader(file).tensors:
        kinds.add((t.tensor_type.name, "exps" in t.name, t.name in ("token_embd.weight", "output.weight")))
        want = gguf.quants.quantize(exact[t.name], t.tensor_type)
        assert np.array(t.data).tobytes() == want.tobytes(), t.name
    three = {
        (type.upper(), True, False),
        (type.upper(), False, False),
        ("F16", True, False),
        ("F16", False, True),
        ("F16", False, False),
    }
    some = {("MXFP4", True, False), ("Q8_0", False, True), ("Q8_0", False, False)}
    assert kinds == {("F32", False, False)} | (some if type == "mxfp4_moe" else three)
    assert (
        read_header(file, "x.gguf")[0]["general.file_type"]
        == {"mxfp4_moe": 38, "tq2_0": 37, "tq1_0": 36}[type]
    )
    assert zoo.verify(file, folder, level="bytes").passed


def test_blocks_of_eight_bits_are_those_of_the_gguf_package() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 32)).astype(np.float32)  # more than are made at a time
    x[:1500] *= rng.choice([0, 1e-45, 1e-40, 1e-7, 1e9, 3e37], (1500, 1)).astype(np.float32)
    halves = np.arange(-254, 256, dtype=np.float32).reshape(-1, 30) / 2
    ends = np.full((len(halves), 2), (127, -0.0), np.float32)  # a scale of one
    near = [np.nextafter(halves, np.float32(to)) for to in (-1e3, 0, 1e3)]
    x = np.concatenate([x, *(np.concatenate([h, ends], 1) for h in (halves, *near))])
    x[5, 7] = np.inf
    with np.errstate(all="ignore"):
        forms = {
            "F32": x,
            "BF16": (x.view(np.uint32) >> 16).astype(np.uint16),
            "F16": x.astype(np.float16).view(np.uint16),
        }
        for dtype, raw in forms.items():
            want = gguf.quants.quantize(to_fp32(raw, dtype), gguf.GGMLQuantizationType.Q8_0)
            assert ggml.q8_0(raw, dtype).tobytes() == want.tobytes(), dtype


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(
    canon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(ZooError, match=r"x\.gguf: cannot be written: No space left on device"):
        written(canon, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_type_matrices_are_as_the_folder_has_them(canon: Path, tmp_path: Path) -> None:
    refs = read_header(written(canon, tmp_path), "x.gguf")[1]
    assert {r.dtype for r in refs if len(r.shape) > 1} == {"BF16"}
    assert {r.dtype for r in refs if len(r.shape) == 1} == {"F32"}


@pytest.mark.parametrize("type", ["q4_k_m", "iq2_xxs", "q6_k", "nvfp4"])
def test_blocks_that_llama_cpp_alone_makes_are_left_to_it_with_the_commands(
    type: str, canon: Path, tmp_path: Path
) -> None:
    file, plain = tmp_path / "x.gguf", tmp_path / "x-bf16.gguf"
    commands = (
        f"`zoo export {canon} {plain} --format gguf --type bf16`, then `llama-quantize {plain} {file} {type}`"
    )
    with pytest.raises(ZooError, match=re.escape(commands)):
        written(canon, tmp_path, type)
    with pytest.raises(
        ZooError, match="x-f32.gguf --format gguf --type f32`, then"
    ):  # bf16 would round them twice
        written(verified.canonical("llama"), tmp_path, type)
    for unknown in ("fp8", "q9_9", "iq9_m"):
        with pytest.raises(ZooError, match=f"unknown type '{unknown}'; expected one of f32, f16, bf16, q8_0"):
            written(canon, tmp_path, unknown)
    with pytest.raises(ZooError, match=f"`llama-quantize '.*' '{tmp_path}/a b/x.gguf' {type}`"):
        written(canon, tmp_path / "a b", type)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_no_whole_blocks_are_kept_in_f16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="zoo"):
        file = zoo.export(verified.canonical("mistral"), tmp_path / "x.gguf", format="gguf", type="q8_0")
    assert "rows of 38 are no blocks of 32; kept in F16" in caplog.text
    assert {t.dtype for t in open_checkpoint(file).tensors.values()} == {"F16", "F32"}


# --- files --------------------------------------------------------------------------------------------------


def test_a_split_set_is_the_model_of_the_one_file(canon: Path, tmp_path: Path) -> None:
    args = [
        "export",
        str(canon),
        str(tmp_path / "s.gguf"),
        "--format",
        "gguf",
        "--max-shard-size",
        "100KB",
        "--json",
    ]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    names = json.loads(result.stdout)["files"]
    assert len(names) > 2 and names == sorted(p.name for p in tmp_path.iterdir())
    assert all(re.fullmatch(rf"s-\d{{5}}-of-{len(names):05d}\.gguf", n) for n in names)
    first = json.loads(result.stdout)["path"]
    assert Path(first).name == names[0]
    one = vendor.canonical(written(canon, tmp_path), tmp_path / "a")
    vendor.same(vendor.canonical(Path(first), tmp_path / "b"), one)
    assert zoo.verify(first, canon, level="bytes").passed


def test_a_file_that_is_there_is_replaced_only_with_force(canon: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"mine")
    with pytest.raises(ZooError, match=r"x\.gguf: exists; --force replaces it"):
        written(canon, tmp_path)
    assert file.read_bytes() == b"mine"
    args = ["export", str(canon), str(file), "--format", "gguf", "--force"]
    assert CliRunner().invoke(cli, args).exit_code == 0
    assert zoo.verify(file, canon, level="plan").passed
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_what_a_killed_export_left_is_taken_and_what_others_put_there_is_not(
    canon: Path, tmp_path: Path
) -> None:
    (partial := tmp_path / "x.gguf.partial").mkdir()
    (partial / "x-00001-of-00002.gguf").write_bytes(b"half")
    held = os.open(partial, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ZooError, match="another process is writing it"):
        written(canon, tmp_path)
    os.close(held)
    (partial / "mine").write_text("mine")
    with pytest.raises(ZooError, match="is in the way, and zoo did not make it"):
        written(canon, tmp_path)
    assert sorted(p.name for p in partial.iterdir()) == ["mine", "x-00001-of-00002.gguf"]
    (partial / "mine").unlink()
    written(canon, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_what_no_gguf_can_say_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        ZooError, match=r"zoo knows no GGUF form of family opt; it has one of cohere2, deepseek_v3"
    ):
        written(verified.canonical("opt"), tmp_path)
    with pytest.raises(ZooError, match=r"expected the name of a file that ends in \.gguf"):
        zoo.export(verified.canonical("llama"), tmp_path / "x", format="gguf")
    with pytest.raises(ZooError, match=r"a type \(q8_0\) is of GGUF"):
        zoo.export(verified.canonical("llama"), tmp_path / "x", type="q8_0")
    assert not list(tmp_path.iterdir())


def test_a_mistral_goes_out_as_the_llama_that_llama_cpp_takes_it_for(tmp_path: Path) -> None:
    folder = verified.canonical("mistral")
    file = written(folder, tmp_path)
    assert open_checkpoint(file).metadata["general.architecture"] == "llama"
    assert zoo.verify(file, folder, level="bytes").passed
    of_file = vendor.canonical(file, tmp_path / "again")
    vendor.same(of_file, {k: t for f in folder.glob("model-*") for k, t in load_file(f).items()})
    with pytest.raises(
        ZooError, match=r"of architecture llama cannot say it: spec.layers\[0\].mixer.window is"
    ):
        written(verified.canonical("mistral_window"), tmp_path / "b")


# --- the tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
def test_a_tokenizer_that_came_of_a_gguf_has_its_fields_again(fields: dict[str, Any]) -> None:
    files, notes = gguf_tokenizer.files(fields, "x.gguf")
    assert not notes
    again = gguf_vocab.fields(files, len(fields["tokenizer.ggml.tokens"]), "x")
    assert again == fields


def test_the_scores_of_pieces_give_the_order_in_which_they_were_learned() -> None:
    files = dict(gguf_tokenizer.files(SENTENCEPIECE, "x.gguf")[0])
    whole = json.loads(files["tokenizer.json"])
    whole["model"]["merges"] = [["a", "b"], ["▁", "ab"], ["▁a", "b"], ["▁", "a"]]
    scores = gguf_vocab.fields(files | {"tokenizer.json": json.dumps(whole).encode()}, 12, "x")[
        "tokenizer.ggml.scores"
    ]
    assert [scores[SENTENCEPIECE["tokenizer.ggml.tokens"].index(t)] for t in ("ab", "▁ab", "▁a")] == [
        0.0,
        -1.0,
        -2.0,
    ]


def test_every_known_way_to_split_text_is_named_again() -> None:
    """By the first name that llama.cpp has for the same, where merges are skipped or not."""
    named = {}
    for pre, _ in gguf_tokenizer.splits():
        files = dict(gguf_tokenizer.files(BYTE_LEVEL | {"tokenizer.ggml.pre": pre}, "x.gguf")[0])
        named[pre] = gguf_vocab.fields(files, 272, "x")["tokenizer.ggml.pre"]
    steps = dict(gguf_tokenizer.splits())
    for pre, again in named.items():
        assert steps[again] == steps[pre]
        assert gguf_tokenizer.ignores_merges(again) == gguf_tokenizer.ignores_merges(pre)
    assert (
        named["glm4"] == "llama-bpe" and named["chatglm-bpe"] == "smaug-bpe" and named["refact"] == "smollm"
    )


@pytest.mark.parametrize(
    ("pre", "respell"),
    [
        ("deepseek-v3", lambda text: text.replace("\\\\r\\\\n", "\\r\\n")),  # line ends as themselves, as released
        ("deepseek-coder", lambda text: text.replace('{"type": "Split", "pattern": {"Regex": "\\\\p{N}"}, "behavior": "Isolated", "invert": false}',
                                                     '{"type": "Digits", "individual_digits": true}')),
    ],
)  # fmt: skip
def test_a_split_is_known_in_each_of_its_spellings(pre: str, respell: Callable[[str], str]) -> None:
    files = dict(gguf_tokenizer.files(BYTE_LEVEL | {"tokenizer.ggml.pre": pre}, "x.gguf")[0])
    text = respell(json.dumps(json.loads(files["tokenizer.json"])))
    assert text != json.dumps(json.loads(files["tokenizer.json"]))
    fields = gguf_vocab.fields(files | {"tokenizer.json": text.encode()}, 272, "x")
    assert fields["tokenizer.ggml.pre"] == pre


def test_a_tokenizer_config_as_transformers_saves_it_is_read() -> None:
    """With a length that stands for none, and added tokens that tokenizer.json does not list."""
    files = dict(gguf_tokenizer.files(byte_level(264), "x.gguf")[0])
    config = json.loads(files["tokenizer_config.json"]) | {
        "model_max_length": int(1e30),
        "added_tokens_decoder": {"264": {"content": "<tool>", "special": False}, "265": {"content": "<s>", "special": True}},
        "add_bos_token": True,
    }  # fmt: skip
    files["tokenizer_config.json"] = json.dumps(config).encode()
    fields = gguf_vocab.fields(files, 272, "x")
    assert fields["tokenizer.ggml.tokens"][264:266] == ["<tool>", "<s>"]
    assert fields["tokenizer.ggml.token_type"][264:266] == [4, 3]
    assert not list(gguf_vocab.unsaid(files, "x"))
    whole = json.loads(files["tokenizer.json"]) | {"post_processor": None}
    (told,) = gguf_vocab.unsaid(files | {"tokenizer.json": json.dumps(whole).encode()}, "x")
    assert "add_bos_token" in told


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "a model of type Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text by {'type': 'Lowercase'}"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text by {'type': 'Whitespace'}"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "is not known to zoo"),
        (
            {"added_tokens": [{"id": 999, "content": "<x>", "special": True}]},
            "the number 999; the embedding has 272 rows",
        ),
        ({"model": 3}, "not as the package tokenizers writes it"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_form_of_is_refused_by_what_it_does(
    change: dict[str, Any], says: str
) -> None:
    files = dict(gguf_tokenizer.files(BYTE_LEVEL, "x.gguf")[0])
    files["tokenizer.json"] = json.dumps(json.loads(files["tokenizer.json"]) | change).encode()
    with pytest.raises(ZooError, match=re.escape(says)):
        gguf_vocab.fields(files, 272, "x")


# --- zoo verify x.gguf --against CANON ----------------------------------------------------------------------


def test_a_written_file_is_held_against_its_folder_as_far_as_its_type_goes(
    canon: Path, tmp_path: Path
) -> None:
    file = str(written(canon, tmp_path))
    result = CliRunner().invoke(cli, ["verify", file, "--against", str(canon), "--level", "bytes"])
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.output and "nothing was written" in result.output
    assert "8 texts, by the folder's tokenizer and the file's" in result.output
    assert not (canon / "parity.json").exists()
    cert = zoo.verify(zoo.export(canon, tmp_path / "q.gguf", format="gguf", type="Q4_1"), canon)
    assert cert.passed and [x.name for x in cert.levels] == ["plan", "bytes"]
    (step,) = (c for c in cert.levels[1].checks if "of a block" in c.name)
    assert 0.5 < step.value <= 1  # the bound is that of the rounding, not above it
    assert "rounds the folder's values to Q4_1, Q8_0" in cert.not_checked[0]


@pytest.mark.proof
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_own_loader_reads_a_written_file_as_the_folder(family: str, tmp_path: Path) -> None:
    """Of the families whose fields its loader all follows in a model as small and odd as ours."""
    case = tiny.CASES[family]
    folder = zoo.convert(testing_gguf.make(case, case.gguf[0], tmp_path)[0], tmp_path / "canon")
    cert = zoo.verify(written(folder, tmp_path, "f32"), folder, require="decode")
    assert cert.passed
    assert cert.oracle["kind"] == "transformers"


@pytest.mark.proof
@pytest.mark.parametrize(
    ("family", "says"),
    [("mixtral", "family is mixtral in the folder, llama there"), ("gemma2", "mixer.scale is")],
)
def test_where_that_loader_drops_what_the_file_says_it_is_no_judge(
    family: str, says: str, tmp_path: Path
) -> None:
    case = tiny.CASES[family]
    folder = zoo.convert(testing_gguf.make(case, case.gguf[0], tmp_path)[0], tmp_path / "canon")
    cert = zoo.verify(written(folder, tmp_path), folder)
    assert cert.passed
    assert (
        "upstream's loader reads the file otherwise: " in cert.not_checked[0] and says in cert.not_checked[0]
    )


@pytest.mark.parametrize("type", ["bf16", "q8_0", "q4_0"])
def test_one_value_that_is_another_is_found(type: str, canon: Path, tmp_path: Path) -> None:
    file = written(canon, tmp_path, type)
    raw = bytearray(file.read_bytes())
    raw[open_checkpoint(file).tensors["blk.1.ffn_up.weight"].offset + 7] ^= 0x44
    file.write_bytes(raw)
    cert = zoo.verify(file, canon, level="bytes")
    assert [x.verdict for x in cert.levels] == ["passed", "failed"]
    assert any("blk.1.ffn_up.weight" in n for n in cert.levels[1].notes)


def test_a_type_that_zoo_does_not_make_is_held_to_what_is_left_of_a_tensor(
    canon: Path, tmp_path: Path
) -> None:
    source = gguf.GGUFReader(written(canon, tmp_path, "f32"))
    fields, _ = read_header(tmp_path / "x.gguf", "x.gguf")
    for name, swapped in (("ternary", False), ("swapped", True)):
        w = gguf.GGUFWriter(tmp_path / f"{name}.gguf", OF.arch)
        for key, value in fields.items():
            if key != "general.architecture":
                testing_gguf._add(w, key, value)
        for t in source.tensors:
            data = np.array(t.data)
            if swapped and t.name == "blk.1.ffn_up.weight":
                data = data[::-1].copy()
            kind = gguf.GGMLQuantizationType.MXFP4 if "ffn_up" in t.name else gguf.GGMLQuantizationType.F32
            w.add_tensor(t.name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    good, bad = (zoo.verify(tmp_path / f"{n}.gguf", canon, level="bytes") for n in ("ternary", "swapped"))
    assert good.passed and not bad.passed
    assert bad.levels[1].notes[0].startswith("blk.1.ffn_up.weight: 1.")


def test_another_tokenizer_or_another_field_is_found(canon: Path, tmp_path: Path) -> None:
    file = written(canon, tmp_path)
    raw = file.read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(raw.replace(b"add_bos_token\x07\0\0\0\x01", b"add_bos_token\x07\0\0\0\x00"))
    assert other.read_bytes() != raw
    cert = zoo.verify(other, canon, level="bytes")
    assert {c.name for x in cert.levels for c in x.checks if not c.passed} == {"texts with other ids"}
    eps = np.float32(build.read_config(canon.parent / "hf")["rms_norm_eps"]).tobytes()
    other.write_bytes(raw.replace(eps, np.float32(1e-3).tobytes(), 1))
    cert = zoo.verify(other, canon, level="bytes")
    assert {c.name for x in cert.levels for c in x.checks if not c.passed} == {"Spec differs from the file's"}


def test_a_file_is_held_against_a_folder_and_nothing_else(canon: Path, tmp_path: Path) -> None:
    file = written(canon, tmp_path)
    for against in (None, file):
        with pytest.raises(ZooError, match=r"a file is held against the canonical folder it was written of"):
            zoo.verify(file, against)
    with pytest.raises(ZooError, match="of files only a GGUF is held against a folder"):
        zoo.verify(canon.parent / "hf" / "model.safetensors", canon)


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("gemma", {"tie_word_embeddings": False}, "gemma has no head but the embedding"),
        ("gpt_neox", {"tie_word_embeddings": True}, "asks for a head beside the embedding"),
        ("qwen3", {"attention_bias": True}, "has no bias behind attention"),
        ("qwen2", {"head_dim": 24}, "together as wide as the model"),
        ("deepseek_v3", {"q_lora_rank": None}, "asks for the rank of queries"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 97.0, "factor": 2.0}}, "RoPE is linear"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 97.0, "factor": 4.0, "original_max_position_embeddings": 64}}, "of all channels"),
        ("starcoder2", {"use_bias": False}, "asks for biases"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 97.0, "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.7}}, "magnitude to follow from its factor"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_run_is_refused_though_fields_could_say_it(
    family: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    case = tiny.CASES[family]
    of, like = case.gguf[0], case.variants[0]
    source = build.make(case, like.with_text(like.text | of.settings | settings), tmp_path / "hf")
    with pytest.raises(ZooError, match="it does not run this model") as e:
        written(zoo.convert(source, tmp_path / "canon"), tmp_path / "out")
    assert says in str(e.value) and not (tmp_path / "out").exists()


def test_a_type_for_experts_of_which_there_are_none_and_a_window_that_llama_cpp_lacks_are_told(
    canon: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(canon, tmp_path, "mxfp4_moe")
    assert "the model has none: its matrices are Q8_0" in caplog.text
    written(verified.canonical("phi3"), tmp_path / "phi3")
    assert "has no window for Phi-3" in caplog.text
