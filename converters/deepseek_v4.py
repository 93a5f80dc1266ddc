"""DeepSeek-V4: Flash and Pro.

What is unusual:
- Four residual streams. Hyper-connections (mHC) read a branch's input from them and mix them anew for each token.
- Every layer sees a window of 128 tokens. Most see entries too, that stand for all tokens before: one for each 128 (HCA), all of
  them seen; or one for each 4, made of 8 (CSA), of which an indexer picks the best. `compress_ratios` says which layer is which
  (0, 128, 4); its entry after the last layer is the prediction layer's.
- One latent is key and value of all heads, its last channels turned; what comes of a head is turned back. Sinks. Queries
  through a latent, and normalised per head. Groups of heads share a first output matrix.
- Layers without entries have RoPE of `rope_theta`, unscaled; those with entries `compress_rope_theta`, and YaRN, whose magnitude is
  1: cos and sin are not multiplied.
- Every layer has experts: scores are roots of a softplus, weights always divided by their sum; in the first `num_hash_layers`
  a table says the experts of each token id. SwiGLU clamped at 10, in the shared expert too.
- Releases have names of their own, without `model.`. Experts are fp4 (bytes of two codes, e8m0 per 32), other matrices e4m3 with
  e8m0 per 128 x 128, both beside a `scale`; compressors, the indexer's weights and routers are bf16.

Where bf16 rounds, this follows DeepSeek's own code, and not transformers, which rounds earlier: streams, their weights and mixing
are computed in fp32, so are what compressors pool, router logits, and RoPE. Theirs also rounds what caches hold (keys to
fp8; the indexer's, after a Hadamard rotation, to fp4) as its engine stores them; that is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping

from zoo.family import (
    MLP,
    CompressedAttention,
    Compressor,
    Config,
    Disagreement,
    Family,
    HyperConnections,
    Indexer,
    Layer,
    MoE,
    Norm,
    Rope,
    Router,
    RuleLine,
    Spec,
    ZooError,
    cat,
    extra,
    hf,
    read,
    rules,
)

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = {0: read.SLIDING, 4: CSA, 128: HCA}
"""What a layer's entry in `compress_ratios` says."""


def spec(c: Config) -> Spec:
    c.refuse(
        attention_bias=False, mlp_bias=False, norm_topk_prob=True, num_key_value_heads=1, n_shared_experts=1
    )
    c.choice("hidden_act", ("silu",), "silu")
    c.choice("scoring_func", ("sqrtsoftplus",), "sqrtsoftplus")
    c.choice("topk_method", ("noaux_tc",), "noaux_tc")
    c.get("expert_dtype")  # the files say
    n, norm = c["num_hidden_layers"], Norm(c["rms_norm_eps"], rounding="last")
    weightless = Norm(c["rms_norm_eps"], weight="none")
    kinds = layer_kinds(c)
    main, compress = (
        rotary(c, of) for of in ("main", "compress")
    )  # a model may have layers of one of them only
    mixers = {
        kind: attention(c, kind, main if kind == read.SLIDING else compress, norm, weightless)
        for kind in set(kinds)
    }
    expert = MLP(c["moe_intermediate_size"], limit=float(c["swiglu_limit"]))

    def moe(by_token: bool) -> MoE:
        router = Router(
            top_k=c["num_experts_per_tok"],
            score="sqrt_softplus",
            selection_bias=not by_token,
            normalize=True,
            normalize_eps=1e-20,
            scale=float(c["routed_scaling_factor"]),
            rounding="last",
            weights_rounding="last",
            by_token=c["vocab_size"] if by_token else None,
        )
        return MoE(read.n_experts(c), expert, router, shared=expert)

    if "mlp_layer_types" in c:
        hashed = [kind == "hash_moe" for kind in c.each_layer("mlp_layer_types", n, ("hash_moe", "moe"))]
    else:
        hashed = [i < c["num_hash_layers"] for i in range(n)]
    return Spec(
        family="deepseek_v4",
        d_model=c["hidden_size"],
        vocab_size=c["vocab_size"],
        layers=tuple(
            Layer(mixers[kind], moe(h), attn_norm=norm, ffn_norm=norm)
            for kind, h in zip(kinds, hashed, strict=True)
        ),
        norm=norm,
        tied=c.get("tie_word_embeddings", False),
        context_length=c["max_position_embeddings"],
        dtype=read.dtype(c),
        hyper=HyperConnections(c["hc_mult"], weightless, float(c["hc_eps"]), c["hc_sinkhorn_iters"]),
    )


