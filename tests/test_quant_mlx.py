"""MLX's releases: its names for experts, a way of its own for each module, embedding and head in codes too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packs
import pytest
import tiny
import torch
import vendor

from zoo.formats import canonical, open_checkpoint
from zoo.mapping.execute import convert
from zoo.mapping.export import export
from zoo.mapping.plan import make_plan
from zoo.model.linear import Table
from zoo.model.load import load
from zoo.quant import dequantise
from zoo.quant.schemes import named
from zoo.testing.build import read_config, read_tensors, write_config, write_tensors
from zoo.testing.rounding import agree
from zoo.verify.ours import Streamed, build, subject_of

Tensors = dict[str, torch.Tensor]
Way = dict[str, Any]
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
RELEASES: dict[str, tuple[str, dict[str, Any], dict[str, Way]]] = {
    # id: (variant, settings, how modules are quantised: "" for those without a pattern of their own)
    "llama": ("llama", {"intermediate_size": 96}, {"": {"group_size": 32, "bits": 4}}),
    "mixed bits": (
        "qwen3", {"intermediate_size": 96},
        {"down_proj|lm_head": {"group_size": 32, "bits": 6}, "self_attn": {"group_size": 16, "bits": 3}, "": {"group_size": 32, "bits": 4}},
    ),
    "experts": (
        "qwen3_moe", {"moe_intermediate_size": 32},
        {r"mlp\.gate$": {"group_size": 64, "bits": 8}, "": {"group_size": 32, "bits": 4}},
    ),
    "experts in mxfp4, the rest in 8 bits": (
        "gpt_oss", {"intermediate_size": 32},
        {"mlp.experts": {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "": {"bits": 8}},
    ),
    "gemma, an embedding that is the head": ("gemma3_plain", {"intermediate_size": 96}, {"": {"group_size": 64, "bits": 8}}),
}  # fmt: skip


def mlx_names(variant: str, tensors: Tensors) -> Tensors:
    """As mlx-lm's `sanitize` of the models names and stacks them."""
    out: Tensors = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, t in tensors.items():
        if m := re.fullmatch(r"(.+\.mlp)\.experts\.(\d+)\.(\w+\.weight)", name):
            stacks.setdefault(f"{m[1]}.switch_mlp.{m[3]}", {})[int(m[2])] = t
        elif name.endswith("experts.gate_up_proj"):  # [E, in, out], gate and up by turns
            stem = name.removesuffix("gate_up_proj")
            out[stem + "gate_proj.weight"], out[stem + "up_proj.weight"] = (
                t[..., ::2].mT.contiguous(),
                t[..., 1::2].mT.contiguous(),
            )
        elif name.endswith("experts.gate_up_proj_bias"):
            stem = name.removesuffix("gate_up_proj_bias")
            out[stem + "gate_proj.bias"], out[stem + "up_proj.bias"] = (
                t[..., ::2].contiguous(),
                t[..., 1::2].contiguous(),
            )
        elif m := re.fullmatch(r"(.+experts\.down_proj)(_bias)?", name):
            out[m[1] + (".bias" if m[2] else ".weight")] = t if m[2] else t.mT.contiguous()
        else:
            out[name] = t
    return out | {name: torch.stack([of[e] for e in sorted(of)]) for name, of in stacks.items()}


def quantised(tensors: Tensors, ways: dict[str, Way]) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """(the release, the values of its weights, the config's `quantization`)."""
    g = torch.Generator().manual_seed(0)
    release: Tensors = {}
    plain: Tensors = {}
    top = ways[""]
    said: dict[str, Any] = {"group_size": 64, "bits": 4} | top
    for name, t in tensors.items():
        module = name.removesuffix(".weight")
        pattern, way = next((p, w) for p, w in ways.items() if re.search(p, module))
        if t.ndim < 2 or module == name or t.shape[-1] % way.get("group_size", 64):
            release[name] = plain[name] = t
            continue
        if pattern or top.keys() != {"group_size", "bits"}:
            said[module] = way
        mode = way.get("mode", "affine")
        pack = (
            packs.mlx(way["bits"], way.get("group_size", 64)) if mode == "affine" else packs.mlx_float(mode)
        )
        made, values = (
            zip(*(pack(*m.shape, g) for m in t.flatten(0, -3)), strict=True)
            if t.ndim > 2
            else ((x,) for x in pack(*t.shape, g))
        )
        join = torch.stack if t.ndim > 2 else (lambda one: one[0])
        plain[name] = join(values)
        release |= {f"{module}.{end}": join([m[end] for m in made]) for end in made[0]}
    return release, plain, said


