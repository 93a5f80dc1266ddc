"""What every family is held to, as a class of tests that a family's test module subclasses with its case.

    class TestMyFamily(FamilySuite):
        case = CASE

Tests with the argument `variant` run once per variant of the case, those with `stem` once per config of a release.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo import families, manifest
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.layout import active_params, layout, total_params
from zoo.mapping.execute import convert
from zoo.mapping.export import export
from zoo.mapping.plan import Plan, make_plan
from zoo.mapping.rules import Box
from zoo.model import Decoder
from zoo.model.load import train
from zoo.model.rope import far_from
from zoo.spec import Spec

from . import build, full_size, gguf, names, released
from .assemble import assemble, view
from .built import Built, built, checkpoint, decoder
from .case import FamilyCase, Gguf
from .gradients import furthest, gradients, unreached
from .rounding import agree, sums_as_upstream
from .variant import Variant

# Constants of the architectures, and the values that class defaults and releases have for them. At least one
# variant of each family has something else, so code that carries one instead of reading it is caught.
DEFAULTS: dict[str, set[Any]] = {
    "rms_norm_eps": {1e-5, 1e-6},
    "layer_norm_epsilon": {1e-5},
    "rope_theta": {1e4, 5e4, 1e5, 1.5e5, 5e5, 1e6, 2e6, 5e6, 1e7, 1e8, 1e9},
    "alpha": {1000, 100000},
    "factor": {8, 16, 32, 36, 40, 64, 128},
    "low_freq_factor": {1},
    "high_freq_factor": {1, 4},
    "original_max_position_embeddings": {4096, 8192, 16384},
    "beta_fast": {32},
    "beta_slow": {1},
    "mscale": {1},
    "mscale_all_dim": {1},
    "attention_factor": {1.2079441541679836, 1.3465735902799727},
    "truncate": {True},
    "llama_4_scaling_beta": {0.1},
    "partial_rotary_factor": {1, 0.25, 0.334},
    "sliding_window": {128, 129, 512, 1024, 4096, 32768},
    "attention_chunk_size": {8192},
    "floor_scale": {8192},
    "attn_scale": {0.1},
    "query_pre_attn_scalar": {256, 168, 128},
    "final_logit_softcapping": {30, 50},
    "attention_value_scale": {0.707},
    "routed_scaling_factor": {1, 2.5, 2.446, 2.827},
    "num_experts_per_tok": {1, 4, 6, 8, 10},
    "top_k_experts": {8},
    "topk_group": {4, 8},
    "index_topk": {2048},
    "swiglu_limit": {7},
    "swiglu_alpha": {1.702},
    "time_step_min": {0.001},
    "conv_kernel": {4},
    "linear_conv_kernel_dim": {4},
    "activation_sparsity_pattern": {0.95},
    "altup_num_inputs": {4},
    "laurel_rank": {64},
}

# A wrong value for each constant that can change without changing a shape: what code would have that does not
# read it. The change of the logits is what a test of that code would see.
WRONG: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "factor": 32.0,
    "alpha": 1000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "attention_factor": 1.3465735902799727,
    "truncate": True,
    "llama_4_scaling_beta": 0.1,
    "sliding_window": 4096,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": False,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": 30.0,
    "attention_value_scale": 0.707,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 1,
    "top_k_experts": 1,
    "index_topk": 2048,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "scale_attn_by_inverse_layer_idx": False,
}


# Fields of a GGUF that converters of several years write beside the rest, and that change nothing.
SILENT: dict[str, Any] = {
    "attention.causal": True, "logit_scale": 1.0, "pooling_type": 0, "rope.scaling.finetuned": False, "vocab_size": 131,
    "rope.scaling.attn_factor": 1.0, "tensor_data_layout": "Meta AI original pth", "attention.scale": 0.0,
    "nextn_predict_layers": 0,
}  # fmt: skip


def of_the_models(test: Callable[..., None]) -> Callable[..., None]:
    """A test that holds no code of zoo: it shows that the test models can show what other tests ask of them. Its answer
    changes with the case and with transformers alone."""
    test.asks = "models"  # type: ignore[attr-defined]
    return test


def of_the_first(test: Callable[..., None]) -> Callable[..., None]:
    """A test that asks the same of every variant, or of every config: one of them shows most of it."""
    test.asks = "first"  # type: ignore[attr-defined]
    return test


def left_to_proofs(test: Callable[..., None]) -> Callable[..., None]:
    """A test of which tests/ asks a few families that have all the parts it depends on."""
    test.asks = "proofs"  # type: ignore[attr-defined]
    return test


def is_proof(item: pytest.Item) -> bool:
    """Whether a test of a suite may be left to the time when its family is proven (`make prove`), rather than run after
    every change of any code: those of the models, and those that the family's main variant, or its shallowest config of
    a kind (quantised, with prediction layers, within a larger model), answers first."""
    asks = getattr(getattr(item, "function", None), "asks", None)
    if asks != "first":
        return asks in ("models", "proofs")
    given = item.callspec.params  # type: ignore[attr-defined]
    case: FamilyCase = item.cls.case  # type: ignore[attr-defined]
    if "variant" in given:
        return bool(given["variant"] != case.main_variant)
    return given["stem"] not in _shallowest(case.name)


@functools.cache
def _shallowest(family: str) -> frozenset[str]:
    """Of the family's configs of each kind, the one with the fewest layers."""
    found: dict[tuple[bool, ...], tuple[int, str]] = {}
    for stem in full_size.stems().get(family, ()):
        config = full_size.read(stem)
        kind = tuple(
            bool(config.get(k)) for k in ("quantization_config", "num_nextn_predict_layers", "text_config")
        )
        this = families.spec_of(config).n_layers, stem
        found[kind] = min(found.get(kind, this), this)
    return frozenset(stem for _, stem in found.values())


