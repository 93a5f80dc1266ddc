"""What llama.cpp writes into a GGUF, in Hugging Face terms: the hyperparameters that its architectures share.

`config(metadata, tensors, tables, where)` gives the config.json that the release had, as far as it
matters. The family that names the architecture (`Family.gguf`) adds what is its own, and what llama.cpp does not
write because its code knows it (a norm's form, a pattern of layers). Key names: gguf-py's constants.py.

- Every field of the architecture is read, or must say what the family does anyway: nothing is ignored (`gguf_fields.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo import families
from zoo.errors import ZooError
from zoo.families import Family
from zoo.formats.base import TensorRef
from zoo.formats.gguf_fields import Fields, Tables
from zoo.soundness import layer_count

CONSTANTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors whose values belong to the config."""


def config(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef], tables: Tables, where: str
) -> dict[str, Any]:
    """config.json of a GGUF. `tables`: the values of its tensors of CONSTANTS. Raises ZooError for an architecture that
    no family names, and for a field that nobody reads and that is not neutral."""
    arch = metadata.get("general.architecture")
    named = families.naming_gguf(arch, where)
    for family, _ in named:
        out = _read(family, arch, Fields(metadata, tensors, tables, where))
        if out is not None:
            return out
    asked = ", ".join(family.name for family, _ in named)
    raise ZooError(
        f"{where}: a GGUF of architecture {arch!r}, but of a kind that no family of it knows (asked: {asked})"
    )


def asked(
    family: Family, metadata: Mapping[str, Any], tensors: Mapping[str, TensorRef], tables: Tables, where: str
) -> tuple[dict[str, Any], set[str]]:
    """config.json as `family` reads it off these fields, and the keys that it asked for: what it has not asked for is not
    judged. For `gguf_out`."""
    f = Fields(metadata, tensors, tables, where)
    out = _read(family, f.arch, f, judge=False)
    if out is None:
        raise ZooError(f"{where}: family {family.name} does not know this kind of GGUF architecture {f.arch}")
    f.judge_tables()
    return out, f.read


def _read(family: Family, arch: Any, f: Fields, judge: bool = True) -> dict[str, Any] | None:
    """What the family makes of a file's fields; None if it is of a kind that the family does not know."""
    with families.blamed(family, f.where, "model"):
        out = {
            "architectures": [family.architectures[0]],
            "model_type": family.model_types[0],
            **_shared(f),
        }
        if (own := family.gguf[arch](f, out)) is None:
            return None
        if "hidden_activation" in own:  # the same thing, under the name that family has for it
            del out["hidden_act"]
        if judge:
            f.judge_the_rest(out | own)
        return out | own


def _shared(f: Fields) -> dict[str, Any]:
    """What every architecture has."""
    embedding = f.tensors.get("token_embd.weight")
    if embedding is None or not embedding.shape:
        raise ZooError(f"{f.where}: there is no tensor 'token_embd.weight': not a language model?")
    out = {
        "vocab_size": embedding.shape[0],
        "hidden_size": f["embedding_length"],
        "num_hidden_layers": _n_layers(f),
        "num_attention_heads": f["attention.head_count"],
        "num_key_value_heads": f.get("attention.head_count_kv", f["attention.head_count"]),
        "max_position_embeddings": f["context_length"],
        "rope_theta": f.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in f.tensors,
        "hidden_act": "silu",
        "attention_bias": f.has("attn_q.bias"),
    }
    if not f.has_field("attention.layer_norm_epsilon") or f.has_field("attention.layer_norm_rms_epsilon"):
        out["rms_norm_eps"] = f[
            "attention.layer_norm_rms_epsilon"
        ]  # norms of the other kind are the family's to read
    if f.get("feed_forward_length"):
        out["intermediate_size"] = f["feed_forward_length"]
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if (number := f.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            out[name] = number
    out.setdefault(
        "pad_token_id", None
    )  # left out, upstream's class has its release's, which may lie beyond this vocabulary
    out["rope_scaling"] = _rope_scaling(f)
    return out


def _n_layers(f: Fields) -> int:
    """Layers of the decoder: `block_count` also counts those that predict further tokens, where the file has them."""
    n = layer_count(f["block_count"], f"{f.arch}.block_count", f.where)
    further = f.layers_with("nextn.eh_proj.weight")
    f.expect("nextn_predict_layers", 0, len(further))
    return n - sum(i < n for i in further)


def _rope_scaling(f: Fields) -> dict[str, Any] | None:
    """Source: load_hparams of llama.cpp's llama-model.cpp (what is absent there), set_gguf_parameters of its
    conversion/base.py and mistral.py (what is written)."""
    kind = f.get("rope.scaling.type", "linear")
    factor = f.get("rope.scaling.factor") or f.get("rope.scale_linear") or 1.0  # the second is an old name
    if kind in ("none", "") or (kind == "linear" and factor == 1.0):
        return None
    if kind not in ("linear", "yarn"):
        raise ZooError(f"{f.where}: rope.scaling.type is {kind!r}; supported: linear, yarn")
    if "rope_freqs.weight" in f.tables:
        raise ZooError(
            f"{f.where}: scales RoPE twice, by rope_freqs.weight and by {f.arch}.rope.scaling ({kind}): not supported"
        )
    out = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        out["factor"] = f["rope.scaling.factor"]
        out["original_max_position_embeddings"] = f["rope.scaling.original_context_length"]
        out["beta_fast"] = f.get("rope.scaling.yarn_beta_fast", 32.0)
        out["beta_slow"] = f.get("rope.scaling.yarn_beta_slow", 1.0)
        if (magnitude := f.get("rope.scaling.yarn_attn_factor")) is not None:
            out["attention_factor"] = magnitude
        if all_dim := f.get("rope.scaling.yarn_log_multiplier"):
            out |= {"mscale": 1.0, "mscale_all_dim": all_dim}
    return out
