"""Youtu-LLM: latent attention without experts. Its first release had RoPE in the keys of the time."""

from __future__ import annotations

from zoo import families
from zoo.testing import BASE, FamilyCase, Variant, rope, yarn
from zoo.testing.full_size import read
from zoo.testing.released import drop, drop_default, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_YOUTU = BASE | {
    "pad_token_id": None,  # upstream would make its embedding zero
    "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 58,
    "num_hidden_layers": 3, "q_lora_rank": 18, "kv_lora_rank": 16, "qk_nope_head_dim": 10, "qk_rope_head_dim": 12,
    "v_head_dim": 22, "rope_parameters": rope(613.0),
}

# fmt: on


def released(config: Settings) -> Settings:
    drop_default(config, rope_interleave=True)
    return flat_rope(drop(config, "head_dim", "embedding_initializer_range")) | {"mlp_bias": False}


# fmt: off
CASE = FamilyCase(
    "youtu",
    (
        Variant("youtu", "YoutuForCausalLM", _YOUTU, "latent attention, RoPE in neighbouring pairs, tied"),
        Variant("youtu_noqlora", "YoutuForCausalLM",
            _YOUTU | {
                "q_lora_rank": None, "v_head_dim": 14, "attention_bias": True, "tie_word_embeddings": False, "rope_interleave": False,
                "hidden_act": "gelu", "rope_parameters": yarn(97.0, 7.0, 64, 3.6, 0.36, mscale=0.8, mscale_all_dim=0.6),
            },
            "q_proj instead of the latent, biases, another activation, half-split RoPE, YaRN with mscale, untied; values narrower than keys",
            rounds_otherwise="upstream's SDPA takes another path where values are narrower than keys; the other variant, where "
            "they are not, is upstream's to the bit"),
    ),
    grouped=False,
    released_text=released,
    refused=(
        ("youtu-llm-2b", {"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ("youtu-llm-2b", {"mlp_bias": True}, "mlp_bias is True"),
        ("youtu-llm-2b", {"kv_lora_rank": None}, "kv_lora_rank"),
    ),
)
# fmt: on


def test_the_first_release_says_the_same_in_other_keys() -> None:
    config = read("youtu-llm-2b")
    first = {k: v for k, v in config.items() if k != "rope_parameters"} | {
        "model_type": "youtu_llm", "rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None,
    }  # fmt: skip
    assert families.spec_of(first) == families.spec_of(config)


def test_a_null_pairing_is_halves_as_upstream_has_it() -> None:
    config = read("youtu-llm-2b")
    null, halves = (families.spec_of(config | {"rope_interleave": said}) for said in (None, False))
    assert null == halves != families.spec_of(config | {"rope_interleave": True})
