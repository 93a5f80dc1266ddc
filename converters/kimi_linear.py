"""Kimi Linear 48B-A3B.

What is unusual:
- No positions anywhere: three layers of Kimi Delta Attention (KDA) to one of MLA, whose "rope" part is kept but
  never rotated (`mla_use_nope`). The latent norm's eps is fixed at 1e-6, the other norms' is 1e-5.
- KDA decays each key channel on its own. q, k and v have a convolution each; the output is normalised in fp32,
  weight included, and gated by a sigmoid. A_log is stored as [1, 1, H, 1].
- The layer lists of `linear_attn_config` count from 1.
- DeepSeek's router under other keys (`num_experts_per_token`, `moe_renormalize`, `num_expert_group`), a shared
  expert, the first layer dense. Experts lie under `block_sparse_moe`, w1 (gate), w3 (up), w2 (down); dense layers
  under `mlp`; transformers renames those too when it saves.
"""

from __future__ import annotations

from zoo.family import (
    MLP,
    Config,
    DeltaNet,
    Disagreement,
    Family,
    LatentAttention,
    Layer,
    Mixer,
    MoE,
    Norm,
    Router,
    Spec,
    ZooError,
    cat,
    hf,
    read,
    rules,
    squeeze,
)

from . import deepseek_v3


def spec(c: Config) -> Spec:
    c.choice("moe_router_activation_func", ("sigmoid",), "sigmoid")
    c.choice("hidden_act", ("silu",))
    c.refuse(mla_use_nope=True, moe_layer_freq=1)
    norm = Norm(c["rms_norm_eps"])
    nope, rest = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    latent = LatentAttention(
        n_heads=c["num_attention_heads"],
        q_rank=c.get("q_lora_rank"),
        kv_rank=c["kv_lora_rank"],
        nope_dim=nope,
        rope_dim=rest,
        v_head_dim=c["v_head_dim"],
        scale=(nope + rest) ** -0.5,
        latent_norm=Norm(deepseek_v3.LATENT_EPS),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
    )
    heads = delta_size(c, "num_heads", "linear_num_heads")
    head_dim = delta_size(c, "head_dim", "linear_head_dim")
    delta = DeltaNet(
        n_k_heads=heads,
        n_v_heads=heads,
        k_head_dim=head_dim,
        v_head_dim=head_dim,
        conv=delta_size(c, "short_conv_kernel_size", "linear_conv_kernel_dim"),
        decay="channel",
        out_gate="sigmoid",
        out_norm=Norm(norm.eps, rounding="last"),
    )
    mixers: dict[str, Mixer] = {read.FULL: latent, read.LINEAR: delta}
    router = Router(
        top_k=c.first("num_experts_per_token", "num_experts_per_tok"),
        score="sigmoid",
        selection_bias=True,
        n_groups=c.first("num_expert_group", "n_group"),
        top_groups=c["topk_group"],
        normalize=c.first("moe_renormalize", "norm_topk_prob"),
        normalize_eps=1e-20,
        scale=float(c["routed_scaling_factor"]),
        rounding="last",
        weights_rounding="last",
    )
    dense = MLP(c["intermediate_size"])
    shared = c.first("num_shared_experts", "n_shared_experts") * c["moe_intermediate_size"]
    moe = MoE(read.n_experts(c), MLP(c["moe_intermediate_size"]), router, shared=MLP(shared))
    return Spec(
        family="kimi_linear",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(mixers[t], moe if s else dense, attn_norm=norm, ffn_norm=norm)
            for t, s in zip(layer_types(c), deepseek_v3.sparse_layers(c), strict=True)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c.first("model_max_length", "max_position_embeddings"),
        dtype=read.dtype(c),
    )


def delta_size(c: Config, released: str, flat: str) -> int:
    """A size of the linear layers in the release's `linear_attn_config`, or as transformers 5 writes it, or in both."""
    if "linear_attn_config" not in c:
        return int(c[flat])
    size: int = c.sub("linear_attn_config")[released]
    c.choice(flat, (size,), size)
    return size


