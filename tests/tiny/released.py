"""config.json as releases write it: the same meaning in the keys of the time, not in those of transformers 5.

The key sets follow the config files of real releases (Llama 3.1 8B, Llama 4 Scout, Mistral Small 3.1,
Ministral 3, DeepSeek V3 / V3.2, Kimi K2 Thinking, Qwen3, Qwen3-Next, SmolLM3, OLMo 2 / 3, Gemma 3, gpt-oss,
GLM-4.5 Air, MiniMax-M2, Kimi Linear, Nemotron 3 Nano, MiMo-V2-Flash). A key that a release leaves out is
left out where upstream's default says the same; a value that no release spells (an explicit NoPE list, say)
stays.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# Where transformers 5.23 does not read a release's keys: the values above happen to be its defaults in the
# real release, so nobody notices there; a tiny checkpoint has other values and comes out different.
NOT_READ_BY_UPSTREAM = {
    "olmo3": "rope_theta reaches the full layers only; sliding layers get the class default 500000",
    "olmo3_plain": "rope_theta reaches the full layers only; sliding layers get the class default 500000",
    "mimo_v2_flash": "rope_theta, swa_rope_theta, partial_rotary_factor, hybrid_layer_pattern, "
    "moe_layer_freq and layernorm_epsilon are ignored",
    "mimo_v2_flash_mtp": "as mimo_v2_flash",
}

# Keys that only transformers 5 writes.
_NEW = ("rope_parameters", "qk_head_dim", "is_encoder_decoder")


def released_config(config: Config) -> Config:
    """A saved config in released keys; `config` is left alone."""
    out = {**config, "transformers_version": "4.57.1"}
    if "text_config" in out:
        out["text_config"] = _text(out["text_config"])
        out["vision_config"] = _flat_rope(dict(out["vision_config"]))
        if out["model_type"] == "mistral3":
            del out["tie_word_embeddings"]  # the wrapper does not say; the files have a head or they do not
            if not out["text_config"]["tie_word_embeddings"]:
                del out["text_config"]["tie_word_embeddings"]
        elif out["model_type"] in ("gemma3", "llama4"):
            out.pop("tie_word_embeddings", None)
    else:
        out = _text(out)
    if (dtype := out.pop("dtype", None)) is not None:
        out["torch_dtype"] = dtype
    return out


def _text(config: Config) -> Config:
    out = dict(config)
    family = _FAMILIES.get(config["model_type"])
    if family is not None:
        out = family(out)
    return {k: v for k, v in out.items() if k not in _NEW or k in _KEEPS_NEW.get(config["model_type"], ())}


# Released after transformers 5: rope_parameters is their own key.
_KEEPS_NEW = {"ministral3": ("rope_parameters",), "mistral4": ("rope_parameters",)}


def _drop(config: Config, *keys: str) -> Config:
    for key in keys:
        config.pop(key, None)
    return config


def _drop_default(config: Config, **defaults: Any) -> Config:
    """Leave out what says nothing new, as releases do."""
    for key, value in defaults.items():
        if config.get(key) == value:
            del config[key]
    return config


def _flat_rope(config: Config, type_key: str = "rope_type") -> Config:
    """rope_parameters -> rope_theta, rope_scaling (null when unscaled), partial_rotary_factor."""
    rope = dict(config.pop("rope_parameters", None) or {})
    if not rope:
        return config
    config["rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", None)) is not None:
        config["partial_rotary_factor"] = partial
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind in ("default", "axial") else {type_key: kind, **rope}
    return config


def _two_thetas(config: Config) -> Config:
    """Gemma: rope_theta and rope_scaling for the full layers, rope_local_base_freq for the sliding ones."""
    local = config["rope_parameters"]["sliding_attention"]["rope_theta"]
    config["rope_parameters"] = config["rope_parameters"]["full_attention"]
    return _flat_rope(config) | {"rope_local_base_freq": local}


def _head_dim(config: Config) -> Config:
    """Leave head_dim out where it follows from the width."""
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]
    return config


def _gpt2(config: Config) -> Config:
    config["n_ctx"] = config["n_positions"]
    _drop_default(config, scale_attn_by_inverse_layer_idx=False, n_inner=None, scale_attn_weights=True)
    return _drop(
        config,
        "dtype",
        "tie_word_embeddings",
        "reorder_and_upcast_attn",
        "pad_token_id",
        "add_cross_attention",
    )


def _llama(config: Config) -> Config:
    return _head_dim(_flat_rope(config))


def _llama4(config: Config) -> Config:
    """Scout leaves the NoPE list empty, which means every fourth layer; chunking and MoE layers follow."""
    every_fourth = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]
    if config["no_rope_layers"] == every_fourth:
        config["no_rope_layers"] = []
    _drop(config, "layer_types", "moe_layers", "no_rope_layer_interval")
    return _flat_rope(config) | {"for_llm_compressor": False}


def _ministral3(config: Config) -> Config:
    config["rope_parameters"] = {"type": "yarn", **config["rope_parameters"]}
    return config


def _deepseek(config: Config) -> Config:
    _drop_default(config, rope_interleave=True)
    _drop(config, "head_dim", "mlp_layer_types", "layer_types", "mlp_bias", "output_router_logits")
    return _flat_rope(config, "type") | {
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "ep_size": 1,
    }


def _qwen3(config: Config) -> Config:
    _drop(config, "layer_types")
    return _flat_rope(config)


def _qwen3_moe(config: Config) -> Config:
    config["num_experts"] = config.pop("num_local_experts")
    return _head_dim(_qwen3(config))


def _qwen3_next(config: Config) -> Config:
    config["full_attention_interval"] = config["layer_types"].index("full_attention") + 1
    return _qwen3(config)


def _smollm3(config: Config) -> Config:
    _drop_default(config, tie_word_embeddings=True)
    return _flat_rope(config) | {"max_window_layers": 28}


def _olmo2(config: Config) -> Config:
    return _drop(_flat_rope(config), "attention_bias", "attention_dropout")


def _olmo3(config: Config) -> Config:
    """One rope_theta; rope_scaling means the full layers only."""
    both = config["rope_parameters"]
    assert both["full_attention"]["rope_theta"] == both["sliding_attention"]["rope_theta"]
    config["rope_parameters"] = both["full_attention"]
    return _flat_rope(config)


def _gemma3(config: Config) -> Config:
    """The small ones give a pattern, the larger ones the list (and the pattern under a private name)."""
    pattern = config.pop("_sliding_window_pattern", None) or config.pop("sliding_window_pattern")
    config.pop("sliding_window_pattern", None)
    if config["num_hidden_layers"] < 5:
        config["sliding_window_pattern"] = pattern
        del config["layer_types"]
    else:
        config["_sliding_window_pattern"] = pattern
    return _two_thetas(_drop(config, "tie_word_embeddings", "use_bidirectional_attention"))


def _gpt_oss(config: Config) -> Config:
    _drop_default(config, swiglu_alpha=1.702)
    config["experts_per_token"] = config["num_experts_per_tok"]
    config["initial_context_length"] = config["rope_parameters"]["original_max_position_embeddings"]
    return _flat_rope(config)


def _minimax_m2(config: Config) -> Config:
    _flat_rope(config)
    config["rotary_dim"] = round(config.pop("partial_rotary_factor") * config["head_dim"])
    del config["rope_scaling"]
    return config | {
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "attn_type_list": [1] * config["num_hidden_layers"],
    }


def _kimi_linear(config: Config) -> Config:
    """Layers are counted from 1; dense layers are the first ones."""
    kinds = config.pop("layer_types")
    config["linear_attn_config"] = {
        "full_attn_layers": [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"],
        "kda_layers": [i for i, kind in enumerate(kinds, 1) if kind == "linear_attention"],
        "head_dim": config.pop("linear_head_dim"),
        "num_heads": config.pop("linear_num_heads"),
        "short_conv_kernel_size": config.pop("linear_conv_kernel_dim"),
    }
    config["first_k_dense_replace"] = config.pop("mlp_layer_types").count("dense")
    config["head_dim"] = 72  # the release has one that nothing uses
    return config | {
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "rope_theta": 10000.0,
        "num_nextn_predict_layers": 0,
    }


def _nemotron_h(config: Config) -> Config:
    letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
    kinds = config.pop("layers_block_type")
    config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
    mtp = config.pop("mtp_layers_block_type")
    if config["num_nextn_predict_layers"]:
        config["mtp_hybrid_override_pattern"] = "".join(letters[kind] for kind in mtp)
    else:
        del config["num_nextn_predict_layers"]
    _drop_default(config, moe_latent_size=None)
    return _drop(config, "time_step_limit", "rope_parameters", "moe_shared_expert_overlap") | {
        "num_hidden_layers": len(kinds),
        "norm_eps": config["layer_norm_epsilon"],
        "rope_theta": 10000,
        "partial_rotary_factor": 1.0,
    }


def _mimo_v2_flash(config: Config) -> Config:
    """`hybrid_layer_pattern` 1 means a window; a released window of W shows W + 1 keys, itself included."""
    both, kinds = config.pop("rope_parameters"), config.pop("layer_types")
    window = config.pop("sliding_window") - 1
    return config | {
        "rope_theta": both["full_attention"]["rope_theta"],
        "swa_rope_theta": both["sliding_attention"]["rope_theta"],
        "partial_rotary_factor": both["full_attention"]["partial_rotary_factor"],
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in kinds],
        "moe_layer_freq": [int(kind == "sparse") for kind in config.pop("mlp_layer_types")],
        "layernorm_epsilon": config.pop("rms_norm_eps"),
        "sliding_window": window,
        "sliding_window_size": window,
        "attention_chunk_size": window,
        "swa_num_attention_heads": config["num_attention_heads"],
        "swa_num_key_value_heads": 2 * config["num_key_value_heads"],
        "swa_head_dim": config["head_dim"],
        "swa_v_head_dim": config["v_head_dim"],
        "n_shared_experts": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }


_FAMILIES = {
    "gpt2": _gpt2,
    "llama": _llama,
    "llama4_text": _llama4,
    "mistral": _llama,
    "ministral": _llama,
    "ministral3": _ministral3,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "deepseek_v32": _deepseek,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "gemma3_text": _gemma3,
    "gemma3n_text": _two_thetas,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _flat_rope,
    "minimax_m2": _minimax_m2,
    "kimi_linear": _kimi_linear,
    "nemotron_h": _nemotron_h,
    "mimo_v2_flash": _mimo_v2_flash,
}
