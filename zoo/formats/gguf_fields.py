"""The metadata of a GGUF as a family reads it: every field is read, or must say what the family does anyway."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.formats.base import TensorRef

Tables = Mapping[str, tuple[float, ...]]

# Fields that say nothing about the numbers, or what other fields make irrelevant: YaRN's beside another scaling, a
# pattern of windows where there is no window, the eps of norms that subtract a mean, experts' where there are none.
_SILENT = (
    "vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "attention.sliding_window_pattern", "attention.layer_norm_epsilon", "attention.temperature_length",
    "expert_used_count", "expert_feed_forward_length",
)  # fmt: skip
_VISION = ("vision.", "mm.")  # Ollama's, of the tensors that see images: the plan accounts for those

# What other fields may say, because it changes nothing; any other value, and any other field, is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.temperature_scale",
        "attention.shared_kv_layers", "attn_logit_softcapping", "router_logit_softcapping",
        "final_logit_softcapping", "swiglu_clamp_exp", "swiglu_clamp_shexp", "rope.scaling.yarn_log_multiplier",
        "n_deepstack_layers", "leading_dense_block_count", "expert_count", "expert_shared_count",
        "expert_shared_feed_forward_length",
    ), (0,)),
    **dict.fromkeys((
        "logit_scale", "residual_scale", "embedding_scale", "rope.scaling.alpha", "rope.scale_linear",
        "moe_every_n_layers", "interleave_moe_layer_step", "expert_group_count", "expert_group_used_count",
        "expert_weights_scale", "expert_gating_func",
    ), (0, 1)),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "expert_weights_norm": (True,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.local.freq_base": (1e4,),  # Ollama's names for Gemma's
    "rope.global.freq_base": (1e6,),
}  # fmt: skip


class Fields:
    """The metadata of one architecture. It remembers what was read, so that the rest can be judged."""

    def __init__(
        self, metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef], tables: Tables, where: str
    ):
        self.metadata, self.tensors, self.tables, self.where = metadata, tensors, tables, where
        self.arch = metadata.get("general.architecture")
        self.read: set[str] = set()
        self.tables_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise ZooError(
                f"{self.where}: field '{self.arch}.{key}' is missing, and this architecture needs it"
            )
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise ZooError(
                f"{self.where}: field '{self.arch}.{key}' is {str(value)[:80]}; only one value for all layers is supported"
            )
        return value[0]  # one number per layer, all the same

    def has_field(self, key: str) -> bool:
        """Whether the file has the field; that is not to have read it."""
        return f"{self.arch}.{key}" in self.metadata

    def raw(self, key: str, default: Any = None) -> Any:
        """The field as it is, a list if there is one."""
        self.read.add(key)
        return self.metadata.get(f"{self.arch}.{key}", default)

    def table(self, name: str) -> tuple[float, ...] | None:
        """The values of a tensor of constants (one of CONSTANTS), if the file has it."""
        self.tables_read.add(name)
        return self.tables.get(name)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse the field if it is there and says something else than these."""
        if (value := self.get(key)) is not None and value not in allowed:
            only = f"supported: {', '.join(map(str, allowed))}" if allowed else "zoo does not know this field"
            raise ZooError(f"{self.where}: field '{self.arch}.{key}' is {str(value)[:80]}; {only}")

    def judge_the_rest(self, out: Mapping[str, Any]) -> None:
        """Refuse what was not read and says what this config does not."""
        neutral = _NEUTRAL | {
            "attention.sliding_window": (0, out["max_position_embeddings"]),
            "rope.freq_base_swa": (out["rope_theta"],),
            "embedding_length_out": (out["hidden_size"],),
        }
        prefix = f"{self.arch}."
        keys = [k.removeprefix(prefix) for k in self.metadata if k.startswith(prefix)]
        for key in keys:
            if key not in self.read and key not in _SILENT and not key.startswith(_VISION):
                self.expect(key, *neutral.get(key, ()))
        self.judge_tables()

    def judge_tables(self) -> None:
        """Refuse tensors of constants that were not read."""
        for name in self.tables:
            if name not in self.tables_read:
                raise ZooError(
                    f"{self.where}: has {name}, which llama.cpp's graph of {self.arch} does not use: not supported"
                )

    def layers_with(self, tensor: str) -> set[int]:
        """The layers that have a tensor of this name."""
        found = (re.fullmatch(rf"blk\.([0-9]{{1,9}})\.{re.escape(tensor)}", name) for name in self.tensors)
        return {int(m[1]) for m in found if m}

    def has(self, tensor: str) -> bool:
        return bool(self.layers_with(tensor))


def head_dim(f: Fields, out: Mapping[str, Any]) -> int:
    """Channels of a head, of keys and values alike, all of them rotated: whatever says it must say the same.
    `out`: the config that the architectures share."""
    wide = out["hidden_size"] // out["num_attention_heads"]
    dim = int(f.get("attention.key_length") or f.get("rope.dimension_count") or wide)
    for what in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        f.expect(what, dim)
        f.expect(f"{what}_swa", dim)
    if (factors := f.tables.get("rope_freqs.weight")) is not None and 2 * len(factors) != dim:
        raise ZooError(
            f"{f.where}: rope_freqs.weight has {len(factors)} factors; a head of {dim} channels needs {dim // 2}"
        )
    return dim


def rotary(f: Fields, out: Mapping[str, Any]) -> tuple[int, float]:
    """Channels of a head, and which part of them is rotated, where that need not be all."""
    dim = int(f.get("attention.key_length") or out["hidden_size"] // out["num_attention_heads"])
    f.expect("attention.value_length", dim)
    turned = int(f.get("rope.dimension_count") or dim)
    part = turned / dim
    return dim, part if int(dim * part) == turned else math.nextafter(part, 2.0)  # configs round it down


def layer_types(f: Fields, n: int, every: int) -> list[str]:
    """Which layers have the window: all but each `every`-th, unless the file says otherwise (a list: true, it has)."""
    pattern = f.raw("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        pattern = [(i + 1) % pattern != 0 for i in range(n)]
    if len(pattern) < n:
        raise ZooError(f"{f.where}: attention.sliding_window_pattern lists {len(pattern)} layers of {n}")
    return ["sliding_attention" if sliding else "full_attention" for sliding in pattern[:n]]


def interleaved_positions(f: Fields, turned: int) -> list[int]:
    """How many of the `turned` / 2 frequencies follow each of an image's three positions, one after the other in turn. All
    must follow one of them: a text has the same position three times, which makes this plain RoPE, and a fourth that is 0.
    Source: ggml's rope with GGML_ROPE_TYPE_IMROPE; llm_graph_input_pos of llama.cpp."""
    said = f.raw("rope.dimension_sections")
    if not isinstance(said, list) or any(k >= 3 * said[k % 3] for k in range(turned // 2)):
        raise ZooError(
            f"{f.where}: field '{f.arch}.rope.dimension_sections' is {str(said)[:80]}; expected three numbers that share out all "
            f"{turned // 2} frequencies evenly"
        )
    return said[:3]


def shortest(x: float) -> float:
    """The shortest decimal that is this fp32 value: 1e-05, not 9.999999747378752e-06."""
    if not math.isfinite(x):
        return x
    for digits in range(6, 10):
        if struct.unpack("<f", struct.pack("<f", y := float(f"{x:.{digits}g}")))[0] == x:
            return y
    return x