ALWAYS = {"mixed bits", "experts", "experts in mxfp4, the rest in 8 bits"}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in ALWAYS else pytest.mark.proof) for k in RELEASES]
)
def test_a_release_is_what_mlx_would_run(kind: str, tmp_path: Path) -> None:
    """Its values under MLX's names; those of Hugging Face's are the same weights."""
    variant, settings, ways = RELEASES[kind]
    path = vendor.make(tmp_path / "hf", variant, **SIZES | settings)
    release, plain, said = quantised(mlx_names(variant, read_tensors(path)), ways)
    config = read_config(path)
    (tmp_path / "plain").mkdir()
    write_config(tmp_path / "plain", config)
    write_tensors(tmp_path / "plain", plain)
    write_config(path, config | {"quantization": said, "quantization_config": said})
    write_tensors(path, release)
    as_it_is = convert(make_plan(open_checkpoint(path)), tmp_path / "codes")
    model, whole = load(as_it_is, dtype=torch.float32), load(as_it_is)
    assert model.embed.scheme is not None and (model.dtype, whole.dtype) == (torch.float32, torch.bfloat16)
    fp32 = vendor.canonical(path, tmp_path / "fp32", dtype="fp32")
    vendor.same(fp32, vendor.canonical(tmp_path / "plain", tmp_path / "want", dtype="fp32"))
    ids = torch.randint(0, model.spec.vocab_size, (2, 7))
    plain_model = load(tmp_path / "fp32")
    assert torch.equal(model.embed.rows(ids), plain_model.embed.rows(ids))  # looked up, to the bit
    logits = plain_model(ids)
    assert agree(model(ids), logits, plain_model, ids)
    streamed = Streamed(folder := canonical.read(as_it_is), torch.float32)  # and as a verification reads it
    streamed.begin(0, ids)
    for i in range(model.spec.n_layers):
        streamed.layer(0, i)
    assert agree(streamed.finish(0), logits, plain_model, ids)
    assert agree(build(subject_of(folder, torch.float32))(ids), logits, plain_model, ids)
    vendor.same(read_tensors(export(as_it_is, tmp_path / "back")), release)
    assert len(named((ckpt := open_checkpoint(path)).tensors, ckpt.config)) == sum(
        n.endswith(".scales") for n in release
    )


def test_each_rank_looks_up_the_rows_of_codes_that_it_has() -> None:
    class Alone:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def sum(self, x: torch.Tensor) -> torch.Tensor:
            return x

    made, values = packs.mlx(4, 32)(12, 64, torch.Generator().manual_seed(0))
    ids, total = torch.tensor([[0, 11], [5, 6]]), torch.zeros(())
    for rank in (0, 1):
        table = Table(6, 64)
        own = {
            c: made[end][6 * rank :][:6]
            for c, end in (("weight", "weight"), ("scale", "scales"), ("shift", "biases"))
        }
        table.quantise("mlx4-group32", own)
        table.across, table.asked = Alone(rank), torch.float32  # type: ignore[assignment]
        total = total + table.rows(ids)
    assert torch.equal(total, values[ids])


KINDS = [("affine", bits, 32) for bits in (1, 2, 3, 4, 5, 6, 8)] + [
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]


@pytest.mark.parametrize("mode, bits, group", KINDS)
def test_what_mlx_writes_is_what_it_reads(mode: str, bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    codes, *rest = mx.quantize(mx.array(w.numpy()), group_size=group, bits=bits, mode=mode)
    theirs = mx.dequantize(codes, *rest, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    made = {"weight": torch.tensor(codes.tolist(), dtype=torch.int64).to(torch.uint32)}
    for name, x in zip(("scale", "shift"), rest):
        made[name] = torch.tensor(x.tolist(), dtype=torch.float32 if mode == "affine" else torch.uint8)
    name = f"mlx{bits}-group{group}" if mode == "affine" else f"mlx-{mode}"
    assert torch.equal(dequantise(name, made, (64,), torch.float32), torch.tensor(theirs.tolist()))


def _mlx_lm(path: Path, dst: Path, **how: Any) -> Callable[[Any], torch.Tensor]:
    """mlx-lm's conversion of a folder, and its logits."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model, config = utils.load_model(path, lazy=False)
    model, config = utils.quantize_model(
        model, config, quant_predicate=getattr(model, "quant_predicate", None), **how
    )
    dst.mkdir()
    utils.save_model(dst, model, donate_model=False)
    (dst / "config.json").write_text(json.dumps(config))
    return lambda ids: torch.tensor(model(mx.array(ids.tolist())).tolist())


@pytest.mark.proof
@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    "mode, bits, group", [("affine", 4, 64), ("affine", 6, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)]
)
def test_the_logits_are_those_of_mlx_lm(
    variant: str, mode: str, bits: int, group: int, tmp_path: Path
) -> None:
    moe = {"moe_intermediate_size": 64} if variant == "qwen3_moe" else {"intermediate_size": 128}
    settings = {**SIZES, "hidden_size": 128, "num_attention_heads": 8, "head_dim": 16, **moe}
    path = vendor.make(tmp_path / "hf", variant, **settings)
    config = read_config(path)
    rope = config.pop("rope_parameters")  # as releases have it
    config |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }
    write_config(
        path, config | ({"num_experts": config.get("num_local_experts", 6)} if variant == "qwen3_moe" else {})
    )
    theirs = _mlx_lm(path, tmp_path / "mlx", mode=mode, bits=bits, group_size=group)
    vendor.canonical(tmp_path / "mlx", tmp_path / "zoo", dtype="fp32")
    with vendor.variant("here", variant, **settings) as name:
        ids = tiny.tokens(name)
    with torch.inference_mode():
        ours = load(tmp_path / "zoo", dtype=torch.float32)(ids)
    want = theirs(ids)
    assert float((ours - want).abs().max()) < 1e-5 * float(want.abs().max())
