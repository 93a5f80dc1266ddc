"""What a variant is, and the rules all variants follow.

A variant is the smallest config that still contains every choice its family's code has to make:

- every kind of layer that alternates is present, and at least once after another kind;
- heads are grouped (ratio > 1, more than one group), expert groups are >= 2 with topk_group < n_group;
- widths are no multiples of each other: a swapped or mis-sliced dimension changes a shape or a value;
- the sequence is longer than the window, the chunk, the selection and the temperature step;
- constants (eps, theta, scales, windows, caps) are neither the class default nor a released value, and large
  enough to show: an eps of 1e-6 against 1e-5 is invisible at any tolerance, one of 0.02 is not;
- scaled RoPE has frequencies that are kept, blended and fully scaled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Settings = dict[str, Any]
Config = Mapping[str, Any]
Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Tensors = dict[str, "torch.Tensor"]
Draw = Callable[[str, tuple[int, ...]], "torch.Tensor"]
Hook = Callable[[Tensors, Settings, Draw], None]
"""Changes saved tensors and the saved config in place into a release's; `Draw` gives seeded values of a shape."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a release: safetensors' dtype name, and the shape."""

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        size = {
            "F32": 4,
            "I32": 4,
            "I64": 8,
            "BF16": 2,
            "F16": 2,
            "F8_E4M3": 1,
            "F8_E8M0": 1,
            "U8": 1,
            "I8": 1,
        }[self.dtype]
        return size * math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Variant:
    """One tiny checkpoint of a family.

    Attributes:
        architecture: upstream's model class; its config class comes with it.
        settings: keyword arguments of the config class, nested for wrappers.
        notes: what is special about it.
        seq_len: tokens needed to pass every window, chunk and selection.
        mtp: multi-token-prediction layers in the files, which no forward pass of the language model reads.
        release: changes what `save_pretrained` wrote into what a release holds (names, unused tensors).
        listed: turns what a release of its config holds into what its files hold, where they are not a release's.
        rewrite: keys of config.json to set after saving (a vendor's own model_type).
        image_token: an id that `tokens` must not draw.
        family: name of the family, set by the `FamilyCase` it is listed in.

    What upstream can't do for it, with the reason. A test fails where `not_read_by_upstream` or `decodes_otherwise` no
    longer holds; `rounds_otherwise` is measured, and taken away by hand:

    Attributes:
        eager_only: upstream's class has no sdpa path.
        rounds_otherwise: why its bf16 logits are not upstream's to the bit for most tokens, as everyone else's are.
        not_read_by_upstream: which keys of its release upstream's config class does not read.
        decodes_otherwise: why upstream's cached decoding does not give the logits of its own prefill.
    """

    name: str
    architecture: str
    settings: Settings = field(repr=False)
    notes: str = ""
    seq_len: int = 29
    mtp: int = 0
    release: Hook | None = None
    listed: Callable[[Shapes], Shapes] | None = None
    rewrite: Settings = field(default_factory=dict, repr=False)
    image_token: int | None = None
    eager_only: bool = False
    rounds_otherwise: str = ""
    not_read_by_upstream: str = ""
    decodes_otherwise: str = ""
    family: str = ""

    def build(self) -> tuple[Any, type[PreTrainedModel]]:
        """Upstream's config object and model class."""
        import transformers

        cls: Any = getattr(transformers, self.architecture)
        return cls.config_class(**_copy(self.settings)), cls

    @property
    def text(self) -> Settings:
        """Settings of the language model, wrapper or not."""
        text: Settings = self.settings.get("text_config", self.settings)
        return text

    @property
    def vocab_size(self) -> int:
        return int(self.text["vocab_size"])

    def with_text(self, text: Settings) -> Variant:
        """The variant with other settings of its language model."""
        settings = self.settings | {"text_config": text} if "text_config" in self.settings else text
        return dataclasses.replace(self, settings=settings)


def _copy(settings: Any) -> Any:
    """Config classes change the dicts they are given."""
    if isinstance(settings, dict):
        return {k: _copy(v) for k, v in settings.items()}
    return list(settings) if isinstance(settings, list) else settings


# A prime vocabulary, and the special ids that generation_config.json repeats.
VOCAB: Settings = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EPS = 0.02
BASE: Settings = VOCAB | {"rms_norm_eps": EPS, "max_position_embeddings": 480}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def rope(theta: float, **more: Any) -> Settings:
    """`rope_parameters` of plain RoPE, and `more` fields of it."""
    return {"rope_type": "default", "rope_theta": theta, **more}


def llama3(theta: float, factor: float, original: int, low: float, high: float) -> Settings:
    """`rope_parameters` of Llama 3's bands: by `factor` beyond `original` positions, blended between `low` and `high`."""
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def yarn(theta: float, factor: float, original: int, fast: float, slow: float, **more: Any) -> Settings:
    """`rope_parameters` of YaRN: by `factor` beyond `original` positions, a ramp between `slow` and `fast` turns."""
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fast,
        "beta_slow": slow,
        **more,
    }
