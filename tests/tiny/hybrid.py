"""Variants whose layers mix attention with a recurrence: qwen3_next, kimi_linear, nemotron_h."""

from __future__ import annotations

from . import extras
from .variant import BASE, EPS, FULL, LINEAR, VOCAB, Variant, rope

# fmt: off

_QWEN3_NEXT = BASE | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
    "intermediate_size": 52, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20,
    "num_experts": 6, "num_experts_per_tok": 3, "num_hidden_layers": 5, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 26, "linear_value_head_dim": 21, "linear_conv_kernel_dim": 3,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR, LINEAR],
    "rope_parameters": rope(613.0, partial_rotary_factor=0.5),
}
_KIMI_LINEAR = BASE | {
    "hidden_size": 44, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 15,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 9, "intermediate_size": 52,
    "moe_intermediate_size": 28, "num_hidden_layers": 5, "num_local_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "linear_head_dim": 10, "linear_num_heads": 3, "linear_conv_kernel_dim": 3,
    "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
}
_NEMOTRON = VOCAB | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR, "moe"], "intermediate_size": 52,
    "mamba_num_heads": 6, "mamba_head_dim": 5, "n_groups": 3, "ssm_state_size": 7, "conv_kernel": 3,
    "chunk_size": 8,
    "time_step_min": 1e-7, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 28, "moe_shared_expert_intermediate_size": 20, "routed_scaling_factor": 1.7,
    "layer_norm_epsilon": EPS, "max_position_embeddings": 480,
}

VARIANTS = [
    Variant("qwen3_next", "qwen3_next", "Qwen3NextForCausalLM", _QWEN3_NEXT,
        "gated DeltaNet with 2 value heads per key head, gated attention, gated shared expert; 70 tokens "
        "cross a chunk of 64", seq_len=70),
    Variant("qwen3_next_mtp", "qwen3_next", "Qwen3NextForCausalLM",
        _QWEN3_NEXT | {
            "linear_num_value_heads": 6, "norm_topk_prob": False, "layer_types": [LINEAR, FULL, LINEAR],
            "num_hidden_layers": 3,
        },
        "3 value heads per key head, router not renormalised; with mtp.* beside the model",
        seq_len=70, mtp=1),
    Variant("kimi_linear", "kimi_linear", "KimiLinearForCausalLM", _KIMI_LINEAR,
        "channel-wise gated delta rule and MLA, no positions anywhere; 70 tokens cross a chunk of 64",
        seq_len=70, release=extras.kimi_linear_release),
    Variant("kimi_linear_two_dense", "kimi_linear", "KimiLinearForCausalLM",
        _KIMI_LINEAR | {
            "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": False,
            "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, LINEAR],
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        },
        "a dense layer of each attention kind, no groups, router weights not renormalised",
        seq_len=70, release=extras.kimi_linear_release),
    Variant("nemotron_h", "nemotron_h", "NemotronHForCausalLM", _NEMOTRON,
        "one mixer per layer: Mamba-2, MoE, attention without positions, MLP; relu^2; dt is never clamped"),
    Variant("nemotron_h_latent", "nemotron_h", "NemotronHForCausalLM",
        _NEMOTRON | {
            "moe_latent_size": 12, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
            "num_nextn_predict_layers": 1, "layers_block_type": ["moe", LINEAR, "mlp", FULL, LINEAR],
        },
        "experts in a latent space (Nemotron 3 Super); with mtp.* beside the model", mtp=1),
    Variant("nemotron_h_dtmin", "nemotron_h", "NemotronHForCausalLM", _NEMOTRON | {"time_step_min": 0.45},
        "the lower clamp of dt acts (upstream: in prefill, not in single-token decode)"),
]
