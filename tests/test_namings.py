"""Names that others than Hugging Face give to a family's tensors: Meta's, Mistral's, llama.cpp's.

At full size the rules account for every one of them; from a tiny checkpoint rebuilt in those names come the same
canonical bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from zoo import families, manifest
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.base import TensorRef
from zoo.layout import active_params, total_params
from zoo.mapping.match import match
from zoo.mapping.plan import make_plan
from zoo.spec import Attention, MoE
from zoo.testing.assemble import assemble, in_other_names, same
from zoo.testing.full_size import account, attention, edited, read, refs


def gguf(config: dict[str, Any]) -> dict[str, TensorRef]:
    """llama.cpp's names and shapes of a model that has these sizes (gguf-py's constants.py)."""
    spec = families.spec_of(config)
    norm = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    post = {"attn_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm"}
    out = {"token_embd.weight": (spec.vocab_size, spec.d_model), "output_norm.weight": (spec.d_model,)}
    if not spec.tied:
        out["output.weight"] = (spec.vocab_size, spec.d_model)
    for i, layer in enumerate(spec.layers):
        a, blk, d = attention(spec, i), f"blk.{i}.", spec.d_model
        ffn = layer.ffn
        assert ffn is not None and not isinstance(ffn, MoE)
        shapes = {
            "attn_q": (a.n_heads * a.head_dim, d), "attn_k": (a.n_kv_heads * a.head_dim, d),
            "attn_v": (a.n_kv_heads * a.head_dim, d), "attn_output": (d, a.n_heads * a.head_dim),
            "ffn_gate": (ffn.d_ff, d), "ffn_up": (ffn.d_ff, d), "ffn_down": (d, ffn.d_ff),
        }  # fmt: skip
        if a.qk_norm:
            shapes |= {"attn_q_norm": (a.head_dim,), "attn_k_norm": (a.head_dim,)}
        shapes |= {theirs: (d,) for ours, theirs in (norm | post).items() if getattr(layer, ours)}
        out |= {f"{blk}{name}.weight": shape for name, shape in shapes.items()}
    return refs({name: ("F32", shape) for name, shape in out.items()})


@pytest.mark.parametrize(
    "stem", ["llama-3.2-1b-instruct", "llama-3.1-8b", "qwen3-8b", "gemma3-270m", "gemma3-1b-it"]
)
def test_the_rules_account_for_llama_cpps_names(stem: str) -> None:
    account(read(stem), gguf(read(stem)), "gguf")


def test_a_gguf_of_llama_3_holds_its_rotary_factors_beside_the_weights() -> None:
    config = read("llama-3.1-8b")
    tensors = gguf(config) | refs({"rope_freqs.weight": ("F32", (64,))})
    assert list(account(config, tensors, "gguf").extras) == ["rope_freqs.weight"]


def meta(config: dict[str, Any], n: int, by_rows: bool) -> dict[str, TensorRef]:
    """The names and slices of Meta's own files for n model-parallel ranks (its llama-models code)."""
    spec = families.spec_of(config)
    a, d, v = attention(spec, 0), spec.d_model, spec.vocab_size
    ffn = spec.layers[0].ffn
    assert ffn is not None and not isinstance(ffn, MoE)
    q, k, f = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim, ffn.d_ff
    one = {"norm.weight": (d,), "output.weight": (v // n, d)}
    one["tok_embeddings.weight"] = (v // n, d) if by_rows else (v, d // n)
    for i in range(spec.n_layers):
        layer = f"layers.{i}."
        one |= {
            layer + "attention.wq.weight": (q // n, d), layer + "attention.wk.weight": (k // n, d),
            layer + "attention.wv.weight": (k // n, d), layer + "attention.wo.weight": (d, q // n),
            layer + "feed_forward.w1.weight": (f // n, d), layer + "feed_forward.w3.weight": (f // n, d),
            layer + "feed_forward.w2.weight": (d, f // n),
            layer + "attention_norm.weight": (d,), layer + "ffn_norm.weight": (d,),
        }  # fmt: skip
    one["rope.freqs"] = (a.head_dim // 2,)
    return refs({f"rank{r}.{name}": ("BF16", shape) for r in range(n) for name, shape in one.items()})


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("vocab_size", [32000, 128256])
def test_the_rules_account_for_metas_files_of_any_number_of_ranks(n: int, vocab_size: int) -> None:
    """Llama 3 cuts the embedding by rows of the vocabulary, Llama 2 by columns."""
    config = {**read("llama-3.1-8b"), "vocab_size": vocab_size}
    account(config, meta(config, n, by_rows=vocab_size == 128256), "meta", n)


def test_the_rules_account_for_a_dense_model_in_mistrals_own_names() -> None:
    config = read("mistral-7b-v0.3")
    tensors = {name.removeprefix("rank0."): t for name, t in meta(config, 1, by_rows=True).items()}
    del tensors["rope.freqs"]
    assert not account(config, tensors, "mistral").extras
    config = read("mistral-small-3.1-24b-instruct")
    tensors = {name.removeprefix("rank0."): t for name, t in meta(config, 1, by_rows=True).items()}
    del tensors["rope.freqs"]
    vision = (
        "vision_encoder.patch_conv.weight",
        "vision_language_adapter.w_in.weight",
        "patch_merger.merging_layer.weight",
    )
    tensors |= refs(dict.fromkeys(vision, ("BF16", (2, 2))))
    assert set(account(config, tensors, "mistral").extras) == set(vision)


def interleaved(t: torch.Tensor, heads: int) -> torch.Tensor:
    """Half-split RoPE rows -> neighbouring pairs (the inverse of what Meta's releases went through)."""
    first, second = t.unflatten(0, (heads, -1)).chunk(2, dim=1)
    return torch.stack((first, second), dim=2).flatten(0, 2)


META = {
    "model.embed_tokens": ("tok_embeddings", 0), "model.norm": ("norm", None), "lm_head": ("output", 0),
    "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
}  # fmt: skip


def metas(hf: dict[str, torch.Tensor], a: Attention, n: int) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors -> Meta's of n ranks, the embedding cut by columns (small vocabulary)."""
    out = {}
    for name, t in hf.items():
        stem = name.removesuffix(".weight")
        layer = stem.split(".")[2] if ".layers." in stem else None
        theirs, axis = META[stem if layer is None else stem.split(".", 3)[3]]
        if theirs in ("attention.wq", "attention.wk"):
            t = interleaved(t, a.n_heads if theirs == "attention.wq" else a.n_kv_heads)
        if theirs == "tok_embeddings":
            axis = 1
        full = f"{theirs}.weight" if layer is None else f"layers.{layer}.{theirs}.weight"
        pieces = [t] * n if axis is None else t.chunk(n, dim=axis)
        out |= {f"rank{r}.{full}": piece for r, piece in enumerate(pieces)}
    return out


def llama_cpps(hf: dict[str, torch.Tensor], a: Attention, permuted: bool) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors -> llama.cpp's."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    } | {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}  # fmt: skip
    four_norms = any("pre_feedforward" in name for name in hf)
    names["post_attention_layernorm"] = "post_attention_norm" if four_norms else "ffn_norm"
    out = {}
    for name, t in hf.items():
        stem, kind = name.rsplit(".", 1)
        layer = stem.split(".")[2] if ".layers." in stem else None
        theirs = names[stem if layer is None else stem.split(".", 3)[3]]
        if permuted and theirs in ("attn_q", "attn_k"):
            t = interleaved(t, a.n_heads if theirs == "attn_q" else a.n_kv_heads)
        out[f"{theirs}.{kind}" if layer is None else f"blk.{layer}.{theirs}.{kind}"] = t
    return out


def with_even_vocabulary(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The checkpoint without its last token: 131 of them do not split over ranks."""
    path = folder / "model.safetensors"
    tensors = {k: t[:130].clone() if t.shape[0] == 131 else t for k, t in load_file(path).items()}
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 130}), encoding="utf-8")
    return folder, tensors


@pytest.mark.parametrize("n", [1, 2])
def test_metas_files_of_any_number_of_ranks_give_the_same_canonical_bytes(n: int, tmp_path: Path) -> None:
    folder, tensors = with_even_vocabulary(tiny.make("llama", tmp_path / "llama"))
    a = attention(make_plan(open_checkpoint(folder)).spec, 0)
    assert same(assemble(in_other_names(folder, metas(tensors, a, n), "meta", n)), assemble(folder))


def test_a_dense_model_in_mistrals_own_names_gives_the_same_canonical_bytes(tmp_path: Path) -> None:
    folder = tiny.make("mistral", tmp_path / "mistral")
    a = attention(make_plan(open_checkpoint(folder)).spec, 0)
    theirs = metas(load_file(folder / "model.safetensors"), a, 1)
    theirs = {name.removeprefix("rank0."): t for name, t in theirs.items()}
    assert same(assemble(in_other_names(folder, theirs, "mistral")), assemble(folder))


@pytest.mark.parametrize(
    ("name", "permuted"),
    [("llama", True), ("llama_tied", True), ("llama_bias", True), ("qwen3", False), ("gemma3", False)],
)
def test_llama_cpps_names_give_the_same_canonical_bytes(name: str, permuted: bool, tmp_path: Path) -> None:
    """Its llama files hold rows of q and k in pairs; those of architectures it rotates in halves do not."""
    folder = tiny.make(name, tmp_path / name)
    a = attention(make_plan(open_checkpoint(folder)).spec, 0)
    theirs = llama_cpps(load_file(folder / "model.safetensors"), a, permuted)
    assert same(assemble(in_other_names(folder, theirs, "gguf")), assemble(folder))


# ------------------------------------------------------------------------------------ at full size


@pytest.mark.parametrize(
    ("stem", "total", "active"),
    [
        ("deepseek-v3", 671.03, 36.63),  # less the embedding, as published: 37
        ("gpt-oss-120b", 116.83, 5.13),
        ("qwen3-235b-a22b", 235.09, 21.57),
        ("llama4-scout-17b-16e-instruct", 107.77, 16.14),
        ("kimi-k2-instruct", 1026.41, 31.69),
    ],
)
def test_well_known_sizes_in_billions(stem: str, total: float, active: float) -> None:
    spec = families.spec_of(read(stem))
    embedding = spec.vocab_size * spec.d_model
    assert round(total_params(spec) / 1e9, 2) == total
    assert round((active_params(spec) - embedding) / 1e9, 2) == active


@pytest.mark.parametrize("stem", ["llama-3.1-8b", "qwen3-8b", "gemma3-27b-it", "olmo2-7b"])
def test_a_layer_that_the_config_does_not_have_is_not_set_aside_silently(stem: str) -> None:
    config = read(stem)
    released = refs({n: (t.dtype, t.shape) for n, t in tiny.released_tensors(config).items()})
    n = families.spec_of(config).n_layers
    shorter = edited(stem, num_hidden_layers=n - 1)
    if "layer_types" in (text := shorter.get("text_config", shorter)):
        text["layer_types"] = text["layer_types"][: n - 1]
    family = families.find(shorter)
    m = match(families.spec_of(shorter), family.rules["hf"], released)
    assert m.unexpected and all(f"layers.{n - 1}." in name for name in m.unexpected)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "ministral-3-3b", "mistral-small-4-119b"])
def test_scaled_rope_that_upstream_takes_for_granted_must_be_written(name: str) -> None:
    config = manifest.find(name).config
    assert config is not None
    for c in (config, config.get("text_config", {})):
        c.pop("rope_scaling", None)
        c.pop("rope_parameters", None)
        c["rope_theta"] = 10000.0
    with pytest.raises(ZooError, match="none of the fields 'rope_parameters', 'rope_scaling' is there"):
        families.spec_of(config)
