"""Jamba: the first Mamba, attention without positions, and experts by turns of their own."""

from __future__ import annotations

import torch

from zoo import families
from zoo.model.decoder import Decoder
from zoo.model.mamba1 import Mamba1
from zoo.spec import MoE
from zoo.testing import BASE, FULL, LINEAR, FamilyCase, Variant
from zoo.testing.full_size import edited, mixers, read
from zoo.testing.released import drop
from zoo.testing.variant import Settings

# fmt: off

_JAMBA = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 28, "num_hidden_layers": 4,
    "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0, "num_experts": 6,
    "num_experts_per_tok": 3, "mamba_d_state": 11, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 5,
}

# fmt: on


def released(config: Settings) -> Settings:
    return drop(config, "use_mambapy", "use_associative_scan", "layer_types") | {
        "n_ctx": config.pop("max_position_embeddings"),
        "calc_logits_for_entire_prompt": False,
        "mamba_inner_layernorms": True,
        "sliding_window": None,
    }


# fmt: off
CASE = FamilyCase(
    "jamba",
    (
        Variant("jamba", "JambaForCausalLM", _JAMBA,
            "Mamba with norms on dt, B and C; attention without positions; experts in every second layer"),
        Variant("jamba_dense", "JambaForCausalLM",
            {k: x for k, x in _JAMBA.items() if k != "num_experts_per_tok"} | {
                "num_experts": 1, "num_hidden_layers": 3, "mamba_dt_rank": "auto",
                "mamba_conv_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 1, "mamba_expand": 2,
            },
            "no experts; one KV head, no bias in the convolution, dt's width left out, tied"),
    ),
    layer_kinds=frozenset({FULL, LINEAR}),
    released_text=released,
    refused=(
        ("jamba-v0.1", {"attn_layer_offset": 8}, "attn_layer_offset is 8"),
        ("jamba-v0.1", {"mamba_proj_bias": True}, "mamba_proj_bias is True"),
        ("jamba-v0.1", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms is False"),
        ("jamba-v0.1", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("jamba-v0.1", {"sliding_window": 4096}, "sliding_window is 4096"),
    ),
)
# fmt: on


def test_one_layer_in_eight_of_jamba_attends_and_every_second_has_experts() -> None:
    spec = families.spec_of(read("jamba-v0.1"))
    assert mixers(spec) == "mmmmammm" * 4
    assert [isinstance(layer.ffn, MoE) for layer in spec.layers] == [False, True] * 16
    assert families.spec_of(edited("jamba-v0.1", mamba_dt_rank="auto")) == spec


def test_the_state_space_is_that_of_transformers_mixer() -> None:
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    config = JambaConfig(**_JAMBA)
    torch.manual_seed(0)
    theirs = JambaMambaMixer(config, 0).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    spec = families.spec_of(config.to_dict() | {"architectures": ["JambaForCausalLM"]})
    ours = Mamba1(spec.layers[0].mixer, spec.d_model, 0)  # type: ignore[arg-type]
    state = {
        k.replace("layernorm", "norm").replace("conv1d", "conv"): v for k, v in theirs.state_dict().items()
    }
    state["dt_bias"], state["out.weight"] = state.pop("dt_proj.bias"), state.pop("out_proj.weight")
    state["conv.weight"] = state["conv.weight"].squeeze(1)
    ours.load_state_dict(state)
    x = torch.randn(2, 19, spec.d_model)
    _, ctx = Decoder(spec).to_empty(device="cpu").start(torch.zeros(2, 19, dtype=torch.long))
    with torch.no_grad():
        assert torch.allclose(ours(x, ctx), theirs(x), atol=2e-5)
