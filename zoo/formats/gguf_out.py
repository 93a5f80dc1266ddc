"""What a GGUF says of a Spec: the inverse of `gguf_config.py` and of what families read (`Family.gguf`).

A field of llama.cpp means one thing, whichever family has it, so there is one table: name -> its value for a Spec. Which of
these fields an architecture has is not said again: its reading says it. `metadata` offers a reading all fields, keeps those
that it asked for, and lets it make a Spec of them. Unless that is the Spec that was to be written, to the bit, the
architecture cannot say what the model is, and this is refused by the name of what differs.

So a family that zoo reads from GGUF is also written, without a line of its own. Key names: gguf-py's constants.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from zoo import families
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats import gguf_config
from zoo.formats.base import TensorRef
from zoo.formats.gguf_fields import Tables, shortest
from zoo.spec import (
    MLP,
    Attention,
    DeltaNet,
    LatentAttention,
    Mamba,
    MoE,
    Rope,
    RopeScaling,
    Spec,
    differences,
)

AS = {"mistral": "llama"}
"""Families without architectures of their own in llama.cpp, and the family in whose its converter writes them."""


def form_of(family: Family) -> Family:
    """The family as which a model of `family` is written, and read again."""
    return families.get(AS[family.name]) if family.name in AS else family


# ---------------------------------------------------------------------------------------------------
# Parts of a Spec that fields speak of


def _mixers(s: Spec) -> list[Attention | LatentAttention]:
    return [x.mixer for x in s.layers if isinstance(x.mixer, Attention | LatentAttention)]


def _mixer(s: Spec) -> Attention | LatentAttention:
    return _mixers(s)[0]


def _latent(s: Spec) -> LatentAttention | None:
    m = _mixer(s)
    return m if isinstance(m, LatentAttention) else None


def _window(m: Attention | LatentAttention) -> int | None:
    return m.window if isinstance(m, Attention) else None


def _rope(s: Spec, windowed: bool = False) -> Rope | None:
    """Of layers that see everything (or of those with a window); of any layer, where those have none."""
    ropes = [(bool(_window(m)), m.rope) for m in _mixers(s) if m.rope is not None]
    return next((r for w, r in ropes if w == windowed), ropes[0][1] if ropes else None)


def _scaling(s: Spec, *kinds: str) -> RopeScaling | None:
    rope = _rope(s)
    scaling = rope.scaling if rope else None
    return scaling if scaling and scaling.kind in kinds else None


def _moe(s: Spec) -> MoE | None:
    return next((x.ffn for x in s.layers if isinstance(x.ffn, MoE)), None)


def _d_ff(s: Spec) -> int | None:
    """Of dense layers; an architecture without any has its experts' here."""
    moe = _moe(s)
    dense = next((x.ffn.d_ff for x in s.layers if isinstance(x.ffn, MLP)), None)
    return dense or (moe.expert.d_ff if moe else None)


def _of_moe(value: Callable[[MoE], Any]) -> Callable[[Spec], Any]:
    return lambda s: None if (moe := _moe(s)) is None else value(moe)


def _of_yarn(value: Callable[[RopeScaling], Any]) -> Callable[[Spec], Any]:
    return lambda s: None if (scaling := _scaling(s, "yarn")) is None else value(scaling)


def _of_latent(value: Callable[[LatentAttention], Any]) -> Callable[[Spec], Any]:
    return lambda s: None if (m := _latent(s)) is None else value(m)


def _head(s: Spec, which: str) -> int:
    """Channels of a head's keys or values, as they lie in the cache: of the latent head, if there is one."""
    m = _mixer(s)
    if isinstance(m, LatentAttention):
        return m.kv_rank + (m.rope_dim if which == "key" else 0)
    return m.head_dim if which == "key" else m.v_head_dim


def _turned(s: Spec) -> int | None:
    rope = _rope(s)
    return rope.dim if rope else None


def _heads(s: Spec) -> int | list[int]:
    return _one([m.n_heads for m in _mixers(s)])


def _kv_heads(s: Spec) -> int | list[int]:
    return _one([1 if isinstance(m, LatentAttention) else m.n_kv_heads for m in _mixers(s)])


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _windows(s: Spec) -> int:
    return next((w for m in _mixers(s) if (w := _window(m))), 0)


