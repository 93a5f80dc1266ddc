"""Variants without experts: gpt2, llama, mistral and its wrappers, qwen3, smollm3, olmo2 / 3, gemma3 / 3n."""

from __future__ import annotations

from . import extras
from .variant import BASE, EPS, FULL, SLIDING, Variant, llama3, rope, yarn

# fmt: off

# --- gpt2 ---------------------------------------------------------------------------------------------------

_GPT2 = {
    "vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2,
    "n_embd": 40, "n_head": 5, "n_layer": 3, "n_positions": 37, "layer_norm_epsilon": EPS,
}
GPT2 = [
    Variant("gpt2", "gpt2", "GPT2LMHeadModel", _GPT2,
        "learned positions, Conv1D [in, out], fused c_attn, tied head, n_inner null = 4 n_embd"),
    Variant("gpt2_inverse_layer", "gpt2", "GPT2LMHeadModel",
        _GPT2 | {"n_inner": 52, "scale_attn_by_inverse_layer_idx": True},
        "attention also divided by layer index + 1; n_inner given"),
    Variant("gpt2_release", "gpt2", "GPT2LMHeadModel", _GPT2 | {"n_head": 4},
        "as the 2019 files: no transformer. prefix, causal masks saved as h.N.attn.bias",
        release=extras.gpt2_release),
]

# --- llama --------------------------------------------------------------------------------------------------

_LLAMA = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3,
    "rope_parameters": llama3(731.0, 6.0, 160, 1.3, 5.5),
}
LLAMA = [
    Variant("llama", "llama", "LlamaForCausalLM", _LLAMA,
        "untied head; head_dim 10 is not 36/6; llama3 RoPE scaling with all three bands"),
    Variant("llama_tied", "llama", "LlamaForCausalLM",
        _LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 3}, "tied head: no lm_head on disk"),
    Variant("llama_bias", "llama", "LlamaForCausalLM",
        _LLAMA | {
            "hidden_size": 60, "head_dim": None, "attention_bias": True, "mlp_bias": True,
            "rope_parameters": rope(977.0),
        },
        "attention_bias and mlp_bias; plain RoPE; head_dim follows from hidden_size"),
]

# --- mistral, ministral, ministral3, mistral3 ---------------------------------------------------------------

_MISTRAL = BASE | {
    "hidden_size": 38, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3,
    "sliding_window": None, "rope_parameters": rope(613.0),
}
# q is scaled by 1 + beta ln(1 + floor(pos / original)): with original 16 and 41 tokens in three steps.
_MINISTRAL3 = _MISTRAL | {
    "head_dim": 12,
    "rope_parameters": yarn(
        97.0, 4.0, 16, 0.9, 0.09, mscale=0.8, mscale_all_dim=0.6, llama_4_scaling_beta=0.37,
    ),
}
_PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 20, "image_size": 28, "patch_size": 7,
}
MISTRAL = [
    Variant("mistral", "mistral", "MistralForCausalLM", _MISTRAL, "no window; head_dim 10 is not 38/6"),
    Variant("mistral_window", "mistral", "MistralForCausalLM",
        _MISTRAL | {"hidden_size": 60, "head_dim": None, "sliding_window": 7},
        "window of 7 on all layers (as v0.1)"),
    Variant("ministral", "mistral", "MinistralForCausalLM",
        _MISTRAL | {
            "num_hidden_layers": 4, "sliding_window": 5, "layer_types": [FULL, SLIDING, SLIDING, FULL],
        },
        "windows of 5 on some layers (8B-2410)"),
    Variant("ministral3", "mistral", "Ministral3ForCausalLM", _MINISTRAL3,
        "YaRN (attention factor from mscale / mscale_all_dim) and a query scale that grows with position",
        seq_len=41),
    Variant("mistral3", "mistral", "Mistral3ForConditionalGeneration",
        {
            "text_config": _MISTRAL | {"model_type": "mistral"}, "vision_config": _PIXTRAL,
            "image_token_index": 130, "tie_word_embeddings": False,
        },
        "wrapper around mistral, untied (the wrapper's class default is tied)", image_token=130),
    Variant("mistral3_ministral3", "mistral", "Mistral3ForConditionalGeneration",
        {
            "text_config": _MINISTRAL3 | {"model_type": "ministral3", "tie_word_embeddings": True},
            "vision_config": _PIXTRAL, "image_token_index": 130, "tie_word_embeddings": True,
        },
        "wrapper around ministral3, tied (Ministral 3 3B)", seq_len=41, image_token=130),
]

# --- qwen3 --------------------------------------------------------------------------------------------------

_QWEN3 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3,
    "rope_parameters": rope(613.0),
}
QWEN3 = [
    Variant("qwen3", "qwen3", "Qwen3ForCausalLM", _QWEN3, "per-head QK norm before RoPE, untied"),
    Variant("qwen3_tied", "qwen3", "Qwen3ForCausalLM",
        _QWEN3 | {"tie_word_embeddings": True, "num_key_value_heads": 3, "attention_bias": True},
        "tied; with attention biases"),
    Variant("qwen3_window", "qwen3", "Qwen3ForCausalLM",
        _QWEN3 | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "layers from max_window_layers on have a window"),
]

