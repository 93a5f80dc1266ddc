"""Variants with experts: llama4, mistral4 / Mistral Large 3, deepseek_v3 / v32, qwen3_moe, gpt_oss, glm4_moe,
minimax_m2, mimo_v2_flash.
"""

from __future__ import annotations

from .variant import BASE, FULL, SLIDING, Variant, llama3, rope, yarn

# fmt: off

# --- llama4 -------------------------------------------------------------------------------------------------

_SCOUT = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 28, "intermediate_size_mlp": 44, "num_hidden_layers": 5,
    "num_local_experts": 4, "num_experts_per_tok": 2, "attention_chunk_size": 7, "floor_scale": 5,
    "attn_scale": 0.35,
    "rope_parameters": llama3(731.0, 6.0, 160, 1.3, 5.5),
}
_LLAMA4_VISION = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 7, "vision_output_dim": 20, "projector_input_dim": 20, "projector_output_dim": 20,
}
LLAMA4 = [
    Variant("llama4_scout", "llama4", "Llama4ForCausalLM", _SCOUT,
        "all layers MoE, top-2, qk norm; chunked RoPE layers, layer 3 NoPE with temperature tuning from "
        "position 4 on"),
    Variant("llama4_maverick", "llama4", "Llama4ForCausalLM",
        _SCOUT | {
            "use_qk_norm": False, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 3,
            "num_experts_per_tok": 1, "rope_parameters": rope(977.0),
        },
        "dense and MoE layers alternate, top-1, no qk norm, plain RoPE, NoPE every third layer"),
    Variant("llama4", "llama4", "Llama4ForConditionalGeneration",
        {
            "text_config": _SCOUT, "vision_config": _LLAMA4_VISION,
            "image_token_index": 130, "boi_token_index": 129, "eoi_token_index": 128,
        },
        "the released wrapper: language_model.* with a vision tower and a projector beside it",
        image_token=130),
]

# --- mistral4, Mistral Large 3 ------------------------------------------------------------------------------

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
MISTRAL4 = [
    Variant("mistral4", "mistral_large3", "Mistral4ForCausalLM", _MISTRAL4,
        "MLA, softmax router with groups, shared experts, experts fused on disk, query scale by position",
        seq_len=41),
    Variant("mistral4_plain", "mistral_large3", "Mistral4ForCausalLM",
        _MISTRAL4 | {
            "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 2,
            "rope_parameters": yarn(97.0, 7.0, 16, 0.9, 0.09, llama_4_scaling_beta=0.37),
        },
        "no query latent, half-split RoPE, YaRN's default attention factor, router weights not renormalised",
        seq_len=41),
    Variant("mistral_large3", "mistral_large3", "Mistral4ForCausalLM",
        _MISTRAL4 | {
            "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "first_k_dense_replace": 2,
            "rope_parameters": yarn(
                97.0, 7.0, 16, 0.9, 0.09, attention_factor=1.0, llama_4_scaling_beta=0.37,
            ),
        },
        "Mistral Large 3: YaRN without any magnitude (apply_scale false), no groups; released in Mistral's "
        "own format (make_mistral_format)", seq_len=41),
]

# --- deepseek_v3, kimi_k2, deepseek_v32 ---------------------------------------------------------------------

_DEEPSEEK = BASE | _MLA | {
    "hidden_size": 40, "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "rope_parameters": yarn(97.0, 7.0, 64, 3.6, 0.36, mscale=0.8, mscale_all_dim=0.6),
}
_DSA = _DEEPSEEK | {"index_topk": 6, "index_n_heads": 7, "index_head_dim": 17, "num_hidden_layers": 3}
_NO_MTP = {"num_nextn_predict_layers": 0}
DEEPSEEK = [
    Variant("deepseek_v3", "deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK | _NO_MTP,
        "MLA with query latent, interleaved RoPE, YaRN with mscale and mscale_all_dim (two separate "
        "effects), groups"),
    Variant("deepseek_v3_noqlora", "deepseek_v3", "DeepseekV3ForCausalLM",
        _DEEPSEEK | _NO_MTP | {
            "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 2, "n_shared_experts": 1, "rope_parameters": rope(83.0),
        },
        "q_proj instead of the latent, half-split RoPE unscaled, router weights not renormalised"),
    Variant("deepseek_v3_mtp", "deepseek_v3", "DeepseekV3ForCausalLM",
        _DEEPSEEK | {"num_hidden_layers": 3, "num_nextn_predict_layers": 1},
        "with the extra layer that predicts a second token, as model.layers.3.*", mtp=1),
    Variant("kimi_k2", "deepseek_v3", "DeepseekV3ForCausalLM",
        _DEEPSEEK | _NO_MTP | {
            "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "num_hidden_layers": 3,
            "rope_parameters": yarn(83.0, 6.0, 64, 3.6, 0.36, mscale=0.7, mscale_all_dim=0.7),
        },
        "model_type kimi_k2 in config.json; transformers knows it as deepseek_v3",
        rewrite={"model_type": "kimi_k2"}),
    Variant("deepseek_v32", "deepseek_v32", "DeepseekV32ForCausalLM", _DSA,
        "sparse attention: 29 tokens, 6 keys each; RoPE interleaved in attention, half-split in the indexer"),
    Variant("deepseek_v32_mtp", "deepseek_v32", "DeepseekV32ForCausalLM",
        _DSA | {"n_group": 2, "topk_group": 1, "rope_parameters": rope(83.0)},
        "unscaled RoPE; with the extra layer, indexer included",
        mtp=1, rewrite={"num_nextn_predict_layers": 1}),
]

