"""Text -> ids, held to transformers' `AutoTokenizer` at a plain call for every kind of tokenizer file."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from zoo.text import Text
from zoo.verify.inputs import TEXTS

CORPUS = [text for _, text in TEXTS] * 4
PROBES = [
    *(text for _, text in TEXTS),
    "", " ", "  two  blanks ", "don't  WE'LL 12345 x", "a<|im_start|>user\n <tool> b</s><s>[INST]", "line\n\n\nline\t",
    "cafe\u0301 <extra_a>  <extra_b> <mine>x",
]  # fmt: skip


@cache
def byte_level(size: int = 600) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def metaspace() -> str:
    """As the tokenizer.json of a Llama 2: SentencePiece's pieces, spelled for the tokenizers library."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    data["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer.to_str()


def put(folder: Path, **files: Any) -> None:
    for name, data in files.items():
        name = {"merges": "merges.txt", "model": "tokenizer.model"}.get(name, name + ".json")
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")


def flags(content: str, **other: bool) -> dict[str, Any]:
    return {
        "content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True,
        **other,
    }  # fmt: skip


def with_json(config: dict[str, Any], model_type: str = "llama", text: str | None = None, **more: Any) -> Any:
    def make(folder: Path) -> None:
        put(
            folder,
            tokenizer=text or byte_level(),
            tokenizer_config=config,
            config={"model_type": model_type},
            **more,
        )

    return make


def saved(**what: Any) -> str:
    return json.dumps({**json.loads(byte_level()), **what})


def vocab_and_merges(config: dict[str, Any], model_type: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        model = json.loads(byte_level())["model"]
        merges = "#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]) + "\n"
        put(
            folder,
            vocab=model["vocab"],
            merges=merges,
            tokenizer_config=config,
            config={"model_type": model_type},
        )

    return make


def byte_tokens() -> list[bytes]:
    """Some tokens in bytes, the single ones first."""
    back = {c: b for b, c in _spelling().items()}
    vocab = json.loads(byte_level())["model"]["vocab"]
    tokens = [bytes(back[c] for c in t) for t in vocab if all(c in back for c in t)]
    return sorted(set(tokens), key=lambda t: len(t) > 1)


def _spelling() -> dict[int, str]:
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in prints]
    return {b: chr(b) for b in prints} | {b: chr(256 + n) for n, b in enumerate(rest)}


def tiktoken(name: str, config: dict[str, Any], model_type: str = "llama") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        lines = (f"{base64.b64encode(t).decode()} {n}\n" for n, t in enumerate(byte_tokens()))
        (folder / name).write_text("".join(lines))
        put(folder, tokenizer_config=config, config={"model_type": model_type})

    return make


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
N = 600  # the vocabulary
KINDS: dict[str, Callable[[Path], None]] = {
    "tokenizer.json": with_json(FAST),
    "without tokenizer_config": lambda folder: put(folder, tokenizer=byte_level(), config={"model_type": "llama"}),
    "saved truncation": with_json(
        FAST, text=saved(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0})
    ),
    "saved padding": with_json(
        FAST,
        text=saved(
            padding={
                "strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                "pad_token": "<|endoftext|>",
            }
        ),
    ),
    "added_tokens_decoder": with_json(
        {**FAST, "added_tokens_decoder": {str(N): flags("<tool>"), str(N + 1): flags("<extra_a>", special=False)}}
    ),
    "added_tokens_decoder out of order": with_json(
        {**FAST, "added_tokens_decoder": {str(N + 1): flags("<tool>", lstrip=True), str(N): flags("<mine>", rstrip=True)}}
    ),
    "added_tokens.json": with_json(FAST, added_tokens={"<tool>": N, "<extra_a>": N + 1}),
    "special_tokens_map.json": with_json(
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        special_tokens_map={"eos_token": flags("<mine>"), "additional_special_tokens": ["<extra_a>", "<extra_b>"]},
    ),
    "additional_special_tokens": with_json({**FAST, "additional_special_tokens": ["<extra_b>", "<extra_a>"]}),
    "additional_special_tokens with flags": with_json(
        {**FAST, "additional_special_tokens": [{"__type": "AddedToken", **flags("<extra_b>", lstrip=True)}]}
    ),
    "extra_special_tokens by name": with_json({**FAST, "extra_special_tokens": {"image_token": "<tool>"}}),
    "a model's own named token": with_json({**FAST, "image_token": "<tool>"}),
    "special tokens not in the vocabulary": with_json({**FAST, "bos_token": "<mine>", "pad_token": "<tool>"}),
    "add_bos_token beside tokenizer.json": with_json({**FAST, "bos_token": "<s>", "add_bos_token": True}),
    "split_special_tokens": with_json({**FAST, "split_special_tokens": True}),
    "clean_up_tokenization_spaces": with_json({**FAST, "clean_up_tokenization_spaces": True}),
    "Llama's": with_json(LLAMA, text=metaspace()),
    "Llama's, legacy": with_json({**LLAMA, "legacy": True}, text=metaspace()),
    "Llama's, without a space before": with_json({**LLAMA, "add_prefix_space": False}, text=metaspace()),
    "Llama's class over byte-level": with_json(LLAMA),
    "Mistral with Llama's class": with_json(LLAMA, "mistral", text=metaspace()),
    "Gemma's": with_json(
        {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}, "gemma3_text", text=metaspace()
    ),
    "Code Llama's": with_json({**LLAMA, "tokenizer_class": "CodeLlamaTokenizer"}, text=metaspace()),
    "Qwen's": with_json(QWEN, "qwen3"),
    "Qwen 2's": with_json({"tokenizer_class": "Qwen2Tokenizer"}, "qwen2"),
    "Qwen 3.5's": with_json({"tokenizer_class": "Qwen2Tokenizer"}, "qwen3_5"),
    "GPT-2's": with_json({"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
    "GPT-2's with a space before": with_json({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "gpt2"),
    "GPT-2's, no class said": with_json({}, "gpt2"),
    "GPT-NeoX's": with_json({"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": True}, "olmo"),
    "Cohere's": with_json({"tokenizer_class": "CohereTokenizer"}, "cohere"),
    "vocab and merges, GPT-2's": vocab_and_merges({"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
    "vocab and merges, with bos": vocab_and_merges(
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}, "gpt2"
    ),
    "vocab and merges, Qwen's": vocab_and_merges(QWEN, "qwen3"),
    "vocab and merges, no class said": vocab_and_merges({}, "qwen2_moe"),
    "tiktoken.model": tiktoken("tiktoken.model", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "tiktoken.model with added tokens": tiktoken(
        "tiktoken.model",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
            "added_tokens_decoder": {"700": flags("<s>"), "702": flags("<tool>")},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_autotokenizer(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if kind.startswith("tiktoken"):
        pytest.importorskip("tiktoken")
    KINDS[kind](tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Text(tmp_path)
    for probe in PROBES:
        ids = theirs(probe).input_ids
        assert ours.encode(probe) == ids
        assert ours.encode(probe, special=False) == theirs(probe, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map
