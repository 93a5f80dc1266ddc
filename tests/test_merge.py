"""PEFT adapters merged into a canonical folder: peft's own result, but for one rounding; and the formulas, written out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import verified
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_quant_models import fp8_blocks, quantised
from test_save import held, inspected

import zoo
from zoo.cli import cli
from zoo.errors import ZooError
from zoo.mapping.merge import OTHERWISE as OTHERWISE_MERGED
from zoo.mapping.merge import READ

Tensors = dict[str, torch.Tensor]
BASE = "base_model.model."


def adapter(dst: Path, tensors: Tensors, **config: Any) -> Path:
    dst.mkdir(exist_ok=True)
    told = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "some/model"} | config
    (dst / "adapter_config.json").write_text(json.dumps(told))
    save_file({BASE + k: t.contiguous() for k, t in tensors.items()}, dst / "adapter_model.safetensors")
    return dst


def canonical(name: str, dtype: str) -> Path:
    return verified.canonical(name) if dtype == "float32" else verified.canonical(name, dtype)


def released(name: str, dtype: str = "float32") -> Tensors:
    canonical(name, dtype)
    files = (verified.ROOT / f"{name}-{dtype}-source").glob("*.safetensors")
    return {k: t for f in files for k, t in load_file(f).items()}


def lora(w: torch.Tensor, r: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, w.shape[1], generator=g) / 4, torch.randn(w.shape[0], r, generator=g) / 4


def merged(name: str, folder: Path, dst: Path, dtype: str = "float32") -> Tensors:
    """The release's tensors after the merge."""
    new = zoo.merge(canonical(name, dtype), folder, dst / "canon")
    back = zoo.export(new, dst / "hf")
    return {k: t for f in back.glob("*.safetensors") for k, t in load_file(f).items()}


def refused(folder: Path, tmp_path: Path, like: Path | None = None) -> str:
    with pytest.raises(ZooError) as e:
        zoo.merge(like or verified.canonical("llama"), folder, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))
    return str(e.value)


