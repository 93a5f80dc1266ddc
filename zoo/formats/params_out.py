"""What params.json says of a Spec, Meta's and Mistral's: the inverse of `zoo/family/consolidated.py`.

As with GGUF (`gguf_out.py`), the families' own readings judge: what is offered here is read again as a family does
(`Family.own`), and unless that gives the Spec that was to be written, to the bit, the vendor's file cannot say what the model is,
and this is refused by the name of what differs. So a family that zoo reads in a vendor's names is also written in them; and one that
it does not is written as the family that has that very Spec (a Mistral that came from a GGUF, where it calls itself llama).

Sources: ModelArgs of llama-models (models/llama3, models/llama4), TransformerArgs of mistral-inference, and released params.json.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from zoo import families
from zoo.config import Config
from zoo.errors import ZooError
from zoo.families import Family
from zoo.family.consolidated import meta_ffn
from zoo.spec import MLP, Attention, LatentAttention, MoE, Rope, Spec, differences
from zoo.untrusted.printable import warn

log = logging.getLogger(__name__)

UNSAID = (
    "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "use_qk_norm", "attn_temperature_tuning", "floor_scale",
    "attn_scale", "tied_embeddings", "q_lora_rank",
)  # fmt: skip
"""Fields that are left out where their absence says the same, as the releases do."""


def form(family: Family, naming: str, spec: Spec, who: str) -> tuple[Family, dict[str, Any]]:
    """The family as which a model of `family` is written in `naming`'s names, and its params.json: itself, or one that has the
    same Spec. Raises ZooError, which says what cannot be said, if there is none."""
    known = [f for f in families.families().values() if naming in f.own]
    if not known:
        raise ZooError(f"no family has files in {naming}'s names")
    refused = None
    for f in sorted(known, key=lambda f: f.name != family.name):
        try:
            return f, describe(f, naming, spec, who)
        except ZooError as e:
            if f.name == family.name:
                raise
            refused = refused or e
    raise ZooError(
        f"{who}: {naming}'s files have no form of family {family.name}: {refused}. They have one of "
        + ", ".join(f.name for f in known)
    )


def describe(family: Family, naming: str, spec: Spec, who: str) -> dict[str, Any]:
    """The params.json that `family` reads as `spec`. Raises ZooError, by the name of what differs, if there is none."""
    tensors = () if spec.tied else ("rank0.output.weight",)
    want = _told(dataclasses.replace(spec, family=family.name), naming)

    def wrong(params: Mapping[str, Any]) -> str | None:
        try:
            config = family.own[naming](Config(dict(params), who), tensors)
            if config is None:
                return f"family {family.name} does not know such a params.json"
            return next(differences(want, _told(families.spec_of(config, family, who), naming)), None)
        except ZooError as e:
            return str(e)

    refused = None
    for offered in (meta_params if naming == "meta" else mistral_params)(spec, who):
        if (why := wrong(offered)) is not None:
            refused = refused or why
            continue
        for key in UNSAID:
            without = {k: v for k, v in offered.items() if k != key}
            if key in offered and wrong(without) is None:
                offered = without
        if naming == "meta":
            _say_other_scale(spec, who)
        return offered
    raise ZooError(f"{who}: {naming}'s params.json cannot say it: {refused}")


def _told(spec: Spec, naming: str) -> Spec:
    """Without what params.json does not say and no number depends on. Meta's code is told a context's length by its caller."""
    context = 0 if naming == "meta" else spec.context_length
    return dataclasses.replace(spec, dtype=None, notes=(), context_length=context)


def _say_other_scale(spec: Spec, who: str) -> None:
    """Llama 3's code knows one factor; params.json says another where there is one, and zoo reads it."""
    rope = next((x.mixer.rope for x in spec.layers if isinstance(x.mixer, Attention) and x.mixer.rope), None)
    scaling = rope.scaling if rope and not any(isinstance(x.ffn, MoE) for x in spec.layers) else None
    if scaling is not None and scaling.factor != 8:
        warn(
            log, "%s: its RoPE is scaled by %g; Meta's own code scales by 8 whatever params.json says, and needs that changed "
            "(scale_factor in llama3/model.py)", who, scaling.factor,
        )  # fmt: skip


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in params.items() if v is not None}


