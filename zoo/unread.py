"""What a family left unread of a config: refused where it would change numbers, noted where nobody knows it.

Three kinds of fields. `SILENT` ones say nothing about the numbers of a text model. `NUMBERS` change them in some
family that there is, each with the values that change nothing. All others are unknown: fine-tuners add keys of their
own, so these are notes. The facts are those of the releases' configs and of the configuration classes and models of
transformers 5. A field that neither list knows and whose name says what it scales counts as one that changes numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from zoo.config import Config
from zoo.errors import ZooError
from zoo.spec import MLP, Attention, LatentAttention, MoE, Rope, Spec

SILENT = re.compile(
    r"""
    _(?!remove_final).* | architectures | model_type | auto_map | (torch_)?dtype | transformers(_version|\.js_config|_weights) | name_or_path
    | (.*_)?(token|tokens)_(id|ids|index) | .*_token_id_.* | n_special | predict_special_tokens | vocab_offset
    | (id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|classifier_dropout.*|pruned_heads)
    # training and initialisation
    | init_method | initializer_.* | .*init(ializer)?_(std|range|value|scale) | (.*_)?dropout(_p|_rate|_prob)? | .*_pdrop | layerdrop
    | summary_.* | rescale_prenorm_residual | embedding_initializer_range | block_use_xavier_init | conv_use_xavier_init
    | .*aux_loss.* | .*_loss_(coef|alpha|coefficient|scaling_factor) | z_loss_coefficient | seq_aux | load_balance_coeff
    | router_jitter_noise | input_jitter_noise | output_router_logits | gradient_clipping | altup_coef_clip
    | time_step_(floor|max|min) | linear_(dt|a_log)_(min|max|init_floor) | pretraining_tp | ep_size
    # generation, caches and the kernels that compute the same
    | use_cache | cache_implementation | output_(attentions|hidden_states|scores|past) | num_logits_to_keep
    | calc_logits_for_entire_prompt
    | return_dict.* | torchscript | use_bfloat16 | tf_legacy_loss | is_(decoder|encoder_decoder|llama_config)
    | tie_encoder_decoder | add_cross_attention | cross_attention_hidden_size | chunk_size(_feed_forward)? | mamba_chunk_size
    | (bad_words_ids|(begin_)?suppress_tokens|forced_.*|prefix|remove_invalid_values|tokenizer_class|exponential_decay_.*)
    | (diversity|length|repetition)_penalty | do_sample | early_stopping | (encoder_)?no_repeat_ngram_size | m(ax|in)_length
    | num_(beams|beam_groups|return_sequences) | temperature | top_[kp] | typical_p | use_mamba_kernels | use_mambapy
    | mamba_ssm_(cache_)?dtype | use_grouped_mm | reorder_and_upcast_attn | moe_shared_expert_overlap | model_max_length
    | bias_dropout_fusion | masked_softmax_fusion | skip_bias_add(_qkv)? | slow_but_exact | offset_alibi | output_projection
    | inference_runner | validate_runner_input | pad_key_length | pre_allocate_kv_cache | scale_attention_softmax_in_fp32
    | n_ctx | expand | (unsloth|axolotl)_.* | (attn|experts)_implementation
    # read elsewhere: what the files hold, by the format's reader
    | quantization(_config)? | compression_config | expert_dtype | for_llm_compressor
    # multi-token prediction has no part in the next token's logits
    | (num_)?mtp(_.*)? | num_nextn_predict_layers | use_mtp | num_mtp_modules | index_share_for_mtp_iteration
    # images and sound
    | (vision|audio|speech|video|image|projector|connector)_config | (image|vision|video|audio|projector|multi_modal|multimodal|mm)_.*
    | (media|img)_.* | spatial_merge_size | out_hidden_size | ignore_index | use_unified_vision_chunk | process_image_mode | language_model_only
    | (use_)?mrope.* | pixel_shuffle_ratio | anyres_.* | vit_.* | num_media_embeds | (im|video)_(start|end|newline)_id
    # Hunyuan's: a head that classifies, ids, and what only counts where layers share keys or tokens are dropped, which is refused
    | add_classification_head | class_num | dense_list | pool_type | skip_cls_token | (text_(start|end)|mask_init|pad)_id
    | org_vocab_size | cla_share_factor | moe_random_routing_dropped_token
    """,
    re.VERBOSE,
)
"""Fields that say nothing about the numbers of a text model, or say it to another reader."""

NUMBERS: dict[str, tuple[Any, ...]] = {
    # scales
    **dict.fromkeys(
        """attention_multiplier embedding_multiplier embedding_multiplier_scale embedding_scale logit_scale logits_scaling
        logits_mup_width_multiplier lm_head_multiplier output_multiplier output_multiplier_scale residual_multiplier
        residual_scale attention_in_multiplier attention_out_multiplier key_multiplier ssm_in_multiplier
        ssm_out_multiplier scale_emb full_attn_alpha_factor full_attn_beta_factor linear_attn_alpha_factor
        linear_attn_beta_factor mlp_alpha_factor mlp_beta_factor attention_value_scale moe_routed_scaling_factor
        moe_router_scaling_factor router_scaling_factor route_scale routed_scaling_factor qk_scale_factor""".split(),
        (1.0,),
    ),
    **dict.fromkeys(
        """query_pre_attn_scalar attn_scale scale_depth dim_model_base mlp_multipliers ssm_multipliers scale_embedding
        normalize_embedding""".split(),
        (False,),
    ),
    **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1,)),
    "scale_attn_weights": (True,),
    "normalization_function": ("rmsnorm",),
    "attention_softmax_in_fp32": (True, False),
    # caps
    **dict.fromkeys(
        """attn_logit_softcapping final_logit_softcapping router_logit_softcapping moe_router_logit_softcapping
        attn_logit_softcap logit_softcap output_logit_soft_cap gate_soft_cap clip_qkv swiglu_limit swiglu_limits
        swiglu_limits_shared hidden_clip activation_sparsity_pattern""".split(),
        (0.0, False),
    ),
    # attention
    **dict.fromkeys(
        """alibi multi_query parallel_attn use_parallel_residual use_parallel_block new_decoder_architecture
        num_ln_in_parallel_attn attn_output_gate attention_output_gate mla_use_output_gate gating gating_types gate_activation
        output_gate_type attention_k_eq_v use_bidirectional_attention attn_temperature_tuning attn_temperature_len
        log_scaling_alpha log_scaling_n_floor scale_attn_by_inverse_layer_idx add_full_attention_sink_bias
        add_swa_attention_sink_bias sconv_kernel_size use_sconv rel_extent d_rel attn_type_list num_kv_shared_layers
        global_head_dim num_global_key_value_heads num_attention_heads_per_layer attention_other_setting
        add_attention_sinks attn_res_block_size mla_use_nope""".split(),
        (False, 0),
    ),
    **dict.fromkeys(
        """use_qk_norm qk_norm qk_layernorm qk_norm_type use_gemma_norm norm_weight_plus_one layernorm_1p
        apply_residual_connection_post_layernorm use_embed_norm post_norm_eps residual_in_fp32
        do_layer_norm_before _remove_final_layer_norm""".split(),
        (False,),
    ),
    **dict.fromkeys(
        """attention_bias attention_out_bias qkv_bias q_bias o_bias use_qkv_bias mlp_bias bias use_bias add_bias_linear
        lm_head_bias enable_bias mamba_proj_bias projectors_bias""".split(),
        (False,),
    ),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_chunk_size"], (False, -1)),
    **dict.fromkeys(
        """use_sliding_window layer_types sliding_window_pattern full_attention_interval global_attn_every_n_layers
        local_layer_ids attn_layer_indices attn_layer_period attn_layer_offset hybrid_layer_pattern
        hybrid_override_pattern layers_block_type layer_group_size full_attn_idxs full_attn_layers kda_layers
        max_window_layers interleaved_sliding_window""".split(),
        (False,),
    ),
    "global_attn_every_n": (1,),
    **dict.fromkeys(["swa_head_dim", "swa_v_head_dim", "swa_num_attention_heads", "swa_num_key_value_heads"], ()),
    # positions
    **dict.fromkeys(
        """rope_theta swa_rope_theta compress_rope_theta rope_local_base_freq global_rope_theta local_rope_theta rotary_emb_base
        rotary_base layer_rope_theta rotary_dim rope_scaling rope_parameters rope_interleaved rope_interleave
        indexer_rope_interleave no_rope_layers no_rope_layer_interval nope_layer_interval partial_rotary_factors
        position_embedding_type use_mem_rope long_factor short_factor long_mscale short_mscale low_freq_factor
        high_freq_factor beta_fast beta_slow mscale mscale_all_dim llama_4_scaling_beta alpha truncate""".split(),
        (False,),
    ),
    **dict.fromkeys(
        ["partial_rotary_factor", "rotary_pct", "factor", "scaling_factor", "attn_factor", "attention_factor",
         "extrapolation_factor"],
        (1.0,),
    ),
    "rope_type": ("default", "original"),
    "original_max_position_embeddings": (),
    "initial_context_length": (),
    "use_pos_enc": (True,),
    # feed-forward
    **dict.fromkeys(
        """hidden_act hidden_activation activation_function activation mlp_hidden_act mamba_hidden_act swiglu_alpha
        activation_situ_beta activation_situ_linear_beta use_double_wide_mlp""".split(),
        (),
    ),
    # experts
    **dict.fromkeys(
        """num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok num_experts_per_token
        experts_per_token moe_topk moe_k top_k_experts zero_expert_num n_shared_experts num_shared_experts
        moe_num_shared_experts shared_expert_intermediate_size shared_intermediate_size moe_latent_size
        routed_expert_hidden_size latent_moe_use_norm enable_moe_block residual_moe shared_expert_sink
        moe_intermediate_size""".split(),
        (False, 0),
    ),
    **dict.fromkeys(
        """norm_topk_prob moe_renormalize route_norm norm_after_topk moe_apply_router_weight_on_input
        moe_router_enable_expert_bias use_routing_bias use_moe_router_bias use_gate_bias use_expert_bias
        moe_router_use_sigmoid scoring_func score_func moe_router_activation_func expert_selection_fn topk_method
        num_hash_layers moe_norm_min use_global_scale shared_expert_combination_strategy enable_moe_fp32_combine
        use_grouped_topk first_k_dense_replace num_dense_layers mlp_only_layers mlp_layer_types moe_layers
        moe_layers_enum dense_mlp_idx prefix_dense_intermediate_size""".split(),
        (False, 0),
    ),
    **dict.fromkeys(
        """n_group topk_group num_expert_group num_expert_groups num_limited_groups decoder_sparse_step
        interleave_moe_layer_step moe_layer_freq moe_layer_interval""".split(),
        (1, 0, False),
    ),
    # state spaces, linear attention, sparse attention, streams
    **dict.fromkeys(
        """linear_attn_config sparse_attention_config sparse_attention_freq index_topk index_n_heads index_head_dim
        index_topk_freq index_topk_pattern index_skip_topk_offset index_kpool index_kpool_compress
        index_kpool_always_select_tail index_block_size index_local_blocks index_topk_blocks indexer_types indexer_budget
        indexer_compress_ratio indexer_n_heads indexer_kv_heads indexer_head_dim compress_ratios compress_rates o_groups
        o_lora_rank conv_L_cache kda_safe_gate kda_lower_bound linear_lower_bound linear_allow_neg_eigval mhc hc_mult
        hc_count hc_lowrank hc_sinkhorn_iters altup_num_inputs altup_correct_scale laurel_rank hidden_size_per_layer_input
        ngram_size ngram_vocab_size_base heads_per_ngram ple_layer_ids ple_embed_dim ple_conv_kernel_size
        mamba_rms_norm mamba_norm_before_gate kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim
        ssm_state_size mamba_num_heads mamba_n_heads mup_enabled num_mem_blocks unpadded_vocab_size text_config
        llm_config""".split(),
        (False, 0),
    ),
    "altup_active_idx": (0,),
    "time_step_limit": ([0.0, math.inf], [0.0, 1e308], [0.0, {"__float__": "Infinity"}]),
    "time_step_rank": (),
    # the whole
    **dict.fromkeys(
        """hidden_size num_hidden_layers n_layer num_attention_heads n_head num_key_value_heads num_kv_heads head_dim
        v_head_dim qk_head_dim intermediate_size vocab_size tie_word_embeddings tied_embeddings rms_norm_eps
        layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon""".split(),
        (),
    ),
}  # fmt: skip
"""Fields that change the numbers of some family, with the values that change nothing (null and empty never do)."""

_TELLING = re.compile(
    r"(.*_)?(rope|rotary|ntk|yarn|theta|logn)(_.*)?|.*soft_?cap.*|.*_multiplier(_.*)?|.*(attn|attention|softmax)_scal(e|ing).*"
)
"""Fields that no list knows, and whose names say that they scale positions, scores or states: ChatGLM's `rope_ratio`, which
its base is multiplied by, Qwen's `use_dynamic_ntk`. They are taken for fields that change numbers."""
_NOTHING = (1, 0, False, "default")

