"""Build a variant, perturb every tensor of it, save it as upstream does, load it as upstream does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import dense, experts, extras, hybrid, names, released
from .variant import Variant

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VARIANTS: dict[str, Variant] = {v.name: v for part in (dense, experts, hybrid) for v in part.VARIANTS}

# Attention that upstream has no sdpa path for.
EAGER_ONLY = {"gpt_oss", "mimo_v2_flash"}


def make(
    name: str,
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
    release's keys too (see `released.py`). The same name, seed and dtype give the same bytes.
    """
    variant = VARIANTS[name]
    dst = Path(dst)
    model = perturbed(variant, seed)
    cast(model, dtype)
    model.save_pretrained(dst, max_shard_size=max_shard_size or "50GB")
    config = read_config(dst)
    if variant.mtp or variant.release is not None:
        tensors, draw = read_tensors(dst), _drawer(seed, dtype)
        if variant.mtp:
            extras.add_mtp(tensors, config, draw, variant.mtp)
        if variant.release is not None:
            variant.release(tensors, config, draw)
        write_tensors(dst, tensors, max_shard_size)
    config |= variant.rewrite
    write_config(dst, released.released_config(config) if released_config else config)
    return dst


def make_mistral_format(name: str, dst: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write the variant as Mistral releases it: params.json and consolidated.safetensors, nothing else."""
    from safetensors.torch import save_file

    config, _ = VARIANTS[name].build()
    model = perturbed(VARIANTS[name], seed)
    cast(model, dtype)
    dst = Path(dst)
    dst.mkdir(parents=True, exist_ok=True)
    tensors = extras.to_mistral_tensors(dict(model.state_dict()))
    save_file(tensors, dst / "consolidated.safetensors", metadata={"format": "pt"})
    (dst / "params.json").write_text(json.dumps(extras.to_params_json(config.to_dict()), indent=2) + "\n")
    return dst


def upstream(
    path: Path, *, dtype: str = "float32", attn: str = "eager", experts: str | None = None
) -> PreTrainedModel:
    """Load a checkpoint with transformers, in eval mode.

    attn: "eager" or "sdpa"; families without sdpa get eager.
    experts: "eager" (default), "batched_mm" or "grouped_mm". The grouped kernel, upstream's default, needs
      strides of 16 bytes and cannot take these widths in bf16; families without such a switch ignore it.
    """
    import torch

    config = read_config(path)
    cls = names.model_class(config)
    switches: dict[str, Any] = {"attn_implementation": attn}
    if (
        config["model_type"] == "gemma3n"
    ):  # the wrapper's vision tower needs timm; the text class reads its files
        cls = names.model_class(config["text_config"])
        switches["config"] = names.upstream_config(config["text_config"])
    elif config["model_type"] in names.MODEL_CLASSES:  # no model_type of transformers, or no class for it
        switches["config"] = names.upstream_config(config)
    if config["model_type"] in EAGER_ONLY:
        switches["attn_implementation"] = "eager"
    if cls._can_set_experts_implementation():
        switches["experts_implementation"] = experts or "eager"
    return cls.from_pretrained(path, dtype=getattr(torch, dtype), **switches).eval()


def upstream_mistral_format(path: Path, *, dtype: str = "float32", attn: str = "eager") -> PreTrainedModel:
    """Load Mistral's own format into upstream's Mistral4, which has no reader for it: rename, fuse, load."""
    import torch
    from safetensors.torch import load_file
    from transformers import Mistral4Config, Mistral4ForCausalLM

    path = Path(path)
    config = Mistral4Config(**extras.from_params_json(json.loads((path / "params.json").read_text())))
    config._attn_implementation, config._experts_implementation = attn, "eager"
    tensors = load_file(path / "consolidated.safetensors")
    with torch.random.fork_rng(devices=[]):
        model = Mistral4ForCausalLM(config)
    state = {}
    for name in model.state_dict():
        if fused := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", name):
            base, parts = f"layers.{fused[1]}.experts", ["w2"] if fused[2] == "down_proj" else ["w1", "w3"]
            state[name] = torch.stack(
                [
                    torch.cat([tensors[f"{base}.{e}.{w}.weight"] for w in parts])
                    for e in range(config.n_routed_experts)
                ]
            )
        else:
            state[name] = tensors[extras.mistral_name(name)]
    model.load_state_dict(state)
    return model.to(getattr(torch, dtype)).eval()


def tokens(name: str, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, T] over the whole vocabulary but the image token; T passes every window and chunk."""
    import torch

    variant = VARIANTS[name]
    ids = [i for i in range(variant.vocab_size) if i != variant.image_token]
    generator = torch.Generator().manual_seed(_seed(seed, f"tokens of {name}"))
    return torch.tensor(ids)[torch.randint(len(ids), (batch, variant.seq_len), generator=generator)]


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of a whole sequence without a cache."""
    import torch

    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


# --- values -------------------------------------------------------------------------------------------------


def fresh(variant: Variant, seed: int = 0) -> PreTrainedModel:
    """The variant as upstream initialises it."""
    import torch

    config, cls = variant.build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls._from_config(config, dtype=torch.float32).eval()


def replace_settings(variant: Variant, text: dict[str, Any]) -> Variant:
    """The variant with other settings of its language model."""
    settings = variant.settings | {"text_config": text} if "text_config" in variant.settings else text
    return dataclasses.replace(variant, settings=settings)


def perturbed(variant: Variant, seed: int = 0) -> PreTrainedModel:
    """The variant with every parameter and every persistent buffer moved away from its initial value."""
    import torch

    model = fresh(variant, seed)
    seen = set()
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if value.is_floating_point() and id(value) not in seen:
                seen.add(id(value))
                value.copy_(_perturb(name, value, seed))
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


# Embeddings and heads.
_TABLE = r"(embed_tokens|embeddings|wte|lm_head)\.weight$"
# Tensors whose initial value would leave a mechanism asleep: (pattern, spread, centre).
_SPECIAL = (
    (r"A_log$", 0.5, -0.5),  # decays that neither vanish nor stay at 1 within a few tokens
    (r"dt_bias$", 0.7, -0.5),
    (r"sinks$", 1.0, 0.5),
    (r"e_score_correction_bias$", 0.3, 0.0),  # changes the choice, does not decide it alone
    (r"correct_output_scale$", 0.4, 0.7),
    (r"modality_router\.weight$", 4.0, 0.0),  # its input is divided by the width
    (r"wpe\.weight$", 0.3, 0.0),
    (r"(prediction|correction)_coefs\.weight$", 0.3, 0.0),  # streams that mix without cancelling
)


def cast(model: PreTrainedModel, dtype: str) -> None:
    """To the dtype of the files; what the class keeps in fp32 (selection biases) stays so, as in releases."""
    import torch

    kept = re.compile("|".join(model._keep_in_fp32_modules_strict or ["(?!)"]))
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if kept.search(name) else getattr(torch, dtype))


def _drawer(seed: int, dtype: str) -> extras.Draw:
    """Values for tensors that no model of upstream holds."""
    import torch

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        start = torch.ones(shape) if len(shape) < 2 else torch.zeros(shape)
        return _perturb(name, start, seed).to(getattr(torch, dtype))

    return draw


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


# --- files --------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    return json.loads((Path(path) / "config.json").read_text())


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
