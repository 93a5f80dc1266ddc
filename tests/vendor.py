"""Checkpoints as vendors publish them, made from one in Hugging Face's layout: the same weights, other files.

Each `to_*` takes a folder that `tiny.make` wrote and writes another. They are written from the vendors' own
loaders (named at each), not from zoo's rules, so that the two can disagree.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

from zoo.testing.build import read_config, read_tensors

Tensors = dict[str, torch.Tensor]


@contextmanager
def variant(name: str, like: str, **settings: Any) -> Iterator[str]:
    """A tiny variant `like` another but for some settings of its language model, for as long as needed."""
    changed = tiny.VARIANTS[like].with_text(tiny.VARIANTS[like].text | settings)
    tiny.VARIANTS[name] = changed
    try:
        yield name
    finally:
        del tiny.VARIANTS[name]


def make(dst: Path, like: str, dtype: str = "float32", **settings: Any) -> Path:
    with variant(f"{like}_here", like, **settings) as name:
        return tiny.make(name, dst, dtype=dtype)


def canonical(path: Path, dst: Path, dtype: str | None = None, **kw: Any) -> Tensors:
    """Convert, and read all tensors of the result, extras left out."""
    from zoo.formats import open_checkpoint
    from zoo.mapping.execute import convert
    from zoo.mapping.plan import make_plan

    convert(make_plan(open_checkpoint(path), dtype=dtype), dst, **kw)
    return {k: t for file in sorted(dst.glob("model*.safetensors")) for k, t in load_file(file).items()}


def same(a: Tensors, b: Tensors) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


# --- pickles ------------------------------------------------------------------------------------------------


def to_pickle(src: Path, dst: Path, shards: int = 1, zipped: bool = True) -> Path:
    """`pytorch_model.bin`, or shards with an index."""
    dst.mkdir(parents=True)
    shutil.copy(src / "config.json", dst)
    tensors = read_tensors(src)
    names = sorted(tensors)
    files = {
        "pytorch_model.bin" if shards == 1 else f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin": names[
            n::shards
        ]
        for n in range(shards)
    }
    for file, mine in files.items():
        state = {k: tensors[k] for k in mine}
        torch.save(state, dst / file, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        weight_map = {k: file for file, mine in files.items() for k in mine}
        (dst / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return dst


# --- Meta ---------------------------------------------------------------------------------------------------


def interleave(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of each head from half-split to interleaved RoPE order. Inverse of what Hugging Face's converters
    do with Meta's and Mistral's q and k."""
    return w.view(n_heads, 2, w.shape[0] // n_heads // 2, -1).transpose(1, 2).reshape(w.shape)


_META = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def _meta_name(name: str, embed_axis: int) -> tuple[str, int | None]:
    top = {
        "model.embed_tokens": ("tok_embeddings", embed_axis),
        "model.norm": ("norm", None),
        "lm_head": ("output", 0),
    }
    module = name.removesuffix(".weight")
    if m := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        new, axis = _META[m[2]]
        return f"layers.{m[1]}.{new}.weight", axis
    new, axis = top[module]
    return f"{new}.weight", axis


def to_meta(src: Path, dst: Path, n_ranks: int, params: dict[str, Any], embed_axis: int = 1) -> Path:
    """Llama 2 (embedding cut by columns) and 3 (by rows): llama_models/llama3/model.py and fairscale's layers."""
    dst.mkdir(parents=True)
    config = read_config(src)
    ranks: list[Tensors] = [{} for _ in range(n_ranks)]
    for name, t in read_tensors(src).items():
        new, axis = _meta_name(name, embed_axis)
        if "attention.wq" in new:
            t = interleave(t, config["num_attention_heads"])
        elif "attention.wk" in new:
            t = interleave(t, config["num_key_value_heads"])
        for rank, piece in zip(ranks, [t] * n_ranks if axis is None else t.chunk(n_ranks, axis), strict=True):
            rank[new] = piece.contiguous()
    for r, rank in enumerate(ranks):
        rank["rope.freqs"] = torch.ones(4)
        torch.save(rank, dst / f"consolidated.{r:02d}.pth")
    (dst / "params.json").write_text(json.dumps(params))
    return dst


def to_meta_llama4(src: Path, dst: Path, n_ranks: int, params: dict[str, Any]) -> Path:
    """llama_models/llama4: model.py, moe.py and ffn.py (their load hooks name what the released files hold).
    Rows of q and k stay as they are: both run interleaved RoPE."""
    dst.mkdir(parents=True)
    tensors = read_tensors(src)
    ranks: list[Tensors] = [{} for _ in range(n_ranks)]

    def put(name: str, pieces: list[torch.Tensor]) -> None:
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = piece.contiguous()

    def cut(*names: str, axis: int) -> list[torch.Tensor]:
        """Of each rank: its slices of these tensors, one after the other."""
        chunks = [tensors[n].chunk(n_ranks, axis) for n in names]
        return [torch.cat([c[r] for c in chunks]) for r in range(n_ranks)]

    put("tok_embeddings.weight", cut("model.embed_tokens.weight", axis=0))
    put("output.weight", cut("lm_head.weight", axis=0))
    put("norm.weight", [tensors["model.norm.weight"]] * n_ranks)
    for i in range(read_config(src)["num_hidden_layers"]):
        a, b = f"model.layers.{i}.", f"layers.{i}."
        qkv = [f"{a}self_attn.{x}_proj.weight" for x in "qkv"]
        put(b + "attention.wqkv.weight", cut(*qkv, axis=0))
        put(b + "attention.wqkv.layer_norm_weight", [tensors[a + "input_layernorm.weight"]] * n_ranks)
        put(b + "attention.wo.weight", cut(a + "self_attn.o_proj.weight", axis=1))
        f = a + "feed_forward."
        norm = [tensors[a + "post_attention_layernorm.weight"]] * n_ranks
        if f + "router.weight" not in tensors:
            put(b + "feed_forward.mlp.layer_norm_weight", norm)
            put(b + "feed_forward.mlp.fc1_weight", cut(f + "gate_proj.weight", f + "up_proj.weight", axis=0))
            put(b + "feed_forward.mlp.fc2_weight", cut(f + "down_proj.weight", axis=1))
            continue
        put(b + "feed_forward.norm.weight", norm)
        put(b + "feed_forward.router_DE", [tensors[f + "router.weight"].T] * n_ranks)
        gate, up = tensors[f + "experts.gate_up_proj"].chunk(2, -1)  # [E, D, F]
        down = tensors[f + "experts.down_proj"]  # [E, F, D]
        put(b + "feed_forward.experts.moe_w_in_eD_F", [x.flatten(0, 1) for x in gate.chunk(n_ranks, 2)])
        put(b + "feed_forward.experts.moe_w_swiglu_eD_F", [x.flatten(0, 1) for x in up.chunk(n_ranks, 2)])
        put(b + "feed_forward.experts.moe_w_out_eF_D", [x.flatten(0, 1) for x in down.chunk(n_ranks, 1)])
        put(b + "feed_forward.w_in_shared_FD.weight", cut(f + "shared_expert.gate_proj.weight", axis=0))
        put(b + "feed_forward.w_swiglu_FD.weight", cut(f + "shared_expert.up_proj.weight", axis=0))
        put(b + "feed_forward.w_out_shared_DF.weight", cut(f + "shared_expert.down_proj.weight", axis=1))
    for r, rank in enumerate(ranks):
        torch.save(rank, dst / f"consolidated.{r:02d}.pth")
    (dst / "params.json").write_text(json.dumps(params))
    return dst


# --- Mistral ------------------------------------------------------------------------------------------------


def _mixtral_name(name: str) -> str | None:
    """Mixtral's gate and experts, as mistral-inference's MoeLayer calls them."""
    if m := re.fullmatch(
        r"model\.layers\.(\d+)\.block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight", name
    ):
        return f"layers.{m[1]}.feed_forward.{m[2]}.weight"
    return None


def to_mistral(src: Path, dst: Path, fp8: bool = False) -> Path:
    """The dense models and Mixtral in Mistral's own format. Inverse of transformers' convert_ministral3_weights_to_hf.py.
    With `fp8`, linear layers are quantised as Mistral does: one scale per weight, one for its input."""
    dst.mkdir(parents=True)
    config = read_config(src)
    config = config.get("text_config", config)
    out: Tensors = {}
    for name, t in read_tensors(src).items():
        name = name.removeprefix("language_model.")
        if not name.startswith(("model.layers", "model.embed", "model.norm", "lm_head")):
            continue
        new = _mixtral_name(name) or _meta_name(name, 0)[0]
        if "attention.wq" in new:
            t = interleave(t, config["num_attention_heads"])
        elif "attention.wk" in new:
            t = interleave(t, config["num_key_value_heads"])
        if fp8 and t.ndim == 2 and new.startswith("layers."):
            t, scale = fp8_tensor(t)
            out[new.removesuffix("weight") + "qscale_weight"] = scale
            out[new.removesuffix("weight") + "qscale_act"] = torch.tensor(0.01)
        out[new] = t.contiguous()
    if "num_local_experts" not in config:
        out["vision_encoder.ln_pre.weight"] = torch.ones(3)
    save_file(out, dst / "consolidated.safetensors")
    (dst / "params.json").write_text(json.dumps(mistral_params(config)))
    return dst


def mistral_params(c: dict[str, Any]) -> dict[str, Any]:
    rope = c["rope_parameters"]
    out = {
        "dim": c["hidden_size"],
        "n_layers": c["num_hidden_layers"],
        "head_dim": c["head_dim"],
        "hidden_dim": c["intermediate_size"],
        "n_heads": c["num_attention_heads"],
        "n_kv_heads": c["num_key_value_heads"],
        "rope_theta": rope["rope_theta"],
        "norm_eps": c["rms_norm_eps"],
        "vocab_size": c["vocab_size"],
        "max_position_embeddings": c["max_position_embeddings"],
        "tied_embeddings": c["tie_word_embeddings"],
    }
    if "num_local_experts" in c:
        out["moe"] = {"num_experts": c["num_local_experts"], "num_experts_per_tok": c["num_experts_per_tok"]}
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        out["yarn"] = {
            "original_max_position_embeddings": original,
            "factor": rope["factor"],
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
            "apply_scale": rope.get("mscale_all_dim") != rope.get("mscale"),
        }
        out["llama_4_scaling"] = {
            "original_max_position_embeddings": original,
            "beta": rope["llama_4_scaling_beta"],
        }
    return out


# --- quantisers: as coarse as they are short -----------------------------------------------------------------

FP8_MAX = 448.0


def fp8_tensor(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = w.float().abs().max() / FP8_MAX
    return (w.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_channel(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = w.float().abs().amax(-1, keepdim=True) / FP8_MAX
    return (w.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_block(w: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and scales [ceil(rows / block), ceil(columns / block)]."""
    rows, columns = w.shape
    br, bc = block
    nr, nc = -(-rows // br), -(-columns // bc)
    padded = torch.zeros(nr * br, nc * bc)
    padded[:rows, :columns] = w.float()
    scale = padded.view(nr, br, nc, bc).abs().amax((1, 3)) / FP8_MAX  # [nr, nc]
    spread = scale.repeat_interleave(br, 0)[:rows].repeat_interleave(bc, 1)[:, :columns]
    return (w.float() / spread).to(torch.float8_e4m3fn), scale


def mxfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [..., out, in / 32, 16] and scales [..., out, in / 32] of a weight [..., out, in]."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = w.float().unflatten(-1, (-1, 32))
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1) / 6)).clamp(-120, 120)
    scaled = groups / 2 ** exponent[..., None]
    code = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8), (exponent + 127).to(torch.uint8)


def int4(w: torch.Tensor, group: int = 32, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """weight_packed, weight_scale and weight_shape of compressed-tensors' pack-quantized."""
    rows, columns = w.shape
    groups = w.float().view(rows, -1, group)
    scale = (groups.abs().amax(-1) / 7.5).to(dtype)  # [rows, columns / group]
    code = (groups / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int32).view(rows, columns) + 8
    shifts = 4 * torch.arange(8)
    packed = (code.view(rows, -1, 8).long() << shifts).sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