def test_the_formulas_written_out(tmp_path: Path) -> None:
    """LoRA with patterns and rsLoRA, DoRA, a whole module, an embedding; in bf16, rounded once. The rest is the same bytes."""
    old, name = released("llama", "bfloat16"), "model.layers.{}.self_attn.{}_proj.weight"
    q, k, down = name.format(0, "q"), name.format(2, "k"), "model.layers.1.mlp.down_proj.weight"
    embed, head = "model.embed_tokens.weight", torch.randn_like(old["lm_head.weight"])
    made, parts = {}, {"lm_head.weight": head}
    for i, (key, r, s) in enumerate(
        ((q, 3, 6 / math.sqrt(3)), (k, 5, 40 / math.sqrt(5)), (down, 3, 6 / math.sqrt(3)))
    ):
        a, b = lora(old[key], r, i)
        module = key.removesuffix(".weight")
        parts |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        made[key] = old[key].float() + s * (b @ a)
    m = torch.rand(len(old[down])) + 0.5
    parts["model.layers.1.mlp.down_proj.lora_magnitude_vector"] = m
    made[down] *= (m / made[down].norm(dim=1))[:, None]
    a, b = lora(old[embed].T, seed=9)  # of a table [tokens, d]: A [r, tokens], B [d, r]
    parts |= {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    made[embed] = old[embed].float() + 6 / math.sqrt(3) * (b @ a).T
    folder = adapter(
        tmp_path / "adapter", parts, use_rslora=True, alpha_pattern={r"layers\.2\.self_attn\.k_proj": 40}, rank_pattern={"k_proj": 5}
    )  # fmt: skip
    new = merged("llama", folder, tmp_path, "bfloat16")
    assert new.keys() == old.keys()
    for key, t in new.items():
        expected = made.get(key, head if key == "lm_head.weight" else old[key])
        torch.testing.assert_close(t, expected.bfloat16(), rtol=2**-8, atol=1e-7, msg=key)
        assert key in made or torch.equal(t, expected.bfloat16()), key
    values = inspected(tmp_path / "canon")["values"]
    assert "zoo merge, of an adapter; from " in values and f"adapter {folder}" in values


def test_experts_that_are_packed_have_their_ranks_apart(tmp_path: Path) -> None:
    """PEFT's target_parameters: one A of all experts' ranks, one B whose columns are by rank and then by expert; two
    parameters of a module are nested and told apart by their shapes."""
    canon = verified.canonical("qwen3_moe")
    old = held(canon)
    up, down = (old[f"layers.0.moe.{n}.weight"] for n in ("gate_up", "down"))
    (E, _, _), module, parts, made = up.shape, "model.layers.0.mlp.experts", {}, {}
    for name, w, nested in (("gate_up", up, ".base_layer"), ("down", down, "")):
        a, b = torch.randn(E * 3, w.shape[2]) / 4, torch.randn(w.shape[1], 3 * E) / 4
        parts |= {f"{module}{nested}.lora_A.weight": a, f"{module}{nested}.lora_B.weight": b}
        delta = torch.einsum("ore,eri->eoi", b.view(-1, 3, E), a.view(E, 3, -1))
        made[f"layers.0.moe.{name}.weight"] = w + 2 * delta
    new = held(zoo.merge(canon, adapter(tmp_path / "adapter", parts), tmp_path / "canon"))
    for key, t in new.items():
        torch.testing.assert_close(t, made.get(key, old[key]), rtol=1e-5, atol=1e-5)
        assert (key in made) != torch.equal(t, old[key]), key


def test_what_is_not_merged_here_is_refused_by_name(tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj"
    a, b = lora(released("llama")[f"{q}.weight"])
    good = {f"{q}.lora_A.weight": a, f"{q}.lora_B.weight": b}

    def said(tensors: Tensors = good, like: Path | None = None, **config: Any) -> str:
        return refused(adapter(tmp_path / "adapter", tensors, **config), tmp_path, like)

    assert "a LOHA adapter; LoRA, rsLoRA and DoRA are merged here" in said(peft_type="LOHA")
    assert "init_lora_weights is 'pissa_niter_4'" in said(init_lora_weights="pissa_niter_4")
    assert "use_qalora is True" in said(use_qalora=True)
    assert "only one of lora_A and lora_B" in said({f"{q}.lora_A.weight": a})
    other = {k.replace("q_proj", "query"): t for k, t in good.items()}
    text = said(other)
    assert (
        "1 of its modules are none of" in text
        and "model.layers.0.self_attn.query" in text
        and "some/model" in text
    )
    assert "does not go with the weight [60, 36]" in said(
        {f"{q}.lora_A.weight": a[:, 1:], f"{q}.lora_B.weight": b}
    )
    assert "were tokens added?" in said(good | {"lm_head.weight": torch.ones(140, 36)})
    assert "is none of LoRA's or DoRA's tensors" in said(good | {f"{q}.lora_C.weight": b.clone()})
    tied = {"lm_head.lora_A.weight": torch.ones(3, 36), "lm_head.lora_B.weight": torch.ones(131, 3)}
    for part in (tied, {"model.embed_tokens.weight": torch.ones(131, 36)}):
        assert "embedding and head of" in said(part, verified.canonical("llama_tied"))
    folder = zoo.convert(quantised("qwen3", {}, fp8_blocks, tmp_path / "hf"), tmp_path / "fp8")
    w = zoo.load(folder).state_dict()["layers.0.attn.out.weight"]
    a, b = lora(w.float())
    o = "model.layers.0.self_attn.o_proj"
    assert "layers.0.attn.out is quantised (fp8" in said(
        {f"{o}.lora_A.weight": a, f"{o}.lora_B.weight": b}, folder
    )
    with pytest.raises(ZooError, match="zoo merge CANON"):
        zoo.convert(tmp_path / "adapter", tmp_path / "new")
    done = CliRunner().invoke(
        cli, ["merge", str(verified.canonical("llama")), str(tmp_path / "hf"), str(tmp_path / "new")]
    )
    assert isinstance(done.exception, ZooError) and "adapter_config.json: missing" in str(done.exception)


def test_a_field_that_nobody_here_knows_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    q = "model.layers.0.self_attn.q_proj"
    a, b = lora(released("llama")[f"{q}.weight"])
    parts = {f"{q}.lora_A.weight": a, f"{q}.lora_B.weight": b}
    folder = adapter(
        tmp_path / "adapter", parts, use_mora=True, later={"x": 1}, unset=None, task_type="CAUSAL_LM"
    )
    zoo.merge(verified.canonical("llama"), folder, tmp_path / "new")
    assert "later, use_mora: not known here" in caplog.text and "unset" not in caplog.text


def test_all_fields_of_pefts_config_are_known() -> None:
    """A field that a newer peft has is one that merging may depend on."""
    peft = pytest.importorskip("peft")
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} <= READ | set(OTHERWISE_MERGED)


def test_a_tied_table_is_changed_where_the_adapter_holds_it_for_both_ends(tmp_path: Path) -> None:
    """As peft saves one that it trained with `ensure_weight_tying`."""
    table = torch.randn(131, 36)
    parts = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    new = merged("llama_tied", adapter(tmp_path / "adapter", parts), tmp_path)
    assert torch.equal(new["model.embed_tokens.weight"], table) and "lm_head.weight" not in new
    folder = adapter(tmp_path / "other", parts | {"lm_head.weight": table + 1})
    assert "embedding and head of" in refused(folder, tmp_path, verified.canonical("llama_tied"))


def test_a_tied_table_is_changed_once_where_peft_trained_one_change_of_low_rank_for_both_ends(
    tmp_path: Path,
) -> None:
    """As peft saves a LoRA of the embedding with `ensure_weight_tying`: what its model computes with it, the merged one does. (Its
    own merge adds it twice.)"""
    peft = pytest.importorskip("peft")
    canon = verified.canonical("llama_tied")
    model = tiny.upstream(verified.ROOT / "llama_tied-float32-source")
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens"], ensure_weight_tying=True)
    )
    torch.manual_seed(0)
    for name in ("lora_embedding_A", "lora_embedding_B"):
        getattr(tuned.base_model.model.model.embed_tokens, name)["default"].data.normal_(std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    ids = tiny.tokens("llama_tied")
    with torch.no_grad():
        theirs = tuned(ids).logits
        ours = zoo.load(zoo.merge(canon, tmp_path / "adapter", tmp_path / "tied"))(ids)
        assert (theirs - zoo.load(canon)(ids)).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    parts = {k.removeprefix(BASE): t for k, t in parts.items()}
    parts["lm_head.lora_A.weight"] = parts["lm_head.lora_A.weight"] + 1
    assert "embedding and head of" in refused(adapter(tmp_path / "adapter", parts), tmp_path, canon)


def test_a_module_within_one_of_which_a_parameter_is_wrapped_is_found(tmp_path: Path) -> None:
    """Jamba's A_log by `target_parameters` wraps all of `mamba`: of what is in it peft saves `mamba.base_layer.dt_proj`."""
    old = released("jamba")
    key = next(k for k in old if k.endswith("mamba.dt_proj.weight"))
    a, b = lora(old[key])
    module = key.removesuffix("dt_proj.weight") + "base_layer.dt_proj"
    parts = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    new = merged("jamba", adapter(tmp_path / "adapter", parts), tmp_path)
    torch.testing.assert_close(new[key], old[key] + 2 * (b @ a), rtol=1e-5, atol=1e-6)


WAYS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "rslora, patterns": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2},
                         "alpha_pattern": {r"layers\.0\..*down_proj": 11}},
    "dora, embedding": {"target_modules": ["v_proj", "up_proj", "embed_tokens"], "use_dora": True},
    "whole, biases": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "k_proj"], "bias": "all"},
}  # fmt: skip
CASES = [
    *(("llama_bias", way) for way in WAYS),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    ("falcon", {"target_modules": ["query_key_value"]}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ("gpt_oss", {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ("qwen3_5_moe", {"target_modules": "all-linear"}),
    ("gemma3n", {"target_modules": "all-linear", "use_rslora": True}),
    ("gemma3_vision", {"target_modules": "all-linear"}),
    ("mistral3", {"target_modules": "all-linear", "use_dora": True}),
    ("gemma4_unified", {"target_modules": "all-linear"}),
    # PEFT looks for the name of a parameter, not for that of the module that it is in
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                 "alpha_pattern": {"mlp.experts": 50, "experts.down_proj": 20}}),
    ("nemotron_h_latent", {"target_modules": ["q_proj"], "target_parameters": ["experts.up_proj", "experts.down_proj"]}),
    ("nemotron_h_dtmin", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
]  # fmt: skip


OFTEN = ["dora, embedding", "whole, biases"]  # the rest is asked by `make proofs`
# a tower under names in memory; two parameters of one shape; patterns of parameters
ALSO = ("gemma3_vision", "nemotron_h_latent", "mixtral")


@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(*c, marks=() if c[1] in OFTEN or c[0] in ALSO else pytest.mark.proof) for c in CASES],
    ids=str,
)
def test_it_is_what_peft_merges(name: str, way: Any, tmp_path: Path) -> None:
    is_what_peft_merges(name, WAYS[way] if isinstance(way, str) else way, tmp_path)