def layer_types(c: Config) -> list[str]:
    """One list as transformers 5 writes it, or the release's two lists of layers, counted from 1, or both."""
    n = c["num_hidden_layers"]
    if "linear_attn_config" not in c:
        return c.each_layer("layer_types", n, (read.FULL, read.LINEAR))
    lists = c.sub("linear_attn_config")
    types: dict[int, str] = dict.fromkeys(lists["full_attn_layers"], read.FULL)
    types |= dict.fromkeys(lists["kda_layers"], read.LINEAR)
    if sorted(types) != list(range(1, n + 1)):
        raise ZooError(f"{lists.where}: full_attn_layers and kda_layers do not make layers 1 to {n}")
    kinds = [types[i] for i in range(1, n + 1)]
    if read.layer_types(c, kinds.__getitem__, (read.FULL, read.LINEAR)) != kinds:
        raise ZooError(f"{c.where}: layer_types and linear_attn_config differ: delete one of them")
    return kinds


_D, _B = "model.layers.{i}.self_attn.", "model.layers.{i}.block_sparse_moe"
HF = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *deepseek_v3.MLA,
    ("layers.{i}.delta.qkv.weight", cat(*(f"{_D}{x}_proj.weight" for x in "qkv"))),
    ("layers.{i}.delta.conv.weight", cat(*(squeeze(f"{_D}{x}_conv1d.weight", 1) for x in "qkv"))),
    ("layers.{i}.delta.beta.weight", _D + "b_proj.weight"),
    ("layers.{i}.delta.decay_down.weight", _D + "f_a_proj.weight"),
    ("layers.{i}.delta.decay_up.weight", _D + "f_b_proj.weight"),
    ("layers.{i}.delta.gate_down.weight", _D + "g_a_proj.weight"),
    ("layers.{i}.delta.gate_up.weight", _D + "g_b_proj.weight"),
    ("layers.{i}.delta.A_log", squeeze(_D + "A_log", 0, 1, 3)),
    ("layers.{i}.delta.dt_bias", _D + "dt_bias"),
    ("layers.{i}.delta.norm.weight", _D + "o_norm.weight"),
    ("layers.{i}.delta.out.weight", _D + "o_proj.weight"),
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _B + ".gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _B + ".gate.e_score_correction_bias"),
    *hf.numbered(_B + ".experts.{e}", "w1", "w3", "w2"),
    *hf.gated_mlp("layers.{i}.moe.shared", _B + ".shared_experts"),
)
_F, _MLP = _D + "forget_gate.", "model.layers.{i}.mlp."
_HELD = (
    ("layers.{i}.delta.conv.weight", squeeze(_D + "conv1d.weight", 1)),
    ("layers.{i}.delta.decay_down.weight", _F + "f_a_proj.weight"),
    ("layers.{i}.delta.decay_up.weight", _F + "f_b_proj.weight"),
    ("layers.{i}.delta.A_log", squeeze(_F + "A_log", 0, 1, 3)),
    ("layers.{i}.delta.dt_bias", _F + "dt_bias"),
    *hf.MLP,
    ("layers.{i}.moe.router.weight", _MLP + "gate.weight"),
    ("layers.{i}.moe.router.selection_bias", _MLP + "gate.e_score_correction_bias"),
    *hf.STACKED,
    *hf.gated_mlp("layers.{i}.moe.shared", _MLP + "shared_experts"),
)
RULES = {
    "hf": rules(*HF),
    "transformers": rules(*hf.in_memory(HF, *_HELD)),
    "saved": rules(*HF, *hf.gated_mlp("layers.{i}.mlp", _B)),
}

DISAGREEMENTS = (
    Disagreement(
        about="the selection bias in the routing weights",
        upstream="adds it for the choice of experts only",
        vendor="adds it in place to a view of the scores, so that the weights are made of biased ones (modeling_kimi.py of the release)",
        follows="design",
        why="the paper and vLLM, which serves the release, use the bias for the choice only",
        source="https://arxiv.org/abs/2510.26692",
        since="2025-10",
        applies=lambda spec: any(isinstance(x.ffn, MoE) for x in spec.layers),
    ),
)
FAMILY = Family(
    "kimi_linear", ("kimi_linear",), ("KimiLinearForCausalLM",), spec, RULES, disagreements=DISAGREEMENTS
)
