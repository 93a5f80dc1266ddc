"""Gemma 3n. Its releases are wrappers whose vision tower is timm's, so upstream's language model is built alone.

The files hold k_proj, v_proj and k_norm of the layers that reuse another layer's K and V, which nothing reads.
"""

from __future__ import annotations

import re

import pytest
import torch

from zoo import families
from zoo.testing import BASE, FULL, SLIDING, FamilyCase, Variant, build, names, rope
from zoo.testing.build import draw_all, rename
from zoo.testing.full_size import account, read, refs
from zoo.testing.names import Config, Tensor
from zoo.testing.released import two_thetas
from zoo.testing.variant import Draw, Settings, Shapes, Tensors

# fmt: off

_GEMMA3N = BASE | {
    "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": [52, 52, 44, 44, 52, 52], "num_hidden_layers": 6, "sliding_window": 6,
    "final_logit_softcapping": 11.0,
    "vocab_size_per_layer_input": 113, "hidden_size_per_layer_input": 14, "altup_num_inputs": 3,
    "num_kv_shared_layers": 2, "laurel_rank": 7,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "activation_sparsity_pattern": [0.9, 0.6, 0.0, 0.8, 0.0, 0.7],
    "rope_parameters": {FULL: rope(613.0), SLIDING: rope(71.0)},
}

# fmt: on


# The vision tower is timm's; a few of its names stand for it.
TIMM: Shapes = {
    "model.vision_tower.timm_model.conv_stem.conv.weight": (6, 3, 3, 3),
    "model.vision_tower.timm_model.blocks.0.0.conv.weight": (8, 6, 1, 1),
    "model.vision_tower.timm_model.msfa.norm.weight": (8,),
}


def prefixed(name: str) -> str:
    """Gemma 3n's language model is released inside a wrapper."""
    return re.sub(r"^model\.(?!language_model\.)", "model.language_model.", name)


def shared_kv(case: FamilyCase, text: Config) -> dict[str, Tensor]:
    """k_proj, v_proj, k_norm of the layers that reuse another layer's K and V: released, never read."""
    cfg = names.upstream_config(case, text)
    n, kv, d = cfg.num_hidden_layers, cfg.num_key_value_heads * cfg.head_dim, cfg.head_dim
    out = {}
    for i in range(n - cfg.num_kv_shared_layers, n):
        base = f"model.language_model.layers.{i}.self_attn."
        for name, shape in (
            ("k_proj", (kv, cfg.hidden_size)),
            ("v_proj", (kv, cfg.hidden_size)),
            ("k_norm", (d,)),
        ):
            out[f"{base}{name}.weight"] = Tensor("BF16", shape)
    return out


def modalities(case: FamilyCase, config: Config) -> dict[str, Tensor]:
    """Audio tower and the two embedders of the wrapper; the vision tower is timm's and is left out."""
    import torch
    from transformers import AutoModel, Gemma3nAudioConfig, Gemma3nVisionConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nMultimodalEmbedder

    text = names.upstream_config(case, names.text_config(config))
    audio = Gemma3nAudioConfig(**{k: v for k, v in config["audio_config"].items() if k != "model_type"})
    vision = Gemma3nVisionConfig(**{k: v for k, v in config["vision_config"].items() if k != "model_type"})
    with torch.device("meta"):
        parts = {
            "audio_tower": AutoModel.from_config(audio),
            "embed_audio": Gemma3nMultimodalEmbedder(audio, text),
            "embed_vision": Gemma3nMultimodalEmbedder(vision, text),
        }
    return {
        f"model.{part}.{name}": Tensor("BF16", tuple(t.shape))
        for part, module in parts.items()
        for name, t in module.state_dict().items()
    }


