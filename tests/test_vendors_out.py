"""Meta's and Mistral's own files out of a canonical folder, held to files that are written from the vendors' own loaders
(`vendor.py`), not from zoo's rules. The vendors' code itself opens them in benchmarks/vendors.py."""

from __future__ import annotations

import base64
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import vendor
import verified
from families.mistral_large3 import make_mistral_format, to_mistral_tensors
from safetensors.torch import load_file
from test_export import hashes
from test_formats_meta import DENSE, LLAMA4
from test_manifests import CONFIGS

import zoo
from zoo import families
from zoo.errors import ZooError
from zoo.formats import gguf_tokenizer, open_checkpoint, params_out
from zoo.formats.pickle import read_pickle
from zoo.formats.pickle_out import Archive
from zoo.mapping.export import export
from zoo.testing import rope
from zoo.text.tiktoken_out import ranks_file
from zoo.text.tokenizer import byte_spelling

PLAIN = DENSE | {"rope_parameters": rope(613.0)}


def exported(tmp_path: Path, format: str, like: str, **settings: Any) -> tuple[Path, Path]:
    """A tiny model in Hugging Face's layout, and the vendor's files of its canonical folder."""
    hf = vendor.make(tmp_path / "hf", like, dtype="bfloat16", **settings)
    vendor.canonical(hf, tmp_path / "canon")
    return hf, zoo.export(tmp_path / "canon", tmp_path / "out", format=format)


def params(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "params.json").read_text()))


def one_rank(folder: Path) -> vendor.Tensors:
    """As Meta's code loads it; the archive's checksums are right."""
    (file,) = folder.glob("*.pth")
    assert zipfile.ZipFile(file).testzip() is None
    state: vendor.Tensors = torch.load(file, mmap=True, weights_only=True)
    return {n: t.clone() for n, t in state.items() if n != "rope.freqs"}


def test_a_llama_becomes_metas_file_and_the_same_canonical_tensors_again(tmp_path: Path) -> None:
    hf, out = exported(tmp_path, "meta", "llama", **DENSE)
    want = vendor.to_meta(hf, tmp_path / "want", 1, {"dim": 60})
    vendor.same(one_rank(out), one_rank(want))
    assert params(out) == {
        "dim": 60, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 132, "norm_eps": 0.02, "rope_theta": 50000.0,
        "use_scaled_rope": True, "multiple_of": 1, "ffn_dim_multiplier": 64.5 / 160,
    }  # fmt: skip
    vendor.same(vendor.canonical(out, tmp_path / "again"), read(tmp_path / "canon"))