def _parts(spec: Spec, who: str) -> tuple[Attention | LatentAttention, MLP | None, MoE | None]:
    """An attention of the model (one that turns, if any does), a dense feed-forward, and experts."""
    mixers = [x.mixer for x in spec.layers]
    if not all(isinstance(m, Attention | LatentAttention) for m in mixers):
        raise ZooError(f"{who}: has layers without plain or latent attention, which no params.json has")
    mixer = next((m for m in mixers if isinstance(m, Attention | LatentAttention) and m.rope), mixers[0])
    assert isinstance(mixer, Attention | LatentAttention)
    dense = next((x.ffn for x in spec.layers if isinstance(x.ffn, MLP)), None)
    return mixer, dense, next((x.ffn for x in spec.layers if isinstance(x.ffn, MoE)), None)


# ---------------------------------------------------------------------------------------------------
# Meta


def meta_params(spec: Spec, who: str) -> Iterator[dict[str, Any]]:
    """Of Llama 2 and 3, or of Llama 4. Meta's code computes the width of the feed-forward: what makes it come out is said."""
    mixer, dense, moe = _parts(spec, who)
    if not isinstance(mixer, Attention):
        raise ZooError(f"{who}: has latent attention, which Meta's params.json cannot say")
    scaling = mixer.rope.scaling if mixer.rope else None
    if scaling is not None and scaling.kind != "llama3":
        raise ZooError(f"{who}: its RoPE is scaled ({scaling.kind}), which Meta's params.json cannot say")
    shared = {
        "dim": spec.d_model,
        "n_layers": spec.n_layers,
        "n_heads": mixer.n_heads,
        "n_kv_heads": mixer.n_kv_heads,
        "vocab_size": spec.vocab_size,
        "norm_eps": spec.norm.eps,
        "rope_theta": float(mixer.rope.theta) if mixer.rope else None,
        "use_scaled_rope": scaling is not None,
        "rope_scaling_factor": scaling.factor if scaling else None,
        "rope_high_freq_factor": scaling.high_freq_factor if scaling else None,
    }
    if moe is None:
        widths = _widths(spec.d_model, dense.d_ff if dense else 0)
    else:
        shared |= _llama4(spec, mixer)
        widths = _widths_of_experts(spec, dense, moe)
    for width in widths:
        yield _plain(shared | width)


def _widths(d_model: int, d_ff: int) -> Iterator[dict[str, Any]]:
    """Settings that make the width of the feed-forward `d_ff`: a released pair if one does, else one that always does."""
    for multiplier in (None, 1.0, 1.3, 1.2, 1.5, 1.1, 1.4):
        for multiple in (256, 1024, 4096, 2048):
            said = _plain({"multiple_of": multiple, "ffn_dim_multiplier": multiplier})
            if meta_ffn(Config(said), 4 * d_model) == d_ff:
                yield said
                return
    yield {"multiple_of": 1, "ffn_dim_multiplier": (d_ff + 0.5) / int(8 * d_model / 3)}


def _llama4(spec: Spec, mixer: Attention) -> dict[str, Any]:
    each = [x.mixer for x in spec.layers if isinstance(x.mixer, Attention)]
    still = [i for i, m in enumerate(each) if m.rope is None]
    growth = next((m.query_scale for m in each if m.query_scale), None)
    return {
        "nope_layer_interval": still[0] + 1 if still else None,
        "use_qk_norm": mixer.qk_norm is not None,
        "attention_chunk_size": mixer.chunk,
        "attn_temperature_tuning": growth is not None,
        "floor_scale": growth.period if growth else None,
        "attn_scale": growth.beta if growth else None,
    }


