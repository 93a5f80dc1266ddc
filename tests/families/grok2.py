"""Grok 2, which upstream cannot run, against a second implementation, written here from sglang's grok.py (no other runs on a CPU).

This holds our decoder and rules to that reading of the source; it does not show that the reading is right.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from zoo import families
from zoo.formats import open_checkpoint
from zoo.formats.base import Checkpoint
from zoo.layout import total_params
from zoo.mapping.execute import convert
from zoo.mapping.export import export
from zoo.mapping.plan import make_plan
from zoo.model import Decoder, load
from zoo.testing import FamilyCase, full_size
from zoo.testing.assemble import assemble

CASE = FamilyCase(
    "grok2",
    without_upstream="transformers has no class of it; sglang's grok.py, read once more for this test, stands for it",
    refused=(
        ("grok-2", {"rope_type": "yarn"}, "rope_type is 'yarn'"),
        ("grok-2", {"residual_moe": False}, "residual_moe is False"),
        ("grok-2", {"sliding_window_size": 4096}, "sliding_window_size is 4096"),
    ),
)

CONFIG: dict[str, Any] = {
    "architectures": ["Grok1ForCausalLM"], "model_type": "git", "torch_dtype": "float32",
    "embedding_multiplier_scale": 7.3, "output_multiplier_scale": 0.6, "vocab_size": 131, "hidden_size": 36,
    "intermediate_size": 44, "moe_intermediate_size": 48, "max_position_embeddings": 480,
    "num_experts_per_tok": 2, "num_local_experts": 5, "residual_moe": True, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "head_dim": 10, "rms_norm_eps": 0.02,
    "final_logit_softcapping": 9, "attn_logit_softcapping": 2.5, "router_logit_softcapping": 1.5,
    "rope_theta": 613, "attn_temperature_len": 7, "sliding_window_size": -1, "global_attn_every_n": 1,
    "rope_type": "original", "original_max_position_embeddings": 64, "scaling_factor": 16.0,
    "extrapolation_factor": 1.0, "attn_factor": 1.0, "beta_fast": 8, "beta_slow": 1,
}  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    c, g = CONFIG, torch.Generator().manual_seed(11)
    d, v, e = c["hidden_size"], c["vocab_size"], c["num_local_experts"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,),
    }  # fmt: skip
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {f"{p}{n}_norm.weight": (d,) for n in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
        shapes |= {f"{p}self_attn.{n}_proj.weight": (s, d) for n, s in (("q", q), ("k", kv), ("v", kv))}
        shapes[f"{p}self_attn.o_proj.weight"] = (d, q)
        shapes[f"{p}block_sparse_moe.gate.weight"] = (e, d)
        mlps = [(p + "mlp.", ("gate_proj", "up_proj", "down_proj"), c["intermediate_size"])]
        mlps += [
            (f"{p}block_sparse_moe.experts.{k}.", ("w1", "w3", "w2"), c["moe_intermediate_size"])
            for k in range(e)
        ]
        for base, (gate, up, down), f in mlps:
            shapes |= {f"{base}{n}.weight": s for n, s in ((gate, (f, d)), (up, (f, d)), (down, (d, f)))}
    out = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        out[name] = 1 + 0.3 * noise if "norm" in name else noise * 1.5 / math.sqrt(shape[-1])
    return out


def second_implementation(t: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence, position by position and head by head."""
    c = CONFIG

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * t[name]

    def mlp(x: torch.Tensor, base: str, gate: str, up: str, down: str) -> torch.Tensor:
        hidden = F.gelu(t[f"{base}.{gate}.weight"] @ x, approximate="tanh") * (t[f"{base}.{up}.weight"] @ x)
        return t[f"{base}.{down}.weight"] @ hidden

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        half = len(x) // 2
        angle = position * c["rope_theta"] ** (-torch.arange(half) / half)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    x = t["model.embed_tokens.weight"][ids] * c["embedding_multiplier_scale"]
    h, group, hd = (
        c["num_attention_heads"],
        c["num_attention_heads"] // c["num_key_value_heads"],
        c["head_dim"],
    )
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = norm(x, p + "pre_attn_norm.weight")
        q, k, v = ((y @ t[f"{p}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, hd)) for n in "qkv")
        heads = torch.zeros(len(ids), h, hd)
        for pos in range(len(ids)):
            for head in range(h):
                query = rotated(q[pos, head], pos)
                keys = torch.stack([rotated(k[j, head // group], j) for j in range(pos + 1)])
                s = keys @ query * hd**-0.5
                s = c["attn_logit_softcapping"] * torch.tanh(s / c["attn_logit_softcapping"])
                if pos > c["attn_temperature_len"]:
                    s = s * math.log2(pos) / math.log2(c["attn_temperature_len"])
                heads[pos, head] = s.softmax(0) @ v[: pos + 1, head // group]
        x = x + norm(heads.flatten(1) @ t[p + "self_attn.o_proj.weight"].T, p + "post_attn_norm.weight")

        y = norm(x, p + "pre_moe_norm.weight")
        out = torch.zeros_like(y)
        for pos in range(len(ids)):
            cap = c["router_logit_softcapping"]
            scores = (cap * torch.tanh(t[p + "block_sparse_moe.gate.weight"] @ y[pos] / cap)).softmax(0)
            out[pos] = mlp(y[pos], p + "mlp", "gate_proj", "up_proj", "down_proj")
            for expert in scores.topk(c["num_experts_per_tok"]).indices.tolist():
                base = f"{p}block_sparse_moe.experts.{expert}"
                out[pos] += scores[expert] * mlp(y[pos], base, "w1", "w3", "w2")
        x = x + norm(out / math.sqrt(2), p + "post_moe_norm.weight")
    logits = norm(x, "model.norm.weight") @ t["lm_head.weight"].T * c["output_multiplier_scale"]
    return c["final_logit_softcapping"] * torch.tanh(logits / c["final_logit_softcapping"])


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(131, (23,), generator=torch.Generator().manual_seed(3))


def logits(ckpt: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    plan = make_plan(ckpt)
    model = Decoder(plan.spec)
    model.load_state_dict(assemble(ckpt, plan), assign=True)
    return model(ids[None])[0]


def test_logits_are_those_of_the_second_implementation(ids: torch.Tensor, tmp_path: Path) -> None:
    tensors = weights()
    ours = logits(open_checkpoint(checkpoint(tmp_path / "grok", tensors)), ids)
    theirs = second_implementation(tensors, ids)
    assert theirs.std() > 0.5
    assert float((ours - theirs).abs().max()) <= 5e-5


@pytest.mark.parametrize(
    "changed",
    [
        "embedding_multiplier_scale", "output_multiplier_scale", "final_logit_softcapping", "rope_theta",
        "attn_logit_softcapping", "router_logit_softcapping", "attn_temperature_len", "rms_norm_eps",
    ],
)  # fmt: skip
def test_every_constant_of_the_config_is_read(changed: str, ids: torch.Tensor, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "grok", weights())
    before = logits(open_checkpoint(folder), ids)
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, changed: CONFIG[changed] * 2}), encoding="utf-8"
    )
    assert float((logits(open_checkpoint(folder), ids) - before).abs().max()) > 1e-3


def cut_for_ranks(folder: Path, tensors: dict[str, torch.Tensor], n: int) -> Path:
    """As released: experts once per rank (w1 and w3 by rows, w2 by columns), everything else in common files."""
    folder.mkdir()
    whole = {k: t for k, t in tensors.items() if ".experts." not in k}
    save_file(whole, folder / "pytorch_model-00000-TP-common.safetensors")
    for r in range(n):
        mine = {
            k: t.chunk(n, dim=1 if ".w2." in k else 0)[r].contiguous()
            for k, t in tensors.items()
            if ".experts." in k
        }
        save_file(mine, folder / f"pytorch_model-00001-TP-{r:03d}.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def test_files_cut_for_ranks_are_joined_and_given_back_to_the_byte(ids: torch.Tensor, tmp_path: Path) -> None:
    tensors = weights()
    released = cut_for_ranks(tmp_path / "released", tensors, 4)
    canonical = convert(make_plan(open_checkpoint(released)), tmp_path / "canonical")
    ours = load(canonical)(ids[None])[0]
    assert float((ours - second_implementation(tensors, ids)).abs().max()) <= 5e-5
    again = export(canonical, tmp_path / "again")
    assert {f.name: f.read_bytes() for f in released.iterdir()} == {
        f.name: f.read_bytes() for f in again.iterdir()
    }


# --- the release ------------------------------------------------------------------------------------------


def released(tensor_lists: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors in the release's files: experts once per rank, cut by rows (w1, w3) and columns (w2)."""
    listed = json.loads((tensor_lists / "grok-2.tensors.json").read_text(encoding="utf-8"))["patterns"]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for pattern, (dtype, shape) in listed.items():
        for name in full_size.expand(pattern):
            if ".experts." not in name:
                tensors[name] = (dtype, tuple(shape))
                continue
            rows, columns = shape
            piece = (rows, columns // 8) if ".w2." in name else (rows // 8, columns)
            tensors |= {f"rank{r}.{name}": (dtype, piece) for r in range(8)}
    return tensors


def test_it_is_put_together_from_its_eight_ranks() -> None:
    tensors = released(Path(__file__).parents[1] / "data" / "tensors")
    full_size.account(full_size.read("grok-2"), full_size.refs(tensors), n_ranks=8)


def test_it_has_the_parameters_that_were_counted_in_its_files() -> None:
    assert total_params(families.spec_of(full_size.read("grok-2"))) == 269_515_497_472