def layer_kinds(c: Config) -> list[str]:
    """Which layers have entries, and of what kind: as releases or as transformers 5 says it; no default."""
    n = read.layer_count(c["num_hidden_layers"], "num_hidden_layers", c.where)
    if "layer_types" in c:
        return c.each_layer("layer_types", n, KINDS.values())
    return [KINDS[ratio] for ratio in c.each_layer("compress_ratios", n, KINDS)]


def attention(c: Config, kind: str, rope: Rope, norm: Norm, weightless: Norm) -> CompressedAttention:
    """The mixer of a kind of layers."""
    head_dim = c["head_dim"]
    rates = c.sub("compress_rates") if "compress_rates" in c else {}
    ratios = {CSA: rates.get(CSA, 4), HCA: rates.get(HCA, 128)}
    compressor = indexer = None
    if kind != read.SLIDING:
        compressor = Compressor(ratios[kind], overlap=kind == CSA, norm=norm)
    if kind == CSA:
        indexer = Indexer(c["index_n_heads"], c["index_head_dim"], c["index_topk"], rope, norm)
    return CompressedAttention(
        n_heads=c["num_attention_heads"],
        head_dim=head_dim,
        q_rank=c["q_lora_rank"],
        window=c["sliding_window"],
        scale=head_dim**-0.5,
        rope=rope,
        latent_norm=norm,
        query_norm=weightless,
        out_groups=c["o_groups"],
        out_rank=c["o_lora_rank"],
        compressor=compressor,
        indexer=indexer,
    )


def rotary(c: Config, of: str) -> Rope:
    """RoPE of layers without entries ("main"), or with ("compress"); over the same channels in both. Transformers 5 says all of
    it in `rope_parameters`, and some of it beside that again: they must agree."""
    theta = "rope_theta" if of == "main" else "compress_rope_theta"
    said = c.get("rope_parameters")
    if isinstance(said, Mapping) and of in said:
        p = read.rope_parameters(c, of, theta=theta)
    elif of == "main":
        p = {"rope_type": "default", "rope_theta": c[theta]}
    else:
        p = read.rope_parameters(c, theta=theta)
        p.setdefault("attention_factor", 1.0)
    share = float(c["qk_rope_head_dim"] / c["head_dim"])
    outer = (
        said if isinstance(said, Mapping) and of in said else {}
    )  # 5.10 leaves those of "main" beside it, too
    for beside, value in (
        (c.get(theta, p["rope_theta"]), p["rope_theta"]),
        (outer.get("rope_theta", p["rope_theta"]) if of == "main" else p["rope_theta"], p["rope_theta"]),
        (outer.get("partial_rotary_factor", share), share),
        (c.get("partial_rotary_factor", share), share),
        (p.get("partial_rotary_factor", share), share),
    ):
        if beside != value:
            raise ZooError(
                f"{c.where}: its RoPE ({of}) is said twice, by {beside} and by {value} of rope_parameters or "
                "qk_rope_head_dim; they should agree"
            )
    return read.rope(c, p, c["qk_rope_head_dim"], interleaved=True, rounding="last")


_L, _A = "layers.{i}.", "layers.{i}.attn."
_E = _L + "ffn.experts.{e}"


def _hyper(key: str, source: str) -> tuple[RuleLine, ...]:
    return (
        (f"{key}.weight", f"{source}fn"),
        (f"{key}.bias", f"{source}base"),
        (f"{key}.factors", f"{source}scale"),
    )


def _compressor(key: str, source: str, kv: str, gate: str, ape: str, norm: str) -> tuple[RuleLine, ...]:
    return (
        (f"{key}.kv_gate.weight", cat(f"{source}{kv}.weight", f"{source}{gate}.weight")),
        (f"{key}.positions", f"{source}{ape}"),
        (f"{key}.norm.weight", f"{source}{norm}.weight"),
    )


