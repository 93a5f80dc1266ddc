"""DeepSeek-V4: streams, windows and compressed entries, experts by token id; fp4 and fp8 with e8m0 scales on disk."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.export import export
from zoo.mapping.plan import make_plan
from zoo.testing import BASE, SLIDING, FamilyCase, Variant, build, full_size, names
from zoo.testing.build import read_config, read_tensors, rename, write_config, write_tensors
from zoo.testing.released import drop
from zoo.testing.variant import Config, Draw, Settings, Tensor, Tensors

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"


def _yarn(**more: Any) -> Settings:
    return {"type": "yarn", "factor": 6.0, "original_max_position_embeddings": 64, "beta_fast": 3.6, "beta_slow": 0.36, **more}  # fmt: skip


# fmt: off
_V4 = BASE | {
    "hidden_size": 40, "moe_intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 22,
    "q_lora_rank": 18, "n_routed_experts": 5, "num_experts_per_tok": 2, "routed_scaling_factor": 1.7,
    "rope_theta": 97.0, "compress_rope_theta": 613.0, "qk_rope_head_dim": 8, "rope_scaling": _yarn(),
    "layer_types": [SLIDING, CSA, HCA], "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {CSA: 4, HCA: 7}, "sliding_window": 5, "index_n_heads": 7, "index_head_dim": 14, "index_topk": 3,
    "o_groups": 2, "o_lora_rank": 9, "hc_mult": 3, "hc_sinkhorn_iters": 5, "hc_eps": 0.03, "swiglu_limit": 1.3,
    "num_nextn_predict_layers": 0,
}
# fmt: on


def released_name(name: str) -> str:
    """Of what transformers 5.23 saves: `model.` and the ends' names are not renamed back, and one norm is to another's name."""
    name = re.sub(r"^model\.(embed)_tokens\.", r"\1.", name)
    name = re.sub(r"^model\.hc_head\.hc_", "hc_head_", name)
    name = re.sub(r"^model\.", "", name)
    return re.sub(r"\.attn\.norm\.", ".attn.kv_norm.", name)


def renamed(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Releases keep other tensors in fp32 than transformers: not the norms, but all of the streams, sinks and positions."""
    return {name: _of_release(name, t) for old, t in tensors.items() for name in [released_name(old)]}


def _of_release(name: str, t: Tensor) -> Tensor:
    wide = re.search(r"hc_|attn_sink$|\.ape$|gate\.bias$", name)
    return t if t.dtype == "I64" else Tensor("F32" if wide else "BF16", t.shape)


def release(tensors: Tensors, config: Settings, draw: Draw) -> None:
    rename(tensors, released_name)


def released(config: Settings) -> Settings:
    """Layers by numbers, one more for the prediction layer; RoPE flat, its share of a head as `qk_rope_head_dim`."""
    rope = config.pop("rope_parameters")
    numbers = {SLIDING: 0, CSA: 4, HCA: 128}
    config["compress_ratios"] = [*(numbers[kind] for kind in config.pop("layer_types")), 0]
    config["num_hash_layers"] = config.pop("mlp_layer_types").count("hash_moe")
    config["rope_theta"], config["compress_rope_theta"] = (
        rope[of]["rope_theta"] for of in ("main", "compress")
    )
    scaled = {k: v for k, v in rope["compress"].items() if k in _yarn()}
    config["rope_scaling"] = scaled if rope["compress"]["rope_type"] == "yarn" else None
    drop(
        config,
        "mlp_bias",
        "output_router_logits",
        "partial_rotary_factor",
        "router_aux_loss_coef",
        "router_jitter_noise",
    )
    return config | {"topk_method": "noaux_tc", "expert_dtype": "fp4"}


