"""The families without experts, at full size and in every spelling of their configs; no weight is made.

That their logits are upstream's is in `test_parity.py`.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from assemble import assemble
from safetensors.torch import load_file, save_file
from test_manifests import CONFIGS, COUNTS, TENSORS, expand, rounds_to

from zoo import families, manifest
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.formats.base import Checkpoint, TensorRef
from zoo.layout import active_params, layout, total_params
from zoo.mapping.plan import Match, make_plan, match
from zoo.spec import Attention, MoE, Spec

FAMILIES = ("gpt2", "llama", "mistral", "qwen3", "smollm3", "olmo2", "olmo3", "gemma3", "gemma3n", "grok2")
VARIANTS = [v.name for v in tiny.VARIANTS.values() if v.family in FAMILIES]


def read(stem: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{stem}.config.json").read_text(encoding="utf-8"))
    return config


def family_of(config: dict[str, Any]) -> str | None:
    try:
        return families.find(config).name
    except ZooError:
        return None


STEMS = [
    stem
    for stem in sorted(p.name.removesuffix(".config.json") for p in CONFIGS.glob("*.config.json"))
    if family_of(read(stem)) in FAMILIES
]
RELEASES = [(m.name, m.params_total) for m in manifest.load_all() if m.family in FAMILIES and m.config]


def refs(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorRef]:
    return {name: TensorRef(name, dtype, shape, "f", 0, 0) for name, (dtype, shape) in tensors.items()}


def account(
    config: dict[str, Any], tensors: dict[str, TensorRef], naming: str = "hf", n_ranks: int = 1
) -> Match:
    """The rules' account of `tensors`: nothing may be left over or missing."""
    family = families.find(config)
    m = match(
        family.spec(families.Config(config)), family.rules[naming], tensors, n_ranks, naming, None, config
    )
    assert not m.missing
    assert not m.unexpected
    assert not m.problems
    return m


# ------------------------------------------------------------------------------------ real releases


def test_every_dense_release_has_its_config_here() -> None:
    assert len(STEMS) >= 36
    assert {family_of(read(stem)) for stem in STEMS} == set(FAMILIES)


@pytest.mark.parametrize("stem", STEMS)
def test_the_spec_has_exactly_the_parameters_that_upstreams_class_has(stem: str) -> None:
    spec = families.spec_of(read(stem))
    if spec.family == "grok2":  # upstream has no class; the released tensors were counted instead
        assert total_params(spec) == 269_515_497_472
        return
    assert total_params(spec) == active_params(spec) == COUNTS[stem]["total"]
    assert spec.tied == COUNTS[stem]["tied"]


@pytest.mark.parametrize(("name", "published"), RELEASES)
def test_the_published_figure_is_the_counted_one_rounded(name: str, published: int | None) -> None:
    m = manifest.find(name)
    assert m.config is not None
    spec = families.spec_of(m.config)
    if published is None:
        return
    counted, embedding = total_params(spec), spec.vocab_size * spec.d_model
    towers = (
        1.4 if m.params_convention else 1.0
    )  # a publisher may count the vision tower: the manifest says so
    assert any(rounds_to(counted - k * embedding, published, 0.025) for k in range(3)) or (
        counted <= published <= towers * counted
    )


@pytest.mark.parametrize("stem", [s for s in STEMS if s != "grok-2"])
def test_the_rules_account_for_every_tensor_of_the_release(stem: str) -> None:
    config = read(stem)
    released = tiny.released_tensors(config, quantised="quantization_config" in config)
    tensors = refs({name: (t.dtype, t.shape) for name, t in released.items()})
    families.families()
    start = time.perf_counter()
    m = account(config, tensors)
    assert time.perf_counter() - start <= 3.0
    used = {name for o in m.outputs.values() for name in o.sources}
    assert used | set(m.extras) == set(tensors)
    assert not used & set(m.extras)
    assert all(m.extras.values())


