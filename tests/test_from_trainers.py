"""What trainers and other tools do to a checkpoint: one name of a tied matrix, wrappers in names, padded
vocabularies, weights quantised in ways that zoo does not read, models under names that nobody claims.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import verified
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import zoo
from zoo.cli import cli
from zoo.cli.inspect import look
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.canonical import read
from zoo.mapping.execute import convert
from zoo.mapping.export import export
from zoo.mapping.plan import Plan, make_plan
from zoo.verify.certificate import Certificate
from zoo.verify.oracle import CannotLoad, config_and_class

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama_tied", tmp_path_factory.mktemp("tied"))


def again(source: Path, dst: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """A copy of a checkpoint with other tensors, and some fields of its config (None: without it)."""
    dst.mkdir()
    told = json.loads((source / "config.json").read_text()) | config
    (dst / "config.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))
    save_file(
        load_file(source / "model.safetensors") if tensors is None else tensors, dst / "model.safetensors"
    )
    return dst


def plan_of(folder: Path) -> Plan:
    return make_plan(open_checkpoint(folder))


def refused(folder: Path) -> str:
    with pytest.raises(ZooError) as e:
        plan_of(folder)
    return str(e.value)


def canonical(folder: Path, dst: Path) -> Tensors:
    convert(plan_of(folder), dst)
    return {k: v for f in read(dst).files for k, v in load_file(dst / f).items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_tied_file_that_kept_only_the_head_is_the_model_that_kept_the_embedding(
    tied: Path, tmp_path: Path
) -> None:
    have = load_file(tied / "model.safetensors")
    have["lm_head.weight"] = have.pop("model.embed_tokens.weight")
    other = again(tied, tmp_path / "other", have)
    notes = plan_of(other).notes
    assert notes == ("of the tied embedding and head the files kept lm_head.weight only: it is both",)
    assert same(canonical(other, tmp_path / "a"), canonical(tied, tmp_path / "b"))
    export(tmp_path / "a", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        other / "model.safetensors"
    ).read_bytes()


def test_an_untied_file_without_an_embedding_is_refused(llama: Path, tmp_path: Path) -> None:
    have = load_file(llama / "model.safetensors")
    del have["model.embed_tokens.weight"]
    assert "missing (1)" in refused(again(llama, tmp_path / "other", have))


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{}",
        "module.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "_forward_module.{}",
        "_fsdp_wrapped_module.{}",
    ],
)
def test_a_wrapper_around_the_model_is_looked_through(llama: Path, tmp_path: Path, wrapped: str) -> None:
    have = {wrapped.format(k): v for k, v in load_file(llama / "model.safetensors").items()}
    other = again(llama, tmp_path / "other", have)
    assert "looked through" in plan_of(other).summary()
    assert same(canonical(other, tmp_path / "a"), canonical(llama, tmp_path / "b"))
    export(tmp_path / "a", tmp_path / "as_it_came", format="source")
    assert (tmp_path / "as_it_came" / "model.safetensors").read_bytes() == (
        other / "model.safetensors"
    ).read_bytes()
    export(tmp_path / "a", tmp_path / "back")
    assert same(*(load_file(f / "model.safetensors") for f in (tmp_path / "back", llama)))


def test_a_wrapper_around_each_layer_is_looked_through(llama: Path, tmp_path: Path) -> None:
    have = {
        "_fsdp_wrapped_module." + k.replace("layers.1.", "layers.1._checkpoint_wrapped_module._orig_mod."): v
        for k, v in load_file(llama / "model.safetensors").items()
    }
    other = again(llama, tmp_path / "other", have)
    assert same(canonical(other, tmp_path / "a"), canonical(llama, tmp_path / "b"))


def test_a_part_of_names_that_is_not_on_the_list_is_not_looked_through(llama: Path, tmp_path: Path) -> None:
    plain = load_file(llama / "model.safetensors")
    said = refused(again(llama, tmp_path / "other", {f"student.{k}": v for k, v in plain.items()}))
    assert "names of tensors begin with 'student.', without which they fit family llama" in said
    other = {k.replace("model.", "transformer."): v for k, v in plain.items()}
    said = refused(again(llama, tmp_path / "renamed", other))
    assert "begin with 'transformer.', where family llama has 'model.'" in said and "\n" not in said


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("layers.0.sa_norm.scale", "torchtune's: "),
        ("transformer.h.0.norm_1.weight", "LitGPT's: "),
        ("model.decoder.0.pp_block.attn.qkv_proj.weight", "nanotron's: "),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "Megatron's: "),
        ("layers.0.attention.wq.weight", "Meta's, which torchtitan has too: "),
    ],
)
def test_a_trainers_own_names_are_called_whose_they_are(
    name: str, whose: str, llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    save_file({name: torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    for like in ({}, {"like": verified.canonical("llama")}):
        with pytest.raises(ZooError, match=f"these names are {whose}"):
            if like:
                zoo.save(folder, to=tmp_path / "x", **like)
            else:
                zoo.convert(folder, tmp_path / "x")


def test_another_prefix_is_found_by_whichever_naming_of_the_family_the_files_have(tmp_path: Path) -> None:
    source = tiny.make("qwen3_moe", tmp_path / "source")
    plain = load_file(source / "model.safetensors")
    said = refused(again(source, tmp_path / "other", {f"actor.{k}": v for k, v in plain.items()}))
    assert "names of tensors begin with 'actor.', without which they fit family qwen3_moe" in said


@pytest.mark.parametrize("how", ["base_layer.", "lora"])
def test_an_adapter_that_was_not_merged_is_called_that(how: str, llama: Path, tmp_path: Path) -> None:
    plain = load_file(llama / "model.safetensors")
    if how == "lora":
        wrapped = plain | {
            k.replace(".weight", f".lora_{part}.default.weight"): torch.zeros(2, 2)
            for k in plain if "q_proj" in k for part in "AB"
        }  # fmt: skip
    else:
        wrapped = {k.replace("q_proj.", f"q_proj.{how}"): v for k, v in plain.items()}
    said = refused(again(llama, tmp_path / "adapted", wrapped))
    assert "an adapter's that was not merged" in said and "merge_and_unload" in said and "\n" not in said


@pytest.mark.parametrize("name", ["v_head.summary", "v_head", "value_head", "score"])
def test_a_value_head_is_kept_aside(name: str, llama: Path, tmp_path: Path) -> None:
    plain = load_file(llama / "model.safetensors")
    head = {f"{name}.weight": torch.ones(1, 36), f"{name}.bias": torch.ones(1)}
    plan = plan_of(again(llama, tmp_path / "trl", plain | head))
    assert set(plan.extras) == set(head) and "value head" in plan.summary()
    classifier = plain | {f"{name}.weight": torch.ones(2, 36)}
    assert "no rule uses them" in refused(again(llama, tmp_path / "classes", classifier))


@pytest.mark.parametrize("leaf", ["inv_freq", "original_inv_freq", "cos_cached"])
def test_frequencies_that_a_version_saved_are_kept_aside_in_every_family(leaf: str, tmp_path: Path) -> None:
    source = tiny.make("qwen3", tmp_path / "source")
    plain = load_file(source / "model.safetensors")
    saved = {f"model.layers.0.self_attn.rotary_emb.{leaf}": torch.ones(5)}
    plan = plan_of(again(source, tmp_path / "old", plain | saved))
    assert set(plan.extras) == set(saved) and "rotary frequencies" in plan.summary()


def test_weights_under_the_key_of_a_trainers_dict_are_found(llama: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "trained").mkdir()
    (folder / "config.json").write_bytes((llama / "config.json").read_bytes())
    plain = load_file(llama / "model.safetensors")
    torch.save({"epoch": 3, "model_state_dict": plain}, folder / "pytorch_model.bin")
    assert same(canonical(folder, tmp_path / "a"), canonical(llama, tmp_path / "b"))


def test_an_index_may_name_its_shards_from_here(llama: Path, tmp_path: Path) -> None:
    folder = again(llama, tmp_path / "shards")
    (folder / "model.safetensors").rename(folder / (shard := "model-00001-of-00001.safetensors"))
    names = load_file(folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, f"./{shard}")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ckpt = open_checkpoint(folder)
    assert list(ckpt.files) == [shard] and not ckpt.notes  # nothing else is here
    assert zoo.verify(zoo.convert(folder, tmp_path / "canon"), level="bytes", write=False).passed


def test_a_head_that_is_missing_is_said_with_the_field_that_ties_it(tied: Path, tmp_path: Path) -> None:
    assert "tie_word_embeddings true" in refused(again(tied, tmp_path / "other", tie_word_embeddings=None))


def test_layers_that_the_config_has_more_or_fewer_of_are_said_by_their_numbers(
    llama: Path, tmp_path: Path
) -> None:
    plain = load_file(llama / "model.safetensors")
    cut = {k: v for k, v in plain.items() if ".layers.1." not in k}
    said = "layers by the config (num_hidden_layers)"
    assert f"{said}: 3; of 1 the files hold nothing" in refused(again(llama, tmp_path / "cut", cut))
    assert f"{said}: 1; the files hold 1-2 too" in refused(
        again(llama, tmp_path / "deep", num_hidden_layers=1)
    )


def test_layers_that_were_taken_out_are_said_by_the_numbers_that_are_left(
    llama: Path, tmp_path: Path
) -> None:
    plain = load_file(llama / "model.safetensors")
    pruned = {
        k.replace(".layers.2.", ".layers.5.").replace(".layers.1.", ".layers.3."): v for k, v in plain.items()
    }
    said = refused(again(llama, tmp_path / "pruned", pruned))
    assert (
        "the config has 3 layers (num_hidden_layers), 0-2, and the files hold as many under other numbers: 0,3,5"
        in said
    )


def test_a_reward_model_is_called_that(llama: Path, tmp_path: Path) -> None:
    other = again(llama, tmp_path / "other", architectures=["LlamaForRewardModel"])
    assert "LlamaForRewardModel gives no logits of the next token" in refused(other)


def test_a_classifier_is_called_what_it_lacks(llama: Path, tmp_path: Path) -> None:
    plain = load_file(llama / "model.safetensors")
    head = {"score.weight": plain.pop("lm_head.weight")[:2]}
    other = again(llama, tmp_path / "other", plain | head, architectures=["LlamaForSequenceClassification"])
    assert refused(other).endswith(
        "LlamaForSequenceClassification gives no logits of the next token; zoo reads language models, with their head"
    )


def test_one_tensor_wrapped_and_plain_is_refused(llama: Path, tmp_path: Path) -> None:
    have = load_file(llama / "model.safetensors")
    have["_orig_mod.model.norm.weight"] = have["model.norm.weight"] + 1
    text = refused(again(llama, tmp_path / "other", have))
    assert "'_orig_mod.model.norm.weight'" in text and "which one is meant" in text


def test_the_first_spelling_of_llamas_class_is_llama(llama: Path, tmp_path: Path) -> None:
    assert plan_of(again(llama, tmp_path / "c", architectures=["LLaMAForCausalLM"])).family.name == "llama"


def test_a_padded_vocabulary_is_said_in_one_line_with_both_numbers(llama: Path, tmp_path: Path) -> None:
    v = json.loads((llama / "config.json").read_text())["vocab_size"]
    have = load_file(llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        have[name] = torch.cat([have[name], torch.zeros(7, have[name].shape[1], dtype=have[name].dtype)])
    other = again(llama, tmp_path / "other", have)
    text = refused(other)
    assert f"{v + 7} rows, but the config's vocab_size is {v} (7 are padding" in text
    assert f"set vocab_size to {v + 7}" in text and "\n" not in text
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):  # "upstream doesn't load this either"
        tiny.upstream(other)
    assert plan_of(again(llama, tmp_path / "right", have, vocab_size=v + 7)).spec.vocab_size == v + 7


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
U8, I8, I32 = torch.uint8, torch.int8, torch.int32


def quantise(source: Path, method: str) -> Tensors:
    """The names and dtypes that a tool leaves for each linear map; sizes as they come out."""
    out: Tensors = {}
    for name, w in load_file(source / "model.safetensors").items():
        if "_proj.weight" not in name:
            out[name] = w
            continue
        n, d = w.shape
        stem = name.removesuffix(".weight")
        made: Tensors
        match method:
            case "hqq":
                made = {"W_q": torch.zeros(n * d // 2, 1, dtype=U8), "meta": torch.zeros(9, dtype=U8)}
            case "quanto":
                made = {"weight._data": torch.zeros(n, d, dtype=I8), "weight._scale": torch.zeros(n, 1)}
            case "w8a8":
                made = {"weight": torch.zeros(n, d, dtype=I8), "weight_scale": torch.zeros(n, 1)}
            case "i8":
                made = {"weight": torch.zeros(n, d, dtype=I8)}
            case "fp8":
                made = {"weight": torch.zeros(n, d).to(torch.float8_e4m3fn)}
            case "packed":
                made = {"weight_packed": torch.zeros(n, d // 2, dtype=U8), "weight_scale": torch.zeros(n, 1)}
            case "qweight":
                made = {"qweight": torch.zeros(d // 8, n, dtype=I32), "scales": torch.zeros(1, n)}
            case _:  # AWQ and GPTQ pack alike, and GPTQ says which column is of which group
                made = {
                    "qweight": torch.zeros(d // 8, n, dtype=I32),
                    "qzeros": torch.zeros(1, n // 8, dtype=I32),
                    "scales": torch.zeros(1, n),
                }
                made |= {"g_idx": torch.zeros(d, dtype=I32)} if method == "gptq" else {}
        out |= {f"{stem}.{k}": v for k, v in made.items()}
    return out


@pytest.mark.parametrize(
    "method, config, said",
    [
        ("hqq", {"quantization_config": {"quant_method": "hqq"}}, "HQQ (quantization_config has quant_method 'hqq'"),
        ("quanto", {}, "quanto (by the names of its tensors"),
        ("qweight", {}, "AWQ, GPTQ or a kin of theirs (by the names"),
        ("w8a8", {}, "I8 codes"),
        ("packed", {}, "U8 codes"),
        ("i8", {}, "I8 codes"),
        ("fp8", {}, "F8_E4M3 codes"),
        ("awq", {"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "version 'gemv'; of AWQ zoo reads gemm"),
        ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 6}}, "bits 6; of GPTQ zoo reads 2, 3, 4 and 8"),
        ("gptq", {"quantization_config": {"quant_method": "eetq"}}, "quant_method 'eetq'"),
    ],
)  # fmt: skip
def test_weights_quantised_in_a_way_that_zoo_does_not_read_are_called_that_in_one_line(
    llama: Path, tmp_path: Path, method: str, config: dict[str, Any], said: str
) -> None:
    text = refused(again(llama, tmp_path / "q", quantise(llama, method), **config))
    assert said in text and "which zoo does not read" in text and "not quantised" in text
    assert "\n" not in text and text.count("proj") <= (" codes" in said)  # one of them as an example


def test_what_a_tools_own_file_says_of_quantised_weights_is_quoted(llama: Path, tmp_path: Path) -> None:
    other = again(llama, tmp_path / "q", quantise(llama, "packed"))
    (other / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert "U8 codes, as" in refused(other) and "hf_quant_config.json has quant_algo 'NVFP4'" in refused(
        other
    )


@pytest.mark.parametrize("stale", [NF4, INT8, {"quant_method": "awq", "bits": 4}])
def test_plain_weights_under_a_stale_quantisation_are_taken_as_they_are(
    llama: Path, tmp_path: Path, stale: dict[str, Any]
) -> None:
    other = again(llama, tmp_path / "other", quantization_config=stale)
    (note,) = plan_of(other).notes
    assert f"quant_method '{stale['quant_method']}'" in note and "they are plain" in note
    assert same(canonical(other, tmp_path / "a"), canonical(llama, tmp_path / "b"))


def test_a_model_under_a_name_that_nobody_claims_is_refused_with_the_family_that_it_fits(
    llama: Path, tmp_path: Path
) -> None:
    other = again(llama, tmp_path / "other", architectures=["NovaForCausalLM"], model_type="nova")
    text = refused(other)
    assert "'NovaForCausalLM'" in text and "'nova'" in text and "--family llama" in text and "\n" not in text


def test_a_family_that_is_said_is_taken_and_recorded(llama: Path, tmp_path: Path) -> None:
    other = again(llama, tmp_path / "other", architectures=["NovaForCausalLM"], model_type="nova")
    folder = zoo.convert(other, tmp_path / "canonical", family="llama")
    said = json.loads((folder / "zoo.json").read_text())
    assert said["source"]["family"] == "llama" and said["source"]["family_given"] is True
    assert "model_type 'nova'" in said["notes"][0] and "--family" in said["notes"][0]
    certificate = zoo.verify(folder, level="bytes", write=False)
    assert certificate.passed and certificate.rules is not None and certificate.rules["family_given"] is True
    about, _ = look(other, "llama")
    assert about["family"] == "llama" and about["architecture"] and said["notes"][0] in about["notes"]
    assert "--family llama" in look(other)[0]["family"]
    assert "family_given" not in zoo.convert(llama, tmp_path / "found").joinpath("zoo.json").read_text()
    with pytest.raises(ZooError, match="no family is called 'lama'"):
        look(other, "lama")


def test_a_model_that_fits_no_family_is_refused_with_the_nearest_and_what_does_not_fit(
    llama: Path, tmp_path: Path
) -> None:
    have = load_file(llama / "model.safetensors")
    have["model.layers.0.memory.weight"] = torch.zeros(2, 2)
    text = refused(again(llama, tmp_path / "o", have, architectures=["NovaForCausalLM"], model_type="nova"))
    assert "Known architectures" in text and "tensors fit" not in text
    near = text.partition("Nearest: ")[2].partition(", but for 1 tensor (model.layers.0.memory.weight)")[0]
    assert "llama" in near.split(", ") and "olmo2" not in near
    alien = {f"blocks.{i}.w": torch.zeros(2, 2) for i in range(30)}
    text = refused(again(llama, tmp_path / "a", alien, architectures=["NovaForCausalLM"], model_type="nova"))
    assert "Nearest" not in text


def certified(folder: Path, tmp_path: Path) -> Certificate:
    return zoo.verify(zoo.convert(folder, tmp_path / "canonical"), level="logits", write=False)


@pytest.mark.parametrize("stale", [NF4, INT8, {"quant_method": "fp8"}])
def test_upstream_is_not_told_a_stale_quantisation_and_the_proof_says_so(
    llama: Path, tmp_path: Path, stale: dict[str, Any]
) -> None:
    cert = certified(again(llama, tmp_path / "other", quantization_config=stale), tmp_path)
    assert cert.headline == "PASSED" and not cert.not_checked
    assert f"quantization_config ({stale['quant_method']}): the weights are plain" in cert.oracle["note"]


def test_upstream_is_not_told_a_padding_token_beyond_the_vocabulary_and_the_proof_says_so(
    llama: Path, tmp_path: Path
) -> None:
    cert = certified(again(llama, tmp_path / "other", pad_token_id=100_000), tmp_path)
    assert cert.headline == "PASSED" and "pad_token_id (100000)" in cert.oracle["note"]


def test_upstream_is_not_told_settings_that_keep_it_from_running_and_the_proof_says_so(
    llama: Path, tmp_path: Path
) -> None:
    odd = {
        "attn_implementation": "flash_attention_2", "return_dict": False, "dtype": "auto", "use_cache": "yes",
        "num_labels": "two", "id2label": {"yes": "no"}, "initializer_range": "0.02", "attention_dropout": "0.0",
    }  # fmt: skip
    cert = certified(again(llama, tmp_path / "other", quantization_config=[], **odd), tmp_path)
    assert cert.headline == "PASSED"
    for key, value in odd.items():
        assert f"config's {key} ({value}): it moves no logit" in cert.oracle["note"]


def test_what_upstreams_constructor_raises_is_its_own_word_and_no_bug_of_ours(
    llama: Path, tmp_path: Path
) -> None:
    other = again(llama, tmp_path / "other", pretraining_tp="wide")
    with pytest.raises(CannotLoad, match=r"upstream cannot load this: \w+Error: "):
        config_and_class(other)
    cert = zoo.verify(zoo.convert(other, tmp_path / "canonical"), write=False)
    assert cert.oracle["kind"] == "none" and "pretraining_tp" in cert.oracle["why"]
    assert cert.headline == "PASSED (bytes only)"


def test_a_pickle_beside_a_stale_quantisation_is_plain_too(llama: Path, tmp_path: Path) -> None:
    other = again(llama, tmp_path / "other", quantization_config=NF4)
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    cert = certified(other, tmp_path)
    assert cert.headline == "PASSED" and "the weights are plain" in cert.oracle["note"]


def test_a_tied_file_that_kept_only_the_head_is_proven_against_upstream(tied: Path, tmp_path: Path) -> None:
    have = load_file(tied / "model.safetensors")
    have["lm_head.weight"] = have.pop("model.embed_tokens.weight")
    cert = certified(again(tied, tmp_path / "other", have), tmp_path)
    assert cert.passed, cert.not_checked


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["FSDPLlamaForCausalLM"]},
        {"architectures": ["PeftModelForCausalLM"]},
        {"architectures": ["AutoModelForCausalLMWithValueHead"]},
        {"architectures": ["LlamaModel"]},
        {"dtype": {"text": "float32"}},
        {"dtype": "float8_e4m3fn"},
        {"dtype": None, "torch_dtype": "torch.bfloat16"},
        {"pad_token_id": [0], "eos_token_id": "</s>"},
        {"quantization_config": "none", "experts_implementation": "grouped_mm"},
        {"initializer_range": 1, "mlp_bias": 0, "attention_bias": 0},
    ],
    ids=str,
)
def test_a_wrappers_class_and_settings_that_say_nothing_of_numbers_keep_neither_side_from_it(
    llama: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    canon = convert(plan_of(again(llama, tmp_path / "other", **config)), tmp_path / "canon")
    assert zoo.verify(canon, level="logits", write=False).verdict == "passed"


def test_a_null_that_upstreams_class_refuses_is_as_good_as_absent(llama: Path, tmp_path: Path) -> None:
    other = again(llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {
        "use_cache": None,
        "tie_word_embeddings": None,
    }
    (other / "config.json").write_text(json.dumps(config))
    assert config_and_class(other)[0].tie_word_embeddings is False


def test_a_config_that_an_editor_began_with_a_mark_is_verified(llama: Path, tmp_path: Path) -> None:
    other = again(llama, tmp_path / "other")
    marked = b"\xef\xbb\xbf" + (other / "config.json").read_bytes()
    (other / "config.json").write_bytes(marked)
    assert certified(other, tmp_path).verdict == "passed"
    back = zoo.export(zoo.convert(other, tmp_path / "bf16", dtype="bf16"), tmp_path / "back")
    assert json.loads((back / "config.json").read_bytes())["dtype"] == "bfloat16"


def test_architectures_and_a_model_type_of_two_families_are_said(llama: Path, tmp_path: Path) -> None:
    two = {"architectures": ["FSDPLlamaForCausalLM"], "model_type": "qwen2"}
    (note,) = plan_of(again(llama, tmp_path / "other", **two)).notes
    assert (
        "LlamaForCausalLM, which is llama, and its model_type 'qwen2', which is qwen2: taken for llama"
        in note
    )


def test_shards_that_are_not_all_there_are_a_download_that_did_not_end(llama: Path, tmp_path: Path) -> None:
    have = load_file(llama / "model.safetensors")
    other = again(llama, tmp_path / "other", {k: v for k, v in have.items() if "layers.1." not in k})
    (other / "model.safetensors").rename(other / "model-00001-of-00002.safetensors")
    assert "1 of 2 shards are here (model-00002-of-00002.safetensors is not)" in refused(other)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("__0_0.distcp", "torch.distributed.checkpoint's shards"), ("global_step10/mp_rank_00_model_states.pt", "DeepSpeed's"),
        ("last.ckpt", "Lightning's"), ("llama.nemo", "NeMo's"), ("iter_0001/mp_rank_00/model_optim_rng.pt", "Megatron-LM's"),
        ("tf_model.h5", "TensorFlow's"), ("flax_model.msgpack", "Flax's"), ("model.onnx", "ONNX's"),
        ("openvino_model.bin", "OpenVINO's"), ("weights.npz", "numpy's"), ("ggml-model-q4_0.bin", "before GGUF"),
        ("model.safetensors.crdownload", "a download that has not ended"), ("model.tar.gz", "an archive"),
        ("optimizer.pt", "a trainer's state"), ("training_args.bin", "a trainer's state"),
    ],
)  # fmt: skip
def test_weights_that_no_reader_takes_are_called_what_they_are(
    llama: Path, tmp_path: Path, file: str, says: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(ZooError) as e:
        open_checkpoint(tmp_path)
    assert says in str(e.value) and Path(file).name in str(e.value)


def test_what_a_file_manager_or_another_engine_left_beside_is_no_set_of_weights(
    llama: Path, tmp_path: Path
) -> None:
    other = again(llama, tmp_path / "other")
    for name in ("._model.safetensors", "openvino_model.bin"):
        (other / name).write_bytes(b"")
    assert plan_of(other).checkpoint.notes == ()


@pytest.mark.parametrize("given", [{}, {"metadata": None}], ids=str)
def test_an_index_without_metadata_is_proven_against_upstream_which_stops_without(
    llama: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    other = again(llama, tmp_path / "other")
    have = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": list(have)[i::2] for i in range(2)}
    for file, names in parts.items():
        save_file({n: have[n] for n in names}, other / file)
    index = {"weight_map": {n: file for file, names in parts.items() for n in names}, **given}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    cert = certified(other, tmp_path)
    assert (
        cert.headline == "PASSED"
        and "model.safetensors.index.json with an object 'metadata'" in cert.oracle["note"]
    )


@pytest.mark.parametrize(
    "name", ["model.fp16.safetensors", "model-00001-of-00001.safetensors", "weights.bin"]
)
def test_weights_under_a_name_that_upstream_does_not_look_for_are_proven_against_it(
    llama: Path, tmp_path: Path, name: str
) -> None:
    other = again(llama, tmp_path / "other")
    have = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    torch.save(have, other / name) if name.endswith(".bin") else save_file(have, other / name)
    canon = zoo.convert(other / name if name.endswith(".bin") else other, tmp_path / "canonical")
    for stream in (False, True)[: 1 + name.endswith("s")]:
        cert = zoo.verify(canon, level="logits", stream=stream, write=False)
        assert cert.headline == "PASSED" and f"upstream was given {name} alone" in cert.oracle["note"]


def test_tensors_that_are_left_out_and_adapters_that_are_not_applied_are_said(
    llama: Path, tmp_path: Path
) -> None:
    other = again(llama, tmp_path / "other")
    have = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    torch.save({"ema": have, "model": have, "epoch": 3}, other / "pytorch_model.bin")
    (other / "adapter_config.json").write_text("{}")
    notes, said = (
        open_checkpoint(other).notes,
        CliRunner().invoke(cli, ["convert", str(other), str(tmp_path / "c")]),
    )
    assert "pytorch_model.bin: the tensors under 'model' are taken, those under 'ema' left out" in notes
    assert any("an adapter lies beside the model, and is not merged" in note for note in notes)
    assert all(note in said.output for note in notes)
