"""Llama 3 and SmolLM2. Nothing is unusual about its upstream: the plainest family there is.

head_dim may be given or follow from the width; releases of Llama 2 leave rope_theta out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from zoo import families
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.testing import BASE, FamilyCase, Gguf, Variant, build, gguf, llama3, rope
from zoo.testing.full_size import attention, read
from zoo.testing.released import plain_rope


def upstream_scales_by_the_configs_32() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_dict(read("llama-3.2-1b-instruct"))
    slowest = LlamaRotaryEmbedding(config).inv_freq[-1].item()
    plain = config.rope_parameters["rope_theta"] ** -((config.head_dim - 2) / config.head_dim)
    assert slowest == pytest.approx(plain / 32)


# fmt: off

_LLAMA = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 3,
    "rope_parameters": llama3(731.0, 6.0, 160, 1.3, 5.5),
}

CASE = FamilyCase(
    "llama",
    (
        Variant("llama", "LlamaForCausalLM", _LLAMA,
            "untied head; head_dim 10 is not 36/6; llama3 RoPE scaling with all three bands"),
        Variant("llama_tied", "LlamaForCausalLM",
            _LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 3}, "tied head: no lm_head on disk"),
        Variant("llama_bias", "LlamaForCausalLM",
            _LLAMA | {
                "hidden_size": 60, "head_dim": None, "attention_bias": True, "mlp_bias": True,
                "rope_parameters": rope(977.0),
            },
            "attention_bias and mlp_bias; plain RoPE; head_dim follows from hidden_size"),
    ),
    released_text=plain_rope,
    gguf=(
        Gguf(
            "llama", lambda c: {"rope.dimension_count": c["head_dim"]},
            settings={"rope_parameters": rope(613.0)}, interleaved=True,
            silent={
                "attention.key_length": 10, "attention.value_length": 10, "expert_count": 0, "expert_used_count": 0,
            },
            refused=(
                {"attention.scale": 0.01}, {"attention.causal": False}, {"attention.sliding_window": 16},
                {"attention.value_length": 8}, {"rope.freq_base_swa": 5000.0}, {"final_logit_softcapping": 30.0},
                {"of_a_later_version": 1},
            ),
        ),
    ),
    refused=(
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_type is 'longrope'"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "llama3"}}, "'factor' is missing"),
        ("llama-3.1-8b", {"rope_scaling": {"type": "dynamic"}}, "'factor' is missing"),
        ("llama-3.1-8b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("llama-3.1-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama-3.1-8b", {"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
        ("smollm2-135m", {"rope_interleaved": True}, "rope_interleaved is True"),
    ),
    disputes={"the RoPE factor of Llama 3.2 1B and 3B": upstream_scales_by_the_configs_32},
)
# fmt: on


def test_llama_2_configs_leave_theta_out() -> None:
    config = read("llama-3.1-8b")
    del config["rope_theta"], config["rope_scaling"]
    rope = attention(families.spec_of(config), 0).rope
    assert rope is not None and rope.theta == 10000.0


def test_llama3_scaling_is_read_from_the_factors_in_a_gguf(tmp_path: Path) -> None:
    theta, dim = 500000.0, 32
    scaled = {"hidden_size": 96, "head_dim": dim, "rope_parameters": llama3(theta, 32.0, 8192, 1.0, 4.0)}
    like = CASE.variant("llama")
    hf = build.make(CASE, like.with_text(like.text | scaled), tmp_path / "hf")
    # As LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py
    factors = []
    for f in 1.0 / theta ** (torch.arange(0, dim, 2) / dim):
        wavelength = 2 * torch.pi / f
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(float(1 / ((1 - smooth) / 32 + smooth)))
    file = gguf.write(hf, tmp_path / "w.gguf", CASE.gguf[0], tables={"rope_freqs.weight": factors})
    specs = [families.spec_of(open_checkpoint(path).config) for path in (file, hf)]
    ours, theirs = (dataclasses.replace(spec, dtype=None) for spec in specs)
    assert ours == theirs
    tables = {"rope_freqs.weight": [f + 1 for f in factors]}
    with pytest.raises(ZooError, match=r"rope_freqs\.weight\[0\] is 2"):
        open_checkpoint(gguf.write(hf, tmp_path / "odd.gguf", CASE.gguf[0], tables=tables))