@pytest.mark.parametrize(
    ("listed", "stem"),
    [
        ("devstral-small-2507", "mistral-small-3.1-24b-instruct"),
        ("gemma3-27b-wrapper", "gemma3-27b-it"),
        ("qwen3-8b-fp8", "qwen3-8b-fp8"),
        ("smollm3-3b", "smollm3-3b"),
        ("grok-2", "grok-2"),
    ],
)
def test_the_rules_account_for_the_tensors_listed_in_the_releases_own_files(listed: str, stem: str) -> None:
    config = read(stem)
    patterns = json.loads((TENSORS / f"{listed}.tensors.json").read_text(encoding="utf-8"))["patterns"]
    names = {name: kind for pattern, kind in patterns.items() for name in expand(pattern)}
    spec = families.spec_of(config)
    if all(names.values()):
        account(config, refs({n: (dtype, tuple(shape)) for n, (dtype, shape) in names.items()}))
    else:  # names only: shapes are taken from what the rules expect
        m = match(spec, families.find(config).rules["hf"], refs(dict.fromkeys(names, ("BF16", ()))))
        assert not m.missing and not m.unexpected


def test_grok_2_is_put_together_from_its_eight_ranks() -> None:
    """Experts once per rank, cut by rows (w1, w3) and columns (w2); everything else whole."""
    config = read("grok-2")
    patterns = json.loads((TENSORS / "grok-2.tensors.json").read_text(encoding="utf-8"))["patterns"]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for pattern, (dtype, shape) in patterns.items():
        for name in expand(pattern):
            if ".experts." not in name:
                tensors[name] = (dtype, tuple(shape))
                continue
            rows, columns = shape
            piece = (rows, columns // 8) if ".w2." in name else (rows // 8, columns)
            tensors |= {f"rank{r}.{name}": (dtype, piece) for r in range(8)}
    account(config, refs(tensors), n_ranks=8)


# ------------------------------------------------------------------------------- spellings of configs


@functools.cache
def saved(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tiny.make(name, Path(folder) / name)
        config: dict[str, Any] = json.loads((Path(folder) / name / "config.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("name", VARIANTS)
def test_released_keys_and_resaved_keys_say_the_same(name: str) -> None:
    new, old = saved(name), tiny.released_config(saved(name))
    assert new != old
    specs = [replace(families.spec_of(c), dtype=None) for c in (new, old)]  # gpt2's releases name no dtype
    assert specs[0] == specs[1]


def attention(spec: Spec, layer: int) -> Attention:
    mixer = spec.layers[layer].mixer
    assert isinstance(mixer, Attention)
    return mixer


def test_gemma_3_as_released_in_march_2025_leaves_out_the_class_defaults() -> None:
    text = {
        "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_hidden_layers": 62,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "model_type": "gemma3_text",
    }  # fmt: skip
    first = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    now = families.spec_of(read("gemma3-27b-it"))
    assert replace(families.spec_of(first), dtype=None) == replace(now, dtype=None)


def test_gemma_3s_pattern_is_read_under_its_public_and_its_private_name() -> None:
    config = read("gemma3-1b-it")
    assert config.pop("sliding_window_pattern") == 6
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        spec = families.spec_of({**config, key: 4})
        assert [attention(spec, i).window is None for i in range(8)] == [False, False, False, True] * 2


def test_full_layers_alone_are_scaled_where_the_others_have_a_theta_of_their_own() -> None:
    spec = families.spec_of(read("gemma3-4b-it"))
    sliding, full = attention(spec, 0).rope, attention(spec, 5).rope
    assert sliding is not None and full is not None
    assert (sliding.theta, sliding.scaling) == (1e4, None)
    assert full.theta == 1e6 and full.scaling is not None and full.scaling.factor == 8.0
    spec = families.spec_of(read("olmo3-7b"))
    sliding, full = attention(spec, 0).rope, attention(spec, 3).rope
    assert sliding is not None and full is not None
    assert (sliding.theta, sliding.scaling, full.theta) == (5e5, None, 5e5)
    assert full.scaling is not None and full.scaling.attention_factor == 1.2079441541679836


def test_llama_2_configs_leave_theta_out() -> None:
    config = read("llama-3.1-8b")
    del config["rope_theta"], config["rope_scaling"]
    rope = attention(families.spec_of(config), 0).rope
    assert rope is not None and rope.theta == 10000.0


def test_a_wrapper_decides_on_the_head_before_its_text_model() -> None:
    config = read("ministral3-3b")
    assert families.spec_of(config).tied
    assert not families.spec_of({**config, "tie_word_embeddings": False}).tied


@pytest.mark.parametrize(("name", "tied"), [("mistral3", False), ("mistral3_ministral3", True)])
def test_where_a_wrapper_says_nothing_the_files_decide_on_the_head(
    name: str, tied: bool, tmp_path: Path
) -> None:
    tiny.make(name, tmp_path / name)
    path = tmp_path / name / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    path.write_text(json.dumps(config), encoding="utf-8")
    assert make_plan(open_checkpoint(tmp_path / name)).spec.tied is tied


def test_the_text_model_decides_which_family_a_shared_wrapper_is_of() -> None:
    names = {
        stem: families.find(read(stem)).name
        for stem in ("mistral-small-3.1-24b-instruct", "ministral3-8b", "mistral-small-4-119b")
    }
    assert list(names.values())[:2] == ["mistral", "mistral"]
    assert names["mistral-small-4-119b"] != "mistral"


# --------------------------------------------------------------------------------------- other namings


def gguf(config: dict[str, Any]) -> dict[str, TensorRef]:
    """llama.cpp's names and shapes of a model that has these sizes (gguf-py's constants.py)."""
    spec = families.spec_of(config)
    norm = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    post = {"attn_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm"}
    out = {"token_embd.weight": (spec.vocab_size, spec.d_model), "output_norm.weight": (spec.d_model,)}
    if not spec.tied:
        out["output.weight"] = (spec.vocab_size, spec.d_model)
    for i, layer in enumerate(spec.layers):
        a, blk, d = attention(spec, i), f"blk.{i}.", spec.d_model
        ffn = layer.ffn
        assert ffn is not None and not isinstance(ffn, MoE)
        shapes = {
            "attn_q": (a.n_heads * a.head_dim, d), "attn_k": (a.n_kv_heads * a.head_dim, d),
            "attn_v": (a.n_kv_heads * a.head_dim, d), "attn_output": (d, a.n_heads * a.head_dim),
            "ffn_gate": (ffn.d_ff, d), "ffn_up": (ffn.d_ff, d), "ffn_down": (d, ffn.d_ff),
        }  # fmt: skip
        if a.qk_norm:
            shapes |= {"attn_q_norm": (a.head_dim,), "attn_k_norm": (a.head_dim,)}
        shapes |= {theirs: (d,) for ours, theirs in (norm | post).items() if getattr(layer, ours)}
        out |= {f"{blk}{name}.weight": shape for name, shape in shapes.items()}
    return refs({name: ("F32", shape) for name, shape in out.items()})


@pytest.mark.parametrize(
    "stem", ["llama-3.2-1b-instruct", "llama-3.1-8b", "qwen3-8b", "gemma3-270m", "gemma3-1b-it"]
)
def test_the_rules_account_for_llama_cpps_names(stem: str) -> None:
    account(read(stem), gguf(read(stem)), "gguf")


def test_a_gguf_of_llama_3_holds_its_rotary_factors_beside_the_weights() -> None:
    config = read("llama-3.1-8b")
    tensors = gguf(config) | refs({"rope_freqs.weight": ("F32", (64,))})
    assert list(account(config, tensors, "gguf").extras) == ["rope_freqs.weight"]


def test_gemmas_norms_are_plain_where_the_file_holds_one_plus_w() -> None:
    config = read("gemma3-1b-it")
    assert families.spec_of(config).norm.weight == "plus_one"
    stored = families.spec_of({**config, "norm_weight_plus_one": True})
    assert {n.weight for la in stored.layers for n in (la.attn_norm, la.ffn_post_norm) if n} == {"plain"}
    assert stored.norm.weight == "plain"


def test_norms_that_came_as_one_plus_w_have_no_form_in_hugging_faces_files() -> None:
    """Writing them out as w would be wrong, and 1 + w - 1 is not w to the bit."""
    config = read("gemma3-1b-it")
    tensors = refs({n: (t.dtype, t.shape) for n, t in tiny.released_tensors(config).items()})
    spec = families.spec_of({**config, "norm_weight_plus_one": True})
    m = match(spec, families.get("gemma3").rules["hf"], tensors)
    assert any("norm.weight: no rule of this family fills it" in problem for problem in m.problems)


def meta(config: dict[str, Any], n: int, by_rows: bool) -> dict[str, TensorRef]:
    """The names and slices of Meta's own files for n model-parallel ranks (its llama-models code)."""
    spec = families.spec_of(config)
    a, d, v = attention(spec, 0), spec.d_model, spec.vocab_size
    ffn = spec.layers[0].ffn
    assert ffn is not None and not isinstance(ffn, MoE)
    q, k, f = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim, ffn.d_ff
    one = {"norm.weight": (d,), "output.weight": (v // n, d)}
    one["tok_embeddings.weight"] = (v // n, d) if by_rows else (v, d // n)
    for i in range(spec.n_layers):
        layer = f"layers.{i}."
        one |= {
            layer + "attention.wq.weight": (q // n, d), layer + "attention.wk.weight": (k // n, d),
            layer + "attention.wv.weight": (k // n, d), layer + "attention.wo.weight": (d, q // n),
            layer + "feed_forward.w1.weight": (f // n, d), layer + "feed_forward.w3.weight": (f // n, d),
            layer + "feed_forward.w2.weight": (d, f // n),
            layer + "attention_norm.weight": (d,), layer + "ffn_norm.weight": (d,),
        }  # fmt: skip
    one["rope.freqs"] = (a.head_dim // 2,)
    return refs({f"rank{r}.{name}": ("BF16", shape) for r in range(n) for name, shape in one.items()})


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("vocab_size", [32000, 128256])
def test_the_rules_account_for_metas_files_of_any_number_of_ranks(n: int, vocab_size: int) -> None:
    """Llama 3 cuts the embedding by rows of the vocabulary, Llama 2 by columns."""
    config = {**read("llama-3.1-8b"), "vocab_size": vocab_size}
    account(config, meta(config, n, by_rows=vocab_size == 128256), "meta", n)


def test_the_rules_account_for_a_dense_model_in_mistrals_own_names() -> None:
    config = read("mistral-7b-v0.3")
    tensors = {name.removeprefix("rank0."): t for name, t in meta(config, 1, by_rows=True).items()}
    del tensors["rope.freqs"]
    assert not account(config, tensors, "mistral").extras
    config = read("mistral-small-3.1-24b-instruct")
    tensors = {name.removeprefix("rank0."): t for name, t in meta(config, 1, by_rows=True).items()}
    del tensors["rope.freqs"]
    vision = (
        "vision_encoder.patch_conv.weight",
        "vision_language_adapter.w_in.weight",
        "patch_merger.merging_layer.weight",
    )
    tensors |= refs(dict.fromkeys(vision, ("BF16", (2, 2))))
    assert set(account(config, tensors, "mistral").extras) == set(vision)


# --- the same bytes, whatever the naming


def in_other_names(
    folder: Path, tensors: dict[str, torch.Tensor], naming: str, n_ranks: int = 1
) -> Checkpoint:
    """A checkpoint of these tensors with the config of `folder`, as a reader of that naming would open it."""
    new = folder.with_name(f"{folder.name}-{naming}{n_ranks}")
    new.mkdir()
    (new / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, new / "model.safetensors")
    return replace(open_checkpoint(new), naming=(naming,), n_ranks=n_ranks)


def interleaved(t: torch.Tensor, heads: int) -> torch.Tensor:
    """Half-split RoPE rows -> neighbouring pairs (the inverse of what Meta's releases went through)."""
    first, second = t.unflatten(0, (heads, -1)).chunk(2, dim=1)
    return torch.stack((first, second), dim=2).flatten(0, 2)


META = {
    "model.embed_tokens": ("tok_embeddings", 0), "model.norm": ("norm", None), "lm_head": ("output", 0),
    "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
}  # fmt: skip


def metas(hf: dict[str, torch.Tensor], a: Attention, n: int) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors -> Meta's of n ranks, the embedding cut by columns (small vocabulary)."""
    out = {}
    for name, t in hf.items():
        stem = name.removesuffix(".weight")
        layer = stem.split(".")[2] if ".layers." in stem else None
        theirs, axis = META[stem if layer is None else stem.split(".", 3)[3]]
        if theirs in ("attention.wq", "attention.wk"):
            t = interleaved(t, a.n_heads if theirs == "attention.wq" else a.n_kv_heads)
        if theirs == "tok_embeddings":
            axis = 1
        full = f"{theirs}.weight" if layer is None else f"layers.{layer}.{theirs}.weight"
        pieces = [t] * n if axis is None else t.chunk(n, dim=axis)
        out |= {f"rank{r}.{full}": piece for r, piece in enumerate(pieces)}
    return out


def llama_cpps(hf: dict[str, torch.Tensor], a: Attention, permuted: bool) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors -> llama.cpp's."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    } | {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}  # fmt: skip
    four_norms = any("pre_feedforward" in name for name in hf)
    names["post_attention_layernorm"] = "post_attention_norm" if four_norms else "ffn_norm"
    out = {}
    for name, t in hf.items():
        stem, kind = name.rsplit(".", 1)
        layer = stem.split(".")[2] if ".layers." in stem else None
        theirs = names[stem if layer is None else stem.split(".", 3)[3]]
        if permuted and theirs in ("attn_q", "attn_k"):
            t = interleaved(t, a.n_heads if theirs == "attn_q" else a.n_kv_heads)
        out[f"{theirs}.{kind}" if layer is None else f"blk.{layer}.{theirs}.{kind}"] = t
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def with_even_vocabulary(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The checkpoint without its last token: 131 of them do not split over ranks."""
    path = folder / "model.safetensors"
    tensors = {k: t[:130].clone() if t.shape[0] == 131 else t for k, t in load_file(path).items()}
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 130}), encoding="utf-8")
    return folder, tensors


@pytest.mark.parametrize("n", [1, 2])
def test_metas_files_of_any_number_of_ranks_give_the_same_canonical_bytes(n: int, tmp_path: Path) -> None:
    folder, tensors = with_even_vocabulary(tiny.make("llama", tmp_path / "llama"))
    a = attention(make_plan(open_checkpoint(folder)).spec, 0)
    assert same(assemble(in_other_names(folder, metas(tensors, a, n), "meta", n)), assemble(folder))


def test_a_dense_model_in_mistrals_own_names_gives_the_same_canonical_bytes(tmp_path: Path) -> None:
    folder = tiny.make("mistral", tmp_path / "mistral")
    a = attention(make_plan(open_checkpoint(folder)).spec, 0)
    theirs = metas(load_file(folder / "model.safetensors"), a, 1)
    theirs = {name.removeprefix("rank0."): t for name, t in theirs.items()}
    assert same(assemble(in_other_names(folder, theirs, "mistral")), assemble(folder))


@pytest.mark.parametrize(
    ("name", "permuted"),
    [("llama", True), ("llama_tied", True), ("llama_bias", True), ("qwen3", False), ("gemma3", False)],
)
def test_llama_cpps_names_give_the_same_canonical_bytes(name: str, permuted: bool, tmp_path: Path) -> None:
    """Its llama files hold rows of q and k in pairs; those of architectures it rotates in halves do not."""
    folder = tiny.make(name, tmp_path / name)
    a = attention(make_plan(open_checkpoint(folder)).spec, 0)
    theirs = llama_cpps(load_file(folder / "model.safetensors"), a, permuted)
    assert same(assemble(in_other_names(folder, theirs, "gguf")), assemble(folder))


# -------------------------------------------------------------------------------------- what is refused


def edited(stem: str, **changes: Any) -> dict[str, Any]:
    """A release's config with some fields changed, in its text model if it is a wrapper."""
    config = read(stem)
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


REFUSED = [
    ("llama-3.1-8b", {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_type is 'longrope'"),
    ("llama-3.1-8b", {"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "rope_type is 'dynamic'"),
    ("llama-3.1-8b", {"rope_scaling": {"rope_type": "llama3"}}, "'factor' is missing"),
    ("llama-3.1-8b", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
    ("llama-3.1-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama-3.1-8b", {"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
    ("smollm2-135m", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("mistral-7b-v0.3", {"attention_bias": True}, "attention_bias is True"),
    ("mistral-7b-v0.3", {"layer_types": ["chunked_attention"] * 32}, "layer_types[0] is 'chunked_attention'"),
    ("mistral-7b-v0.3", {"layer_types": ["sliding_attention"] * 32}, "sliding_window is null"),
    ("mistral-small-3.1-24b-instruct", {"model_type": "mixtral"}, "model_type is 'mixtral'"),
    ("qwen3-8b", {"use_sliding_window": True, "max_window_layers": 28}, "'sliding_window' is missing"),
    ("qwen3-8b", {"layer_types": ["full_attention"] * 3}, "layer_types should list 36 layers"),
    ("qwen3-8b", {"layer_types": ["sliding_attention"] * 36}, "use_sliding_window is False"),
    (
        "mistral-7b-v0.3",
        {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 16},
        "is the model_type ministral?",
    ),
    ("smollm3-3b", {"no_rope_layers": [2] * 36}, "no_rope_layers[0] is 2"),
    ("olmo2-7b", {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
    ("olmo3-7b", {"layer_types": ["linear_attention"] * 32}, "layer_types[0] is 'linear_attention'"),
    ("gemma3-27b-it", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("gemma3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma3-27b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3n-e2b", {"altup_active_idx": 1}, "altup_active_idx is 1"),
    ("gemma3n-e2b", {"attention_bias": True}, "attention_bias is True"),
    ("gemma3n-e2b", {"num_kv_shared_layers": 27}, "shares keys and values"),
    ("glm-4.5", {"partial_rotary_factor": 1.5}, "RoPE would rotate 192 of 128 channels"),
    (
        "deepseek-v3",
        {"n_group": 256, "topk_group": 4},
        "groups of 1 experts cannot be judged by their best 2",
    ),
    ("grok-2", {"rope_type": "yarn"}, "rope_type is 'yarn'"),
    ("grok-2", {"residual_moe": False}, "residual_moe is False"),
    ("grok-2", {"sliding_window_size": 4096}, "sliding_window_size is 4096"),
]


@pytest.mark.parametrize(
    ("stem", "changes", "says"), REFUSED, ids=[f"{s}-{next(iter(c))}" for s, c, _ in REFUSED]
)
def test_what_a_family_cannot_do_is_refused_by_name(stem: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ZooError) as error:
        families.spec_of(edited(stem, **changes), where=f"{stem}/config.json")
    assert says in str(error.value)
    assert str(error.value).startswith(f"{stem}/config.json")


def test_what_is_left_out_is_what_upstream_takes_it_for() -> None:
    """Fields that no tensor's shape shows, whose defaults upstream's classes have."""

    def without(name: str, key: str, **more: Any) -> dict[str, Any]:
        config = json.loads(json.dumps(manifest.find(name).config))
        for c in (config, config.get("text_config", {})):
            c.pop(key, None)
        return config | more

    def value_scales(config: dict[str, Any]) -> set[float]:
        return {layer.mixer.value_scale for layer in families.spec_of(config).layers}

    assert value_scales(without("mimo-v2-flash", "attention_value_scale")) == {0.707}
    assert value_scales(without("mimo-v2-flash", "", attention_value_scale=None)) == {1.0}
    whole = families.spec_of(without("gemma-3n-e4b", ""))
    assert families.spec_of(without("gemma-3n-e4b", "num_kv_shared_layers")) == whole
    assert families.spec_of(without("gemma-3n-e4b", "final_logit_softcapping")) == whole
    # An explicit null is no, where a field that is absent is yes.
    interleaved = [
        families.spec_of(without("deepseek-v3", "rope_interleave", **more)).layers[0].mixer.rope.interleaved
        for more in ({}, {"rope_interleave": None}, {"rope_interleave": False})
    ]
    assert interleaved == [True, False, False]
    scaled = without("gpt-oss-20b", "")
    scaled["rope_scaling"]["truncate"] = None
    assert families.spec_of(scaled) == families.spec_of(without("gpt-oss-20b", ""))  # which says false
    for name in ("gpt-oss-20b", "ministral-3-3b", "mistral-small-4-119b"):
        config = without(name, "rope_scaling")
        for c in (config, config.get("text_config", {})):
            c.pop("rope_parameters", None)
            c["rope_theta"] = 10000.0
        with pytest.raises(ZooError, match="none of the fields 'rope_parameters', 'rope_scaling' is there"):
            families.spec_of(config)


def test_mistrals_window_must_be_written() -> None:
    config = read("mistral-7b-v0.3")
    del config["sliding_window"]
    with pytest.raises(ZooError, match="sliding_window"):
        families.spec_of(config)
    windows = {
        a.window
        for i in range(32)
        if (a := attention(families.spec_of({**config, "sliding_window": 4096}), i))
    }
    assert windows == {4096}


def test_unread_keys_and_values_are_set_aside_only_where_a_layer_takes_anothers() -> None:
    """Gemma 3n's releases hold k and v of the sharing layers; those of any other layer are used."""
    config = read("gemma3n-e2b")
    tensors = refs({n: (t.dtype, t.shape) for n, t in tiny.released_tensors(config).items()})
    m = account(config, tensors)
    unread = {n for n in m.extras if ".self_attn." in n}
    assert {int(n.split(".")[3]) for n in unread} == set(range(20, 30))
    assert {n.split(".")[5] for n in unread} == {"k_proj", "v_proj", "k_norm"}


@pytest.mark.parametrize("stem", ["llama-3.1-8b", "qwen3-8b", "gemma3-27b-it", "olmo2-7b"])
def test_a_layer_that_the_config_does_not_have_is_not_set_aside_silently(stem: str) -> None:
    config = read(stem)
    released = refs({n: (t.dtype, t.shape) for n, t in tiny.released_tensors(config).items()})
    n = families.spec_of(config).n_layers
    shorter = edited(stem, num_hidden_layers=n - 1)
    if "layer_types" in (text := shorter.get("text_config", shorter)):
        text["layer_types"] = text["layer_types"][: n - 1]
    family = families.find(shorter)
    m = match(families.spec_of(shorter), family.rules["hf"], released)
    assert m.unexpected and all(f"layers.{n - 1}." in name for name in m.unexpected)


def test_a_layout_has_a_rule_for_each_of_its_tensors_and_no_rule_is_dead() -> None:
    """Over all variants and releases of a family, every Hugging Face rule is used by some layout."""
    specs = [families.spec_of(read(s)) for s in STEMS] + [families.spec_of(saved(v)) for v in VARIANTS]
    for name in FAMILIES:
        keys = {slot.key for s in specs if s.family == name for slot in layout(s).values()}
        rules = set(families.get(name).rules["hf"].by_key)
        assert keys <= rules
        optional = {k for k in rules if k.endswith(".bias")} | {"head.weight"}
        assert rules - keys <= optional | {"layers.{i}.attn.q_norm.weight", "layers.{i}.attn.k_norm.weight"}
