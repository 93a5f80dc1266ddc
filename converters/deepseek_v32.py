"""DeepSeek-V3.2 and V3.2-Exp: DeepSeek-V3 with sparse attention.

What is unusual, beyond deepseek_v3:
- A small indexer in every layer scores all keys and lets each query see the best `index_topk` of them.
- The indexer's RoPE rotates halves, at the front of its heads; the attention's own rotates neighbouring pairs.
- The indexer's keys pass a LayerNorm with bias, eps 1e-6 whatever the config says.
- The vendor's code scores in fp8 after a Hadamard rotation, which changes no weight and is not done here.
"""

from __future__ import annotations

from zoo.family import Config, Disagreement, Family, Indexer, Norm, Spec, hf, read, rules

from . import deepseek_v3

SPARSE = ("indexed_attention", "deepseek_sparse_attention")
"""What transformers calls such layers since 5.18, and what it called them before."""


def spec(c: Config) -> Spec:
    c.refuse(moe_layer_freq=1, rope_interleave=True)
    if "layer_types" in c:
        c.each_layer("layer_types", c["num_hidden_layers"], SPARSE)
    mixer = deepseek_v3.latent_attention(c, indexer=indexer(c))
    return deepseek_v3.decoder("deepseek_v32", c, mixer, deepseek_v3.router(c))


def indexer(c: Config, interleaved: bool = False) -> Indexer:
    """The scorer of keys. Its LayerNorm's eps is fixed."""
    return Indexer(
        n_heads=c["index_n_heads"],
        head_dim=c["index_head_dim"],
        top_k=c["index_topk"],
        rope=read.rope(c, read.rope_parameters(c), c["qk_rope_head_dim"], interleaved=interleaved),
        key_norm=Norm(1e-6, kind="layer"),
    )


_I = "model.layers.{i}.self_attn.indexer."
HF = (
    *deepseek_v3.HF,
    ("layers.{i}.attn.indexer.q.weight", _I + "wq_b.weight"),
    ("layers.{i}.attn.indexer.k.weight", _I + "wk.weight"),
    ("layers.{i}.attn.indexer.k_norm.weight", _I + "k_norm.weight"),
    ("layers.{i}.attn.indexer.k_norm.bias", _I + "k_norm.bias"),
    ("layers.{i}.attn.indexer.head_weights.weight", _I + "weights_proj.weight"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *hf.STACKED))}

DISAGREEMENTS = (
    Disagreement(
        about="the pairing of the indexer's rotary channels",
        upstream="rotates halves",
        vendor="rotated neighbouring pairs in the code of October 2025, and halves since November",
        follows="vendor",
        why="DeepSeek announced and mended it: the weights want halves",
        source="https://github.com/deepseek-ai/DeepSeek-V3.2-Exp",
        since="2025-11",
    ),
)
FAMILY = Family(
    "deepseek_v32", ("deepseek_v32",), ("DeepseekV32ForCausalLM",), spec, RULES, disagreements=DISAGREEMENTS
)