def in_the_wrapper(case: FamilyCase, tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    tensors = {prefixed(name): t for name, t in tensors.items()} | shared_kv(case, names.text_config(config))
    return tensors | modalities(case, config) if "audio_config" in config else tensors


def as_saved(listed: Shapes) -> Shapes:
    """As transformers saves the language model: no wrapper, no unread K and V."""
    unread = shared_kv(CASE, CASE.variant("gemma3n").build()[0].to_dict())
    return {k.replace("model.language_model.", "model."): s for k, s in listed.items() if k not in unread}


def gemma3n_release(tensors: Tensors, config: Settings, draw: Draw) -> None:
    """The released wrapper: a prefix, unused K and V of the layers that share them, vision and audio weights.

    The vision tower is timm's; a few of its names stand for it. The rest is what upstream's classes hold.
    """
    text = dict(config)
    audio = {
        "model_type": "gemma3n_audio",
        "hidden_size": 16,
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": [4, 2],
        "input_feat_size": 8,
        "vocab_size": 3,
        "vocab_offset": 128,
    }
    vision = {"model_type": "gemma3n_vision", "hidden_size": 12, "vocab_size": 4, "vocab_offset": 124}
    config.clear()
    config.update(
        model_type="gemma3n",
        architectures=["Gemma3nForConditionalGeneration"],
        text_config=text,
        audio_config=audio,
        vision_config=vision,
        dtype=text["dtype"],
    )
    rename(tensors, prefixed)
    draw_all(tensors, shared_kv(CASE, text), draw)
    draw_all(tensors, modalities(CASE, config), draw)
    for name, shape in TIMM.items():
        tensors[name] = draw(name, shape)


def upstream_caps_logits_at_30() -> None:
    model = build.fresh(CASE.variants[0])
    assert type(model.config)().final_logit_softcapping == 30
    torch.nn.init.normal_(model.lm_head.weight, std=100)
    logits, cap = build.logits(model, build.tokens(CASE.variants[0])), model.config.final_logit_softcapping
    assert 0.99 * cap < logits.abs().max() <= cap


def upstream_clips_altup_in_training_only() -> None:
    altup = next(m for m in build.fresh(CASE.variants[0]).modules() if hasattr(m, "prediction_coefs")).eval()
    altup.config.altup_coef_clip, w = 1e-3, altup.prediction_coefs.weight
    x = torch.ones(altup.config.altup_num_inputs, 1, 2, altup.config.hidden_size)
    torch.nn.init.normal_(w)
    for training in (False, True):
        altup.train(training).predict(x)
        assert (w.abs().max() <= 1.001e-3) == training


# fmt: off
CASE = FamilyCase(
    "gemma3n",
    (
        Variant("gemma3n", "Gemma3nForCausalLM", _GEMMA3N,
            "3 AltUp streams, LAuReL, per-layer embeddings (ids >= 113 have none), last 2 layers reuse K and V "
            "of "
            "layers 3 and 2, Gaussian top-k on four layers, two FFN widths",
            listed=as_saved),
        Variant("gemma3n_wrapper", "Gemma3nForCausalLM",
            _GEMMA3N | {
                "altup_num_inputs": 4, "num_attention_heads": 4, "intermediate_size": 52, "rms_norm_eps": 0.03,
            },
            "as released: model.language_model.*, unused K/V of the sharing layers, vision and audio beside it",
            release=gemma3n_release,
            listed=lambda shapes: shapes | TIMM),
    ),
    layer_kinds=frozenset({FULL, SLIDING}),
    alone=True,
    released_text=two_thetas,
    released=in_the_wrapper,
    refused=(
        ("gemma3n-e2b", {"altup_active_idx": 1}, "altup_active_idx is 1"),
        ("gemma3n-e2b", {"attention_bias": True}, "attention_bias is True"),
        ("gemma3n-e2b", {"num_kv_shared_layers": 27}, "shares keys and values"),
    ),
    disputes={"the soft cap on the logits": upstream_caps_logits_at_30, "the clip of AltUp's coefficients": upstream_clips_altup_in_training_only},
)
# fmt: on


def test_unread_keys_and_values_are_set_aside_only_where_a_layer_takes_anothers() -> None:
    """Gemma 3n's releases hold k and v of the sharing layers; those of any other layer are used."""
    config = read("gemma3n-e2b")
    tensors = refs({n: (t.dtype, t.shape) for n, t in names.released_tensors(CASE, config).items()})
    m = account(config, tensors)
    unread = {n for n in m.extras if ".self_attn." in n}
    assert {int(n.split(".")[3]) for n in unread} == set(range(20, 30))
    assert {n.split(".")[5] for n in unread} == {"k_proj", "v_proj", "k_norm"}


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "final_logit_softcapping"])
def test_what_is_left_out_is_what_upstream_takes_it_for(key: str) -> None:
    config = read("gemma3n-e4b")
    whole = families.spec_of(config)
    for part in (config, config.get("text_config", {})):
        part.pop(key, None)
    assert families.spec_of(config) == whole