def stored(name: str, t: Tensor) -> dict[str, Tensor]:
    """fp4 of experts, e4m3 of other matrices but compressors', routers' and the ends', each with e8m0 beside it."""
    plain = re.search(r"^(embed|head)\.|compressor|weights_proj|\.gate\.|norm", name)
    if plain or not name.endswith(".weight") or len(t.shape) != 2:
        return {name: t}
    (rows, columns), scale = t.shape, name.removesuffix("weight") + "scale"
    if ".experts." in name:
        return {name: Tensor("I8", (rows, columns // 2)), scale: Tensor("F8_E8M0", (rows, columns // 32))}
    return {
        name: Tensor("F8_E4M3", t.shape),
        scale: Tensor("F8_E8M0", (-(-rows // 128), -(-columns // 128))),
    }


def mtp(case: FamilyCase, config: Config, count: int) -> dict[str, Tensor]:
    """A layer without entries that chooses its experts, two input norms, a projection of each input, an output norm and streams'
    end of its own (DeepSeek's inference/model.py, MTPBlock)."""
    d, n = config["hidden_size"], config["hc_mult"]
    alone = {
        "layer_types": [SLIDING],
        "mlp_layer_types": ["moe"],
        "compress_ratios": None,
        "num_hash_layers": None,
    }
    block = names.first_layer(case, names.one_layer(config, alone))
    out: dict[str, Tensor] = {}
    for i in range(count):
        base = f"mtp.{i}."
        out |= {
            released_name(f"model.layers.0.{name}").replace("layers.0.", base): t for name, t in block.items()
        }
        out |= {f"{base}{name}.weight": Tensor("BF16", (d,)) for name in ("enorm", "hnorm", "norm")}
        out |= {f"{base}{name}.weight": Tensor("BF16", (d, d)) for name in ("e_proj", "h_proj")}
        for name, shape in (("fn", (n, n * d)), ("base", (n,)), ("scale", (1,))):
            out[f"{base}hc_head_{name}"] = Tensor("F32", shape)
    return {name: _of_release(name, t) for name, t in out.items()}


def upstream_rounds_router_logits_and_what_is_pooled() -> None:
    model = build.fresh(CASE.variants[0]).bfloat16()
    layer = model.model.layers[1]
    x = torch.ones(1, 3, CASE.variants[0].text["hidden_size"], dtype=torch.bfloat16)
    assert layer.mlp.gate(x)[0].dtype == torch.bfloat16
    assert layer.self_attn.compressor.kv_proj(x).dtype == torch.bfloat16


_ROUNDS = "follows DeepSeek's own code, which keeps streams, pooled entries, router logits and RoPE in fp32"

# fmt: off
CASE = FamilyCase(
    "deepseek_v4",
    (
        Variant("deepseek_v4", "DeepseekV4ForCausalLM", _V4,
            "37 tokens: windows of 5, entries of 4 (3 picked of 9) and of 7, neither of which divides them; 3 streams",
            seq_len=37, release=release, eager_only=True, rounds_otherwise=_ROUNDS),
        Variant("deepseek_v4_pro", "DeepseekV4ForCausalLM",
            {k: v for k, v in _V4.items() if k != "rope_theta"} | {  # of layers that it has not
                "layer_types": [HCA, HCA, CSA], "mlp_layer_types": ["hash_moe", "hash_moe", "moe"],
                "compress_rates": {CSA: 4, HCA: 9}, "rope_scaling": {"rope_type": "default"}, "hc_mult": 2, "index_topk": 4,
                "num_attention_heads": 9, "o_groups": 3, "num_nextn_predict_layers": 1,
            },
            "no layer with a window alone, unscaled RoPE; with the prediction layer",
            mtp=1, release=release, eager_only=True, rounds_otherwise=_ROUNDS),
    ),
    layer_kinds=frozenset({SLIDING, CSA, HCA}),
    released_text=released,
    released=renamed,
    stored=stored,
    mtp=mtp,
    kept_in_fp32=frozenset({
        "weight", "ape", "attn_sink", *(f"hc_{of}_{part}" for of in ("attn", "ffn", "head") for part in ("fn", "base", "scale")),
    }),  # the norms' weights
    disputes={"where bf16 rounds in routers, compressors and streams": upstream_rounds_router_logits_and_what_is_pooled},
    refused=(
        ("deepseek-v4-flash", {"hc_sinkhorn_iters": 10**9}, "1000000000 rounds of Sinkhorn"),
        ("deepseek-v4-flash", {"compress_ratios": [4, 8] * 22}, "compress_ratios[1] is 8"),
        ("deepseek-v4-flash", {"compress_ratios": None}, "compress_ratios"),
        ("deepseek-v4-flash", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek-v4-flash", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("deepseek-v4-flash", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ("deepseek-v4-flash", {"o_groups": 7}, "64 heads do not make 7 groups"),
        ("deepseek-v4-flash", {"partial_rotary_factor": 0.5}, "its RoPE"),
    ),
)
# fmt: on


def quantised(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """As a release holds them (see `stored`), and the values that its codes stand for."""
    import vendor  # which imports the families

    out: Tensors = {}
    values = dict(tensors)
    for name, t in tensors.items():
        kinds = stored(name, Tensor("F32", tuple(t.shape)))
        scale = name.removesuffix("weight") + "scale"
        if scale not in kinds:
            out[name] = t
            continue
        if kinds[name].dtype == "I8":
            blocks, exponents = vendor.mxfp4(t)
            out[name] = blocks.flatten(-2).view(torch.int8)
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
            pairs = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()  # the low half first
            values[name] = (table[pairs] * 2.0 ** (exponents.float()[..., None] - 127)).flatten(-2)
        else:
            codes, scales = vendor.fp8_block(t, (128, 128))
            exponents = (scales.log2().ceil() + 127).to(torch.uint8)
            power = 2.0 ** (exponents.float() - 127)
            spread = power.repeat_interleave(128, 0)[: len(t)].repeat_interleave(128, 1)[:, : t.shape[1]]
            out[name] = (t / spread).to(torch.float8_e4m3fn)
            values[name] = out[name].float() * spread
        assert (tuple(out[name].shape), tuple(exponents.shape)) == (kinds[name].shape, kinds[scale].shape)
        out[scale] = exponents.view(torch.float8_e8m0fnu)
    return out, values


@pytest.mark.proof
def test_the_listed_tensors_of_flash_are_as_many_and_as_large_as_its_index_says() -> None:
    """https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash/resolve/main/model.safetensors.index.json: its `weight_map` has 69,187
    names, and `total_size` is 159,609,485,896."""
    tensors = names.released_tensors(CASE, full_size.read("deepseek-v4-flash"), mtp=1, quantised=True)
    assert (len(tensors), sum(t.nbytes for t in tensors.values())) == (69_187, 159_609_485_896)


@pytest.mark.proof
def test_a_quantised_release_is_carried_as_bytes_verified_streamed_and_exported_to_the_byte(
    tmp_path: Path,
) -> None:
    """Widths of 32 for fp4, and of more than one block of 128 for e4m3."""
    import vendor  # which imports the families

    variant = CASE.variants[0]
    settings = variant.text | {"hidden_size": 160, "moe_intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"layer_types": [SLIDING, CSA], "mlp_layer_types": ["hash_moe", "moe"]}
    path = build.make(CASE, variant.with_text(settings), tmp_path / "release", released_config=True)
    coded, values = quantised(read_tensors(path))
    write_config(tmp_path / "release", read_config(path) | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}})  # fmt: skip
    write_tensors(path, coded)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_config(plain, {k: v for k, v in read_config(path).items() if k != "quantization_config"})
    write_tensors(plain, values)
    vendor.same(
        vendor.canonical(path, tmp_path / "fp32", dtype="fp32"),
        vendor.canonical(plain, tmp_path / "want", dtype="fp32"),
    )
    plan = make_plan(open_checkpoint(path))
    assert {how for name, how in plan.quant.items() if ".moe.gate_up" in name or ".moe.down" in name} == {
        "mxfp4-bytes"
    }
    assert {how for name, how in plan.quant.items() if ".attn." in name} == {"fp8-block"}
    carried = zoo.convert(path, tmp_path / "carried")
    ids = build.tokens(variant)
    exact = zoo.load(tmp_path / "fp32")(ids)
    assert (zoo.load(carried, dtype=torch.float32)(ids) - exact).abs().max() < 2e-5
    assert (build.logits(build.upstream(CASE, plain), ids) - exact).abs().max() < 5e-5
    for stream in (False, True):  # against upstream's own reading of the codes
        assert zoo.verify(carried, level="logits", stream=stream, write=False).passed
    export(carried, tmp_path / "back")
    for file in path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_table_that_names_experts_beyond_those_there_are_is_refused(tmp_path: Path) -> None:
    path = build.make(CASE, CASE.variants[0], tmp_path / "release")
    tensors = read_tensors(path)
    tensors["layers.0.ffn.gate.tid2eid"][7, 1] = 5
    write_tensors(path, tensors)
    with pytest.raises(ZooError, match=r"router\.table names experts 0 to 5; expected 0 to 4"):
        zoo.load(zoo.convert(path, tmp_path / "canonical"))


def test_what_transformers_saves_and_holds_in_memory_is_the_same_model(tmp_path: Path) -> None:
    import vendor  # which imports the families

    variant = CASE.variants[0]
    released = build.make(CASE, variant, tmp_path / "released")
    saved = build.make(CASE, replace(variant, release=None), tmp_path / "saved")
    assert "model.layers.1.attn.norm.weight" in read_tensors(saved)
    held = tmp_path / "held"
    held.mkdir()
    write_config(held, read_config(saved))
    torch.save(build.perturbed(variant).state_dict(), held / "pytorch_model.bin")
    want = vendor.canonical(released, tmp_path / "a")
    vendor.same(vendor.canonical(saved, tmp_path / "b"), want)
    vendor.same(vendor.canonical(held, tmp_path / "c"), want)