class FamilySuite:
    """The tests of one family. Subclasses set `case`. `is_proof` says which need not run after every change."""

    case: FamilyCase

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        case, wanted = self.case, metafunc.fixturenames
        if "variant" in wanted:
            # One process makes all of a variant's checkpoints: see `built`.
            each = [pytest.param(v, id=v.name, marks=pytest.mark.xdist_group(v.name)) for v in case.variants]
            metafunc.parametrize("variant", each)
        if "stem" in wanted:
            metafunc.parametrize("stem", full_size.stems().get(case.name, ()))
        if "of" in wanted:
            metafunc.parametrize("of", case.gguf, ids=[g.arch for g in case.gguf])
        if "listed" in wanted:
            metafunc.parametrize("listed", sorted(case.listed))
        if "release" in wanted:
            mine = [m for m in manifest.load_all() if m.family == case.name and m.config]
            metafunc.parametrize("release", mine, ids=[m.name for m in mine])
        if "says" in wanted:
            ids = [f"{stem}-{next(iter(changes))}" for stem, changes, _ in case.refused]
            metafunc.parametrize(("stem_of", "changes", "says"), case.refused, ids=ids)

    @pytest.fixture(autouse=True)
    def quiet(self) -> Iterator[None]:
        """One thread, and nothing from transformers but its errors."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    def sides(self, variant: Variant, dtype: str = "float32") -> Built:
        return built(self.case, variant, dtype)

    def reference(self, variant: Variant) -> torch.Tensor:
        """Upstream's logits [B, T, V]."""
        return self.sides(variant).upstream["eager"]

    @pytest.fixture
    def tensor_lists(self, request: pytest.FixtureRequest) -> Path:
        """The folder of the tensor lists of real files, and of upstream's counts."""
        return request.config.rootpath / "tests" / "data" / "tensors"

    @pytest.fixture
    def counts(self, tensor_lists: Path) -> dict[str, Any]:
        """Config stem -> what `full_size.upstream_count` says of it, as `tests/prove.py` wrote it down."""
        found: dict[str, Any] = json.loads((tensor_lists / "counts.json").read_text(encoding="utf-8"))
        return found

    # --- the checkpoints: complete, away from every default, and saying what upstream says -----------------------

    @of_the_models
    def test_upstream_loads_it_and_its_logits_spread(self, variant: Variant) -> None:
        ids, out = build.tokens(variant), self.reference(variant)
        assert out.shape == (2, variant.seq_len, variant.vocab_size)
        assert out.isfinite().all()
        assert 3 < out.abs().max() < 30
        assert out.std(-1).min() > 0.5, "some position has nothing to say"
        assert out.std((0, 1)).min() > 0.3, "some token's logit hardly depends on the input"
        # What came through the files is what was built.
        model = build.corrected(self.case, build.perturbed(variant))
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")
        assert (build.logits(model, ids) - out).abs().max() < 5e-5

    @of_the_models
    def test_upstream_decodes_as_it_prefills_where_the_variant_does_not_say_otherwise(
        self, variant: Variant
    ) -> None:
        model, ids = build.upstream(self.case, checkpoint(self.case, variant)), build.tokens(variant)
        n = ids.shape[1] - 3
        with torch.inference_mode():
            cache = model(input_ids=ids[:, :n], use_cache=True).past_key_values
            steps = [
                model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                for i in range(n, ids.shape[1])
            ]
        difference = (torch.cat(steps, 1) - self.reference(variant)[:, n:]).abs().max()
        assert difference > 0.5 if variant.decodes_otherwise else difference < 5e-5

    @of_the_models
    def test_every_parameter_and_persistent_buffer_is_moved_from_its_initial_value(
        self, variant: Variant
    ) -> None:
        initial, moved = build.fresh(variant).state_dict(), build.perturbed(variant).state_dict()
        assert initial.keys() == moved.keys()
        # Of whole numbers some are the same again: one expert in so many is the first.
        most = {k: 0.01 if t.is_floating_point() else 0.5 for k, t in moved.items()}
        still = [k for k in moved if (initial[k] == moved[k]).float().mean() > most[k]]
        assert not still

    @of_the_models
    def test_a_seed_gives_the_same_bytes_again_and_another_seed_others(
        self, variant: Variant, tmp_path: Path
    ) -> None:
        def digest(path: Path) -> dict[str, str]:
            return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir()}

        torch.rand(7)  # the state of the global generator must not matter
        assert digest(build.make(self.case, variant, tmp_path / "again")) == digest(
            checkpoint(self.case, variant)
        )
        one, other = (build.perturbed(variant, seed).state_dict() for seed in (0, 1))
        assert not [k for k in one if torch.equal(one[k], other[k])]

    @of_the_models
    def test_shards_hold_the_same_tensors_and_bf16_keeps_what_releases_keep_in_fp32(
        self, variant: Variant, tmp_path: Path
    ) -> None:
        whole = build.read_tensors(build.make(self.case, variant, tmp_path / "whole", dtype="bfloat16"))
        path = build.make(self.case, variant, tmp_path / "shards", dtype="bfloat16", max_shard_size="20KB")
        parts = build.read_tensors(path)
        index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == parts.keys() == whole.keys()
        assert len(set(index.values())) >= 3
        assert all(torch.equal(whole[k], parts[k]) for k in whole)
        kept = {k.rsplit(".", 1)[-1] for k, t in whole.items() if t.dtype == torch.float32}
        assert kept - {"bias"} == self.case.kept_in_fp32
        out = build.logits(build.upstream(self.case, path, dtype="bfloat16"), build.tokens(variant))
        assert out.isfinite().all()

    def test_constants_are_neither_class_defaults_nor_released_values(self) -> None:
        for key, usual in DEFAULTS.items():
            values = [v for mine in self.case.variants if (v := settings(mine).get(key)) is not None]
            flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
            assert not flat or any(x not in usual for x in flat), f"{key} is {flat}"

    @of_the_models
    def test_a_constant_that_is_not_read_shows_in_the_logits(self, variant: Variant) -> None:
        ids = build.tokens(variant)
        model = build.perturbed(variant)
        right, state = build.logits(model, ids), model.state_dict()
        silent = []
        for label, changed in wrong_constants(variant):
            wrong = build.fresh(variant.with_text(changed))
            if any(t.shape != state[k].shape for k, t in wrong.state_dict().items()):
                continue  # as the number of experts does in a table of them
            wrong.load_state_dict(state)
            difference = (build.logits(wrong, ids) - right).abs().max().item()
            if difference < 1e-3:
                silent.append((label, difference))
        assert not silent

    @of_the_models
    def test_widths_heads_groups_and_length_leave_no_room_for_mix_ups(self, variant: Variant) -> None:
        config = variant.build()[0].get_text_config()
        config.allow_global_per_layer_attribute_access = True  # of most layers, where some have other sizes
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", getattr(config, "num_kv_heads", None))
        if self.case.grouped:
            assert kv_heads < heads and heads % kv_heads == 0
        else:
            assert kv_heads in (None, heads), "MHA and MLA have no groups"
        widths = {config.vocab_size}
        for key in (
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "q_lora_rank",
            "kv_lora_rank",
        ):
            value = getattr(config, key, None) or 0
            widths |= set(value if isinstance(value, list) else [value]) - {0}
        assert not [(a, b) for a in widths for b in widths if a < b and b % a == 0]
        derived = heads * head_dim(config) == config.hidden_size
        by_design = (
            r"attn.c_proj|\.conv\.out_proj|altup_\w*projections|coefs|vision|visual|multi_modal|mm_projector"
        )
        if derived:  # heads * head_dim is the width, and without groups so are k and v
            by_design += r"|[qo]_proj|out_proj|(attention|attn)\.dense" + (
                "" if self.case.grouped else r"|[kv]_proj"
            )
        may_be_square = re.compile(by_design)
        state = variant.build()[1]._from_config(variant.build()[0]).state_dict()
        square = [k for k, t in state.items() if t.ndim > 1 and t.shape[-1] == t.shape[-2]]
        assert not [k for k in square if not may_be_square.search(k)]
        if getattr(config, "n_group", None) is not None and config.n_group > 1:
            assert config.topk_group < config.n_group
            counts = ("n_routed_experts", "num_local_experts", "num_experts")
            experts = next(n for key in counts if (n := getattr(config, key, None)))
            eligible = experts // config.n_group * config.topk_group
            assert config.num_experts_per_tok <= eligible
        for limit in ("sliding_window", "attention_chunk_size", "index_topk", "chunk_size", "floor_scale"):
            value = getattr(config, limit, None)
            assert value is None or variant.seq_len > 2 * value
        if "linear_key_head_dim" in variant.text or "linear_head_dim" in variant.text:
            assert variant.seq_len > 64, "upstream computes the delta rule in chunks of 64"

    def test_every_kind_of_layer_that_alternates_is_there(self) -> None:
        """Per family, both sides of each switch occur."""
        kinds: dict[str, set[Any]] = {
            "layer_types": set(),
            "mlp_layer_types": set(),
            "no_rope_layers": set(),
            "moe_layers": set(),
        }
        for variant in self.case.variants:
            config = variant.build()[0].get_text_config()
            for key, found in kinds.items():
                value = getattr(config, key, None)
                if key == "moe_layers" and value is not None:
                    value = [i in value for i in range(config.num_hidden_layers)]
                found |= set(value or ())
        if self.case.layer_kinds:
            assert kinds["layer_types"] == self.case.layer_kinds
        assert len(kinds["no_rope_layers"]) in (0, 2)
        assert len(kinds["moe_layers"]) in (0, 2)
        assert len(kinds["mlp_layer_types"]) in (0, 2)

    @of_the_models
    def test_scaled_rope_keeps_blends_and_scales(self, variant: Variant) -> None:
        from transformers import modeling_rope_utils

        config = variant.build()[0].get_text_config()
        rope = config.rope_parameters if hasattr(config, "rope_parameters") else None
        parts = [p for p in rope.values() if isinstance(p, dict)] or [rope] if rope else []
        for part in parts:
            if part["rope_type"] not in ("llama3", "yarn"):
                continue
            config.rope_parameters = part
            function = modeling_rope_utils.ROPE_INIT_FUNCTIONS[part["rope_type"]]
            scaled, _ = function(config, "cpu")
            n = 2 * len(scaled)
            plain = part["rope_theta"] ** -(torch.arange(0, n, 2) / n)
            ratio = (plain / scaled).tolist()
            close = [[x for x in ratio if abs(x - y) < 1e-3] for y in (1.0, part["factor"])]
            assert all(close) and len(close[0]) + len(close[1]) < len(ratio), ratio

    @of_the_models
    def test_no_choice_of_an_expert_or_a_key_hangs_on_rounding(
        self, variant: Variant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gaps: list[float] = []
        topk = torch.topk

        def watched(x: Any, k: int, dim: int = -1, **more: Any) -> Any:
            group_score = x.ndim == 3 and k == 2  # a sum over the two best: the same whichever is second
            if x.shape[dim] > k and not group_score:
                best = topk(x.detach(), k + 1, dim=dim).values.movedim(dim, -1)
                gap = best[..., k - 1] - best[..., k]
                gaps.append(gap[best[..., k] > -1e30].min().item())  # masked ones cannot be chosen
            return topk(x, k, dim=dim, **more)

        monkeypatch.setattr(torch, "topk", watched)
        monkeypatch.setattr(torch.Tensor, "topk", watched)
        build.logits(build.perturbed(variant), build.tokens(variant))
        assert bool(gaps) == (
            not {"num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk"}.isdisjoint(variant.text)
        )
        assert not gaps or min(gaps) > 1e-5

    # --- released keys and names ---------------------------------------------------------------------------------

    @of_the_models
    def test_a_config_in_released_keys_means_the_same(self, variant: Variant, tmp_path: Path) -> None:
        path = build.make(self.case, variant, tmp_path / variant.name, released_config=True)
        config = build.read_config(path)
        text = names.text_config(config)
        if "rope_parameters" not in self.case.keeps.get(text["model_type"], ()):
            assert "rope_parameters" not in text
        ids = build.tokens(variant)
        if not variant.not_read_by_upstream:
            assert torch.equal(build.logits(build.upstream(self.case, path), ids), self.reference(variant))
            return
        try:
            wrong = build.logits(build.upstream(self.case, path), ids)
        except RuntimeError:  # shapes of other layers than the file's
            return
        assert (wrong - self.reference(variant)).abs().max() > 0.1, (
            "upstream reads it now: take `not_read_by_upstream` away"
        )

    def test_released_names_lists_the_files(self, variant: Variant) -> None:
        path, variant = checkpoint(self.case, variant), variant
        on_disk = {k: tuple(t.shape) for k, t in build.read_tensors(path).items()}
        listed = names.released_names(self.case, build.read_config(path), mtp=variant.mtp)
        assert on_disk == (variant.listed(listed) if variant.listed else listed)

    def test_released_keys_and_resaved_keys_give_the_same_spec(self, variant: Variant) -> None:
        new = build.read_config(checkpoint(self.case, variant))
        old = released.released_config(self.case, new)
        assert new != old
        specs = [
            replace(families.spec_of(c), dtype=None) for c in (new, old)
        ]  # GPT-2's releases name no dtype
        assert specs[0] == specs[1]

    # --- the decoder computes what upstream computes, in every way it can be run ---------------------------------

    def model_of(self, variant: Variant) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
        b = self.sides(variant)
        model = decoder(b.spec, b.tensors)
        return model, b.ids, model(b.ids)

    def test_fp32_logits_are_upstreams(self, variant: Variant) -> None:
        model, ids, logits = self.model_of(variant)
        assert agree(logits, self.sides(variant).upstream["eager"], model, ids)

    def test_decoding_token_by_token_gives_the_logits_of_one_pass(self, variant: Variant) -> None:
        model, ids, logits = self.model_of(variant)
        cache, first = model.cache(len(ids), ids.shape[1]), first_piece(model, ids)
        steps = [model(ids[:, :first], cache)]
        steps += [model(ids[:, t : t + 1], cache) for t in range(first, ids.shape[1])]
        assert agree(torch.cat(steps, 1), logits, model, ids)

    @of_the_first
    def test_feeding_a_prompt_in_uneven_pieces_gives_the_logits_of_one_pass(self, variant: Variant) -> None:
        model, ids, logits = self.model_of(variant)
        T = ids.shape[1]
        cache = model.cache(len(ids), T + 3)
        cuts = [
            0,
            *(n for n in sorted({1, 4, 12, 13, T // 2 + 1, T - 2, T - 1, T}) if n >= first_piece(model, ids)),
        ]
        pieces = [model(ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
        assert agree(torch.cat(pieces, 1), logits, model, ids)

    @of_the_first
    def test_a_step_that_looks_at_every_slot_gives_the_same_logits(self, variant: Variant) -> None:
        """What a captured CUDA graph replays: lengths are tensors, nothing is sliced."""
        model, ids, logits = self.model_of(variant)
        T = ids.shape[1]
        cache = model.cache(len(ids), T + 3)
        cache.fixed = True
        first = max(5, first_piece(model, ids))
        pieces = [model(ids[:, :first], cache)]
        pieces += [model(ids[:, t : t + 1], cache) for t in range(first, T)]
        assert agree(torch.cat(pieces, 1), logits, model, ids)

    @of_the_first
    def test_a_cache_that_was_reset_remembers_nothing(self, variant: Variant) -> None:
        model, ids, logits = self.model_of(variant)
        cache = model.cache(len(ids), ids.shape[1])
        model(ids.flip(1), cache)
        cache.reset()
        first = max(3, first_piece(model, ids))
        again = [model(ids[:, :first], cache), model(ids[:, first:], cache)]
        assert agree(torch.cat(again, 1), logits, model, ids)

    @left_to_proofs
    def test_gradients_are_upstreams(self, variant: Variant) -> None:
        ours, theirs = gradients(self.case, variant)
        assert ours.keys() == theirs.keys()
        error, name = furthest(ours, theirs)
        assert error < 1e-4, name

    def test_sequences_of_a_batch_do_not_see_each_other(self, variant: Variant) -> None:
        model, ids, logits = self.model_of(variant)
        assert agree(model(ids[1:]), logits[1:], model, ids[1:])

    @of_the_first
    def test_layers_run_one_at_a_time_with_their_own_weights_only(self, variant: Variant) -> None:
        b = self.sides(variant)
        ends = Decoder(b.spec)
        ends.load_state_dict(
            {k: v for k, v in b.tensors.items() if not k.startswith("layers.")}, assign=True, strict=False
        )
        x, ctx = ends.start(b.ids)
        for i in range(b.spec.n_layers):
            prefix = f"layers.{i}."
            alone = Decoder(b.spec).layers[i]
            alone.load_state_dict(
                {k.removeprefix(prefix): v for k, v in b.tensors.items() if k.startswith(prefix)}, assign=True
            )
            x = alone(x, ctx)
        assert agree(ends.finish(x, ctx), b.upstream["eager"], decoder(b.spec, b.tensors), b.ids)

    @of_the_first
    def test_bf16_logits_lie_within_upstreams_own_spread(self, variant: Variant) -> None:
        """Judged by quantiles: one expert chosen otherwise moves a token's logits by 1 to 4. Upstream's two ways are
        equally right, and ours is held to the nearer: with a CPU's plainest instructions lfm2_moe's eager way chooses
        other experts for one token in ten than its sdpa way and ours, which then agree (median 0.0)."""
        b = self.sides(variant, "bfloat16")
        logits = decoder(b.spec, b.tensors)(b.ids)
        assert logits.dtype == torch.bfloat16
        spread = [quantiles(b.upstream["eager"], b.upstream[other]) for other in ("sdpa", "fp32")]
        median, high = map(min, *(quantiles(logits, b.upstream[way]) for way in ("eager", "sdpa")))
        assert median <= 1.25 * max(s[0] for s in spread)
        assert high <= 1.5 * max(s[1] for s in spread)
        # and no further from the truth than upstream itself
        ours, theirs = (quantiles(x, b.upstream["fp32"])[0] for x in (logits, b.upstream["eager"]))
        assert ours <= 1.2 * theirs

    def test_bf16_rounds_where_upstream_rounds(self, variant: Variant) -> None:
        """With the same attention kernel, and sums in the same order, most logits are equal to the bit; a norm
        that scales in fp32 where upstream scales in bf16, or a RoPE table in another dtype, ends that. A variant of which this can't be asked
        says why, and is held to upstream's own spread by the test above."""
        if variant.rounds_otherwise:
            pytest.skip(variant.rounds_otherwise)
        b = self.sides(variant, "bfloat16")
        with sums_as_upstream(variant.eager_only, self.case.sums_rounded):
            logits = decoder(b.spec, b.tensors)(b.ids)
        ours = quantiles(logits, b.upstream["sdpa"])[0]
        assert ours <= 0.5 * quantiles(b.upstream["eager"], b.upstream["sdpa"])[0]

    # --- every tensor matters, and every byte comes back ---------------------------------------------------------

    @of_the_first
    def test_changing_any_one_source_tensor_changes_the_logits(self, variant: Variant) -> None:
        """A tensor that is read, checked and stored but never used would pass every comparison of bytes; one that the
        decoder takes for a constant would pass parity if upstream's test model left it at its default. Most are seen at once by their
        gradients; of the rest, as of what chooses experts, each is changed by itself."""
        b = self.sides(variant)
        where = regions(b.plan)
        assert set(where) | set(b.plan.extras) == set(b.plan.checkpoint.tensors)
        assert not set(where) & set(b.plan.extras)
        assert all(b.plan.extras.values())

        tensors = {name: t.clone() for name, t in b.tensors.items()}
        model = Decoder(b.spec)
        model.load_state_dict(tensors, assign=True)
        idle = without_gradient(b, build.tokens(variant, batch=4), where)
        expected = [s for s in where if s.endswith(tuple(self.case.without_effect))]
        for batch in (4, 60):
            ids = build.tokens(variant, batch=batch)
            if batch > 4:  # experts that few tokens choose, or none because of their selection bias
                for key in tensors:
                    if key.endswith("selection_bias"):
                        tensors[key].zero_()
            before = model(ids)
            idle = [s for s in idle if not difference(model, ids, before, tensors, where[s]) > 1e-4]
            assert torch.equal(model(ids), before), "the last change was not taken back"
            if idle == expected:
                break
        assert idle == expected

    def test_the_canonical_tensors_are_those_of_an_independent_assembly_and_every_file_comes_back_to_the_byte(
        self, variant: Variant, tmp_path: Path
    ) -> None:
        how: dict[str, Any] = {"dtype": "bfloat16", "max_shard_size": 30_000, "released_config": True}
        source = build.make(self.case, variant, tmp_path / "source", **how)
        (source / "tokenizer.json").write_text('{"version": "1.0"}')
        (source / "chat_template.jinja").write_text("{{ messages }}")
        plan = make_plan(open_checkpoint(source))
        convert(plan, tmp_path / "canon", shard_size=40_000)
        got, released = build.read_tensors(tmp_path / "canon"), build.read_tensors(source)
        same_bits({n: got.pop(n) for n in plan.extras}, {n: released[n] for n in plan.extras})
        same_bits(got, assemble(source))
        export(tmp_path / "canon", tmp_path / "back")
        assert hashes(tmp_path / "back") == hashes(source)

    def test_parameters_are_the_tensors_of_the_layout(self, variant: Variant) -> None:
        spec = self.sides(variant).spec
        model = Decoder(spec)
        found = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert found == {n: s.shape for n, s in layout(spec).items()}
        assert all(p.is_meta for p in model.parameters())

    # --- real releases, at full size -----------------------------------------------------------------------------

    def test_the_spec_has_exactly_the_parameters_that_upstreams_class_has(
        self, stem: str, counts: dict[str, Any]
    ) -> None:
        assert stem in counts, (
            f"run `make prove FAMILY={self.case.name}`: it counts {stem} and writes it down"
        )
        spec, counted = families.spec_of(full_size.read(stem)), counts[stem]
        buffers = full_size.buffers(spec)  # there; stored like parameters
        assert total_params(spec) - buffers == counted["total"]
        assert active_params(spec) - buffers == counted["active"]
        assert full_size.has_experts(spec) == (counted["active"] != counted["total"])
        assert spec.tied == counted["tied"]
        assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec

    def test_the_published_figures_are_the_counted_ones_rounded(self, release: manifest.Manifest) -> None:
        assert release.config is not None
        spec = families.spec_of(release.config)
        assert spec.family == release.family
        embedding = spec.vocab_size * spec.d_model
        total, active = total_params(spec), active_params(spec)
        if not full_size.has_experts(spec) or (self.case.without_upstream and release.params_active is None):
            published = release.params_total
            if published is None:
                return
            # A publisher may leave out the embeddings, or count the vision tower: the manifest says so.
            towers = 1.4 if release.params_convention else 1.0
            assert any(full_size.rounds_to(total - k * embedding, published, 0.025) for k in range(3)) or (
                total <= published <= towers * total
            )
            return
        assert release.params_total is not None and release.params_active is not None
        within = 0.05 if "vision" in (release.params_convention or "") else 0.025
        assert full_size.rounds_to(total, release.params_total, within)
        assert any(
            full_size.rounds_to(active - k * embedding, release.params_active, within) for k in range(3)
        )

    @of_the_first
    def test_the_rules_account_for_every_tensor_of_the_release(self, stem: str) -> None:
        if self.case.without_upstream or stem in self.case.packed_otherwise:
            return  # accounted for by tests of the family's own
        config = full_size.read(stem)
        mtp = self.case.mtp_layers.get(stem, config.get("num_nextn_predict_layers") or 0)
        tensors = full_size.released(self.case, config, mtp=mtp, quantised="quantization_config" in config)
        families.families()
        start = time.process_time()
        m = full_size.account(config, tensors)
        assert time.process_time() - start <= 3.0
        used = {name for o in m.outputs.values() for name in o.sources}
        assert used | set(m.extras) == set(tensors)
        assert not used & set(m.extras)
        assert bool(m.extras) == bool(mtp or "text_config" in config)
        assert all(m.extras.values())

    def test_the_rules_account_for_the_tensors_listed_in_a_releases_own_files(
        self, listed: str, tensor_lists: Path
    ) -> None:
        of = self.case.listed[listed]
        config = full_size.read(of.stem)
        path = tensor_lists / f"{listed}.tensors.json"
        patterns = json.loads(path.read_text(encoding="utf-8"))["patterns"]
        kinds = {name: kind for pattern, kind in patterns.items() for name in full_size.expand(pattern)}
        spec = families.spec_of(config)
        if not all(kinds.values()):  # names only: shapes are taken from what the rules expect
            m = match_names(spec, config, kinds)
            assert not m.missing and not m.unexpected
            return
        tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in kinds.items()}
        extras = full_size.account(config, full_size.refs(tensors)).extras
        found = {"rotary" if "inv_freq" in name else name.split(".")[0] for name in extras}
        if of.extras is not None:
            assert found == of.extras
        if of.extras == frozenset({"model"}):  # a prediction layer
            assert all(name.startswith(f"model.layers.{spec.n_layers}.") for name in extras)

    def test_every_rule_is_used_and_every_tensor_of_a_layout_has_one(self) -> None:
        """Over all variants and releases: a rule that no layout asks for is dead, or one of the case's `optional_rules`.

        Biases, an untied head and norms of queries and keys are common lines that some family does without."""
        configs = [full_size.read(s) for s in full_size.stems().get(self.case.name, ())]
        configs += [build.read_config(checkpoint(self.case, v)) for v in self.case.variants]
        keys = {slot.key for c in configs for slot in layout(families.spec_of(c)).values()}
        rules = set(families.get(self.case.name).rules["hf"].by_key)
        assert keys <= rules
        common = {"head.weight", "layers.{i}.attn.q_norm.weight", "layers.{i}.attn.k_norm.weight"}
        common |= {key for key in rules if key.endswith(".bias")}
        assert rules - keys - common == set(self.case.optional_rules)

    # --- llama.cpp's files --------------------------------------------------------------------------------------

    def test_a_gguf_has_the_architecture_and_after_conversion_the_bytes_of_the_release(
        self, of: Gguf, tmp_path: Path
    ) -> None:
        pytest.importorskip("gguf")
        plans = [
            make_plan(open_checkpoint(path), dtype="fp32") for path in gguf.make(self.case, of, tmp_path)
        ]
        hf, ours = (replace(plan.spec, dtype=None, context_length=0) for plan in plans)
        assert ours == hf
        folders = [convert(plan, tmp_path / name) for plan, name in zip(plans, "ab", strict=True)]
        made, from_gguf = (build.read_tensors(folder) for folder in folders)
        assert {name for name in from_gguf if name not in plans[1].outputs} == set(plans[1].extras)
        same_bits(made, {name: from_gguf[name] for name in plans[1].outputs})
        # What came from a GGUF has a form in Hugging Face's files, the one that it was made of.
        back = export(folders[1], tmp_path / "back")
        assert families.spec_of(build.read_config(back)).layers == hf.layers
        same_bits(build.read_tensors(back), build.read_tensors(export(folders[0], tmp_path / "hf_fp32")))
        # And what came from Hugging Face's files goes out as the GGUF that llama.cpp's converter makes of them.
        out = export(folders[0], tmp_path / "out.gguf", format="gguf")
        plan = make_plan(open_checkpoint(out), dtype="fp32")
        assert replace(plan.spec, dtype=None) == replace(plans[0].spec, dtype=None)
        if of.written:
            gguf.same(out, tmp_path / "w.gguf", of)
        else:
            same_bits(made, build.read_tensors(convert(plan, tmp_path / "c")))

    def test_of_a_ggufs_fields_none_is_ignored(self, of: Gguf, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        header = gguf.header(self.case, of, tmp_path)
        silent = gguf.config(of, header, SILENT | of.silent)
        assert families.spec_of(silent) == families.spec_of(gguf.config(of, header, {}))
        for fields in ({"of_a_later_version": 1}, *of.refused):
            key, value = list(fields.items())[-1]
            with pytest.raises(ZooError) as error:
                gguf.config(of, header, fields)
            assert f"w.gguf: field '{of.arch}.{key}' is {value}" in str(error.value)

    def test_every_gguf_that_the_family_reads_is_in_its_case(self) -> None:
        assert {g.arch for g in self.case.gguf} == set(families.get(self.case.name).gguf)

    def test_upstream_still_does_as_each_disagreement_says(self) -> None:
        """One that it has mended has had its day."""
        assert {d.about for d in families.get(self.case.name).disagreements} == set(self.case.disputes)
        for check in self.case.disputes.values():
            check()

    def test_what_a_family_cannot_do_is_refused_by_name(
        self, stem_of: str, changes: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(ZooError) as error:
            families.spec_of(full_size.edited(stem_of, **changes), where=f"{stem_of}/config.json")
        assert says in str(error.value)
        assert str(error.value).startswith(f"{stem_of}/config.json")


def regions(plan: Plan) -> dict[str, list[tuple[str, Box]]]:
    """Source tensor -> the elements of canonical tensors that come from it."""
    out: dict[str, list[tuple[str, Box]]] = {}
    for o in plan.outputs.values():
        for source, fit in zip(o.sources, o.fits, strict=True):
            out.setdefault(source, []).append((o.name, fit.canonical))
    return out


def without_gradient(b: Built, ids: torch.Tensor, where: dict[str, list[tuple[str, Box]]]) -> list[str]:
    """The source tensors for which it takes more than a gradient to see that they matter: all whose change by noise of their own size
    would, to first order, move logits by no more than 1e-4 (root mean square). A whole canonical tensor that no gradient reaches, where one
    should, fails."""
    model = decoder(b.spec, b.tensors)
    train(model)
    logits = model(ids)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)) / logits.numel() ** 0.5
    (logits * weights).sum().backward()
    assert not unreached(model)
    learnt = dict(model.named_parameters())

    def moves(name: str, box: Box) -> float:
        if (p := learnt.get(name)) is None or p.grad is None:
            return 0.0
        size = 0.1 + view(p.detach().view(-1), box).abs().mean()
        return float(view(p.grad.contiguous().view(-1), box).norm() * size)

    return [s for s in where if not any(moves(*part) > 1e-4 for part in where[s])]


def difference(
    model: Decoder,
    ids: torch.Tensor,
    before: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    where: list[tuple[str, Box]],
) -> float:
    """The largest change of a logit when noise of the tensor's own size is added to these elements."""
    parts = [view(tensors[name].view(-1), box) for name, box in where]
    kept = [part.clone() for part in parts]
    generator = torch.Generator().manual_seed(5)
    for part in parts:
        if not part.is_floating_point():  # which expert: another token's
            part.copy_(part.roll(1, 0))
            continue
        noise = torch.randn(part.shape, generator=generator) * (0.1 + part.float().abs().mean())
        part += noise.to(part.dtype)
    logits = model(ids)
    for part, old in zip(parts, kept, strict=True):
        part.copy_(old)
    assert logits.isfinite().all()
    return float((logits - before).abs().max())


def quantiles(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Median and 90 % quantile over tokens of the largest logit difference."""
    error = (a.float() - b.float()).abs().amax(-1).flatten()
    return error.quantile(0.5).item(), error.quantile(0.9).item()


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        bits = [t[name].contiguous().view(-1).view(torch.uint8) for t in (a, b)]
        assert torch.equal(*bits), name


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def match_names(spec: Spec, config: dict[str, Any], kinds: dict[str, Any]) -> Any:
    """The rules' account of names whose shapes are not known."""
    from zoo.mapping.match import match

    nameless = full_size.refs(dict.fromkeys(kinds, ("BF16", ())))
    return match(spec, families.find(config).rules["hf"], nameless)


def settings(variant: Variant) -> dict[str, Any]:
    """The language model's settings of a variant, RoPE parameters of all layer types flattened in."""
    rope = variant.text.get("rope_parameters", {})
    nested = [v for v in rope.values() if isinstance(v, dict)] or [rope]
    return variant.text | {k: v for part in nested for k, v in part.items()}


def first_piece(model: Decoder, ids: torch.Tensor) -> int:
    """How many tokens a cache is given first, at least: it is not carried across LongRoPE's border."""
    return max((n + 1 for n in far_from(model.spec) if n < ids.shape[1]), default=1)


def wrong_constants(variant: Variant) -> Iterator[tuple[str, dict[str, Any]]]:
    """One changed copy of the text settings per constant, RoPE parameters included."""
    text = variant.text
    for key, wrong in WRONG.items():
        if text.get(key) not in (None, wrong):
            yield key, text | {key: wrong}
        rope = text.get("rope_parameters", {})
        # Beside alpha upstream asks for it and does not read it; alone it counts beyond the context.
        unread = key == "factor" and rope.get("rope_type") == "dynamic"
        if rope.get(key) not in (None, wrong) and not unread:
            yield f"rope_parameters.{key}", text | {"rope_parameters": rope | {key: wrong}}
        for kind, part in rope.items():
            if isinstance(part, dict) and part.get(key) not in (None, wrong):
                yield f"{kind}.{key}", text | {"rope_parameters": rope | {kind: part | {key: wrong}}}


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)