def test_a_tied_head_has_a_name_of_its_own_and_no_bytes_in_metas_file(tmp_path: Path) -> None:
    _, out = exported(tmp_path, "meta", "llama_tied", **PLAIN)
    (file,) = out.glob("*.pth")
    state = torch.load(file, mmap=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    assert families.spec_of(open_checkpoint(out).config).tied


@pytest.mark.parametrize("step", [1, 2])
def test_a_llama_4_becomes_metas_file(step: int, tmp_path: Path) -> None:
    settings = LLAMA4 | {"interleave_moe_layer_step": step}
    hf, out = exported(tmp_path, "meta", "llama4_scout", **settings)
    vendor.same(one_rank(out), one_rank(vendor.to_meta_llama4(hf, tmp_path / "want", 1, {})))
    assert params(out)["nope_layer_interval"] == 4 and params(out)["attention_chunk_size"] == 7
    assert params(out)["moe_args"]["interleave_moe_layer_step"] == step
    vendor.same(vendor.canonical(out, tmp_path / "again"), read(tmp_path / "canon"))


def read(canon: Path) -> vendor.Tensors:
    return {k: t for f in canon.glob("model-*") for k, t in load_file(f).items()}


@pytest.mark.parametrize("like", ["mistral", "ministral", "mixtral", "mistral_large3"])
def test_a_mistral_becomes_its_own_format_and_the_same_canonical_tensors_again(
    like: str, tmp_path: Path
) -> None:
    hf, out = exported(tmp_path, "mistral", like)
    if like == "mistral_large3":
        want = to_mistral_tensors(vendor.read_tensors(hf))
    else:
        want = load_file(vendor.to_mistral(hf, tmp_path / "want") / "consolidated.safetensors")
        want.pop("vision_encoder.ln_pre.weight", None)
    vendor.same(load_file(out / "consolidated.safetensors"), want)
    vendor.same(vendor.canonical(out, tmp_path / "again"), read(tmp_path / "canon"))


def test_a_folder_that_came_in_mistrals_format_goes_back_to_the_byte(tmp_path: Path) -> None:
    own = make_mistral_format("mistral_large3", tmp_path / "own")
    vendor.canonical(own, tmp_path / "canon")
    assert hashes(zoo.export(tmp_path / "canon", tmp_path / "out", format="mistral")) == hashes(own)


def test_a_mistral_that_came_as_a_gguf_of_llama_becomes_its_own_format(tmp_path: Path) -> None:
    hf = vendor.make(tmp_path / "hf", "mistral")
    vendor.canonical(hf, tmp_path / "canon")
    file = zoo.export(tmp_path / "canon", tmp_path / "x.gguf", format="gguf", type="f32")
    vendor.canonical(file, tmp_path / "of_gguf")
    out = zoo.export(tmp_path / "of_gguf", tmp_path / "out", format="mistral")
    straight = zoo.export(tmp_path / "canon", tmp_path / "straight", format="mistral")
    vendor.same(load_file(out / "consolidated.safetensors"), load_file(straight / "consolidated.safetensors"))
    assert params(out) == params(straight)


def test_shards_of_a_size_have_an_index(tmp_path: Path) -> None:
    vendor.canonical(vendor.make(tmp_path / "hf", "mistral"), tmp_path / "canon")
    out = export(tmp_path / "canon", tmp_path / "out", "mistral", shard_size=40_000, dtype="bf16")
    assert (out / "consolidated.safetensors.index.json").exists()
    assert len(list(out.glob("consolidated-*.safetensors"))) > 1
    assert {t.dtype for t in vendor.canonical(out, tmp_path / "again").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "release", ["llama-3.1-405b", "llama4-scout-17b-16e-instruct", "mistral-7b-v0.1", "ministral3-3b"]
)
def test_a_releases_architecture_can_be_said(release: str) -> None:
    said(release)


@pytest.mark.proof
def test_every_releases_architecture_can_be_said_but_one() -> None:
    """Mistral Small 4's softmax has YaRN's magnitude, which no params.json is known to say."""
    refused = set()
    for file in CONFIGS.glob("*.config.json"):
        release = file.name.removesuffix(".config.json")
        try:
            said(release)
        except ZooError:
            refused.add(release)
    assert refused == {"mistral-small-4-119b"}


def said(release: str) -> None:
    """Raises ZooError where a vendor's naming has no word for it."""
    config = json.loads((CONFIGS / f"{release}.config.json").read_text())
    if "architectures" not in config:
        return
    family = families.find(config)
    for naming in {"meta", "mistral"} & set(family.own):
        params_out.form(family, naming, families.spec_of(config), release)


# --- what cannot be said ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "like", "says"),
    [
        ("meta", "llama", r"meta's params.json cannot say it: .*rope_high_freq_factor is 5.5"),
        ("meta", "mistral", r"no form of family mistral: .*head_dim is 10, and it would be read as 6.* llama, llama4"),
        ("mistral", "mistral4", r"mistral's params.json cannot say it: spec.layers\[0\].mixer.scale is"),
        ("mistral", "qwen3", r"no form of family qwen3: .*qk_norm is QKNorm.*one of mistral, mistral_large3, mixtral"),
        ("meta", "nemotron_h", "has layers without plain or latent attention, which no params.json has"),
    ],
)  # fmt: skip
def test_what_a_vendors_format_cannot_say_is_refused_by_name(
    format: str, like: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ZooError, match=says):
        zoo.export(verified.canonical(like), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_quantised_weights_and_options_of_other_formats_are_refused(tmp_path: Path) -> None:
    own = vendor.to_mistral(vendor.make(tmp_path / "hf", "mistral"), tmp_path / "own", fp8=True)
    vendor.canonical(own, tmp_path / "canon")
    assert hashes(zoo.export(tmp_path / "canon", tmp_path / "out", format="mistral")) == hashes(own)
    with pytest.raises(ZooError, match=r"are quantised \(layers.0.attn.qkv: fp8-tensor\)"):
        export(tmp_path / "canon", tmp_path / "b", "mistral", shard_size=9000)
    with pytest.raises(ZooError, match='a size of files is for formats "hf", "gguf" and "mistral"'):
        export(verified.canonical("llama"), tmp_path / "b", "meta", shard_size=9000)


def test_a_scale_that_metas_code_does_not_have_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        exported(tmp_path, "meta", "llama", **DENSE)
    assert "its RoPE is scaled by 32; Meta's own code scales by 8" in caplog.text


# --- the tokenizer -----------------------------------------------------------------------------------------------


def tokenizer(reserved: int, merges: list[list[str]]) -> dict[str, Any]:
    """A tokenizer.json as Llama 3's: bytes and what is merged of them, numbered by rank, then tokens that are added."""
    tokens = [*map(chr, byte_spelling().values()), *("".join(m) for m in merges)]
    added = [{"id": len(tokens) + n, "content": f"<|{n}|>", "special": True} for n in range(reserved)]
    (steps,) = (s for name, s in gguf_tokenizer.splits() if name == "llama-bpe")
    model = {
        "type": "BPE",
        "vocab": {t: n for n, t in enumerate(tokens)},
        "merges": merges,
        "ignore_merges": True,
    }
    return {
        "added_tokens": [t | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) for t in added],
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": None,
        "decoder": None, "model": model,
    }  # fmt: skip


