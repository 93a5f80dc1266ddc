"""From what `save_pretrained` writes to what the release holds: names, extra layers, tensors nobody reads.

A hook gets the saved tensors, the saved config and a way to draw seeded values; it changes both in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import names

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]
Config = dict[str, Any]
Draw = Callable[[str, tuple[int, ...]], "torch.Tensor"]
Hook = Callable[[Tensors, Config, Draw], None]


def add_mtp(tensors: Tensors, config: Config, draw: Draw, count: int) -> None:
    """Multi-token-prediction layers under the family's own names."""
    _draw_all(tensors, names.mtp_tensors(config, count), draw)


def gpt2_release(tensors: Tensors, config: Config, draw: Draw) -> None:
    """The 2019 files have no `transformer.` prefix and store each layer's causal mask as `attn.bias`."""
    import torch

    n = config["n_positions"]
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    for i in range(config["n_layer"]):
        tensors[f"h.{i}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)


def gemma3_release(tensors: Tensors, config: Config, draw: Draw) -> None:
    """The released vision tower has one more level in its names than a freshly built one saves."""
    _rename(tensors, names.gemma3_vision_prefix)


def kimi_linear_release(tensors: Tensors, config: Config, draw: Draw) -> None:
    """`save_pretrained` renames the dense layers too; the release does not."""
    renamed = names.undo_kimi_dense_rename(tensors)
    tensors.clear()
    tensors.update(renamed)


def gemma3n_release(tensors: Tensors, config: Config, draw: Draw) -> None:
    """The released wrapper: a prefix, unused K and V of the layers that share them, vision and audio weights.

    The vision tower is timm's; a few of its names stand for it. The rest is what upstream's classes hold.
    """
    text = dict(config)
    audio = {
        "model_type": "gemma3n_audio",
        "hidden_size": 16,
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": [4, 2],
        "input_feat_size": 8,
        "vocab_size": 3,
        "vocab_offset": 128,
    }
    vision = {"model_type": "gemma3n_vision", "hidden_size": 12, "vocab_size": 4, "vocab_offset": 124}
    config.clear()
    config.update(
        model_type="gemma3n",
        architectures=["Gemma3nForConditionalGeneration"],
        text_config=text,
        audio_config=audio,
        vision_config=vision,
        dtype=text["dtype"],
    )
    _rename(tensors, names.gemma3n_prefix)
    _draw_all(tensors, names.gemma3n_shared_kv(text), draw)
    _draw_all(tensors, names.gemma3n_modalities(config), draw)
    for name, shape in (
        ("conv_stem.conv.weight", (6, 3, 3, 3)),
        ("blocks.0.0.conv.weight", (8, 6, 1, 1)),
        ("msfa.norm.weight", (8,)),
    ):
        full = f"model.vision_tower.timm_model.{name}"
        tensors[full] = draw(full, shape)


def _rename(tensors: Tensors, rule: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[rule(name)] = tensors.pop(name)


def _draw_all(tensors: Tensors, wanted: dict[str, names.Tensor], draw: Draw) -> None:
    for name, t in wanted.items():
        assert name not in tensors, name
        tensors[name] = draw(name, t.shape)


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


def to_params_json(config: Config) -> Config:
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


def from_params_json(params: Config) -> Config:
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
