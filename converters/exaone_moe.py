"""K-EXAONE (236B-A23B).

The attention of EXAONE 4.0: QK-norm per head, three layers with a window to a full one, and the full ones have no RoPE. Else
- norms sit on the INPUTS of attention and feed-forward;
- DeepSeek's router and shared expert; the first layer dense. The selection bias lies beside the router in the files, not in it.
- Which layers are dense is said by a number, under two names, or by lists (`is_moe_layer`, `mlp_layer_types`).
- A prediction layer lies under `mtp.`.
"""

from __future__ import annotations

from zoo.family import Config, Family, RuleLine, Spec, ZooError, extra, hf, rules

from . import deepseek_v3, exaone4


def spec(c: Config) -> Spec:
    dense_first = c.first("first_k_dense_replace", "first_last_k_dense_replace", default=1)
    c = c.with_defaults({"first_k_dense_replace": dense_first, "n_group": 1, "topk_group": 1})
    listed, sparse = c.get("is_moe_layer"), deepseek_v3.sparse_layers(c)
    if listed is not None and c.each_layer("is_moe_layer", len(sparse), (True, False)) != sparse:
        raise ZooError(
            f"{c.where}: is_moe_layer lists other layers than {dense_first} dense ones first: {listed}"[:400]
        )
    return deepseek_v3.decoder("exaone_moe", c, list(exaone4.attentions(c)), deepseek_v3.router(c))


_BIAS = "layers.{i}.moe.router.selection_bias"
HF: tuple[RuleLine, ...] = (
    *hf.ENDS,
    *hf.PRE_NORMS,
    *hf.ATTENTION,
    *hf.QK_NORM,
    *hf.MLP,
    *hf.in_memory(deepseek_v3.MOE, (_BIAS, "model.layers.{i}.mlp.e_score_correction_bias")),
    extra("mtp.*", hf.MTP),
)
_HELD = (*hf.STACKED, (_BIAS, "model.layers.{i}.mlp.gate.e_score_correction_bias"))
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *_HELD))}

FAMILY = Family("exaone_moe", ("exaone_moe",), ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"), spec, RULES)
