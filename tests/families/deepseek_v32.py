"""DeepSeek V3.2: V3 with an indexer that chooses the keys a token sees."""

from __future__ import annotations

import torch

from families.deepseek_v3 import mtp, released
from zoo.testing import BASE, FamilyCase, Listed, Variant, build, rope, yarn


def upstream_rotates_the_indexers_halves() -> None:
    class Seen:
        def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
            self.keys = keys
            return keys

    indexer = next(m for m in build.fresh(CASE.variants[0]).modules() if hasattr(m, "weights_proj"))
    d, draw = indexer.qk_rope_head_dim, torch.Generator().manual_seed(0)
    h, q = (torch.randn(1, 3, w.in_features, generator=draw) for w in (indexer.wk, indexer.wq_b))
    angle, seen = torch.rand(1, 3, d // 2, generator=draw), Seen()
    turns = torch.cat([angle, angle], dim=-1)
    indexer(
        h,
        q,
        (turns.cos(), turns.sin()),
        torch.ones(1, 1, 3, 3, dtype=torch.bool),
        torch.arange(3)[None],
        seen,
    )
    a, b = indexer.k_norm(indexer.wk(h))[..., :d].chunk(2, dim=-1)
    turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
    torch.testing.assert_close(seen.keys[..., :d], turned)


# fmt: off

_MLA = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 18, "kv_lora_rank": 15,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 12, "v_head_dim": 9,
}
_DEEPSEEK = BASE | _MLA | {
    "hidden_size": 40, "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
    "rope_parameters": yarn(97.0, 7.0, 64, 3.6, 0.36, mscale=0.8, mscale_all_dim=0.6),
}
_DSA = _DEEPSEEK | {"index_topk": 6, "index_n_heads": 7, "index_head_dim": 17, "num_hidden_layers": 3}

CASE = FamilyCase(
    "deepseek_v32",
    (
        Variant("deepseek_v32", "DeepseekV32ForCausalLM", _DSA,
            "sparse attention: 29 tokens, 6 keys each; RoPE interleaved in attention, half-split in the indexer"),
        Variant("deepseek_v32_mtp", "DeepseekV32ForCausalLM",
            _DSA | {"n_group": 2, "topk_group": 1, "rope_parameters": rope(83.0)},
            "unscaled RoPE; with the extra layer, indexer included",
            mtp=1, rewrite={"num_nextn_predict_layers": 1}),
    ),
    grouped=False,
    released_text=released,
    kept_in_fp32=frozenset({"e_score_correction_bias"}),
    mtp=mtp,
    listed={"deepseek-v3.2": Listed("deepseek-v3.2", frozenset({"model"}))},
    refused=(("deepseek-v3.2", {"rope_interleave": False}, "rope_interleave is False"),),
    optional_rules={
        "layers.{i}.attn.q.weight": "V3's queries without a latent",
    },
    disputes={"the pairing of the indexer's rotary channels": upstream_rotates_the_indexers_halves},
)
# fmt: on
