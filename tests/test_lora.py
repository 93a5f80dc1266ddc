"""A PEFT adapter out of two folders: what was merged comes out again, peft computes with it what the tuned model computes, and what an
adapter cannot hold is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import verified
from click.testing import CliRunner
from safetensors.torch import load_file
from test_merge import adapter, canonical, lora, released
from test_save import held

import zoo
from zoo.cli import cli
from zoo.errors import ZooError
from zoo.mapping import lora as extraction

EPS = torch.finfo(torch.float32).eps
LOGITS = 5e-5
"""What `zoo verify` allows of logits in fp32 at least."""


def tuned(name: str, dst: Path, **also: Any) -> Path:
    """The variant with an adapter of rank 3 merged into three kinds of its matrices, and with tensors that it holds whole."""
    parts, old = {}, released(name)
    matrices = [k for k in old if k.endswith(("q_proj.weight", "down_proj.weight", "o_proj.weight"))]
    for i, key in enumerate(matrices):
        a, b = lora(old[key], 3, i)
        module = key.removesuffix(".weight")
        parts |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return zoo.merge(verified.canonical(name), adapter(dst / "first", parts | also), dst / "tuned")


def close(
    made: dict[str, torch.Tensor], target: dict[str, torch.Tensor], base: dict[str, torch.Tensor]
) -> None:
    """TUNED is BASE + BA rounded once, so their difference is BA + E with |E| <= eps/2 |TUNED|. What the best product of rank r
    leaves of it has no greater norm than E (Eckart and Young); an SVD in fp32, and B A, lose some eps |BA| more."""
    assert made.keys() == target.keys()
    for key, t in target.items():
        bound = EPS * (t.norm() + 16 * (t - base[key]).norm())
        assert (made[key] - t).abs().max() <= bound, key
        if torch.equal(t, base[key]):
            assert torch.equal(made[key], t), f"{key} was not touched"


def test_what_was_merged_comes_out_and_peft_computes_with_it_what_the_tuned_model_does(
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    old = released("llama_bias")
    norm, bias = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"
    also = {k: old[k] + 0.25 for k in (norm, bias, "model.embed_tokens.weight", "model.norm.weight")}
    base, new = canonical("llama_bias", "float32"), tuned("llama_bias", tmp_path, **also)
    done = CliRunner().invoke(
        cli, ["lora", str(base), str(new), str(tmp_path / "out"), "--rank", "3", "--json"]
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    layers = zoo.spec(base).n_layers
    assert len(said["kept"]) == 3 * layers and said["worst"]["kept"] > 1 - 1e-6
    assert sorted(said["whole"]) == sorted([norm[:-7], bias, "model.embed_tokens", "model.norm"])
    close(held(zoo.merge(base, tmp_path / "out", tmp_path / "again")), held(new), held(base))

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj"] and config["bias"] == "all"
    model = tiny.upstream(verified.ROOT / "llama_bias-float32-source")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    assert set(config) <= set(theirs.peft_config["default"].to_dict())
    ids = tiny.tokens("llama_bias")
    with torch.no_grad():
        logits = zoo.load(new)(ids)
        assert (theirs(ids).logits - logits).abs().max() <= LOGITS
        assert (zoo.load(base)(ids) - logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["gpt_oss", "gpt2", *(pytest.param(n, marks=pytest.mark.proof) for n in ("phi3", "falcon", "qwen3_moe", "gemma3n"))]
)  # fmt: skip
def test_fused_turned_and_packed_weights_come_out_under_transformers_names(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = verified.canonical(name)
    names = {f"{x}.weight" for x in ("attn.qkv", "attn.out", "mlp.down", "moe.gate_up", "moe.down")}
    g = torch.Generator().manual_seed(0)
    state = held(base)
    for key, t in state.items():
        if key.startswith("layers.0.") and key.split(".", 2)[2] in names:
            *e, n, m = t.shape
            state[key] = t + torch.randn(*e, n, 2, generator=g) @ torch.randn(*e, 2, m, generator=g) / 8
    new = zoo.save(state, base, tmp_path / "tuned")
    done = extraction.extract(base, new, tmp_path / "out", rank=2)
    assert done.kept and done.worst is not None and done.worst[1] > 1 - 1e-6 and not done.whole
    close(held(zoo.merge(base, done.path, tmp_path / "again")), held(new), held(base))
    theirs = peft.PeftModel.from_pretrained(
        tiny.upstream(verified.ROOT / f"{name}-float32-source"), done.path
    )
    ids = tiny.tokens(name)
    with torch.no_grad():
        assert (theirs(ids).logits - zoo.load(new)(ids)).abs().max() <= LOGITS


def test_the_energy_kept_is_that_of_the_largest_singular_values_either_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    d = torch.randn(90, 60, generator=g)
    s = torch.linalg.svdvals(d.double())
    for exact, within in ((1024, 1e-6), (8, 5e-3)):
        monkeypatch.setattr(extraction, "EXACT", exact)
        a, b, kept = extraction.lowered(d, 5)
        assert (a.shape, b.shape) == ((5, 60), (90, 5))
        best = float((s[:5] ** 2).sum() / (s**2).sum())
        assert best - within <= kept <= best + 1e-6
        assert kept == pytest.approx(1 - float((d - b @ a).norm() ** 2 / d.norm() ** 2), abs=1e-5)
    a, b, kept = extraction.lowered(d, 100)
    assert len(a) == 60 and kept > 1 - 1e-9


def test_what_an_adapter_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    base = verified.canonical("llama_tied")

    def refused(new: Path, old: Path = base) -> str:
        with pytest.raises(ZooError) as e:
            extraction.extract(old, new, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
        return str(e.value)

    state = held(base)
    state["embed.weight"] = state["embed.weight"] + 1
    assert "model.embed_tokens.weight (it is the head, too: tied)" in refused(
        zoo.save(state, base, tmp_path / "a")
    )
    assert "has the values of" in refused(zoo.save(held(base), base, tmp_path / "b"))
    assert "is of another architecture" in refused(verified.canonical("llama"))
    llama = verified.canonical("llama")
    state = {k: t + 1 if k == "norm.weight" else t for k, t in held(llama).items()}
    assert "in model.norm alone" in refused(zoo.save(state, llama, tmp_path / "c"), llama)
    gpt_oss = verified.canonical("gpt_oss")
    state = {k: t + 1 if k.endswith("sinks") else t for k, t in held(gpt_oss).items()}
    assert "self_attn.sinks (a parameter" in refused(zoo.save(state, gpt_oss, tmp_path / "d"), gpt_oss)


def test_an_adapter_is_replaced_with_force_and_a_folder_of_others_is_not(tmp_path: Path) -> None:
    base, new = verified.canonical("llama"), tuned("llama", tmp_path)
    first = extraction.extract(base, new, tmp_path / "out", rank=1)
    assert first.worst is not None and first.worst[1] < 0.9, "three directions do not fit into one"
    with pytest.raises(ZooError, match="exists already"):
        extraction.extract(base, new, tmp_path / "out")
    extraction.extract(base, new, tmp_path / "out", rank=64, force=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    small = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert all(
        len(small[f"base_model.model.{m}.lora_A.weight"]) == r < 64 for m, r in config["rank_pattern"].items()
    )
    close(held(zoo.merge(base, tmp_path / "out", tmp_path / "again")), held(new), held(base))
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(ZooError, match="holds what zoo did not write"):
        extraction.extract(base, new, tmp_path / "out", force=True)