def _pattern(s: Spec) -> list[bool] | None:
    return [bool(_window(m)) for m in _mixers(s)] if _windows(s) else None


def _eps(kind: str) -> Callable[[Spec], float | None]:
    return lambda s: s.norm.eps if s.norm.kind == kind else None


def _theta(s: Spec, windowed: bool) -> float | None:
    rope = _rope(s, windowed)
    return float(rope.theta) if rope else None


def _gating(moe: MoE) -> int:
    return 2 if moe.router.score == "sigmoid" else 3 if moe.router.over == "chosen" else 1


def _shared(moe: MoE) -> int | None:
    return moe.shared.d_ff // moe.expert.d_ff if moe.shared else None


def _mscale(s: Spec) -> float | None:
    """0.1 * mscale_all_dim of DeepSeek's YaRN, whose magnitude is part of the scale of scores."""
    scaling, m = _scaling(s, "yarn"), _latent(s)
    if scaling is None or m is None or scaling.factor <= 1:
        return None
    magnitude = math.sqrt(m.scale * math.sqrt(m.nope_dim + m.rope_dim))
    return round((magnitude - 1) / math.log(scaling.factor), 7)


def _original(s: Spec) -> int | None:
    scaling = _scaling(s, "yarn", "longrope")
    return scaling.original_context if scaling else None


def _kind(s: Spec) -> str | None:
    scaling = _scaling(s, "linear", "yarn")
    return scaling.kind if scaling else None


def _factor(s: Spec) -> float | None:
    scaling = _scaling(s, "linear", "yarn")
    return float(scaling.factor) if scaling else None


def _magnitude(s: Spec) -> float | None:
    scaling = _scaling(s, "longrope")
    return scaling.attention_factor if scaling else None


def _softcap(s: Spec) -> float | None:
    m = _mixer(s)
    return m.softcap if isinstance(m, Attention) else None


def _state(s: Spec) -> DeltaNet | Mamba | None:
    return next((m for x in s.layers for m in x.mixers if isinstance(m, DeltaNet | Mamba)), None)


def _of_state(
    delta: Callable[[DeltaNet], int], mamba: Callable[[Mamba], int]
) -> Callable[[Spec], int | None]:
    def value(s: Spec) -> int | None:
        match _state(s):
            case DeltaNet() as m:
                return delta(m)
            case Mamba() as m:
                return mamba(m)
        return None

    return value


def _linear(s: Spec) -> list[bool] | None:
    return [isinstance(x.mixer, DeltaNet) for x in s.layers] if isinstance(_state(s), DeltaNet) else None


def _interval(s: Spec) -> int | None:
    linear = _linear(s)
    return linear.index(False) + 1 if linear and not all(linear) else None


