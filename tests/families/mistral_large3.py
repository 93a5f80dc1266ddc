"""Mistral Large 3 and Mistral Small 4: `mistral4` upstream.

transformers has no reader of Mistral's own format (params.json, consolidated.safetensors), in which Large 3 is
released: it is rewritten here. Small 4 was released after transformers 5: rope_parameters is its own key.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from families.mistral import tied_as_its_text
from zoo import families
from zoo.spec import LatentAttention
from zoo.testing import BASE, FamilyCase, Variant, build, full_size, names, yarn
from zoo.testing.built import built
from zoo.testing.full_size import read
from zoo.testing.names import Config, Tensor
from zoo.testing.variant import Settings, Tensors

if TYPE_CHECKING:
    pass

# fmt: off

_MLA = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 15,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 12, "v_head_dim": 9,
}
_MISTRAL4 = BASE | _MLA | {
    "hidden_size": 40, "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "rope_parameters": yarn(
        97.0, 7.0, 16, 0.9, 0.09, mscale=0.8, mscale_all_dim=0.6, llama_4_scaling_beta=0.37,
    ),
}

def upstream_scales_scores() -> None:
    attention = build.fresh(CASE.variants[0]).model.layers[0].self_attn
    assert attention.scaling > 1.1 * attention.qk_head_dim**-0.5


CASE = FamilyCase(
    "mistral_large3",
    (
        Variant("mistral4", "Mistral4ForCausalLM", _MISTRAL4,
            "MLA, softmax router with groups, shared experts, experts fused on disk, query scale by position",
            seq_len=41),
        Variant("mistral4_plain", "Mistral4ForCausalLM",
            _MISTRAL4 | {
                "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "n_group": 2,
                "topk_group": 1, "first_k_dense_replace": 2,
                "rope_parameters": yarn(97.0, 7.0, 16, 0.9, 0.09, llama_4_scaling_beta=0.37),
            },
            "no query latent, half-split RoPE, YaRN's default attention factor, router weights not renormalised",
            seq_len=41),
        Variant("mistral_large3", "Mistral4ForCausalLM",
            _MISTRAL4 | {
                "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1,
                "first_k_dense_replace": 2,
                "rope_parameters": yarn(
                    97.0, 7.0, 16, 0.9, 0.09, attention_factor=1.0, llama_4_scaling_beta=0.37,
                ),
            },
            "Mistral Large 3: YaRN without any magnitude (apply_scale false), no groups; released in Mistral's "
            "own format (make_mistral_format)", seq_len=41),
    ),
    grouped=False,
    classes={"mistral4": "Mistral4ForCausalLM"},
    upstream_keys=tied_as_its_text,
    keeps={"mistral4": ("rope_parameters",)},
    disputes={"YaRN's factor on the scores": upstream_scales_scores},
)
# fmt: on


# --- Mistral's own format -----------------------------------------------------------------------------------

# Mistral Large 3: released name -> upstream's, per layer. Experts are numbered on disk and fused upstream.
_MISTRAL_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "gate": "mlp.gate",
    "shared_experts.w1": "mlp.shared_experts.gate_proj",
    "shared_experts.w2": "mlp.shared_experts.down_proj",
    "shared_experts.w3": "mlp.shared_experts.up_proj",
}
_TO_MISTRAL = {theirs: ours for ours, theirs in _MISTRAL_LAYER.items()}
_MISTRAL_TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


def mistral_name(name: str) -> str:
    """Upstream's name of a tensor that both formats have one to one -> Mistral's."""
    module, suffix = name.rsplit(".", 1)
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"layers.{layer[1]}.{_TO_MISTRAL[layer[2]]}.{suffix}"
    return f"{_MISTRAL_TOP[module]}.{suffix}"


def to_mistral_tensors(tensors: Tensors) -> Tensors:
    """Rename, and take the fused experts apart: rows of gate_up are w1 (gate) then w3 (up), down is w2."""
    out: Tensors = {}
    for name, t in tensors.items():
        if fused := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", name):
            for e, expert in enumerate(t):
                base = f"layers.{fused[1]}.experts.{e}"
                if fused[2] == "down_proj":
                    out[f"{base}.w2.weight"] = expert.clone()
                else:
                    gate, up = expert.chunk(2)
                    out[f"{base}.w1.weight"], out[f"{base}.w3.weight"] = gate.clone(), up.clone()
        else:
            out[mistral_name(name)] = t
    return out


def to_params_json(config: Settings) -> Settings:
    """Upstream's Mistral4 config -> the params.json of Mistral Large 3 (keys as in the release)."""
    rope = config["rope_parameters"]
    assert (
        rope["rope_type"] == "yarn" and rope.get("attention_factor") == 1.0 and "mscale_all_dim" not in rope
    )
    original = rope["original_max_position_embeddings"]
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_attention_heads"],
        "head_dim": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "hidden_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "tied_embeddings": config["tie_word_embeddings"],
        "max_position_embeddings": config["max_position_embeddings"],
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_nope_head_dim": config["qk_nope_head_dim"],
        "qk_rope_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "moe": {
            "num_experts": config["n_routed_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "num_shared_experts": config["n_shared_experts"],
            "expert_hidden_dim": config["moe_intermediate_size"],
            "first_k_dense_replace": config["first_k_dense_replace"],
            "num_expert_groups": config["n_group"],
            "num_expert_groups_per_tok": config["topk_group"],
            "routed_scale": config["routed_scaling_factor"],
            "route_every_n": 1,
            "expert_parallel": 1,
            "expert_model_parallel": 1,
        },
        "yarn": {
            "original_max_position_embeddings": original,
            "factor": rope["factor"],
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
            "apply_scale": False,
        },
        "llama_4_scaling": {
            "original_max_position_embeddings": original,
            "beta": rope["llama_4_scaling_beta"],
        },
    }


