"""Falcon-H1: attention and a state space side by side in every layer, and a factor on almost everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zoo
from zoo import families
from zoo.errors import ZooError
from zoo.testing import BASE, FamilyCase, Gguf, Variant, gguf, rope
from zoo.testing.full_size import attention, read
from zoo.testing.released import drop, flat_rope
from zoo.testing.variant import Settings, Tensors

# fmt: off

_H1 = BASE | {
    "hidden_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 52,
    "num_hidden_layers": 3, "rope_parameters": rope(613.0), "mamba_d_ssm": 60, "mamba_n_heads": 12, "mamba_d_head": 5,
    "mamba_n_groups": 3, "mamba_d_state": 7, "mamba_d_conv": 3, "mamba_chunk_size": 8, "embedding_multiplier": 1.9,
    "lm_head_multiplier": 0.6, "mlp_multipliers": [0.7, 1.4], "key_multiplier": 0.8, "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.7, "ssm_multipliers": [0.9, 1.1, 0.8, 1.3, 1.2], "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.6,
}
_ROUNDS = "upstream rounds x and keys times their factors; here these are part of the scores' and the values' scales"

# fmt: on


def released(config: Settings) -> Settings:
    return drop(flat_rope(config), "time_step_limit") | {"attn_layer_indices": None, "mamba_use_mlp": True}


FACTORS = {
    "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0, "mlp_multipliers": [1.0, 1.0], "key_multiplier": 1.0,
    "attention_in_multiplier": 1.0, "attention_out_multiplier": 1.0, "ssm_multipliers": [1.0] * 5, "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
}  # fmt: skip


def gguf_weights(tensors: Tensors, config: Settings) -> Tensors:
    """As Mamba2Model and FalconH1Model of llama.cpp's converter change them: the decay for its logarithm, and every factor
    multiplied into what it stands at."""
    inner, bc = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    z, x, b, c, dt = config["ssm_multipliers"]
    of_parts = torch.tensor([z] * inner + [x] * inner + [b] * bc + [c] * bc + [dt] * config["mamba_n_heads"])
    read, gate, down = config["attention_in_multiplier"], *config["mlp_multipliers"]
    factors = {
        "q_proj": read, "k_proj": config["key_multiplier"] * read, "v_proj": read, "gate_proj": gate, "down_proj": down,
        "o_proj": config["attention_out_multiplier"], "out_proj": config["ssm_out_multiplier"],
        "in_proj": of_parts[:, None] * config["ssm_in_multiplier"], "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }  # fmt: skip
    out: Tensors = {}
    for name, t in tensors.items():
        t = t.float() * factors.get(name.split(".")[-2], 1.0)
        if name.endswith("A_log"):
            t = -torch.exp(t.double()).float()
        elif name.endswith("mamba.norm.weight"):
            t = t.unflatten(0, (config["mamba_n_groups"], -1))
        name = name.replace("dt_bias", "dt_proj.bias")
        out[name] = (
            t.unsqueeze(1)
            if name.endswith(("A_log", ".D"))
            else t.squeeze(1)
            if name.endswith("conv1d.weight")
            else t
        )
    return out


def gguf_fields(config: Settings) -> Settings:
    return {
        "attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"],
        "ssm.conv_kernel": config["mamba_d_conv"], "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"], "ssm.time_step_rank": config["mamba_n_heads"],
        "ssm.inner_size": config["mamba_d_ssm"],
    }  # fmt: skip


# fmt: off
CASE = FamilyCase(
    "falcon_h1",
    (
        Variant("falcon_h1", "FalconH1ForCausalLM", _H1,
            "attention beside Mamba-2 whose gate is alone; fourteen factors", rounds_otherwise=_ROUNDS),
        Variant("falcon_h1_norm", "FalconH1ForCausalLM",
            _H1 | {
                "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_conv_bias": False, "mlp_bias": True,
                "tie_word_embeddings": True, "num_hidden_layers": 2,
            },
            "a norm after the gate; biases in the MLP, none in the convolution; tied", rounds_otherwise=_ROUNDS),
        Variant("falcon_h1_norm_first", "FalconH1ForCausalLM",
            _H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_d_head": "auto", "num_hidden_layers": 2},
            "a norm before the gate", rounds_otherwise=_ROUNDS),
    ),
    refused=(
        ("falcon-h1-0.5b", {"attention_bias": True}, "attention_bias is True"),
        ("falcon-h1-0.5b", {"projectors_bias": True}, "projectors_bias is True"),
        ("falcon-h1-0.5b", {"mamba_proj_bias": True}, "mamba_proj_bias is True"),
        ("falcon-h1-0.5b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("falcon-h1-0.5b", {"mamba_d_head": 60}, "mamba_n_heads * mamba_d_head is 1440"),
        ("falcon-h1-0.5b", {"ssm_multipliers": [1.0, 2.0]}, "there are 2 scales"),
    ),
    released_text=released,
    gguf=(
        Gguf("falcon-h1", gguf_fields, variant="falcon_h1_norm", settings=FACTORS | {"mamba_conv_bias": True}, weights=gguf_weights,
             refused=({"attention.scale": 0.5}, {"rope.dimension_count": 4})),
    ),
)
# fmt: on


def test_attentions_factors_are_in_its_scales() -> None:
    c = read("falcon-h1-0.5b")
    a = attention(families.spec_of({**c, "attention_in_multiplier": 3.0}), 0)
    assert abs(a.scale - 9 * c["key_multiplier"] / 8) < 1e-9
    assert a.value_scale == 3 * c["attention_out_multiplier"]


def test_a_gguf_has_the_factors_in_its_weights(tmp_path: Path) -> None:
    """As llama.cpp's converter multiplies them in: the model is the same, though no number of its config is."""
    pytest.importorskip("gguf")
    of = replace(CASE.gguf[0], variant="falcon_h1", settings={})
    folders = [zoo.convert(path, tmp_path / path.name[:1]) for path in gguf.make(CASE, of, tmp_path)]
    ids = torch.arange(11, 31)[None]
    with torch.inference_mode():
        released, ours = (zoo.load(folder, dtype=torch.float32)(ids) for folder in folders)
    # A product that is stored is rounded once more: over 20 seeds that made 1.0 to 3.5e-6 of the largest logit, by torch's norms as by ours.
    assert (released - ours).abs().max() < 7e-6 * released.abs().max()
    # Written again as they are, they would be lost: no field of the architecture says them.
    with pytest.raises(ZooError, match=r"falcon-h1 cannot say it: spec.*would be read as"):
        zoo.export(folders[0], tmp_path / "out.gguf", format="gguf")