# --- smollm3, olmo2, olmo3 ----------------------------------------------------------------------------------

_SMOLLM3 = BASE | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52,
    "num_hidden_layers": 4,
    "no_rope_layer_interval": 3, "rope_parameters": rope(613.0),
}
_OLMO = BASE | {
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 52,

}
SMOLLM_OLMO = [
    Variant("smollm3", "smollm3", "SmolLM3ForCausalLM", _SMOLLM3, "tied; layer 2 without RoPE"),
    Variant("smollm3_window", "smollm3", "SmolLM3ForCausalLM",
        _SMOLLM3 | {
            "use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 0, 1],
            "tie_word_embeddings": False,
        },
        "untied; explicit NoPE list, and the NoPE layers have a window"),
    Variant("olmo2", "olmo2", "Olmo2ForCausalLM",
        _OLMO | {"num_hidden_layers": 3, "rope_parameters": rope(613.0)},
        "norms on branch outputs only; QK norm over the full width"),
    Variant("olmo3", "olmo3", "Olmo3ForCausalLM",
        _OLMO | {
            "num_hidden_layers": 5, "sliding_window": 6,
            "rope_parameters": {
                FULL: yarn(613.0, 5.0, 64, 2.6, 0.13, attention_factor=1.17), SLIDING: rope(613.0),
            },
        },
        "3 sliding layers to 1 full; YaRN with a given attention factor on full layers only"),
    Variant("olmo3_plain", "olmo3", "Olmo3ForCausalLM",
        _OLMO | {
            "num_hidden_layers": 5, "sliding_window": 6, "num_key_value_heads": 3,
            "layer_types": [FULL, SLIDING, FULL, SLIDING, SLIDING],
            "rope_parameters": {FULL: rope(613.0), SLIDING: rope(613.0)},
        },
        "explicit layer types, plain RoPE everywhere"),
]

# --- gemma3 -------------------------------------------------------------------------------------------------

_GEMMA3 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 5,
    "query_pre_attn_scalar": 17, "sliding_window": 6, "sliding_window_pattern": 3,
    "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 613.0, "factor": 5.0}, SLIDING: rope(71.0),
    },
}
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 20, "image_size": 28, "patch_size": 7, "vision_use_head": False,
}
GEMMA3 = [
    Variant("gemma3", "gemma3", "Gemma3ForCausalLM", _GEMMA3 | {"final_logit_softcapping": 11.0},
        "four (1 + w) norms, two thetas, linear scaling on full layers, embeddings times 6, final softcap"),
    Variant("gemma3_plain", "gemma3", "Gemma3ForCausalLM",
        _GEMMA3 | {
            "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window_pattern": 2,
            "num_hidden_layers": 3, "rope_parameters": {FULL: rope(613.0), SLIDING: rope(71.0)},
        },
        "no scaling, one K/V head (as 270M and 1B)"),
    Variant("gemma3_vision", "gemma3", "Gemma3ForConditionalGeneration",
        {
            "text_config": _GEMMA3 | {"num_key_value_heads": 3, "rms_norm_eps": 0.03, "hidden_size": 42},
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": 130, "boi_token_index": 129, "eoi_token_index": 128,
        },
        "the wrapper of 4B and larger, names as released", release=extras.gemma3_release, image_token=130),
]

# --- gemma3n ------------------------------------------------------------------------------------------------

_GEMMA3N = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": [52, 52, 44, 44, 52, 52], "num_hidden_layers": 6, "sliding_window": 6,
    "final_logit_softcapping": 11.0,
    "vocab_size_per_layer_input": 113, "hidden_size_per_layer_input": 14, "altup_num_inputs": 3,
    "num_kv_shared_layers": 2, "laurel_rank": 7,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "activation_sparsity_pattern": [0.9, 0.6, 0.0, 0.8, 0.0, 0.7],
    "rope_parameters": {FULL: rope(613.0), SLIDING: rope(71.0)},
}
GEMMA3N = [
    Variant("gemma3n", "gemma3n", "Gemma3nForCausalLM", _GEMMA3N,
        "3 AltUp streams, LAuReL, per-layer embeddings (ids >= 113 have none), last 2 layers reuse K and V "
        "of "
        "layers 3 and 2, Gaussian top-k on four layers, two FFN widths"),
    Variant("gemma3n_wrapper", "gemma3n", "Gemma3nForCausalLM",
        _GEMMA3N | {
            "altup_num_inputs": 4, "num_attention_heads": 4, "intermediate_size": 52, "rms_norm_eps": 0.03,
        },
        "as released: model.language_model.*, unused K/V of the sharing layers, vision and audio beside it",
        release=extras.gemma3n_release),
]

VARIANTS = [*GPT2, *LLAMA, *MISTRAL, *QWEN3, *SMOLLM_OLMO, *GEMMA3, *GEMMA3N]