_SCALED = """long_factor short_factor long_mscale short_mscale low_freq_factor high_freq_factor beta_fast beta_slow mscale
mscale_all_dim alpha truncate factor scaling_factor attn_factor attention_factor extrapolation_factor
original_max_position_embeddings""".split()


def judge(c: Config, spec: Spec) -> list[str]:
    """Notes on the fields of `c` that nobody read: those that zoo does not know, and those that others overrule. Raises
    ZooError, naming every one, for those that change numbers and are neither neutral nor what `spec` says anyway."""
    refused, unknown, notes = [], [], []
    says: dict[str, set[Any]] | None = None
    for path, value in c.data.unread():
        key = path[-1]
        if SILENT.fullmatch(key) or value is None or value in ([], {}):
            continue
        neutral = NUMBERS.get(key, _NOTHING if _TELLING.fullmatch(key) else None)
        if neutral is None:
            unknown.append(".".join(path))
            continue
        if any(_same(value, x) for x in neutral) or _idle(key, value, _beside(c, path), spec):
            continue
        says = says or _said_by(spec)
        if any(_same(value, x) for x in says.get(key, ())):
            continue
        if key == "partial_rotary_factor" and (counts := _in_rope_parameters(key, _beside(c, path))):
            notes.append(
                f"config: {'.'.join(path)} is {str(value)[:40]}, and rope_parameters has {str(counts)[:80]}, which counts, "
                "as in transformers 5 (before 5.20 it writes its class' default beside)"
            )
        else:
            other = _in_rope_parameters(key, _beside(c, path))
            beside = (
                f" (and {str(other[0])[:40]} in the settings of RoPE, which was read: delete one)"
                if other
                else ""
            )
            refused.append(f"{'.'.join(path)} is {str(value)[:80]}{beside}")
    refused += _other_shares(c.data, spec)
    if refused:
        raise ZooError(
            f"{c.where}: {'; '.join(refused)}; and the family {spec.family} does not read "
            f"{'it' if len(refused) == 1 else 'them'}: the model would compute other numbers. Is it of another family "
            "(--family)? If upstream ignores a field, delete it from the config"
        )
    if unknown:
        notes.append(f"config: nobody reads {', '.join(unknown)} (unknown to zoo)")
    return notes


