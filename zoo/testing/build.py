"""Build a variant, perturb every tensor of it, save it as upstream does, load it as upstream does."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import families

from . import names, released
from .variant import Draw, Tensors, Variant

if TYPE_CHECKING:
    import torch

    from .case import FamilyCase


def make(
    case: FamilyCase,
    variant: Variant,
    dst: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: int | str | None = None,
    released_config: bool = False,
) -> Path:
    """Write the variant's checkpoint (configs and safetensors) into `dst` and return `dst`.

    Names, shapes and layout are a release's: what `save_pretrained` does differently is put right, and
    tensors that a release has beside the language model are there. With `released_config`, config.json has a
    release's keys too (see `released.py`). The same variant, seed and dtype give the same bytes.
    """
    dst = Path(dst)
    model = perturbed(variant, seed)
    cast(model, dtype)
    model.save_pretrained(dst, max_shard_size=max_shard_size or "50GB")
    config = read_config(dst)
    if variant.mtp or variant.release is not None:
        tensors, draw = read_tensors(dst), drawer(seed, dtype)
        if variant.mtp:
            draw_all(tensors, names.mtp_tensors(case, config, variant.mtp), draw)
        if variant.release is not None:
            variant.release(tensors, config, draw)
        write_tensors(dst, tensors, max_shard_size)
    config |= variant.rewrite
    write_config(dst, released.released_config(case, config) if released_config else config)
    return dst


def upstream(
    case: FamilyCase,
    path: Path,
    *,
    dtype: str = "float32",
    attn: str = "eager",
    experts: str | None = None,
) -> Any:
    """Load a checkpoint with transformers, in eval mode, corrected in the points where zoo follows the vendor.

    attn: "eager" or "sdpa"; families without sdpa get eager.
    experts: "eager" (default), "batched_mm" or "grouped_mm". The grouped kernel, upstream's default, needs
      strides of 16 bytes and cannot take these widths in bf16; families without such a switch ignore it.
    """
    import torch

    config = read_config(path)
    switches: dict[str, Any] = {"attn_implementation": attn}
    if case.alone and "text_config" in config:  # the text class reads the wrapper's files
        config = config["text_config"]
        switches["config"] = names.upstream_config(case, config)
    elif config["model_type"] in case.classes:  # no model_type of transformers, or no class for it
        switches["config"] = names.upstream_config(case, config)
    if any(v.eager_only for v in case.variants):
        switches["attn_implementation"] = "eager"
    cls = names.model_class(case, config)
    if cls._can_set_experts_implementation():
        switches["experts_implementation"] = experts or "eager"
    return corrected(case, cls.from_pretrained(path, dtype=getattr(torch, dtype), **switches).eval())


def corrected(case: FamilyCase, model: Any) -> Any:
    """Upstream's model, made to do as the vendor's in the points where zoo follows the vendor."""
    for known in families.get(case.name).disagreements:
        if known.correct is not None:
            known.correct(model)
    return model


def tokens(variant: Variant, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, T] over the whole vocabulary but the image token; T passes every window and chunk."""
    import torch

    ids = [i for i in range(variant.vocab_size) if i != variant.image_token]
    generator = torch.Generator().manual_seed(_seed(seed, f"tokens of {variant.name}"))
    return torch.tensor(ids)[torch.randint(len(ids), (batch, variant.seq_len), generator=generator)]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of a whole sequence without a cache."""
    import torch

    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


# --- values -------------------------------------------------------------------------------------------------


def fresh(variant: Variant, seed: int = 0) -> Any:
    """The variant as upstream initialises it."""
    import torch

    config, cls = variant.build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls._from_config(config, dtype=torch.float32).eval()


def perturbed(variant: Variant, seed: int = 0) -> Any:
    """The variant with every parameter and every persistent buffer moved away from its initial value."""
    return perturb(fresh(variant, seed), seed)


def perturb(model: Any, seed: int) -> Any:
    """Move every parameter and every persistent buffer of a model, and return it."""
    import torch

    seen = set()
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if value.is_floating_point() and id(value) not in seen:
                seen.add(id(value))
                value.copy_(_perturb(name, value, seed))
            elif name.endswith("tid2eid"):
                value.copy_(_experts_by_token(name, value.shape, model.config.n_routed_experts, seed))
    return model


def _perturb(name: str, value: torch.Tensor, seed: int) -> torch.Tensor:
    """A new value for a tensor: drawn by name, so that it does not depend on the order of creation."""
    import torch

    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(_seed(seed, name)))
    for pattern, scale, shift in _SPECIAL:
        if re.search(pattern, name):
            return noise * scale + shift
    if re.search(_TABLE, name):
        return noise * (2.0 / math.sqrt(value.shape[-1]))  # as a head: logits with a spread of about 2
    if value.ndim < 2:
        return value + 0.3 * noise  # norms, biases, skips: about what they start from
    fan_in = math.prod(value.shape[1:]) if "conv" in name else value.shape[-1]
    return noise * (1.2 / math.sqrt(fan_in))


def _experts_by_token(name: str, shape: tuple[int, ...], n_experts: int, seed: int) -> torch.Tensor:
    """So many experts for each token id, no two of them the same."""
    import torch

    generator = torch.Generator().manual_seed(_seed(seed, name))
    return torch.rand(shape[0], n_experts, generator=generator).argsort(-1)[:, : shape[1]]


# Embeddings and heads.
_TABLE = r"(embed_tokens|embeddings|wte|lm_head)\.weight$"
# Tensors whose initial value would leave a mechanism asleep: (pattern, spread, centre).
_SPECIAL = (
    (r"A_log$", 0.5, -0.5),  # decays that neither vanish nor stay at 1 within a few tokens
    (r"dt_bias$", 0.7, -0.5),
    (r"sinks$", 1.0, 0.5),
    (r"e_score_correction_bias$", 0.3, 0.0),  # changes the choice, does not decide it alone
    (r"act_fn\.eps$", 0.05, -0.3),  # left of 0, where it bounds
    (r"correct_output_scale$", 0.4, 0.7),
    (r"modality_router\.weight$", 4.0, 0.0),  # its input is divided by the width
    (r"router\.proj\.weight$", 1.2, 0.0),  # its input is divided by the root of the width
    (r"wpe\.weight$", 0.3, 0.0),
    (r"(prediction|correction)_coefs\.weight$", 0.3, 0.0),  # streams that mix without cancelling
)


def cast(model: Any, dtype: str) -> None:
    """To the dtype of the files; what the class keeps in fp32 (selection biases) stays so, as in releases."""
    import torch

    kept = re.compile("|".join(model._keep_in_fp32_modules_strict or ["(?!)"]))
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if kept.search(name) else getattr(torch, dtype))


def drawer(seed: int, dtype: str) -> Draw:
    """Values for tensors that no model of upstream holds."""
    import torch

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        start = torch.ones(shape) if len(shape) < 2 else torch.zeros(shape)
        return _perturb(name, start, seed).to(getattr(torch, dtype))

    return draw


def draw_all(tensors: Tensors, wanted: dict[str, names.Tensor], draw: Draw) -> None:
    """Add tensors that upstream's class does not hold."""
    for name, t in wanted.items():
        assert name not in tensors, name
        tensors[name] = draw(name, t.shape)


def rename(tensors: Tensors, rule: Callable[[str], str]) -> None:
    """Give every tensor another name."""
    for name in list(tensors):
        tensors[rule(name)] = tensors.pop(name)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


# --- files --------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text())
    return config


def write_config(path: Path, config: dict[str, Any]) -> None:
    (Path(path) / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's safetensors files."""
    from safetensors.torch import load_file

    return {k: t for file in sorted(Path(path).glob("*.safetensors")) for k, t in load_file(file).items()}


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], max_shard_size: int | str | None = None
) -> None:
    """Replace a checkpoint's safetensors files, in shards with an index where a size is given."""
    from huggingface_hub import save_torch_state_dict

    path = Path(path)
    for file in [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]:
        file.unlink()
    tensors = {k: tensors[k].contiguous() for k in sorted(tensors)}
    save_torch_state_dict(tensors, path, max_shard_size=max_shard_size or "50GB", metadata={"format": "pt"})
