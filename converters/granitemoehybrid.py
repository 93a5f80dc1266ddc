"""Granite 4.0: H-Small (32B-A9B) and H-Tiny with experts; H-Micro, H-1B, H-350M, and Micro without.

Granite's four factors (see granite.py), and
- nine layers with Mamba-2 to one with attention, in the order of `layer_types` (in Micro, attention alone);
- RoPE only where `position_embedding_type` is "rope"; the hybrids have no positions at all;
- in every layer an MLP of `shared_intermediate_size`, beside experts (see granitemoe.py) or, where
  `num_local_experts` is 0, alone;
- transformers calls the kinds "linear_attention" and "full_attention" since 5.18, releases and versions before "mamba" and "attention".
"""

from __future__ import annotations

from zoo.family import (
    FFN,
    Attention,
    Config,
    Disagreement,
    Family,
    Mamba,
    Mixer,
    Norm,
    Spec,
    hf,
    read,
    rules,
)

from . import granite, granitemoe
from .nemotron_h import dt_floor

KINDS = {"mamba": read.LINEAR, "attention": read.FULL, read.LINEAR: read.LINEAR, read.FULL: read.FULL}


def spec(c: Config) -> Spec:
    shared = granitemoe.shared_mlp(c)
    ffn: FFN = granitemoe.moe(c, shared) if c["num_local_experts"] else shared
    (
        c.get("intermediate_size"),
        c.get("num_experts_per_tok"),
    )  # the experts'; where there are none they say nothing
    kinds = [KINDS[kind] for kind in read.layer_types(c, lambda _: read.LINEAR, KINDS)]
    of: dict[str, Mixer] = {read.FULL: attention(c), read.LINEAR: mamba(c)}
    return granite.decoder("granitemoehybrid", c, [(of[kind], ffn) for kind in kinds])


def attention(c: Config) -> Attention:
    positions = c.choice("position_embedding_type", ("rope", "nope", None), None)
    if positions != "rope":
        return granite.attention(c, None)
    return granite.attention(c, read.whole_rope(c, read.rope_parameters(c), read.head_dim(c)))


def mamba(c: Config) -> Mamba:
    c.choice("hidden_act", ("silu",))  # it is the convolution's too
    c.refuse(mamba_proj_bias=False)
    n_heads, head_dim = read.mamba_heads(c, c.get("mamba_expand", 2) * c["hidden_size"])
    return Mamba(
        n_heads=n_heads,
        head_dim=head_dim,
        n_groups=c.get("mamba_n_groups", 1),
        state=c["mamba_d_state"],
        conv=c["mamba_d_conv"],
        out_norm=Norm(c["rms_norm_eps"]),
        conv_bias=c.get("mamba_conv_bias", True),
        dt_min=dt_floor(c),
    )


_SHARED = "model.layers.{i}.shared_mlp."
HF = (
    *granitemoe.HF,
    *hf.mamba("model.layers.{i}.mamba"),
    ("layers.{i}.mlp.gate_up.weight", _SHARED + "input_linear.weight"),
    ("layers.{i}.mlp.down.weight", _SHARED + "output_linear.weight"),
)
RULES = {"hf": rules(*HF), "transformers": rules(*hf.in_memory(HF, *granitemoe.HELD))}

DISAGREEMENTS = (
    Disagreement(
        about="the norm behind Mamba-2 where it has groups",
        upstream="norms each group by itself since 5.23; before, its CUDA kernels did, and without them all groups were one",
        vendor="norms each group by itself (mamba_ssm)",
        follows="vendor",
        why="models are trained with the kernels; releases have one group, where both are the same",
        source="https://github.com/state-spaces/mamba/blob/main/mamba_ssm/modules/mamba2.py",
        since="2026-11",
        applies=lambda spec: any(
            isinstance(m := layer.mixer, Mamba) and m.n_groups > 1 for layer in spec.layers
        ),
    ),
)
FAMILY = Family(
    "granitemoehybrid",
    ("granitemoehybrid",),
    ("GraniteMoeHybridForCausalLM",),
    spec,
    RULES,
    disagreements=DISAGREEMENTS,
)
