"""Qwen3.5 with experts: stacked in bf16 releases, as in memory; one by one where they are quantised."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from families import qwen3_5, qwen3_next
from zoo import families
from zoo.formats.opening import open_checkpoint
from zoo.mapping.plan import make_plan
from zoo.testing import FULL, LINEAR, FamilyCase, Gguf, Variant, gguf, names
from zoo.testing.full_size import account, mixers, read, refs
from zoo.testing.names import Config, Tensor
from zoo.testing.variant import Draw, Settings, Shapes, Tensors


def stacked(name: str) -> tuple[str, int | None, str]:
    """A stacked tensor's name, and of which expert and projection it holds this one; others as they are."""
    found = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if found is None:
        return name, None, ""
    return f"{found[1]}.{'down' if found[3] == 'down' else 'gate_up'}_proj", int(found[2]), found[3]


def as_released(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """`save_pretrained` takes the experts apart; bf16 releases hold them as they are in memory."""
    out = {}
    for name, t in tensors.items():
        whole, expert, part = stacked(name)
        if expert is None:
            out[name] = t
        elif part != "up":
            experts = names.text_config(config)["num_experts"]
            rows, columns = t.shape
            out[whole] = Tensor(t.dtype, (experts, rows * (2 if part == "gate" else 1), columns))
    return out


def one_by_one(shapes: Shapes) -> Shapes:
    """Stacked experts taken apart again."""
    out: Shapes = {}
    for name, shape in shapes.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            experts, both, d = shape
            parts = {"gate_proj": (both // 2, d), "up_proj": (both // 2, d)}
        elif leaf == "down_proj":
            experts, *rest = shape
            parts = {leaf: tuple(rest)}
        else:
            out[name] = shape
            continue
        out |= {f"{base}.{e}.{part}.weight": each for e in range(experts) for part, each in parts.items()}
    return out


def stack_experts(tensors: Tensors, config: Settings, draw: Draw) -> None:
    """The same of a tiny checkpoint's tensors."""
    parts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in list(tensors):
        whole, expert, part = stacked(name)
        if expert is not None:
            parts.setdefault(whole, {}).setdefault(expert, {})[part] = tensors.pop(name)
    for whole, experts in parts.items():
        each = [experts[e] for e in sorted(experts)]
        tensors[whole] = torch.stack(
            [torch.cat([x[part] for part in ("gate", "up", "down") if part in x]) for x in each]
        )


def gguf_weights(tensors: Tensors, config: Settings) -> Tensors:
    """Of stacked experts llama.cpp's converter parts gate and up."""
    out: Tensors = {}
    for name, x in qwen3_5.gguf_weights(tensors, config).items():
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), x.chunk(2, dim=1)):
                out[f"{name.removesuffix('gate_up_proj')}{part}.weight"] = half
        else:
            out[f"{name}.weight" if name.endswith("experts.down_proj") else name] = x
    return out


def gguf_fields(config: Settings) -> Settings:
    return qwen3_5.gguf_fields(config) | qwen3_next.gguf_experts(config)


# fmt: off

_MOE = qwen3_5.TEXT | {
    "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2,
}

CASE = FamilyCase(
    "qwen3_5_moe",
    (
        Variant("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration",
            {"text_config": _MOE, **qwen3_5.WRAPPER},
            "the wrapper, with its vision tower and mtp.*; experts one by one, gated shared expert",
            seq_len=70, mtp=1, image_token=130, listed=one_by_one),
        Variant("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
            _MOE | {
                "linear_num_value_heads": 4, "layer_types": [LINEAR, FULL, LINEAR], "num_hidden_layers": 3,
                "num_experts": 5,
            },
            "the text model alone, its experts stacked; 2 value heads per key head", seq_len=70, release=stack_experts),
    ),
    layer_kinds=frozenset({FULL, LINEAR}),
    released_text=qwen3_5.released,
    keeps={"qwen3_5_moe_text": ("rope_parameters",)},
    released=as_released,
    mtp=qwen3_5.mtp,
    mtp_layers={"qwen3.5-35b-a3b": 1, "qwen3.5-122b-a10b": 1, "qwen3.5-397b-a17b": 1},
    gguf=(
        Gguf("qwen35moe", gguf_fields, variant="qwen3_5_moe_text", settings=qwen3_5.GGUF_SETTINGS, weights=gguf_weights,
             refused=(*qwen3_5.GGUF_REFUSED, {"expert_weights_norm": False}, {"expert_gating_func": 2})),
    ),
    refused=(
        ("qwen3.5-35b-a3b", {"norm_topk_prob": False, "scoring_func": "sigmoid"}, "scoring_func is sigmoid"),
        ("qwen3.5-35b-a3b", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    ),
)
# fmt: on


def test_every_fourth_layer_of_qwen3_5_moe_is_attention() -> None:
    assert mixers(families.spec_of(read("qwen3.5-35b-a3b"))) == "ddda" * 10


def test_experts_may_lie_one_by_one() -> None:
    config = read("qwen3.5-35b-a3b")
    shapes = one_by_one({name: t.shape for name, t in names.released_tensors(CASE, config).items()})
    tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    assert all(name.startswith("model.visual.") for name in account(config, refs(tensors)).extras)


def test_a_gguf_that_ggml_itself_wrote_lacks_axes_of_one(tmp_path: Path) -> None:
    """llama-quantize writes the dimensions that ggml counts: the shared expert's gate has one in its files, two in the
    converter's."""
    pytest.importorskip("gguf")
    ckpt = open_checkpoint(gguf.make(CASE, CASE.gguf[0], tmp_path)[1])
    gates = {name: t for name, t in ckpt.tensors.items() if t.shape[0] == 1 and len(t.shape) == 2}
    assert set(gates) == {f"blk.{i}.ffn_gate_inp_shexp.weight" for i in range(5)}
    fewer = {name: replace(t, shape=t.shape[1:]) for name, t in gates.items()}
    plan, other = (make_plan(c, dtype="fp32") for c in (ckpt, replace(ckpt, tensors=ckpt.tensors | fewer)))
    assert other.outputs == plan.outputs