def from_params_json(params: Settings) -> Settings:
    """The params.json of Mistral Large 3 -> upstream's Mistral4 config."""
    moe, yarn = params["moe"], params["yarn"]
    assert not yarn["apply_scale"] and moe["route_every_n"] == 1
    assert (
        yarn["original_max_position_embeddings"]
        == params["llama_4_scaling"]["original_max_position_embeddings"]
    )
    return {
        "model_type": "mistral4",
        "architectures": ["Mistral4ForCausalLM"],
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_heads"],
        "intermediate_size": params["hidden_dim"],
        "rms_norm_eps": params["norm_eps"],
        "tie_word_embeddings": params["tied_embeddings"],
        **{
            key: params[key]
            for key in (
                "vocab_size",
                "max_position_embeddings",
                "q_lora_rank",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
            )
        },
        "n_routed_experts": moe["num_experts"],
        "num_experts_per_tok": moe["num_experts_per_tok"],
        "n_shared_experts": moe["num_shared_experts"],
        "moe_intermediate_size": moe["expert_hidden_dim"],
        "first_k_dense_replace": moe["first_k_dense_replace"],
        "n_group": moe["num_expert_groups"],
        "topk_group": moe["num_expert_groups_per_tok"],
        "routed_scaling_factor": moe["routed_scale"],
        "norm_topk_prob": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": params["rope_theta"],
            "factor": yarn["factor"],
            "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "beta_fast": yarn["beta"],
            "beta_slow": yarn["alpha"],
            "attention_factor": 1.0,
            "llama_4_scaling_beta": params["llama_4_scaling"]["beta"],
        },
    }