def test_a_conv1d_is_one_whatever_the_config_says_of_it(tmp_path: Path) -> None:
    """PEFT sets `fan_in_fan_out` by the module that it met last; a square matrix does not show which way it lies."""
    old = released("gpt2")
    key = next(k for k in old if k.endswith("h.0.attn.c_proj.weight"))
    a, b = lora(old[key])
    module = "transformer." + key.removeprefix("transformer.").removesuffix(".weight")
    parts = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    for said in (True, False):
        new = merged(
            "gpt2", adapter(tmp_path / f"{said}", parts, fan_in_fan_out=said), tmp_path / f"to{said}"
        )
        torch.testing.assert_close(new[key], old[key] + 2 * (b @ a).T, rtol=1e-5, atol=1e-6)


# Of Mamba's modules peft itself refuses `out_proj`; Step 3.5's release has other names for its vision tower than transformers, and
# fuses what that has apart.
OTHERWISE = {
    "falcon_h1": r".*\.(in_proj|[qkvo]_proj|gate_proj|up_proj|down_proj)",
    "nemotron_h": r".*\.(in_proj|[qkvo]_proj|up_proj|down_proj)",
    "step3p5": r".*language_model.*\.([qkvog]_proj|gate_proj|up_proj|down_proj)",
}


@pytest.mark.proof
@pytest.mark.parametrize("family", [n for n, case in tiny.CASES.items() if case.variants])
def test_an_adapter_of_all_linear_modules_is_what_peft_merges_in_every_family(
    family: str, tmp_path: Path
) -> None:
    targets = OTHERWISE.get(family, "all-linear")
    is_what_peft_merges(tiny.CASES[family].variants[0].name, {"target_modules": targets}, tmp_path)


def is_what_peft_merges(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    canon = verified.canonical(name)
    model = tiny.upstream(verified.ROOT / f"{name}-float32-source")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(0)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p) / 8
    tuned.save_pretrained(tmp_path / "adapter")
    new = held(zoo.merge(canon, tmp_path / "adapter", tmp_path / "canon"))
    state = tuned.merge_and_unload().state_dict()
    if name in OTHERWISE:  # what no adapter changes goes along from the folder
        state = {k: t for k, t in state.items() if "vision_model" not in k}
    theirs = held(zoo.save(state, canon, tmp_path / "theirs"))
    assert new.keys() == theirs.keys()
    for key, t in theirs.items():
        torch.testing.assert_close(new[key], t, rtol=1e-5, atol=2e-6, msg=key)
    assert sum(not torch.equal(new[k], t) for k, t in held(canon).items()) >= 2