# --- qwen3_moe ----------------------------------------------------------------------------------------------

_QWEN3_MOE = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_experts": 6, "num_experts_per_tok": 3,
    "num_hidden_layers": 4, "norm_topk_prob": True, "mlp_only_layers": [1], "rope_parameters": rope(613.0),
}
QWEN3_MOE = [
    Variant("qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE,
        "softmax router renormalised over the chosen; layer 1 dense by mlp_only_layers"),
    Variant("qwen3_moe_step", "qwen3_moe", "Qwen3MoeForCausalLM",
        _QWEN3_MOE | {
            "norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2, "num_experts": 5,
        },
        "not renormalised; every second layer sparse by decoder_sparse_step"),
]

# --- gpt_oss ------------------------------------------------------------------------------------------------

_GPT_OSS = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 28, "num_hidden_layers": 4, "num_local_experts": 5, "num_experts_per_tok": 3,
    "sliding_window": 6, "swiglu_limit": 1.3,
    "rope_parameters": yarn(97.0, 6.0, 64, 3.6, 0.36, truncate=False),
}
GPT_OSS = [
    Variant("gpt_oss", "gpt_oss", "GptOssForCausalLM", _GPT_OSS,
        "sinks, biases everywhere, interleaved gate/up with a clamp at 1.3 that acts often, YaRN without "
        "truncation"),
    Variant("gpt_oss_alpha", "gpt_oss", "GptOssForCausalLM",
        _GPT_OSS | {
            "swiglu_alpha": 1.2, "num_local_experts": 6, "num_hidden_layers": 3, "num_key_value_heads": 3,
            "layer_types": [FULL, SLIDING, FULL], "attention_bias": False,
            "rope_parameters": yarn(97.0, 6.0, 64, 3.6, 0.36, attention_factor=1.17),
        },
        "another sigmoid gain, no attention biases, layers start with a full one, truncated YaRN, given "
        "magnitude"),
]

# --- glm4_moe, minimax_m2 -----------------------------------------------------------------------------------

_GLM = BASE | {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4, "first_k_dense_replace": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1,
    "rope_parameters": rope(613.0, partial_rotary_factor=0.67),
}
GLM_MINIMAX = [
    Variant("glm4_moe", "glm4_moe", "Glm4MoeForCausalLM", _GLM,
        "QK norm, partial RoPE on 8 of 12 dims, q/k/v biases, groups; with the MTP layer", mtp=1),
    Variant("glm4_moe_air", "glm4_moe", "Glm4MoeForCausalLM",
        _GLM | _NO_MTP | {
            "use_qk_norm": False, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1,
            "n_shared_experts": 1, "norm_topk_prob": False,
            "rope_parameters": rope(613.0, partial_rotary_factor=0.5),
        },
        "no QK norm, two dense layers, no groups, router weights not renormalised"),
    Variant("minimax_m2", "minimax_m2", "MiniMaxM2ForCausalLM",
        BASE | {
            "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
            "intermediate_size": 28, "num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 3,

            "rope_parameters": rope(613.0, partial_rotary_factor=8 / 12),
        },
        "QK norm over the full width, partial RoPE on 8 of 12 dims, sigmoid router with a selection bias"),
]

# --- mimo_v2_flash ------------------------------------------------------------------------------------------

_MIMO = BASE | {
    "hidden_size": 40, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12, "v_head_dim": 9,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 5, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "sliding_window": 7, "attention_value_scale": 0.61,
    "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
    "rope_parameters": {
        FULL: rope(613.0, partial_rotary_factor=0.34), SLIDING: rope(71.0, partial_rotary_factor=0.34),
    },
}
MIMO = [
    Variant("mimo_v2_flash", "mimo_v2_flash", "MiMoV2FlashForCausalLM", _MIMO,
        "2 K/V heads on full layers, 4 and sinks on sliding ones, v narrower than k and scaled, RoPE on 4 "
        "of 12 dims"),
    Variant("mimo_v2_flash_mtp", "mimo_v2_flash", "MiMoV2FlashForCausalLM",
        _MIMO | {
            "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "num_hidden_layers": 3,
            "layer_types": [FULL, SLIDING, FULL], "mlp_layer_types": ["dense", "sparse", "dense"],
            "rope_parameters": {
                FULL: rope(613.0, partial_rotary_factor=0.5), SLIDING: rope(71.0, partial_rotary_factor=0.5),
            },
        },
        "no groups, not renormalised, a dense layer after a sparse one; with model.mtp.* beside the model",
        mtp=2),
]

VARIANTS = [*LLAMA4, *MISTRAL4, *DEEPSEEK, *QWEN3_MOE, *GPT_OSS, *GLM_MINIMAX, *MIMO]