HF: tuple[RuleLine, ...] = (
    ("embed.weight", "embed.weight"),
    ("norm.weight", "norm.weight"),
    ("head.weight", "head.weight"),
    *_hyper("hyper", "hc_head_"),
    (_L + "attn_norm.weight", _L + "attn_norm.weight"),
    (_L + "ffn_norm.weight", _L + "ffn_norm.weight"),
    *_hyper(_L + "attn_hyper", _L + "hc_attn_"),
    *_hyper(_L + "ffn_hyper", _L + "hc_ffn_"),
    (_A + "q_down.weight", _A + "wq_a.weight"),
    (_A + "q_latent_norm.weight", _A + "q_norm.weight"),
    (_A + "q_up.weight", _A + "wq_b.weight"),
    (_A + "kv.weight", _A + "wkv.weight"),
    (_A + "kv_norm.weight", _A + "kv_norm.weight"),
    (_A + "sinks", _A + "attn_sink"),
    (_A + "out_down.weight", _A + "wo_a.weight"),
    (_A + "out.weight", _A + "wo_b.weight"),
    *_compressor(_A + "compressor", _A + "compressor.", "wkv", "wgate", "ape", "norm"),
    (_A + "indexer.q.weight", _A + "indexer.wq_b.weight"),
    (_A + "indexer.head_weights.weight", _A + "indexer.weights_proj.weight"),
    *_compressor(_A + "indexer.compressor", _A + "indexer.compressor.", "wkv", "wgate", "ape", "norm"),
    (_L + "moe.router.weight", _L + "ffn.gate.weight"),
    (_L + "moe.router.selection_bias", _L + "ffn.gate.bias"),
    (_L + "moe.router.table", _L + "ffn.gate.tid2eid"),
    *hf.numbered(_E, "w1", "w3", "w2"),
    (
        _L + "moe.shared.gate_up.weight",
        cat(_L + "ffn.shared_experts.w1.weight", _L + "ffn.shared_experts.w3.weight"),
    ),
    (_L + "moe.shared.down.weight", _L + "ffn.shared_experts.w2.weight"),
    extra("mtp.*", hf.MTP),
)
_SPELT = {
    "embed.": "model.embed_tokens.", "norm.": "model.norm.", "layers.": "model.layers.", "hc_head_": "model.hc_head.hc_",
}  # fmt: skip
"""Where transformers saves what its conversion does not rename back."""

_M = "model.layers.{i}.self_attn."
IN_MEMORY: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *_hyper("hyper", "model.hc_head.hc_"),
    *_hyper(_L + "attn_hyper", "model.layers.{i}.attn_hc."),
    *_hyper(_L + "ffn_hyper", "model.layers.{i}.ffn_hc."),
    (_A + "q_down.weight", _M + "q_a_proj.weight"),
    (_A + "q_latent_norm.weight", _M + "q_a_norm.weight"),
    (_A + "q_up.weight", _M + "q_b_proj.weight"),
    (_A + "kv.weight", _M + "kv_proj.weight"),
    (_A + "kv_norm.weight", _M + "kv_norm.weight"),
    (_A + "sinks", _M + "sinks"),
    (_A + "out_down.weight", _M + "o_a_proj.weight"),
    (_A + "out.weight", _M + "o_b_proj.weight"),
    *_compressor(_A + "compressor", _M + "compressor.", "kv_proj", "gate_proj", "position_bias", "kv_norm"),
    (_A + "indexer.q.weight", _M + "compressor.indexer.q_b_proj.weight"),
    (_A + "indexer.head_weights.weight", _M + "compressor.indexer.scorer.weights_proj.weight"),
    *_compressor(
        _A + "indexer.compressor",
        _M + "compressor.indexer.",
        "kv_proj",
        "gate_proj",
        "position_bias",
        "kv_norm",
    ),
    (_L + "moe.router.weight", "model.layers.{i}.mlp.gate.weight"),
    (_L + "moe.router.selection_bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
    (_L + "moe.router.table", "model.layers.{i}.mlp.gate.tid2eid"),
    *hf.STACKED,
    *hf.gated_mlp(_L + "moe.shared", "model.layers.{i}.mlp.shared_experts"),
)
_MIXED: tuple[RuleLine, ...] = (
    ("head.weight", "head.weight"),
    *hf.numbered("model.layers.{i}.mlp.experts.{e}", "w1", "w3", "w2"),
)
"""What transformers up to 5.14 renames when it saves: all else keeps its name in memory."""
RULES = {
    "hf": rules(*HF),
    "transformers": rules(*IN_MEMORY, *_MIXED),
    "saved": rules(*HF, (_A + "kv_norm.weight", _A + "norm.weight"), prefixes=(_SPELT,)),
}

DISAGREEMENTS = (
    Disagreement(
        about="where bf16 rounds in routers, compressors and streams",
        upstream="computes router logits and pooled entries in the model's dtype, and mixes streams by rounded weights",
        vendor="computes all of these in fp32",
        follows="vendor",
        why="the weights were made by the vendor's code; in fp32 both compute the same",
        source="https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash/blob/main/inference/model.py",
        since="2026-05",
    ),
)
FAMILY = Family(
    "deepseek_v4",
    ("deepseek_v4",),
    ("DeepseekV4ForCausalLM",),
    spec,
    RULES,
    disagreements=DISAGREEMENTS,
)