def _other_shares(data: Mapping[str, Any], spec: Spec, *at: str) -> Iterator[str]:
    """The shares of a head that are to turn of which no layer turns so many channels, read or not: RoPE's settings are read for
    every family, and not every family asks them for this."""
    for key, value in dict(data).items():
        within_rope = bool(at) and at[-1] in (
            "rope_parameters",
            "rope_scaling",
        )  # an object for each kind of layer
        if isinstance(value, Mapping) and (
            within_rope or key in ("text_config", "rope_parameters", "rope_scaling")
        ):
            yield from _other_shares(value, spec, *at, key)
        elif key == "partial_rotary_factor" and type(value) in (int, float) and _rotates(spec):
            if not _in_rope_parameters(key, data) and not any(
                _turns(layer.mixer, value) for layer in spec.layers
            ):
                yield f"{'.'.join((*at, key))} is {value}"


def _turns(mixer: Any, share: float) -> bool:
    """Whether RoPE turns this share of a head's channels, rounded down, or all of the part of a head that is there for it."""
    rope: Rope | None = getattr(mixer, "rope", None)
    if rope is None:
        return False
    if isinstance(mixer, LatentAttention):
        return share in (1, mixer.rope_dim / (mixer.nope_dim + mixer.rope_dim))
    turned = rope.dim if rope.turning is None else 2 * rope.turning
    return bool(turned <= share * mixer.head_dim < turned + (1 if rope.turning is None else 2))


