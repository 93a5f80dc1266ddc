"""Meta's rank files: the same canonical bytes as the same weights in Hugging Face's layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vendor
from test_export import hashes
from test_manifests import CONFIGS

import zoo
from zoo import families
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.export import export
from zoo.model.load import load
from zoo.spec import Spec
from zoo.testing import llama3

DENSE = {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 64,
    "vocab_size": 132, "rope_parameters": llama3(50000.0, 32.0, 8192, 1.0, 4.0),
}  # fmt: skip
PARAMS = {
    "dim": 60, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "vocab_size": -1, "multiple_of": 4,
    "ffn_dim_multiplier": 0.4, "norm_eps": 0.02, "rope_theta": 50000.0, "use_scaled_rope": True,
}  # fmt: skip
LLAMA4 = {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 40,
    "intermediate_size_mlp": 80, "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1,
    "rope_parameters": llama3(50000.0, 16.0, 8192, 1.0, 4.0), "attn_temperature_tuning": True,
    "no_rope_layer_interval": 4,
}  # fmt: skip
LLAMA4_PARAMS = {
    "dim": 60, "n_layers": 4, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 131, "multiple_of": 4, "ffn_exp": 4.0,
    "ffn_dim_multiplier": 0.5, "norm_eps": 0.02, "rope_theta": 50000.0, "use_scaled_rope": True,
    "rope_scaling_factor": 16.0, "rope_high_freq_factor": 4.0, "nope_layer_interval": 4, "use_qk_norm": True,
    "attention_chunk_size": 7, "attn_temperature_tuning": True, "floor_scale": 5.0, "attn_scale": 0.35,
    "moe_args": {
        "num_experts": 4, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1, "interleave_moe_layer_step": 2,
    },
}  # fmt: skip


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return vendor.make(tmp_path / "hf", "llama", **DENSE)


@pytest.fixture
def ranks(hf: Path, tmp_path: Path) -> Path:
    return vendor.to_meta(hf, tmp_path / "meta", 2, PARAMS)


def architecture(path: Path) -> Spec:
    """The Spec, but for what params.json does not say."""
    return replace(families.spec_of(open_checkpoint(path).config), dtype=None, context_length=0)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_ranks_convert_to_the_bytes_of_the_whole(hf: Path, n_ranks: int, tmp_path: Path) -> None:
    meta = vendor.to_meta(hf, tmp_path / "meta", n_ranks, PARAMS)
    assert open_checkpoint(meta).format == "meta"
    vendor.same(vendor.canonical(meta, tmp_path / "b"), vendor.canonical(hf, tmp_path / "a"))


def test_params_json_says_what_config_json_says(hf: Path, ranks: Path) -> None:
    assert architecture(ranks) == architecture(hf)


def test_an_embedding_cut_by_rows_is_joined_by_rows(tmp_path: Path) -> None:
    hf = vendor.make(tmp_path / "hf", "llama", **(DENSE | {"vocab_size": 100_352, "num_hidden_layers": 1}))
    meta = vendor.to_meta(hf, tmp_path / "meta", 2, PARAMS | {"n_layers": 1}, embed_axis=0)
    assert open_checkpoint(meta).config["vocab_size"] == 100_352
    vendor.same(vendor.canonical(meta, tmp_path / "b"), vendor.canonical(hf, tmp_path / "a"))


def test_its_logits_are_those_of_upstream_on_the_hugging_face_layout(
    hf: Path, ranks: Path, tmp_path: Path
) -> None:
    vendor.canonical(ranks, tmp_path / "zoo")
    ids = tiny.tokens("llama")
    with torch.inference_mode():
        ours = load(tmp_path / "zoo")(ids)
    assert (ours - tiny.logits(tiny.upstream(hf), ids)).abs().max() <= 5e-5


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_llama4_ranks_convert_to_the_bytes_of_the_whole(n_ranks: int, tmp_path: Path) -> None:
    vocab = {"vocab_size": 132} if n_ranks == 2 else {}
    hf = vendor.make(tmp_path / "hf", "llama4_scout", **LLAMA4, **vocab)
    meta = vendor.to_meta_llama4(hf, tmp_path / "meta", n_ranks, LLAMA4_PARAMS | vocab)
    assert architecture(meta) == architecture(hf)
    vendor.same(vendor.canonical(meta, tmp_path / "b"), vendor.canonical(hf, tmp_path / "a"))


RELEASES = {
    # params.json as in the releases (llama-models' sku_list.py; the model cards), and the config it must give
    "llama-3.1-8b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
    "llama-3.1-70b": {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 4096},
    "llama-3.1-405b": {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "ffn_dim_multiplier": 1.2, "multiple_of": 4096},
    "llama-3.2-1b-instruct": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
    "llama-3.2-3b-instruct": {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_released_params_give_the_released_config(release: str) -> None:
    data = json.loads((CONFIGS / f"{release}.config.json").read_text())
    params = RELEASES[release] | {
        "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    }  # fmt: skip
    ours = families.own_config(
        "meta", params, () if data.get("tie_word_embeddings") else ("rank0.output.weight",), "params.json"
    )

    def spec(config: dict[str, Any]) -> Spec:
        return replace(families.spec_of(config), dtype=None)

    assert spec(ours) == spec(data)


def test_llama4_scouts_params_give_the_released_config() -> None:
    data = json.loads((CONFIGS / "llama4-scout-17b-16e-instruct.config.json").read_text())
    params = {
        "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202048, "multiple_of": 2048,
        "ffn_exp": 4.0, "ffn_dim_multiplier": 1.2, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
        "nope_layer_interval": 4, "use_qk_norm": True, "attention_chunk_size": 8192, "attn_temperature_tuning": True,
        "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True},
    }  # fmt: skip
    ours = families.own_config("meta", params, ("rank0.output.weight",), "params.json")
    assert replace(families.spec_of(ours), dtype=None) == replace(families.spec_of(data), dtype=None)


# --- what can be wrong ----------------------------------------------------------------------------------------


def test_a_missing_rank_in_the_middle_is_named(hf: Path, tmp_path: Path) -> None:
    meta = vendor.to_meta(hf, tmp_path / "meta", 2, PARAMS)
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(ZooError, match=r"consolidated\.00\.pth is missing"):
        open_checkpoint(meta)


def test_a_missing_last_rank_is_named(ranks: Path) -> None:
    (ranks / "consolidated.01.pth").unlink()
    with pytest.raises(ZooError, match=r"set of 2 rank files; found 1: consolidated\.01\.pth is missing"):
        open_checkpoint(ranks)


def rewrite(file: Path, **tensors: torch.Tensor | None) -> None:
    state = torch.load(file)
    for name, t in tensors.items():
        name = name.replace("__", ".")
        if t is None:
            del state[name]
        else:
            state[name] = t
    torch.save(state, file)


def test_ranks_of_different_shapes_disagree(ranks: Path) -> None:
    rewrite(ranks / "consolidated.01.pth", layers__1__attention__wk__weight=torch.zeros(11, 60))
    with pytest.raises(
        ZooError, match=r"disagree: 'layers\.1\.attention\.wk\.weight'.*\[10, 60\].*\[11, 60\]"
    ):
        open_checkpoint(ranks)


def test_ranks_of_different_tensors_disagree(ranks: Path) -> None:
    rewrite(ranks / "consolidated.01.pth", layers__1__attention__wk__weight=None)
    with pytest.raises(
        ZooError, match=r"disagree: 'layers\.1\.attention\.wk\.weight' is in .*00\.pth but not in .*01\.pth"
    ):
        open_checkpoint(ranks)


def test_ranks_whose_copies_of_a_norm_differ_disagree(ranks: Path, tmp_path: Path) -> None:
    rewrite(ranks / "consolidated.01.pth", norm__weight=torch.ones(60))
    with pytest.raises(ZooError, match=r"norm\.weight"):
        vendor.canonical(ranks, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_without_params_json_there_is_nothing_to_go_by(ranks: Path) -> None:
    (ranks / "params.json").unlink()
    with pytest.raises(ZooError, match="params"):
        open_checkpoint(ranks, "meta")


def test_the_vision_models_are_refused(ranks: Path) -> None:
    (ranks / "params.json").write_text(json.dumps(PARAMS | {"vision_chunk_size": 560}))
    with pytest.raises(ZooError, match="vision"):
        open_checkpoint(ranks)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("rope_scaling", {"factor": 2}, "rope_scaling is"),
        ("low_freq_factor", 2.0, r"low_freq_factor is 2\.0"),
        ("use_qk_norm", True, "use_qk_norm is True"),
        ("quantization", {"x": 1}, "quantization is"),
        ("use_scaled_rope", "false", "use_scaled_rope is 'false'"),
        ("n_layers", 4_000_000_000, "n_layers is 4000000000; expected 1 to 1024"),
        ("multiple_of", 0, "makes no model"),
        ("vocab_size", "abc", "vocab_size is abc; expected a whole number"),
        ("n_heads", [], "makes no model"),
    ],
)
def test_a_field_that_is_not_supported_is_refused_by_name(
    field: str, value: object, says: str, ranks: Path
) -> None:
    (ranks / "params.json").write_text(json.dumps(PARAMS | {field: value}))
    with pytest.raises(ZooError, match=rf"params\.json: .*{says}"):
        open_checkpoint(ranks)


def test_params_that_are_no_object_are_refused(ranks: Path) -> None:
    (ranks / "params.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ZooError, match=r"params\.json: model should be an object"):
        open_checkpoint(ranks)


def test_two_files_of_one_rank_are_refused(ranks: Path) -> None:
    (ranks / "consolidated.0.pth").write_bytes((ranks / "consolidated.00.pth").read_bytes())
    with pytest.raises(ZooError, match=r"consolidated\.0\.pth and consolidated\.00\.pth are both of rank 0"):
        open_checkpoint(ranks)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_the_rank_files_come_back_to_the_byte(hf: Path, n_ranks: int, tmp_path: Path) -> None:
    """Meta's names are of one rank, so they are the release's own files where it had one."""
    meta = vendor.to_meta(hf, tmp_path / "meta", n_ranks, PARAMS)
    (meta / "tokenizer.model").write_bytes(b"IQ== 0\n")
    canon = zoo.convert(meta, tmp_path / "canon")
    assert hashes(export(canon, tmp_path / "back", "source")) == hashes(meta)
    assert (hashes(export(canon, tmp_path / "one", "meta")) == hashes(meta)) == (n_ranks == 1)
    assert len(list((tmp_path / "one").glob("*.pth"))) == 1
