"""ERNIE 4.5 with experts. Its prediction layer is a dense one, under names of its own."""

from __future__ import annotations

from zoo.testing import BASE, FamilyCase, Variant, names, rope
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_ERNIE = BASE | {
    "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 44, "moe_intermediate_size": 28, "num_hidden_layers": 4,
    "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2, "moe_norm_min": 0.7,
    "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop(config, "output_router_logits", "router_aux_loss_coef")
    return flat_rope(config) | {"num_nextn_predict_layers": 1, "moe_use_aux_free": True}


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """A dense layer each, a projection of [embedding, hidden] and the norms of both (as vLLM loads them)."""
    d, dtype = config["hidden_size"], names.DTYPES[names.dtype_of(config)]
    block = names.first_layer(case, names.one_layer(dict(config), {"moe_layer_start_index": 1}))
    out: dict[str, Tensor] = {}
    for i in range(count):
        out |= {f"model.mtp_block.{i}.{name}": t for name, t in block.items()}
        out |= {f"model.mtp_{kind}_norm.{i}.weight": Tensor(dtype, (d,)) for kind in ("emb", "hidden")}
        out[f"model.mtp_linear_proj.{i}.weight"] = Tensor(dtype, (d, 2 * d))
    return out


# fmt: off
CASE = FamilyCase(
    "ernie4_5_moe",
    (
        Variant("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _ERNIE,
            "softmax router with a selection bias and a floor under the sum, shared experts, first layer dense, tied; "
            "with the MTP layer", mtp=1),
        Variant("ernie4_5_moe_grid", "Ernie4_5_MoeForCausalLM",
            _ERNIE | {
                "moe_num_shared_experts": 0, "moe_layer_interval": 2, "moe_layer_start_index": 2,
                "moe_layer_end_index": 4, "num_hidden_layers": 6, "moe_num_experts": 5, "tie_word_embeddings": False,
                "moe_norm_min": 0.6,
            },
            "no shared experts, one sparse layer by start, end and interval, untied"),
    ),
    released_text=released,
    kept_in_fp32=frozenset({"weight", "e_score_correction_bias"}),
    mtp=mtp,
    refused=(
        ("ernie-4.5-21b-a3b", {"use_bias": True}, "use_bias is True"),
        ("ernie-4.5-21b-a3b", {"moe_use_aux_free": False}, "moe_use_aux_free is False"),
        ("ernie-4.5-21b-a3b", {"moe_num_experts": None}, "moe_num_experts"),
    ),
)
# fmt: on