def _in_rope_parameters(key: str, beside: Mapping[str, Any]) -> list[Any]:
    """What `rope_parameters`, or `rope_scaling`, beside a field say of it: of all layers, or of each kind; nothing if some are silent."""
    p = beside.get("rope_parameters") or beside.get("rope_scaling")
    if not isinstance(p, Mapping):
        return []
    said = [dict.get(dict(x), key) for x in p.values() if isinstance(x, Mapping)] or [p.get(key)]
    return [] if None in said else said


def _same(a: Any, b: Any) -> bool:
    """Equal, where true is not 1 and 1 is 1.0."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _beside(c: Config, path: tuple[str, ...]) -> Mapping[str, Any]:
    """The object that holds the field at `path`."""
    at: Mapping[str, Any] = dict(c.data)
    for part in path[:-1]:
        at = dict(at[part])
    return at


def _idle(key: str, value: Any, beside: Mapping[str, Any], spec: Spec) -> bool:
    """Whether other fields make this one say nothing."""
    kinds = beside.get("layer_types") or []
    full = isinstance(kinds, list) and set(kinds) == {"full_attention"}
    windowed = any(isinstance(m.mixer, Attention) and m.mixer.window for m in spec.layers)
    if key in _SCALED and (kind := beside.get("rope_type") or beside.get("type")):  # settings of scaled RoPE
        return kind in ("default", "original")
    match key:
        case "sliding_window":
            return not windowed and (beside.get("use_sliding_window") is False or full)
        case "use_sliding_window":
            return windowed or full or beside.get("sliding_window") is None
        case "rope_local_base_freq":  # the theta of layers with a window
            return not windowed
        case "max_window_layers":
            return not beside.get("use_sliding_window") or bool(kinds)
        case "sliding_window_pattern" | "_sliding_window_pattern" | "full_attention_interval":
            return bool(kinds)
        case "no_rope_layer_interval":
            return bool(beside.get("no_rope_layers"))
        case "no_rope_layers":
            return isinstance(value, list) and all(_same(x, 1) for x in value)
        case "layer_types":
            return full and not windowed
        case "first_k_dense_replace" | "mlp_only_layers" | "decoder_sparse_step" | "moe_layer_freq":
            return bool(beside.get("mlp_layer_types"))
        case "head_dim":  # latent attention names the parts of a head, and its tensors fix their sizes
            mixers = [layer.mixer for layer in spec.layers]
            return any(isinstance(m, LatentAttention) for m in mixers) and not any(
                isinstance(m, Attention) for m in mixers
            )
        case "original_max_position_embeddings":  # beside the settings
            return not _scaled(spec)
        case "rope_theta" | "partial_rotary_factor":
            return not _rotates(spec)
        case "rope_scaling" | "rope_parameters":
            kind = value.get("rope_type") or value.get("type") if isinstance(value, Mapping) else value
            return kind == "default" or not _rotates(spec)
        case _:
            return False


def _scaled(spec: Spec) -> bool:
    ropes = [getattr(layer.mixer, "rope", None) for layer in spec.layers]
    return any(r is not None and r.scaling is not None for r in ropes)


def _rotates(spec: Spec) -> bool:
    return any(getattr(layer.mixer, "rope", None) is not None for layer in spec.layers)


def _said_by(spec: Spec) -> dict[str, set[Any]]:
    """What the Spec says of fields that it did not get from them."""
    out: dict[str, set[Any]] = {}

    def say(keys: str, *values: Any) -> None:
        for key in keys.split():
            out[key] = out.get(key, set()) | {v for v in values if v is not None}

    say("hidden_size", spec.d_model)
    say("vocab_size", spec.vocab_size)
    say("num_hidden_layers n_layer", spec.n_layers)
    say("tie_word_embeddings tied_embeddings", spec.tied)
    say("rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps", spec.norm.eps)
    for layer in dict.fromkeys(spec.layers):
        for keys, values in (*_mixer(layer.mixer), *_ffn(layer.ffn)):
            say(keys, *values)
    return out


def _mixer(m: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if not isinstance(m, Attention | LatentAttention):
        return
    yield "num_attention_heads n_head", (m.n_heads,)
    yield "attention_bias qkv_bias use_qkv_bias", (m.qkv_bias,)
    if isinstance(m, LatentAttention):  # every head has a key of its own
        yield "num_key_value_heads", (m.n_heads,)
        yield "qk_head_dim", (m.nope_dim + m.rope_dim,)
        yield "v_head_dim", (m.v_head_dim,)
    else:
        yield "num_key_value_heads num_kv_heads", (m.n_kv_heads,)
        yield "head_dim", (m.head_dim,)
        yield "v_head_dim", (m.v_head_dim,)
        yield "use_qk_norm qk_norm qk_layernorm", (m.qk_norm is not None,)
        yield "sliding_window sliding_window_size attention_chunk_size", (m.window, m.chunk)
    if (r := m.rope) is not None:
        yield "rope_theta rope_base rope_freq_base rotary_base rotary_emb_base", (r.theta,)
        yield "use_rope use_rotary rotary use_rotary_emb use_rotary_pos_emb use_rotary_embedding", (True,)
        yield "rope_interleave rope_interleaved", (r.interleaved,)
        if isinstance(m, Attention):
            yield "rotary_dim", (r.dim,)
            yield "partial_rotary_factor rotary_pct", (r.dim / m.head_dim,)
        else:
            yield "partial_rotary_factor", (m.rope_dim / (m.nope_dim + m.rope_dim),)
        if r.scaling is not None:
            yield "original_max_position_embeddings initial_context_length", (r.scaling.original_context,)


def _ffn(f: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if isinstance(f, MLP):
        yield "intermediate_size", (f.d_ff,)
    if not isinstance(f, MoE):
        return
    r = f.router
    yield "moe_intermediate_size intermediate_size", (f.expert.d_ff,)
    yield "num_experts num_local_experts n_routed_experts", (f.n_experts,)
    yield "num_experts_per_tok num_experts_per_token experts_per_token", (r.top_k,)
    yield "norm_topk_prob", (r.normalize or r.over == "chosen",)
    yield "scoring_func", (r.score,)
    yield "routed_scaling_factor", (r.scale,)
    yield "n_group", (r.n_groups,)
    yield "topk_group", (r.top_groups,)
    yield "use_routing_bias", (r.selection_bias,)
    if f.shared is not None:
        yield "n_shared_experts num_shared_experts", (1, f.shared.d_ff // f.expert.d_ff)
        yield "shared_expert_intermediate_size", (f.shared.d_ff,)
