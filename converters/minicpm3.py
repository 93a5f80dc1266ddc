"""MiniCPM3: 4B. A dense decoder with DeepSeek's latent attention and three scales of its own.

- Multi-head latent attention, RoPE half-split. The norms of both latents have a fixed eps of 1e-6, not `rms_norm_eps`.
- Embeddings times `scale_emb`; each branch times scale_depth / sqrt(layers) before it is added; the last state is divided
  by d_model / `dim_model_base` before the head, here the logits are (in bf16 that rounds once less).
- LongRoPE, whose two tables are the same in the release, and whose original context is the whole context.
- The release says neither theta (1e4) nor v_head_dim (d_model / heads) nor that the head is tied.
"""

from __future__ import annotations

from zoo.family import MLP, Config, Family, LatentAttention, Layer, Norm, Spec, hf, read, rules

from .deepseek_v3 import LATENT_EPS, MLA


def spec(c: Config) -> Spec:
    d, n, n_heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
    c.refuse(num_key_value_heads=n_heads)
    p = read.rope_parameters(c, default_theta=1e4)
    Config(p, f"{c.where}: rope_parameters").choice("rope_type", ("default", "longrope"))
    norm, nope, rotary = Norm(c["rms_norm_eps"]), c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    mixer = LatentAttention(
        n_heads=n_heads,
        q_rank=c.get("q_lora_rank"),
        kv_rank=c["kv_lora_rank"],
        nope_dim=nope,
        rope_dim=rotary,
        v_head_dim=c.get("v_head_dim", d // n_heads),
        scale=(nope + rotary) ** -0.5,
        latent_norm=Norm(LATENT_EPS),
        rope=read.rope(c, p, rotary, longrope=("longrope",)),
        qkv_bias=c.get("attention_bias", False),
        out_bias=c.get("attention_bias", False),
    )
    mlp = MLP(c["intermediate_size"], c.table("hidden_act", read.ACTIVATIONS), bias=c.get("mlp_bias", False))
    layer = Layer(mixer, mlp, attn_norm=norm, ffn_norm=norm, residual_scale=c["scale_depth"] / n**0.5)
    return Spec(
        family="minicpm3",
        d_model=d,
        vocab_size=c["vocab_size"],
        layers=(layer,) * n,
        norm=norm,
        tied=read.tied(c, c, default=True),
        context_length=c["max_position_embeddings"],
        embed_scale=float(c["scale_emb"]),
        logit_scale=c["dim_model_base"] / d,
        dtype=read.dtype(c),
    )


RULES = {"hf": rules(*hf.ENDS, *hf.PRE_NORMS, *MLA, *hf.MLP)}
FAMILY = Family("minicpm3", ("minicpm3",), ("MiniCPM3ForCausalLM",), spec, RULES)
