"""What verification says about a right conversion, a wrong one, and one that can't be judged."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import vendor
from safetensors.torch import load_file, save_file
from verified import COVERING, broken, canonical, copy, rewrite, with_tensor

import zoo
from zoo.errors import ZooError
from zoo.formats.canonical import read
from zoo.model.cache import Cache, Context
from zoo.model.rope import far_from
from zoo.spec import Attention
from zoo.testing.build import write_tensors
from zoo.verify import judge
from zoo.verify.certificate import check
from zoo.verify.diagnose import hypotheses
from zoo.verify.faults.base import CATALOGUE
from zoo.verify.faults.spec import map_spec
from zoo.verify.float64 import InFloat64, logits_of
from zoo.verify.oracle import Transformers
from zoo.verify.ours import Ours, subject_of
from zoo.verify.tolerance import FLOOR_FP32, Bound


def checks(cert: zoo.verify.certificate.Certificate) -> dict[str, bool]:  # type: ignore[name-defined]
    return {c.name: c.passed for level in cert.levels for c in level.checks}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "nemotron_h_dtmin", "gemma3n"])
def test_a_right_conversion_passes_every_level(name: str) -> None:
    cert = zoo.verify(canonical(name), write=False)
    assert cert.passed
    assert [x.name for x in cert.levels] == ["plan", "bytes", "layers", "logits", "decode"]
    assert not cert.not_checked


@pytest.mark.parametrize("family", COVERING[::2])  # `make proofs` does it with every family
def test_in_bf16_every_part_stays_within_upstreams_own_spread(family: str) -> None:
    cert = zoo.verify(canonical(tiny.MAIN[family], "bfloat16"), dtype="bf16", write=False)
    failed = [(c.name, c.value, c.bound) for x in cert.levels for c in x.checks if not c.passed]
    assert not failed


def test_the_bound_is_twice_upstreams_own_spread_or_the_floor() -> None:
    cert = zoo.verify(canonical("llama"), level="logits", write=False)
    level = cert.level("logits")
    assert level is not None
    spread = level.figures["spread"]
    assert spread["ways"] == ("eager attention", "sdpa attention")
    assert 0 < spread["logits"]["max"] < FLOOR_FP32
    (worst,) = (c for c in level.checks if c.name == "|logit error| max")
    assert worst.bound == max(2 * spread["logits"]["max"], FLOOR_FP32)
    assert "spread" in worst.why


def test_inputs_cross_every_limit_and_hold_rows_of_different_lengths() -> None:
    cert = zoo.verify(canonical("gpt_oss"), level="logits", write=False)
    assert cert.inputs is not None
    assert cert.inputs["limits_crossed"]
    longest = max(n for b in cert.inputs["batches"] for n in b["lengths"])
    assert longest > max(cert.inputs["limits_crossed"].values())
    assert any(len(set(b["lengths"])) > 1 for b in cert.inputs["batches"])


def test_a_limit_that_is_too_long_to_cross_is_named_as_not_checked() -> None:
    cert = zoo.verify(canonical("mistral_window"), level="logits", max_length=5, write=False)
    assert any("window 7" in text for text in cert.not_checked)


@pytest.mark.parametrize(
    ("fault", "where", "cause"),
    [
        ("rope_rows_interleaved", "layer 1, attention", "rows of q and k in interleaved RoPE order"),
        ("gate_up_swapped", "layer 1, feed-forward", "gate and up exchanged"),
        (
            "norms_swapped",
            "layer 1, norm (attn_norm)",
            "agrees when attn_norm and ffn_norm are exchanged in layer 1",
        ),
        ("head_off_by_one", "the final norm or the head", "rows of the head shifted"),
        ("embedding_off_by_one", "the embedding", "rows of the embedding shifted"),
        ("norm_stale", "layer 1, norm (ffn_norm)", "is 1 throughout"),
        ("norm_eps", "layer 0, norm (attn_norm)", "attn_norm.eps"),
        ("mtp_layer_included", "ours has 4 layers, the oracle 3", "layers[3]"),
    ],
)
def test_a_failure_names_layer_part_and_cause(fault: str, where: str, cause: str, tmp_path: Path) -> None:
    cert = zoo.verify(broken("llama", fault, tmp_path / "broken"), level="logits", write=False)
    assert not cert.passed
    assert cert.diagnosis is not None
    assert cert.diagnosis["where"] == where
    assert any(cause in text for text in cert.diagnosis["suggestions"])


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_moe", "kimi_linear"])
def test_in_bf16_two_ids_that_have_each_others_rows_are_named(name: str, tmp_path: Path) -> None:
    folder = rewrite(
        copy(canonical(name, "bfloat16"), tmp_path / "c"), CATALOGUE["head_rows_exchanged"].inject
    )
    level = zoo.verify(folder, dtype="bf16", level="logits", write=False).level("logits")
    assert level is not None
    failed = [c.name for c in level.checks if not c.passed]
    assert "logits of one id beside those of others, worst id" in failed
    assert any("the logits of 2 ids depart far more than the others': " in note for note in level.notes)


def test_of_logits_that_depart_after_layers_that_agree_no_mistake_is_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["zoo.verify.tolerance"], "FLOOR_FP32", 1e-9)
    name = "layers.2.mlp.down.weight"
    folder = with_tensor(copy(canonical("llama"), tmp_path / "c"), name, lambda t: t * (1 + 5e-6))
    found = zoo.verify(folder, level="logits", write=False).diagnosis
    assert found is not None and found["layer"] is None and found["where"] == "the logits"
    (text,) = found["suggestions"]
    assert text.startswith("the final norm and the head alone agree with upstream")
    assert not found["hypotheses"]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_an_error_that_adds_up_over_layers_has_no_part_and_no_cause(name: str, tmp_path: Path) -> None:
    def noisy(s: zoo.verify.faults.Subject) -> zoo.verify.faults.Subject:  # type: ignore[name-defined]
        random = torch.Generator().manual_seed(0)
        ours = {k: t for k, t in s.tensors.items() if k.startswith("layers.") and k.endswith(".down.weight")}
        return s.put(
            {k: t * (1 + 1e-5 * torch.randn(t.shape, generator=random)) for k, t in ours.items()}
        )  # in each layer less than its bound

    cert = zoo.verify(rewrite(copy(canonical(name), tmp_path / "c"), noisy), level="logits", write=False)
    found = cert.diagnosis
    assert not cert.passed and found is not None
    assert found["layer"] and found["part"] is None and found["where"] == f"layer {found['layer']}"
    assert found["suggestions"] == [
        f"layer {found['layer']} alone agrees with upstream when given upstream's own input: the error adds up over the "
        "layers, by rounding or by experts chosen differently"
    ]
    assert not found["hypotheses"]


@pytest.mark.parametrize("window", [39, 41, 80])
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_that_shows_in_the_longest_rows_alone_is_looked_for_there(
    window: int, stream: bool, tmp_path: Path
) -> None:
    def misread(s: zoo.verify.faults.Subject) -> zoo.verify.faults.Subject:  # type: ignore[name-defined]
        return s.with_spec(
            map_spec(s.spec, lambda x: replace(x, window=window) if isinstance(x, Attention) else x)
        )

    source = vendor.make(tmp_path / "source", "mistral_window", sliding_window=40)
    folder = rewrite(zoo.convert(source, tmp_path / "canonical"), misread)
    cert = zoo.verify(folder, level="logits", stream=stream, write=False)
    found = cert.diagnosis
    assert not cert.passed and found is not None and cert.inputs is not None
    assert max(cert.inputs["batches"][0]["lengths"]) < 39
    assert found["where"] == "layer 0, attention"
    causes = {
        39: ["consistent with the window one key narrower"],
        41: ["consistent with the window one key wider"],
        80: [f"agrees when the window is 40 keys in {'layer 0' if stream else 'every layer'}"],
    }
    said = f"zoo.json says layer_kinds[0].mixer.window is {window}, the source's config 40"
    assert found["suggestions"] == [said, *causes[window]]


def test_a_mistake_that_changes_nothing_is_not_tried() -> None:
    clean = subject_of(read(canonical("llama")), torch.float32)
    tried = list(hypotheses(clean, 1))
    specs = [subject for _, _, site, subject in tried if site == "spec"]
    assert specs and clean.spec not in [s.spec for s in specs if s.patch is None]
    names = {name for name, *_ in tried}
    assert not names & {"norm_mean", "value_norm_skipped", "post_norms_skipped"}  # it has none of these


def test_the_bytes_level_sees_truncation_instead_of_rounding(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    right = zoo.convert(source, tmp_path / "right", dtype="bf16")
    assert zoo.verify(right, level="bytes", write=False).passed

    def truncated(t: torch.Tensor) -> torch.Tensor:
        from safetensors.torch import load_file

        fp32 = load_file(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
        return (fp32.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)

    wrong = with_tensor(copy(right, tmp_path / "wrong"), "layers.0.mlp.down.weight", truncated)
    cert = zoo.verify(wrong, level="bytes", write=False)
    level = cert.level("bytes")
    assert level is not None and level.verdict == "failed"
    assert set(level.figures["differing"]) == {"layers.0.mlp.down.weight"}


def test_the_bytes_level_counts_a_single_changed_element(tmp_path: Path) -> None:
    def flip(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t.view(-1)[7] += 1e-3
        return t

    name = "layers.3.moe.gate_up.weight"
    folder = with_tensor(copy(canonical("qwen3_moe"), tmp_path / "c"), name, flip)
    level = zoo.verify(folder, level="bytes", write=False).level("bytes")
    assert level is not None
    assert level.figures["differing"] == {name: 1}


def test_a_carried_file_that_was_edited_is_seen(tmp_path: Path) -> None:
    folder = copy(canonical("llama"), tmp_path / "c")
    (folder / "generation_config.json").write_text("{}")
    assert not checks(zoo.verify(folder, level="bytes", write=False))["carried files that differ"]


def test_the_certificate_vouches_for_every_chat_template(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (source / name).write_text(name)
    folder = zoo.convert(source, tmp_path / "c")
    assert zoo.verify(folder, level="bytes").passed and not check(folder)
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (folder / name).write_text(name[::-1])
        assert check(folder) == [f"{name}: content changed"]
        failed = checks(zoo.verify(folder, level="bytes", write=False))
        assert not failed["carried files that differ"]
        (folder / name).write_text(name)
    (folder / "additional_chat_templates/default.jinja").write_text("another")
    assert check(folder) == ["additional_chat_templates/default.jinja: was not there when it was issued"]


def test_a_spec_that_is_not_the_sources_fails_the_plan(tmp_path: Path) -> None:
    cert = zoo.verify(broken("llama", "rope_theta", tmp_path / "c"), level="plan", write=False)
    assert not checks(cert)["Spec differs from the source's"]


def test_without_its_source_only_the_plan_is_judged_and_the_rest_is_listed(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    folder = zoo.convert(source, tmp_path / "canonical")
    shutil.rmtree(source)
    cert = zoo.verify(folder, write=False)
    assert [x.name for x in cert.levels] == ["plan"]
    text = " ".join(cert.not_checked)
    assert "bytes" in text and "logits" in text and "not there any more" in text


def test_a_family_without_upstream_says_what_it_was_not_compared_with(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "source")
    folder = zoo.convert(source, tmp_path / "canonical")
    config = json.loads((source / "config.json").read_text())
    # An architecture that transformers has no class for, though its files are llama's.
    (source / "config.json").write_text(
        json.dumps(config | {"architectures": ["LLaMAForCausalLM"], "model_type": "nobody"})
    )
    cert = zoo.verify(folder, write=False)
    assert any("upstream cannot run this" in text for text in cert.not_checked)
    assert cert.level("logits") is None


def test_another_checkpoint_of_the_same_shape_is_told_apart(tmp_path: Path) -> None:
    other = tiny.make("llama", tmp_path / "other", seed=1)
    cert = zoo.verify(canonical("llama"), against=other, level="logits", write=False)
    assert not cert.passed
    assert {x.name for x in cert.levels if x.verdict == "failed"} == {"bytes", "layers", "logits"}
    # Nothing explains it: what the config says and nobody read is all that is left to say.
    assert cert.diagnosis is not None
    none, unread = cert.diagnosis["suggestions"]
    assert none == "no single mistake of the catalogue explains it"
    assert unread.startswith("of the config, the family llama does not read ") and "architectures" in unread


def test_nan_fails(tmp_path: Path) -> None:
    def poison(s: zoo.verify.faults.Subject) -> zoo.verify.faults.Subject:  # type: ignore[name-defined]
        t = s.tensors["layers.2.mlp.down.weight"].clone()
        t[0, 0] = float("nan")
        return s.put({"layers.2.mlp.down.weight": t})

    cert = zoo.verify(rewrite(copy(canonical("llama"), tmp_path / "c"), poison), level="logits", write=False)
    assert {x.name for x in cert.levels if x.verdict == "failed"} == {"bytes", "layers", "logits"}
    assert cert.diagnosis is not None
    assert any("not finite" in text for text in cert.diagnosis["suggestions"])
    assert cert.diagnosis["where"] == "layer 2, feed-forward"


@pytest.mark.parametrize("stream", [False, True])
def test_one_expert_that_is_not_finite_is_found_without_guesses(stream: bool, tmp_path: Path) -> None:
    def poison(t: torch.Tensor) -> torch.Tensor:
        t[0, 0, 0] = float("nan")  # few tokens are routed to it
        return t

    folder = with_tensor(copy(canonical("qwen3_moe"), tmp_path / "c"), "layers.3.moe.down.weight", poison)
    found = zoo.verify(folder, level="logits", stream=stream, write=False).diagnosis
    assert found is not None and found["where"] == "layer 3, feed-forward"
    assert found["suggestions"] == ["layers.3.moe.down.weight holds numbers that are not finite"]


def test_nothing_to_compare_with_is_an_error_that_says_so() -> None:
    with pytest.raises(ZooError, match="no such file or folder to verify against"):
        zoo.verify(canonical("llama"), against="/nowhere/at/all")
    with pytest.raises(ZooError, match="unknown level 'all'; expected one of plan, bytes"):
        zoo.verify(canonical("llama"), level="all")


def test_a_level_that_is_asked_for_is_judged_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["zoo.verify.against"], "upstream_available", lambda: False)
    cert = zoo.verify(canonical("llama"), write=False)  # as far as can be judged here
    assert cert.passed and cert.not_checked == [
        "layers, logits, decode: transformers is not installed (pip install 'zoo-weights[upstream]')"
    ]
    for how in ({"level": "layers"}, {"level": "logits"}, {"level": "decode"}, {"self_test": True}):
        with pytest.raises(ZooError, match="can't be judged: transformers is not installed"):
            zoo.verify(canonical("llama"), write=False, **how)
    with pytest.raises(ZooError, match="the self-test compares logits"):
        zoo.verify(canonical("llama"), level="bytes", self_test=True, write=False)


def test_a_module_that_transformers_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = canonical("llama")
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(
        ZooError, match="transformers is installed, and cannot be imported: No module named 'no_such_module'"
    ):
        zoo.verify(folder, write=False)
    assert zoo.verify(folder, level="bytes", write=False).passed


def test_decoding_cannot_be_asked_for_while_streaming() -> None:
    with pytest.raises(ZooError, match="decode can't be judged: not done while streaming"):
        zoo.verify(canonical("llama"), level="decode", stream=True, write=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_judged_by_what_is_no_number(
    value: float, where: str, stream: bool, tmp_path: Path
) -> None:
    source = tiny.make("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[where][1, 3] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    cert = zoo.verify(zoo.convert(source, tmp_path / "canonical"), level="logits", stream=stream, write=False)
    assert cert.level("bytes").verdict == "passed" and cert.level("logits").verdict == "failed"
    assert "upstream itself gives values that are infinite" in " ".join(cert.level("logits").notes)
    assert cert.level("layers").verdict == ("passed" if where == "lm_head.weight" else "failed")
    assert any(c.why == "none: upstream's own values are not finite" for c in cert.level("logits").checks)
    assert cert.diagnosis is not None
    assert cert.diagnosis["where"].startswith("the final norm" if where == "lm_head.weight" else "layer 1")
    assert any("upstream itself gives" in text for text in cert.diagnosis["suggestions"])
    assert not cert.diagnosis["hypotheses"]


def test_experts_that_no_token_is_routed_to_are_counted(tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3", tmp_path / "hf")
    tensors = vendor.read_tensors(source)
    biases = [t for name, t in tensors.items() if name.endswith("e_score_correction_bias")]
    for bias in biases:
        bias[1] = -100.0  # and its group of two is never among the best
    write_tensors(source, tensors)
    cert = zoo.verify(zoo.convert(source, tmp_path / "zoo"), level="logits", write=False)
    assert cert.passed
    (said,) = (note for note in cert.level("logits").notes if "not run" in note)  # type: ignore[union-attr]
    assert said.startswith(f"{2 * len(biases)} of {sum(map(len, biases))} experts were not run")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "fp32"),
        ("kimi_linear", "fp32"),
        ("qwen3_moe", "bf16"),
        ("deepseek_v3", "bf16"),
        ("deepseek_v32", "bf16"),
        ("nemotron_h", "bf16"),
        ("llama", "bf16"),
    ],
)
def test_a_cache_that_counts_positions_wrongly_fails_decode_alone(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Context.begin

    def wrong(T: int, cache: Cache | None, dtype: torch.dtype, device: torch.device) -> Context:
        ctx = right(T, cache, dtype, device)
        if ctx.start > 0:
            ctx.positions = ctx.positions - 1
        return ctx

    monkeypatch.setattr(Context, "begin", wrong)
    folder = canonical(name) if dtype == "fp32" else canonical(name, "bfloat16")
    cert = zoo.verify(folder, dtype=dtype, write=False)
    assert [x.name for x in cert.levels if x.verdict == "failed"] == ["decode"]
    (check,) = (c for c in cert.levels[-1].checks if c.name.startswith("cached against uncached"))
    assert not check.passed


def test_what_decoding_rounds_otherwise_is_held_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # With a bound of nothing every rounding is beyond it, on any CPU.
    none = Bound(0.0, "nothing is within it")
    monkeypatch.setattr(sys.modules["zoo.verify.tolerance"], "logit_bound", lambda *_: none)
    cert = zoo.verify(canonical("llama"), write=False)
    check = cert.level("decode").checks[0]  # type: ignore[union-attr]
    assert check.why.startswith("from ours in float64: 2 x how far passes in fp32 are from that")
    assert check.passed and 0 < check.value < FLOOR_FP32


@pytest.mark.parametrize("name", ["glm4_moe_air", "kimi_k2"])
def test_in_fp16_a_token_of_other_experts_is_no_wrong_copy(name: str, tmp_path: Path) -> None:
    source = tiny.make(name, tmp_path / "hf", dtype="float16", seed=1)
    assert zoo.verify(zoo.convert(source, tmp_path / "zoo"), dtype="fp16", level="logits", write=False).passed


def test_heads_of_an_indexer_are_weighed_in_fp32_in_every_dtype() -> None:
    """Otherwise ours looks at other keys than the vendor's code, and upstream's in fp16, which was called a wrong copy."""
    folder = canonical("glm_moe_dsa_shared")
    assert zoo.verify(folder, dtype="fp16", level="logits", write=False).passed
    weights = zoo.load(folder, dtype=torch.float16).layers[0].attn.indexer.head_weights
    x = torch.randn(2, weights.weight.shape[1], dtype=torch.float16)
    assert weights.weight.dtype == torch.float32 and torch.equal(weights(x), x.float() @ weights.weight.T)


@pytest.mark.parametrize("name", ["phi3_short", "minicpm3"])
def test_a_text_that_crosses_longropes_border_is_judged_as_it_was_generated(name: str) -> None:
    """The angles of all its tokens are others then: both sides read it anew, and each token is judged by what was read when it came."""
    folder = canonical(name)
    decoder, upstream = zoo.load(folder), Transformers(folder.parent / f"{name}-float32-source")
    ids = torch.arange(7, 40)[None]
    (border,) = far_from(decoder.spec)
    tokens = upstream.greedy(ids, n=border - 20)
    assert tokens is not None and ids.shape[1] < border < ids.shape[1] + len(tokens)
    assert tokens.equal(judge.greedy_uncached(upstream, ids, len(tokens)))
    text = torch.cat([ids[0], tokens[:-1]])[None]
    assert judge.as_generated(Ours(decoder), text, ids.shape[1]).argmax(-1).equal(tokens)


def test_ours_in_float64_is_what_fp32_rounds() -> None:
    folder = canonical("qwen3_next")
    decoder, upstream = zoo.load(folder), Transformers(folder.parent / "qwen3_next-float32-source")
    ids = torch.arange(2, 42).view(2, 20)
    exact, rounded = logits_of(decoder, ids), decoder(ids)
    assert exact is not None and exact.dtype == torch.float64 and decoder.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    wide, theirs_rounded = InFloat64(upstream), upstream.run(ids, (20, 20))
    with wide:
        theirs = wide.run(ids, (20, 20))
    assert theirs.dtype == torch.float64 and 0 < (exact - rounded).abs().max()
    # Both widened are one to far below what fp32 can tell, and each one's fp32 is about as far from it. The median: one
    # token's choice of experts hangs by 1e-7 to 2e-5, and is made otherwise on one CPU or another.
    ours_off, theirs_off = (
        float((a - b).abs().amax(-1).median()) for a, b in ((exact, rounded), (theirs, theirs_rounded))
    )
    assert (exact - theirs).abs().max() < theirs_off / 4
    assert 0 < ours_off < 2 * theirs_off


@pytest.mark.parametrize("seed", [0, 3])
def test_some_tokens_of_other_experts_are_no_wrong_cache(seed: int, tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3_noqlora", tmp_path / "hf", dtype="bfloat16", seed=seed)
    assert zoo.verify(zoo.convert(source, tmp_path / "zoo"), dtype="bf16", write=False).passed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_of_many_logits_with_a_cache_those_are_compared_that_tell_most(dtype: str) -> None:
    states = torch.randn(2, 700, 8)
    other = states.clone()
    other[1, 333] += 1e-3
    at = judge._looked_at(states, other, judge.LOOKED_AT // 200, dtype).tolist()
    assert len(at) <= 100 and at == sorted(set(at)) and {0, *range(684, 700)} <= set(at)
    assert dtype != "fp32" or 333 in at
    assert judge._looked_at(states, other, 100, dtype).tolist() == list(range(700))