def _sections(s: Spec) -> list[int] | None:
    """Frequencies that follow each of an image's positions in turn, and a fourth that is none."""
    rope = _rope(s)
    return [(rope.dim // 2 + 2 - k) // 3 for k in range(3)] + [0] if rope else None


FIELDS: Mapping[str, Callable[[Spec], Any]] = {
    "vocab_size": lambda s: s.vocab_size,
    "context_length": lambda s: s.context_length,
    "embedding_length": lambda s: s.d_model,
    "block_count": lambda s: s.n_layers,
    "feed_forward_length": _d_ff,
    "use_parallel_residual": lambda s: s.layers[0].parallel,
    "attention.head_count": _heads,
    "attention.head_count_kv": _kv_heads,
    "attention.key_length": lambda s: _head(s, "key"),
    "attention.value_length": lambda s: _head(s, "value"),
    "attention.key_length_mla": _of_latent(lambda m: m.nope_dim + m.rope_dim),
    "attention.value_length_mla": _of_latent(lambda m: m.v_head_dim),
    "attention.q_lora_rank": _of_latent(lambda m: m.q_rank),
    "attention.kv_lora_rank": _of_latent(lambda m: m.kv_rank),
    "attention.layer_norm_rms_epsilon": _eps("rms"),
    "attention.layer_norm_epsilon": _eps("layer"),
    "attention.scale": lambda s: _mixer(s).scale,
    "attention.sliding_window": _windows,
    "attention.sliding_window_pattern": _pattern,
    "attention.recurrent_layers": _linear,
    "full_attention_interval": _interval,
    "ssm.conv_kernel": _of_state(lambda m: m.conv, lambda m: m.conv),
    "ssm.state_size": _of_state(lambda m: m.k_head_dim, lambda m: m.state),
    "ssm.group_count": _of_state(lambda m: m.n_k_heads, lambda m: m.n_groups),
    "ssm.time_step_rank": _of_state(lambda m: m.n_v_heads, lambda m: m.n_heads),
    "ssm.inner_size": _of_state(lambda m: m.n_v_heads * m.v_head_dim, lambda m: m.n_heads * m.head_dim),
    "attn_logit_softcapping": _softcap,
    "final_logit_softcapping": lambda s: s.logit_softcap,
    "embedding_scale": lambda s: float(s.embed_scale),
    "residual_scale": lambda s: float(s.layers[0].residual_scale),
    "logit_scale": lambda s: float(s.logit_scale),
    "rope.dimension_count": _turned,
    "rope.freq_base": lambda s: _theta(s, False),
    "rope.freq_base_swa": lambda s: _theta(s, True) if _windows(s) else None,
    "rope.dimension_sections": _sections,
    "rope.scaling.type": _kind,
    "rope.scaling.factor": _factor,
    "rope.scaling.original_context_length": _original,
    "rope.scaling.attn_factor": _magnitude,
    "rope.scaling.yarn_beta_fast": _of_yarn(lambda r: float(r.beta_fast)),
    "rope.scaling.yarn_beta_slow": _of_yarn(lambda r: float(r.beta_slow)),
    "rope.scaling.yarn_attn_factor": _of_yarn(lambda r: float(r.attention_factor)),
    "rope.scaling.yarn_log_multiplier": _mscale,
    "expert_count": _of_moe(lambda m: m.n_experts),
    "expert_used_count": _of_moe(lambda m: m.router.top_k),
    "expert_feed_forward_length": _of_moe(lambda m: m.expert.d_ff),
    "expert_shared_count": _of_moe(_shared),
    "expert_shared_feed_forward_length": _of_moe(lambda m: m.shared.d_ff if m.shared else None),
    "expert_gating_func": _of_moe(_gating),
    "expert_weights_norm": _of_moe(lambda m: m.router.normalize),
    "expert_weights_scale": _of_moe(lambda m: float(m.router.scale * m.routed_scale)),
    "expert_group_count": _of_moe(lambda m: m.router.n_groups),
    "expert_group_used_count": _of_moe(lambda m: m.router.top_groups),
    "leading_dense_block_count": lambda s: next(
        (i for i, x in enumerate(s.layers) if isinstance(x.ffn, MoE)), None
    ),
}

OTHERWISE: Mapping[tuple[str, str], Callable[[Spec], Any]] = {
    ("granite", "logit_scale"): lambda s: 1 / s.logit_scale,  # the graph divides by it
    ("cohere2", "rope.scaling.type"): lambda s: "none",
}
"""Where an architecture means something else by a field, or its converter says what goes without saying."""

UNSAID = (
    "attention.recurrent_layers",
    "attention.sliding_window_pattern", "attention.sliding_window", "rope.freq_base_swa", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_log_multiplier", "rope.scaling.attn_factor", "attention.key_length_mla", "attention.value_length_mla",
    "expert_shared_feed_forward_length", "expert_weights_norm", "expert_weights_scale", "expert_gating_func", "expert_group_count", "expert_group_used_count",
    "leading_dense_block_count", "attn_logit_softcapping", "final_logit_softcapping", "embedding_scale", "residual_scale",
)  # fmt: skip
"""Fields that are left out where the architecture implies just their value, but for those of NEEDED."""

NEEDED: Mapping[str, tuple[str, ...]] = {
    "deepseek2": (
        "attention.key_length_mla", "attention.value_length_mla", "expert_weights_norm", "expert_weights_scale",
        "expert_gating_func", "expert_group_count", "expert_group_used_count", "leading_dense_block_count",
    ),
    "gemma2": ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "granite": ("embedding_scale", "residual_scale"),
    "phi3": ("attention.sliding_window",),
}  # fmt: skip
"""What llama.cpp itself asks of a file, whatever zoo's reading takes for granted."""


def _lacks_a_query_latent(s: Spec) -> bool:
    """But for the sizes by which llama.cpp knows the small models that have none."""
    known = s.n_layers in (26, 27) or (s.n_layers == 48 and s.vocab_size == 128256)
    return (m := _latent(s)) is not None and m.q_rank is None and not known


def _narrow(s: Spec) -> bool:
    return any(isinstance(m, Attention) and m.n_heads * m.head_dim != s.d_model for m in _mixers(s))


def _another_magnitude(s: Spec) -> bool:
    """Of YaRN: another than follows from its factor. Latent attention has its own rule."""
    scaling = _scaling(s, "yarn")
    if scaling is None or _latent(s) is not None:
        return False
    return not math.isclose(
        scaling.attention_factor, 0.1 * math.log(max(1.0, scaling.factor)) + 1, rel_tol=1e-6
    )


UNOPENED: tuple[tuple[tuple[str, ...], Callable[[Spec, Iterable[str]], bool], str], ...] = (
    (
        (),
        lambda s, _: _another_magnitude(s),
        "takes YaRN's magnitude to follow from its factor, whatever a field says (attention_factor)",
    ),
    (("cohere2", "gemma", "gemma2"), lambda s, _: not s.tied, "has no head but the embedding"),
    (("gptneox", "gpt-oss"), lambda s, _: s.tied, "asks for a head beside the embedding (output.weight)"),
    (
        ("gemma", "gemma2", "gemma3", "qwen3", "qwen3moe"),
        lambda _, names: any(n.endswith("attn_output.bias") for n in names),
        "has no bias behind attention (attn_output.bias)",
    ),
    (
        ("chatglm", "phi3", "qwen2"),
        lambda s, _: _narrow(s),
        "has heads that are together as wide as the model",
    ),
    (("deepseek2",), lambda s, _: _lacks_a_query_latent(s), "asks for the rank of queries (q_lora_rank)"),
    (
        ("deepseek2",),
        lambda s, _: _kind(s) == "linear",
        "scales scores by YaRN's magnitude where RoPE is linear, too",
    ),
    (
        ("deepseek2",),
        lambda s, _: _kind(s) == "yarn" and not _mscale(s),
        "takes YaRN's magnitude to be of all channels (mscale_all_dim)",
    ),
    (
        ("starcoder2",),
        lambda _, names: not any(n.endswith("attn_output.bias") for n in names),
        "asks for biases",
    ),
)
"""Architectures (none: all), models that a file can say and llama.cpp does not open or computes otherwise, and what its graph does.
Source: load_arch_tensors and llama_context of llama.cpp, and its refusals (llama-cpp-python 0.3.36)."""

OTHERWISE_THERE: tuple[tuple[str, Callable[[Spec], bool], str], ...] = (
    ("phi3", lambda s: _windows(s) > 0, "has no window for Phi-3: texts beyond it come out otherwise there"),
)
"""Architectures, the models of which llama.cpp computes some texts otherwise, as from its own converter's files, and what."""


# ---------------------------------------------------------------------------------------------------
# Constants that lie in tensors


def tables(spec: Spec) -> dict[str, tuple[float, ...]]:
    """The tensors of constants: factors of rotary frequencies that no field says. Source: generate_extra_tensors of llama.cpp's
    converter."""
    rope = _rope(spec)
    scaling = rope.scaling if rope else None
    if rope is None or scaling is None:
        return {}
    if scaling.kind == "longrope":
        return {"rope_factors_long.weight": scaling.long, "rope_factors_short.weight": scaling.short}
    return {"rope_freqs.weight": tuple(_llama3(rope, scaling))} if scaling.kind == "llama3" else {}


def _llama3(rope: Rope, r: RopeScaling) -> Iterator[float]:
    """1 for short wavelengths, the whole factor for long ones, and between them a blend of the frequencies."""
    low, high = r.original_context / r.low_freq_factor, r.original_context / r.high_freq_factor
    for k in range(rope.dim // 2):
        wavelength = 2 * math.pi * rope.theta ** (2 * k / rope.dim)
        smooth = (r.original_context / wavelength - r.low_freq_factor) / (
            r.high_freq_factor - r.low_freq_factor
        )
        blend = 1 / ((1 - smooth) / r.factor + smooth)
        yield 1.0 if wavelength < high else r.factor if wavelength > low else blend


# ---------------------------------------------------------------------------------------------------
# A Spec's metadata


@dataclasses.dataclass(frozen=True)
class Described:
    """An architecture of llama.cpp and its fields that say a Spec, keys with the architecture's name. `otherwise`: what llama.cpp is
    known to compute otherwise."""

    arch: str
    fields: dict[str, Any]
    tables: Tables
    otherwise: tuple[str, ...] = ()


def describe(family: Family, spec: Spec, tensors: Mapping[str, tuple[int, ...]], who: str) -> Described:
    """The first of the family's architectures that can say `spec`. `tensors`: the file's, name -> shape.

    Raises ZooError, which says what cannot be said, if none can.
    """
    refused = None
    for arch in family.gguf:
        try:
            return _described(family, arch, spec, tensors, who)
        except ZooError as e:
            refused = refused or e
    raise refused or ZooError(f"{who}: llama.cpp's GGUF has no architecture for family {family.name}")


def _described(
    family: Family, arch: str, spec: Spec, tensors: Mapping[str, tuple[int, ...]], who: str
) -> Described:
    for archs, meant, does in UNOPENED:
        if (arch in archs or not archs) and meant(spec, tensors):
            raise ZooError(
                f"{who}: llama.cpp's graph of architecture {arch} {does}: it does not run this model"
            )
    constants = {n: tuple(shortest(float(np.float32(x))) for x in t) for n, t in tables(spec).items()}
    refs = {n: TensorRef(n, "F32", shape, "", 0, 0) for n, shape in tensors.items()}
    refs |= {n: TensorRef(n, "F32", (len(t),), "", 0, 0) for n, t in constants.items()}

    def read(fields: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        metadata = {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in fields.items()}
        return gguf_config.asked(family, metadata, refs, constants, who)

    offered = {}
    for key, value in FIELDS.items():
        value = OTHERWISE.get((arch, key), value)(spec)
        if value is not None:
            offered[key] = shortest(float(np.float32(value))) if isinstance(value, float) else value
    want = _plain(spec)

    def judged(fields: Mapping[str, Any]) -> list[str]:
        """What is wrong with them: what would be read otherwise, or why nothing would be."""
        try:
            return list(differences(want, _plain(families.spec_of(read(fields)[0], family, who))))
        except ZooError as e:
            return [str(e), *UNSAID]  # worse than any difference

    try:
        _, asked = read(offered)
    except ZooError as e:
        told = str(e).removeprefix(f"{who}: ")
        raise ZooError(f"{who}: a GGUF of architecture {arch} cannot say it: {told}") from None
    fields = {k: v for k, v in offered.items() if k in asked or k == "vocab_size"}
    wrong = judged(fields)
    for key in UNSAID if wrong else ():  # what the architecture implies to more digits than a field has
        without = {k: v for k, v in fields.items() if k != key}
        if key in fields and len(better := judged(without)) < len(wrong):
            fields, wrong = without, better
    if wrong:
        raise ZooError(f"{who}: a GGUF of architecture {arch} cannot say it: {wrong[0]}")
    for key in UNSAID:
        without = {k: v for k, v in fields.items() if k != key}
        if key in fields and key not in NEEDED.get(arch, ()) and not judged(without):
            fields = without
    otherwise = [told for its, meant, told in OTHERWISE_THERE if its == arch and meant(spec)]
    return Described(arch, {f"{arch}.{k}": v for k, v in fields.items()}, constants, tuple(otherwise))


def _plain(spec: Spec) -> Spec:
    """Without what no number depends on, and no GGUF says."""
    return dataclasses.replace(spec, dtype=None, notes=())