MERGES = [["t", "h"], ["th", "e"], ["Ġ", "the"], ["Ġ", "t"], ["Ġt", "h"], ["Ã", "©"]]
# With every pair that a token can be merged of: "Ġthe" and "Ġth" have two.
ALLOWED = [["t", "h"], ["th", "e"], ["Ġ", "the"], ["Ġth", "e"], ["Ġ", "t"], ["Ġ", "th"], ["Ġt", "h"], ["Ã", "©"]]  # fmt: skip


def test_metas_tokenizer_is_made_of_a_tokenizer_json_and_gives_its_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    made = tokenizer(4, MERGES)
    made["model"]["merges"] = ALLOWED
    vendor.canonical(vendor.make(tmp_path / "hf", "llama_tied", **PLAIN), tmp_path / "canon")
    described = json.loads((tmp_path / "canon" / "zoo.json").read_text())
    (tmp_path / "canon" / "tokenizer.json").write_text(json.dumps(made))
    described["carried"] = [*described["carried"], "tokenizer.json"]
    (tmp_path / "canon" / "zoo.json").write_text(json.dumps(described))
    out = zoo.export(tmp_path / "canon", tmp_path / "out", format="meta")
    lines = [line.split() for line in (out / "tokenizer.model").read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    pattern = made["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    metas = tiktoken.Encoding(
        "metas", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|0|>": len(ranks)}
    )
    text = " the th é theth 12345\n  the"
    ids = Tokenizer.from_str(json.dumps(made)).encode(text).ids
    assert metas.encode(text) == ids and max(ids) >= 256


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"merges": MERGES[:-1]}, "its merges are not those that its tokens' numbers, as ranks, allow"),
        ({"vocab": {"a": 1}}, "not numbered from 0"),
        ({"ignore_merges": False}, "splits text as smaug-bpe does|splits text as dbrx does"),
    ],
)
def test_another_tokenizer_than_metas_is_not_given_out_as_one(change: dict[str, Any], says: str) -> None:
    made = tokenizer(4, MERGES)
    made["model"] |= {"merges": ALLOWED} | change
    with pytest.raises(ZooError, match=says):
        ranks_file(json.dumps(made).encode())


def test_a_tokenizer_that_lacks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        zoo.export(verified.canonical("mistral"), tmp_path / "out", format="mistral")
    assert "no tekken.json or tokenizer.model.v* is written, which Mistral's own code reads" in caplog.text


# --- the archive ---------------------------------------------------------------------------------------------


def test_an_archive_beyond_four_gigabytes_is_laid_out_as_zip64(tmp_path: Path) -> None:
    """Sparse: nothing of its five gigabytes is written."""
    tensors = [("a", "BF16", (5, 1 << 29)), ("b", "F32", (4,)), ("c", "F64", ())]
    made, file = Archive("consolidated.00.pth", tensors, {"d": "b"}), tmp_path / "consolidated.00.pth"
    with open(file, "wb") as f:
        f.truncate(made.size)
        for at, data in made.pieces:
            os.pwrite(f.fileno(), data, at)
        os.pwrite(f.fileno(), bytes(range(16)), made.place["b"])
    state = torch.load(file, mmap=True, weights_only=True)
    assert [(n, t.dtype, tuple(t.shape)) for n, t in state.items()] == [
        ("a", torch.bfloat16, (5, 1 << 29)), ("b", torch.float32, (4,)), ("c", torch.float64, ()), ("d", torch.float32, (4,)),
    ]  # fmt: skip
    assert state["d"].view(torch.uint8).tolist() == list(range(16))
    assert {t.name: t.offset for t in read_pickle(file, "x") if t.name != "d"} == made.place
    sizes = {e.filename: e.file_size for e in zipfile.ZipFile(file).infolist()}
    assert sizes["consolidated.00/data/0"] == 5 << 30 and made.nbytes == (5 << 30) + 16 + 8
