"""A tiny checkpoint in GGUF: names from gguf-py's own map, metadata and values as llama.cpp's converter writes them.

What is special to a family stands in its `FamilyCase.gguf`, written from llama.cpp's code rather than from zoo's rules, so
that the two can disagree. Needs the package gguf.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import build
from .build import read_config, read_tensors
from .variant import Config, Settings, Tensors

if TYPE_CHECKING:
    import torch

    from zoo.formats.base import TensorRef

    from .case import FamilyCase, Gguf

    Header = tuple[dict[str, Any], dict[str, TensorRef], dict[str, tuple[float, ...]]]


def metadata(of: Gguf, config: Config) -> dict[str, Any]:
    """The fields of the architecture, as TextModel.set_gguf_parameters of llama.cpp's converter and the family's own class
    write them for this config.json."""
    heads = config["num_attention_heads"]
    fields = {
        "vocab_size": config["vocab_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads", heads),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "rope.freq_base": (config.get("rope_parameters") or {}).get("rope_theta"),
        **of.fields(config),
    }
    return {f"{of.arch}.{k}": v for k, v in fields.items() if v is not None}


def make(case: FamilyCase, of: Gguf, at: Path, quant: str = "F32", **settings: Any) -> tuple[Path, Path]:
    """The same weights, all of them bf16 values, as a folder in Hugging Face's layout and as a GGUF: `hf` and `w.gguf` in
    the folder `at`. `settings`: of the variant, beside those of the case."""
    like = case.variant(of.variant) if of.variant else case.variants[0]
    folder = build.make(case, like.with_text(like.text | of.settings | settings), at / "hf", dtype="bfloat16")
    return folder, write(folder, at / "w.gguf", of, quant=quant)


def write(src: Path, dst: Path, of: Gguf, *, quant: str = "F32", tables: Mapping[str, Any] | None = None,
          types: Callable[[str], str] | None = None, **more: Any) -> Path:  # fmt: skip
    """The checkpoint in the folder `src` as the GGUF `dst`, which is returned.

    quant: a type that gguf-py can quantise to, for matrices of fitting width. tables: tensors of constants, by name. types: instead of
    `quant`, the type of each matrix by its name in the file; of those that gguf-py cannot make, any blocks (`some_blocks`).
    more: fields to set besides, whole keys.
    """
    import gguf
    import numpy as np

    config = read_config(src)
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == of.arch)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    dst.parent.mkdir(parents=True, exist_ok=True)
    w = gguf.GGUFWriter(dst, of.arch)
    for key, value in {**metadata(of, config), **more}.items():
        _add(w, key, value)
    for name, table in {**of.tables(config), **(tables or {})}.items():
        w.add_tensor(name, np.asarray(table, dtype=np.float32))
    for name, t in of.weights(stacked(read_tensors(src)), config).items():
        full = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert full is not None, f"gguf-py has no name for {name}"
        new = full.removesuffix(".weight").removesuffix(".bias")
        x = t.float()
        if of.plus_one and new.endswith("norm"):
            x = x + 1
        if of.interleaved and re.search(r"attn_[qk]$", new):
            x = interleaved(x, config["num_attention_heads" if new.endswith("q") else "num_key_value_heads"])
        wide = x.ndim > 1 and x.shape[-1] % 32 == 0 and "norm" not in new
        kind = gguf.GGMLQuantizationType[(types(full) if types else quant) if wide else "F32"]
        plain = kind == gguf.GGMLQuantizationType.F32
        if kind.name in ("Q4_K", "Q5_K", "Q6_K"):
            data = some_blocks(kind.name, tuple(x.shape))
        else:
            data = x.numpy() if plain else gguf.quants.quantize(x.numpy(), kind)
        w.add_tensor(full, data, raw_dtype=None if plain else kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return dst


def some_blocks(type: str, shape: tuple[int, ...]) -> Any:
    """Blocks of a tensor of that shape: bytes [.., bytes of a row] of any codes, with scales that make values of up to about 1."""
    import numpy as np

    from zoo.quant import blocks

    block = blocks.TYPES[type.lower()]
    n = int(np.prod(shape)) // block.columns
    raw = np.random.default_rng(len(shape) + n).integers(0, 256, (n, block.nbytes), dtype=np.uint8)
    scale = 2.0**-10 if block.columns == 256 else 2.0**-7
    for at in block.halves:
        raw[:, at : at + 2] = (
            np.random.default_rng(at + n).normal(0, scale, (n, 1)).astype(np.float16).view(np.uint8)
        )
    return raw.reshape(*shape[:-1], -1)


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def same(ours: Path, theirs: Path, of: Gguf) -> None:
    """Assert that zoo's file says all that the converter's says, and has its tensors: names, types, shapes, bytes."""
    from zoo.formats.gguf import read_header

    (mine, my_refs), (fields, refs) = (read_header(file, file.name) for file in (ours, theirs))
    idle = {f"{of.arch}.{k}" for k in of.idle}
    said = {k: v for k, v in fields.items() if k not in idle}
    assert {k: mine.get(k) for k in said} == said
    assert {_what(ours, r) for r in my_refs} == {_what(theirs, r) for r in refs}


def _what(file: Path, r: TensorRef) -> tuple[Any, ...]:
    return r.name, r.dtype, r.shape, file.read_bytes()[r.offset : r.offset + r.nbytes]


def header(case: FamilyCase, of: Gguf, at: Path) -> Header:
    """Metadata, tensors and the values of those of constants of the family's tiny GGUF, which is written to the folder `at`."""
    from zoo.formats.gguf import read_header

    folder, file = make(case, of, at)
    found, refs = read_header(file, file.name)
    tables = {name: tuple(map(float, table)) for name, table in of.tables(read_config(folder)).items()}
    return found, {r.name: r for r in refs}, tables


def config(of: Gguf, header: Header, fields: Settings, factors: tuple[float, ...] | None = None) -> Settings:
    """The config.json that zoo reads off the header with fields changed, or taken out (None). `factors`: the values of a
    `rope_freqs.weight`."""
    from zoo.formats import gguf_config

    metadata, tensors, tables = header
    changed = metadata | {f"{of.arch}.{k}": v for k, v in fields.items()}
    kept = {k: v for k, v in changed.items() if v is not None}
    if factors is not None:
        tables = tables | {"rope_freqs.weight": factors}
    return gguf_config.config(kept, tensors, tables, "w.gguf")


def interleaved(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows (or elements of a bias) of each head from half-split to interleaved RoPE order: LlamaModel.permute."""
    return w.view(n_heads, 2, w.shape[0] // n_heads // 2, -1).transpose(1, 2).reshape(w.shape)


def stacked(tensors: Tensors) -> Tensors:
    """Numbered experts as one tensor each, as all of llama.cpp's converters have them."""
    import torch

    out: Tensors = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, t in tensors.items():
        if m := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", name):
            stacks.setdefault(f"{m[1]}.{m[3]}.weight", {})[int(m[2])] = t
        else:
            out[name] = t
    return out | {name: torch.stack([s[n] for n in sorted(s)]) for name, s in stacks.items()}