def make_mistral_format(variant: str | Variant, dst: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write the variant (or the one of that name) as Mistral releases it: params.json and consolidated.safetensors."""
    from safetensors.torch import save_file

    variant = CASE.variant(variant) if isinstance(variant, str) else variant
    config, _ = variant.build()
    model = build.perturbed(variant, seed)
    build.cast(model, dtype)
    dst.mkdir(parents=True, exist_ok=True)
    tensors = to_mistral_tensors(dict(model.state_dict()))
    save_file(tensors, dst / "consolidated.safetensors", metadata={"format": "pt"})
    (dst / "params.json").write_text(json.dumps(to_params_json(config.to_dict()), indent=2) + "\n")
    return dst


def upstream_mistral_format(path: Path, *, dtype: str = "float32", attn: str = "eager") -> Any:
    """Load Mistral's own format into upstream's Mistral4, which has no reader for it: rename, fuse, load."""
    import torch
    from safetensors.torch import load_file
    from transformers import Mistral4Config, Mistral4ForCausalLM

    path = Path(path)
    config = Mistral4Config(**from_params_json(json.loads((path / "params.json").read_text())))
    config._attn_implementation, config._experts_implementation = attn, "eager"
    tensors = load_file(path / "consolidated.safetensors")
    with torch.random.fork_rng(devices=[]):
        model = Mistral4ForCausalLM(config)
    state = {}
    for name in model.state_dict():
        if fused := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", name):
            base, parts = f"layers.{fused[1]}.experts", ["w2"] if fused[2] == "down_proj" else ["w1", "w3"]
            state[name] = torch.stack(
                [
                    torch.cat([tensors[f"{base}.{e}.{w}.weight"] for w in parts])
                    for e in range(config.n_routed_experts)
                ]
            )
        else:
            state[name] = tensors[mistral_name(name)]
    model.load_state_dict(state)
    return model.to(getattr(torch, dtype)).eval()


def released_in_mistrals_format(params: Config, quantised: bool = False) -> dict[str, Tensor]:
    """Mistral Large 3 from its params.json: Mistral's names, experts one by one.

    Its fp8 release scales blocks of 128x128 by `weight_scale`; wq_a, wkv_a_with_mqa and gate stay bf16.
    """
    out: dict[str, Tensor] = {}
    for name, t in names.saved_tensors(CASE, from_params_json(dict(params))).items():
        if fused := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", name):
            experts, rows, columns = t.shape
            parts = (
                {"w2": (rows, columns)}
                if fused[2] == "down_proj"
                else dict.fromkeys(("w1", "w3"), (rows // 2, columns))
            )
            for e in range(experts):
                for part, shape in parts.items():
                    out[f"layers.{fused[1]}.experts.{e}.{part}.weight"] = Tensor(t.dtype, shape)
        else:
            out[mistral_name(name)] = t
    if quantised:
        for name in [n for n in out if re.search(r"\.(w[123]|wq_b|wkv_b|wo)\.weight$", n)]:
            rows, columns = out[name].shape
            out[name] = Tensor("F8_E4M3", (rows, columns))
            out[f"{name}_scale"] = Tensor("F32", (-(-rows // 128), -(-columns // 128)))
    return out


# --- tests --------------------------------------------------------------------------------------------------


def test_mistrals_own_format_is_the_same_model(tmp_path: Path) -> None:
    import torch

    path = make_mistral_format("mistral_large3", tmp_path)
    assert sorted(f.name for f in path.iterdir()) == ["consolidated.safetensors", "params.json"]
    b = built(CASE, CASE.variant("mistral_large3"))
    assert torch.equal(build.logits(upstream_mistral_format(path), b.ids), b.upstream["eager"])
    listed = released_in_mistrals_format(json.loads((path / "params.json").read_text()))
    assert {k: t.shape for k, t in listed.items()} == {
        k: tuple(t.shape) for k, t in build.read_tensors(path).items()
    }
    assert "layers.2.experts.7.w3.weight" in listed and "layers.1.feed_forward.w1.weight" in listed


def test_the_release_is_accounted_for_in_mistrals_own_names() -> None:
    params = json.loads((full_size.CONFIGS / "mistral-large-3-675b.params.json").read_text(encoding="utf-8"))
    config = full_size.read("mistral-large-3-675b") | {"quantization_config": params["quantization_config"]}
    lists = Path(__file__).parents[1] / "data" / "tensors"
    listed = json.loads((lists / "mistral-large-3-675b.tensors.json").read_text(encoding="utf-8"))
    tensors = released_in_mistrals_format(params, quantised=True)
    assert set(tensors) == {name for pattern in listed["patterns"] for name in full_size.expand(pattern)}
    vision = {
        "vision_encoder.conv.weight": ("BF16", (1, 1)),
        "patch_merger.merging_layer.weight": ("BF16", (1, 1)),
    }
    found = full_size.refs({n: (t.dtype, t.shape) for n, t in tensors.items()} | vision)
    assert set(full_size.account(config, found, "mistral").extras) == set(vision)


def test_yarn_of_mistral_large_3_changes_no_magnitude_and_that_of_deepseek_does() -> None:
    large, v3 = (families.spec_of(read(s)).layers[0].mixer for s in ("mistral-large-3-675b", "deepseek-v3"))
    assert isinstance(large, LatentAttention) and isinstance(v3, LatentAttention)
    assert (
        large.rope is not None
        and large.rope.scaling is not None
        and v3.rope is not None
        and v3.rope.scaling is not None
    )
    assert large.rope.scaling.attention_factor == v3.rope.scaling.attention_factor == 1.0
    assert large.scale == 192**-0.5
    assert v3.scale == pytest.approx(192**-0.5 * 1.3688879454113936**2, abs=0, rel=1e-15)
    assert large.query_scale is not None and (large.query_scale.beta, large.query_scale.period) == (
        0.1,
        8192.0,
    )
