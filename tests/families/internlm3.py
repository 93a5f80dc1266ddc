"""InternLM3, which transformers runs as a Llama. It wants `qkv_bias` and `bias` equal; the vendor's own code does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo import families
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.plan import make_plan
from zoo.model.decoder import Decoder
from zoo.testing import BASE, FamilyCase, Variant, build, rope
from zoo.testing.assemble import assemble
from zoo.testing.built import decoder
from zoo.testing.full_size import attention, edited, read
from zoo.testing.released import flat_rope
from zoo.testing.variant import Settings

# fmt: off

_INTERNLM3 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 52,
    "num_hidden_layers": 3, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 613.0, "factor": 3.0},
}
_ITS_OWN: Settings = {"model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"]}

# fmt: on


def released(config: Settings) -> Settings:
    config["qkv_bias"], config["bias"] = config.pop("attention_bias"), config.pop("mlp_bias")
    config.pop("pretraining_tp", None)
    return flat_rope(config)


def upstream_keys(config: Settings) -> Settings:
    """In Llama's words, whose class runs it."""
    said = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}
    return {said.get(k, k): v for k, v in config.items()}


# fmt: off
CASE = FamilyCase(
    "internlm3",
    (
        Variant("internlm3", "LlamaForCausalLM", _INTERNLM3,
            "a Llama in other words; dynamic RoPE, within its context", rewrite=_ITS_OWN),
        Variant("internlm3_bias", "LlamaForCausalLM",
            _INTERNLM3 | {
                "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu",
                "rope_parameters": rope(613.0),
            },
            "biases everywhere, another activation, tied, plain RoPE", rewrite=_ITS_OWN),
    ),
    classes={"internlm3": "LlamaForCausalLM"},
    released_text=released,
    upstream_keys=upstream_keys,
    refused=(
        ("internlm3-8b-instruct", {"rope_scaling": {"rope_type": "longrope", "factor": 6.0}}, "rope_type is 'longrope'"),
        ("internlm3-8b-instruct", {"rope_scaling": {"rope_type": "dynamic"}}, "'factor' is missing"),
        ("internlm3-8b-instruct", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    ),
)
# fmt: on


def test_q_k_and_v_may_have_biases_where_nothing_else_has() -> None:
    a = attention(families.spec_of(edited("internlm3-8b-instruct", qkv_bias=True)), 0)
    assert a.qkv_bias and not a.out_bias


def test_saved_by_llamas_class_it_is_a_llama_of_the_same_numbers(tmp_path: Path) -> None:
    """Many have it so: under Llama's names it needs no code of its own."""
    variant = CASE.variant("internlm3")
    theirs = build.perturbed(variant)
    theirs.save_pretrained(tmp_path)
    plan = make_plan(open_checkpoint(tmp_path))
    assert plan.family.name == "llama" and plan.spec.layers == families.spec_of(own(tmp_path)).layers
    ids = build.tokens(variant)
    ours = decoder(plan.spec, assemble(tmp_path, plan))(ids)
    assert (ours - build.logits(theirs, ids)).abs().max() < 5e-5


def own(folder: Path) -> Settings:
    """The config in InternLM3's own words."""
    return released(json.loads((folder / "config.json").read_text())) | _ITS_OWN


def test_a_text_beyond_the_context_of_dynamic_rope_is_refused() -> None:
    small = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 6,
    }
    small |= {"vocab_size": 11, "num_hidden_layers": 1, "max_position_embeddings": 5}
    model = Decoder(families.spec_of(read("internlm3-8b-instruct") | small)).to_empty(device="cpu")
    cache = model.cache(1, 8)
    model(torch.zeros(1, 5, dtype=torch.long), cache)
    with pytest.raises(ZooError, match="a pass up to position 6: beyond 5 this model's RoPE changes"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)