def _widths_of_experts(spec: Spec, dense: MLP | None, moe: MoE) -> Iterator[dict[str, Any]]:
    """Settings that make both widths. A dense layer takes 2/3 of 4 d_model times the multiplier; an expert 2/3 of `ffn_exp` d_model
    times it, of which `auto_scale_F` leaves half."""
    d, expert = spec.d_model, moe.expert.d_ff
    wide = dense.d_ff if dense else 2 * expert
    args = {
        "num_experts": moe.n_experts,
        "top_k": moe.router.top_k,
        "interleave_moe_layer_step": next(i for i, x in enumerate(spec.layers) if isinstance(x.ffn, MoE)) + 1,
        "capacity_factor": 1.0,
    }
    for said in _widths(d, wide):
        said = {"ffn_dim_multiplier": 1.0} | said  # Llama 4's code multiplies by it always
        yield said | {"ffn_exp": 4.0, "moe_args": args | {"auto_scale_F": True}}
    multiple = math.gcd(wide, expert)
    multiplier = (wide - (multiple - 1) // 2 + 0.5) / int(8 * d / 3)
    yield {
        "multiple_of": multiple,
        "ffn_dim_multiplier": multiplier,
        "ffn_exp": (expert - (multiple - 1) // 2 + 0.5) * 3 / (2 * d * multiplier),
        "moe_args": args | {"auto_scale_F": False},
    }


# ---------------------------------------------------------------------------------------------------
# Mistral


def mistral_params(spec: Spec, who: str) -> Iterator[dict[str, Any]]:
    """Of a dense model, of experts, or of latent attention. Whether YaRN's magnitude counts is tried both ways."""
    mixer, dense, moe = _parts(spec, who)
    width = dense or (moe.expert if moe else None)
    shared: dict[str, Any] = {
        "dim": spec.d_model,
        "n_layers": spec.n_layers,
        "head_dim": mixer.head_dim if isinstance(mixer, Attention) else mixer.nope_dim + mixer.rope_dim,
        "hidden_dim": width.d_ff if width else None,
        "n_heads": mixer.n_heads,
        "n_kv_heads": mixer.n_kv_heads if isinstance(mixer, Attention) else mixer.n_heads,
        "rope_theta": float(mixer.rope.theta) if mixer.rope else None,
        "norm_eps": spec.norm.eps,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "tied_embeddings": spec.tied,
    }
    if isinstance(mixer, LatentAttention):
        shared |= {
            "q_lora_rank": mixer.q_rank,
            "kv_lora_rank": mixer.kv_rank,
            "qk_nope_head_dim": mixer.nope_dim,
            "qk_rope_head_dim": mixer.rope_dim,
            "v_head_dim": mixer.v_head_dim,
        }
    else:
        shared |= _windows(spec)
    if moe is not None:
        shared["moe"] = _experts(spec, moe, latent=isinstance(mixer, LatentAttention))
    growth = mixer.query_scale
    if growth is not None:
        shared["llama_4_scaling"] = {
            "original_max_position_embeddings": int(growth.period), "beta": growth.beta,
        }  # fmt: skip
    for scaled in (True, False):
        yield _plain(shared | _yarn(mixer.rope, scaled))


def _windows(spec: Spec) -> dict[str, Any]:
    """One number for all layers, or the shortest pattern of them that comes again."""
    each = [x.mixer.window if isinstance(x.mixer, Attention) else None for x in spec.layers]
    if len(set(each)) == 1:
        return {"sliding_window": each[0]}
    n = next(n for n in range(1, len(each) + 1) if len(each) % n == 0 and each == each[:n] * (len(each) // n))
    return {"_sliding_window": each[:n]}


def _experts(spec: Spec, moe: MoE, latent: bool) -> dict[str, Any]:
    router = moe.router
    said = {"num_experts_per_tok": router.top_k, "num_experts": moe.n_experts}
    if not latent:
        return said
    return said | {
        "first_k_dense_replace": next(i for i, x in enumerate(spec.layers) if isinstance(x.ffn, MoE)),
        "route_every_n": 1,
        "expert_hidden_dim": moe.expert.d_ff,
        "num_expert_groups": router.n_groups,
        "num_expert_groups_per_tok": router.top_groups,
        "routed_scale": router.scale,
        "num_shared_experts": moe.shared.d_ff // moe.expert.d_ff if moe.shared else 0,
    }


def _yarn(rope: Rope | None, scaled: bool) -> dict[str, Any]:
    scaling = rope.scaling if rope else None
    if scaling is None or scaling.kind != "yarn":
        return {}
    return {
        "yarn": {
            "original_max_position_embeddings": scaling.original_context,
            "factor": scaling.factor,
            "beta": scaling.beta_fast,
            "alpha": scaling.beta_slow,
            "apply_scale": scaled,
        }
    }
