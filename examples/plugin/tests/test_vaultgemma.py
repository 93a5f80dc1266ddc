"""VaultGemma held to upstream by the suite that every family of zoo's own passes. The package must be installed.

Its upstream class is eager only: sdpa has no soft cap.
"""

from __future__ import annotations

from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, rope
from zoo.testing.released import flat_rope
from zoo.testing.suite import FamilySuite

_VAULTGEMMA = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3, "rope_parameters": rope(613.0), "tie_word_embeddings": True,
    "layer_types": [FULL, SLIDING, FULL], "sliding_window": 7, "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 1.7, "final_logit_softcapping": 4.1,
}  # fmt: skip

CASE = FamilyCase(
    "vaultgemma",
    (
        Variant("vaultgemma", "VaultGemmaForCausalLM", _VAULTGEMMA,
            "two (1 + w) norms, both soft caps, a window on one layer", eager_only=True),
        Variant("vaultgemma_uncapped", "VaultGemmaForCausalLM",
            _VAULTGEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
            "no caps, biases: what the release has not", eager_only=True),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    released_text=flat_rope,
)  # fmt: skip


class TestVaultGemma(FamilySuite):
    case = CASE
