"""Llama 4. Scout leaves the list of layers without positions empty, which means every fourth.

Chunking and MoE layers follow from other keys. transformers saves experts stacked; one release stores them one by one.
"""

from __future__ import annotations

import torch

from zoo import families
from zoo.spec import Attention
from zoo.testing import BASE, FULL, FamilyCase, Variant, build, llama3, names, rope
from zoo.testing.full_size import account, read, refs
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings

# fmt: off

_SCOUT = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 28, "intermediate_size_mlp": 44, "num_hidden_layers": 5,
    "num_local_experts": 4, "num_experts_per_tok": 2, "attention_chunk_size": 7, "floor_scale": 5,
    "attn_scale": 0.35,
    "rope_parameters": llama3(731.0, 6.0, 160, 1.3, 5.5),
}
_LLAMA4_VISION = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 7, "vision_output_dim": 20, "projector_input_dim": 20, "projector_output_dim": 20,
}

# fmt: on


def released(config: Settings) -> Settings:
    """Scout leaves the NoPE list empty, which means every fourth layer; chunking and MoE layers follow."""
    every_fourth = [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]
    if config["no_rope_layers"] == every_fourth:
        config["no_rope_layers"] = []
    drop(config, "layer_types", "moe_layers", "no_rope_layer_interval")
    return flat_rope(config) | {"for_llm_compressor": False}


def upstream_decodes_beyond_a_chunk_as_it_reads_a_prompt() -> None:
    variant = CASE.variants[0]
    model, ids = build.fresh(variant), build.tokens(variant, batch=1)
    n = model.config.attention_chunk_size + 1
    assert n < ids.shape[1]
    with torch.inference_mode():
        whole, out = model(ids).logits, model(ids[:, :n], use_cache=True)
        for i in range(n, ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(out.logits[:, -1], whole[:, i], atol=1e-5, rtol=1e-4)


# fmt: off
# What bf16 logits differ by from upstream's with sdpa, in the median over tokens.
_ROUNDS = "0.36 to 0.5 of the spread between upstream's two attentions, on the edge of what is asked; the cause is not known yet"

CASE = FamilyCase(
    "llama4",
    (
        Variant("llama4_scout", "Llama4ForCausalLM", _SCOUT,
            "all layers MoE, top-2, qk norm; chunked RoPE layers, layer 3 NoPE with temperature tuning from "
            "position 4 on", rounds_otherwise=_ROUNDS),
        Variant("llama4_maverick", "Llama4ForCausalLM",
            _SCOUT | {
                "use_qk_norm": False, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 3,
                "num_experts_per_tok": 1, "rope_parameters": rope(977.0),
            },
            "dense and MoE layers alternate, top-1, no qk norm, plain RoPE, NoPE every third layer", rounds_otherwise=_ROUNDS),
        Variant("llama4", "Llama4ForConditionalGeneration",
            {
                "text_config": _SCOUT, "vision_config": _LLAMA4_VISION,
                "image_token_index": 130, "boi_token_index": 129, "eoi_token_index": 128,
            },
            "the released wrapper: language_model.* with a vision tower and a projector beside it",
            image_token=130, rounds_otherwise=_ROUNDS),
    ),
    main="llama4_scout",
    layer_kinds=frozenset({FULL, "chunked_attention"}),
    released_wrapper=lambda config: drop(config, "tie_word_embeddings"),
    packed_otherwise={"llama4-maverick-17b-128e-instruct-fp8": "its experts are stored one by one"},
    released_text=released,
    disputes={"decoding beyond a chunk": upstream_decodes_beyond_a_chunk_as_it_reads_a_prompt},
)
# fmt: on


def test_maverick_fp8_stores_its_experts_one_by_one() -> None:
    """`for_llm_compressor`: [out, in] per expert, one scale per row; attention, router and vision plain."""
    config = read("llama4-maverick-17b-128e-instruct-fp8")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}

    def channels(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
        tensors[f"{name}.weight_scale"] = ("BF16", (rows, 1))

    for name, t in names.released_tensors(CASE, config).items():
        base, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            experts, d, both = t.shape
            for e in range(experts):
                channels(f"{base}.{e}.gate_proj", both // 2, d)
                channels(f"{base}.{e}.up_proj", both // 2, d)
        elif leaf == "down_proj":
            experts, f, d = t.shape
            for e in range(experts):
                channels(f"{base}.{e}.down_proj", d, f)
        elif "shared_expert" in name:
            channels(base, *t.shape)
        else:
            tensors[name] = (t.dtype, t.shape)
    m = account(config, refs(tensors))
    assert m.quant["layers.1.moe.gate_up"] == m.quant["layers.1.moe.shared.down"] == "fp8-channel"
    assert set(m.extras) == {n for n in tensors if not n.startswith("language_model.")}


def test_a_nope_layer_of_llama_4_sees_everything_and_has_no_qk_norm() -> None:
    spec = families.spec_of(read("llama4-scout-17b-16e-instruct"))
    for i, layer in enumerate(spec.layers):
        a = layer.mixer
        assert isinstance(a, Attention)
        nope = (i + 1) % 4 == 0
        assert [a.rope is None, a.chunk is None, a.qk_norm is None, a.query_scale is not None] == [nope] * 4
