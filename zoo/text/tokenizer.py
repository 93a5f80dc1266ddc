"""A release's tokenizer files -> a tokenizer that gives the ids of transformers' `AutoTokenizer` at a plain call.

The files are of five kinds; all end as a `tokenizers.Tokenizer`, whose library does the work:

- tokenizer.json, that library's own;
- vocab.json + merges.txt, byte-level BPE;
- tokenizer.model, SentencePiece;
- tekken.json, Mistral's;
- tiktoken.model, *.tiktoken (and Meta's tokenizer.model, which is one): tokens in base64, and their ranks.

Unusual here:
- A few tokenizer classes (`tokenizer_class`) say themselves how text is split and put together; of tokenizer.json
  they take the vocabulary, the merges and the post-processor only. `CLASSES` has those of the families zoo knows.
- Tokens are added from each place where they are kept, in upstream's order; the order gives new ones their ids.
- Truncation and padding that a file saved are no part of the model: the prompt is neither cut nor filled.
- `add_bos_token`, `add_eos_token` count only where there is no tokenizer.json: there the post-processor says it.

Facts: transformers 5.23, `models/auto/tokenization_auto.py`, `tokenization_utils_base.py`,
`tokenization_utils_tokenizers.py`; tests/test_text.py holds each kind to it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.formats.base import MAX_JSON, inside, place_of, read_json
from zoo.formats.gguf_tokenizer import QWEN2_SPLIT, QWEN35_SPLIT, SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRANSFORMERS = "5.23.0"
"""The version whose ids these are, whichever is installed."""
_JSON = "tokenizer.json"
MAX_TOKEN = 1024
"""Characters of a token of SentencePiece or tiktoken; the longest known are 256 of a kind."""
MAX_RESERVED = 100_000
"""Tokens that are counted and not named."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TIKTOKEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How a tiktoken file's text is split where nothing else is known: Llama 3's way, and AutoTokenizer's default."""
_UP, _LOW = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]", r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_SPLIT = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UP}]*[{_LOW}]+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[{_UP}]+[{_LOW}]*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Kimi's, from the release's own code (tokenization_kimi.py), which AutoTokenizer runs only if it is trusted."""
_END = "<|endoftext|>"

# tekken.json of 2024 lists no special tokens; these are mistral-common's for it, in the order of their ids.
_TEKKEN_2024 = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()

# The class that upstream has for a model of this type; others take the one that the files declare.
_BY_TYPE = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen2_vl"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), "Qwen3_5Tokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "dbrx", "phi", "opt", "starcoder2", "jais2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe", "mamba", "mamba2", "falcon_mamba", "mpt"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    "code_llama": "CodeLlamaTokenizer",
    **dict.fromkeys(("mistral", "mistral3", "mixtral", "ministral", "ministral3", "pixtral", "voxtral"), "backend"),
    **dict.fromkeys(("glm", "glm4", "glm4_moe", "glm4v", "glm4v_moe", "glm4_moe_lite", "olmo2", "olmo3", "olmo_hybrid", "flex_olmo"), "backend"),
    **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "granitemoeshared"), "backend"),
    **dict.fromkeys(("kimi_k25", "kimi_linear", "mimo_v2_flash", "stablelm", "gpt_bigcode"), "backend"),
    **dict.fromkeys(("phi3", "phimoe", "minimax_m2", "nemotron", "internlm2", "internlm3", "minicpm3"), "backend"),
    **dict.fromkeys(("jamba", "ernie4_5", "ernie4_5_moe", "llava", "llava_next", "molmo"), "backend"),
}  # fmt: skip
# Types whose releases declare a class that upstream knows to be wrong.
_DECLARE_WRONG = {
    "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "phi3", "phimoe", "minimax_m2", "nemotron", "internlm2",
    "internlm3", "minicpm3", "jamba", "ernie4_5", "ernie4_5_moe", "llava", "llava_next", "molmo",
}  # fmt: skip
_MISTRAL = {"mistral", "mistral3", "mixtral", "ministral", "ministral3", "pixtral", "voxtral"}
OTHERS = {
    f"{name}Tokenizer"
    for name in """
    Albert Bart Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot BlenderbotSmall ByT5 CLIP CTRL
    Camembert Canine Clvp Cpm CpmAnt DPRQuestionEncoder Deberta DebertaV2 Dia Esm Esmc FNet FSMT Flaubert Funnel GPTNeoXJapanese GPTSw3
    Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert M2M100 MBart MBart50 MLuke MPNet Marian MarkupLM Mgpstr MobileBert Mvp
    MyT5 Nllb Nougat OpenAIGPT PLBart Parakeet Pegasus Perceiver Phobert ProphetNet Rag Reformer RemBert RoCBert RoFormer Roberta
    SeamlessM4T Siglip Siglip2 Speech2Text SpeechT5 Splinter T5 Tapas Tipsv2 Udop VideoPrism Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper
    XGLM XLM XLMRoberta XLNet
    """.split()
}
"""Classes with code of their own upstream, which zoo has not: where one is taken, that is said."""


@dataclass
class Loaded:
    """A tokenizer, ready. `special` are the named special tokens as text, as templates see them."""

    tokenizer: Tokenizer
    special: dict[str, str]
    files: tuple[str, ...]  # that it was made from
    clean_up: bool = False
    mistral: bool = False
    pieces: Any = None  # sentencepiece's own processor, where plain texts are its
    notes: tuple[str, ...] = ()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """`special`: as at a plain call. Without: a rendered template, which spells special tokens itself."""
        if not self.mistral:
            return list(self.tokenizer.encode(text, add_special_tokens=special).ids)
        # As mistral-common: a plain text begins with <s>, and "[INST]" in it is text.
        self.tokenizer.encode_special_tokens = special
        if special and self.pieces is not None:
            ids = list(self.pieces.encode(text))
        else:
            ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        begin = self.tokenizer.token_to_id("<s>") if special else None
        return ids if begin is None else [begin, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        if self.clean_up:
            for mark in (".", "?", "!", ","):
                text = text.replace(" " + mark, mark)
            text = text.replace(" ' ", "'")
            for short in ("n't", "'m", "'s", "'ve", "'re"):
                text = text.replace(" " + short, short)
        return text


def file_of(root: Path) -> Path:
    """The file that the tokenizer of the folder `root` is made from. Raises ZooError if it has none."""
    if (name := _versioned(_json(root / "tokenizer_config.json"))) != _JSON:
        return inside(root, name, "fast_tokenizer_files in tokenizer_config.json")
    named = (root / name for name in _READERS)
    versions = sorted(root.glob("tokenizer.model.v[0-9]*"), reverse=True)
    for file in (*named, *versions, *sorted(root.glob("*.tiktoken"))):
        if file.is_file():
            return file
    raise ZooError(
        f"{root} has no tokenizer ({', '.join(_READERS)} with merges.txt, tokenizer.model.v*, *.tiktoken), so text can't be turned into "
        "tokens: give token ids (--ids)"
    )


def load(root: Path) -> Loaded:
    """The tokenizer of the folder `root`. Raises ZooError if it has none, or one that can't be read."""
    file = file_of(root)
    config = _json(root / "tokenizer_config.json")
    other = _tiktoken if file.suffix == ".tiktoken" else _sentencepiece
    read = _from_json if file == root / _versioned(config) else _READERS.get(file.name, other)
    loaded = read(root, config, file)
    if (chosen := _chosen(root, config, None)) in OTHERS and not loaded.mistral:
        said = f"transformers reads this with its {chosen}, which zoo has not; read as the file says: ids may differ"
        loaded.notes = (said, *loaded.notes)
    return loaded


def _versioned(config: Mapping[str, Any]) -> str:
    """The name of the tokenizers library's file. `fast_tokenizer_files` lists others, each for a version of transformers and
    later ones: the last is taken, in the order of the versions' text, before the first that is too new."""
    listed = config.get("fast_tokenizer_files")
    if listed is None:
        return _JSON
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ZooError(
            f"tokenizer_config.json: fast_tokenizer_files is {str(listed)[:80]}; expected names of files"
        )
    from packaging.version import Version

    of = {found[1]: name for name in listed if (found := re.search(r"tokenizer\.(.*)\.json", name))}
    chosen = _JSON
    for version, name in sorted(of.items()):
        try:
            if Version(version) > Version(TRANSFORMERS):
                break
        except ValueError:  # InvalidVersion, and what Python refuses: a number of thousands of digits
            raise ZooError(
                f"tokenizer_config.json: fast_tokenizer_files lists {name[:80]!r}, which names no version of transformers"
            ) from None
        chosen = name
    return chosen


def class_of(root: Path, config: Mapping[str, Any], document: Mapping[str, Any] | None) -> str:
    """The class of `CLASSES` that upstream takes, or "backend": the file as it is."""
    chosen = _chosen(root, config, document)
    return chosen if chosen in CLASSES else "backend"


def _chosen(root: Path, config: Mapping[str, Any], document: Mapping[str, Any] | None) -> str:
    """The name of the class that upstream takes, whichever it is."""
    model = _json(place_of(root, "config.json"))
    kind = model.get("model_type")
    kind = kind if isinstance(kind, str) else ""
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    declared = declared.removesuffix("Fast") if isinstance(declared, str) else None
    known = _BY_TYPE.get(kind)
    if declared == "LlamaTokenizer" and kind not in _MISTRAL | _DECLARE_WRONG and document is not None:
        if "ByteLevel" in _types(document):
            return "backend"
    if declared is not None and known is not None and known != declared:
        if known == "backend":
            return "backend"
        declared = known if kind in _DECLARE_WRONG else declared
    return declared or known or "backend"


# ---- the kinds


def _from_json(root: Path, config: dict[str, Any], file: Path) -> Loaded:
    from tokenizers import Tokenizer

    document = read_json(file, "it is the tokenizer")
    of = class_of(root, config, document)
    model = document.get("model")
    if not isinstance(model, dict):
        raise ZooError(f"{file}: it has no model")
    fields = {k: v for k, v in config.items() if k not in ("add_bos_token", "add_eos_token")}
    if isinstance(padding := document.get("padding"), dict) and isinstance(padding.get("pad_token"), str):
        fields.setdefault("pad_token", padding["pad_token"])
    if of == "backend":
        made = Tokenizer.from_file(str(file))
    else:
        # Only its post-processor, without the cost of its vocabulary.
        shell = {**document, "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        post = Tokenizer.from_str(json.dumps(shell)).post_processor
        vocab = model.get("vocab")
        if isinstance(vocab, list):
            vocab = {t[0] if isinstance(t, list) else t: n for n, t in enumerate(vocab)}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", ())]
        made = CLASSES[of].build(vocab or {}, merges, fields)
        if post is not None:
            made.post_processor = post
    added = document.get("added_tokens") or []
    return _finish(root, fields, made, of, (file.name,), added)


def _vocab_and_merges(root: Path, config: dict[str, Any], file: Path) -> Loaded:
    of = class_of(root, config, None)
    merges_file = root / "merges.txt"
    if not merges_file.is_file():
        raise ZooError(f"{file}: merges.txt is missing beside it")
    vocab = read_json(file, "it is the tokenizer's vocabulary")
    merges = []
    for number, line in enumerate(_text(merges_file).split("\n")):
        if line.strip() and not (number == 0 and line.startswith("#version")):
            pair = tuple(line.rstrip("\r").split(" "))
            if len(pair) != 2:
                raise ZooError(f"{merges_file}: line {number + 1} is no pair of tokens: {line[:60]!r}")
            merges.append(pair)
    of = of if of != "backend" else "GPT2Tokenizer"
    made = CLASSES[of].build(vocab, merges, config)
    return _finish(root, config, made, of, (file.name, "merges.txt"))


def _sentencepiece(root: Path, config: dict[str, Any], file: Path) -> Loaded:
    data = _bytes(file)
    if (
        _ranks_or_none(data[:4096].rsplit(b"\n", 1)[0]) is not None
    ):  # Meta's Llama 3 calls its tiktoken file so
        return _tiktoken(root, config, file)
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ZooError(
            f"{file} is a SentencePiece model, and the library that reads it is not installed: "
            "pip install sentencepiece protobuf"
        ) from None
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ZooError(f"{file}: sentencepiece can't read it ({error})") from None
    mistral = file.name.startswith(
        "tokenizer.model.v"
    )  # Mistral's own releases, which only mistral-common reads
    of = "LlamaTokenizer" if mistral else class_of(root, config, None)
    pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    added = [
        AddedToken(piece, normalized=False, special=kind == 3) for piece, _, kind in pieces if kind in (3, 4)
    ]
    vocab = {piece: n for n, (piece, *_) in enumerate(pieces)}
    fields = dict(config)
    if of != "backend":
        made = CLASSES[of].build(vocab, _merges(vocab), fields)
    else:
        if trainer.model_type == trainer.UNIGRAM:
            model: Any = models.Unigram([p[:2] for p in pieces], trainer.unk_id, trainer.byte_fallback)
        else:
            model = models.BPE(
                vocab, _merges(vocab), unk_token=trainer.unk_piece, fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )  # fmt: skip
        made = Tokenizer(model)
        steps: list[Any] = [normalizers.Replace(" ", SPACE)]
        if normal.precompiled_charsmap:
            steps.insert(0, normalizers.Precompiled(normal.precompiled_charsmap))
        made.normalizer = normalizers.Sequence(steps)
        back: list[Any] = [decoders.Replace(SPACE, " ")]
        if trainer.byte_fallback:
            back += [decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence(back)
        for key in ("bos", "eos", "unk"):
            if getattr(trainer, f"{key}_id") >= 0:
                fields.setdefault(f"{key}_token", getattr(trainer, f"{key}_piece"))
    loaded = _finish(root, fields, made, of, (file.name,), extra=added)
    if mistral:
        from sentencepiece import SentencePieceProcessor

        loaded.mistral, loaded.pieces = True, SentencePieceProcessor(model_proto=data)
    return loaded


def _tekken(root: Path, config: dict[str, Any], file: Path) -> Loaded:
    from tokenizers import AddedToken

    data = read_json(file, "it is the tokenizer")
    try:
        about, tokens = data["config"], data["vocab"]
        listed = data.get("special_tokens")
        named = _TEKKEN_2024 if listed is None else [str(t["token_str"]) for t in sorted(listed, key=_rank)]
        count = about.get("default_num_special_tokens") or len(named)
        if not 0 <= count <= MAX_RESERVED:
            raise ValueError(f"{count} special tokens")
        named = [*named, *(f"<SPECIAL_{n}>" for n in range(len(named), count))]
        size = about.get("default_vocab_size")
        raw = [
            base64.b64decode(t["token_bytes"]) for t in (tokens if size is None else tokens[: size - count])
        ]
        pattern = about["pattern"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ZooError(f"{file}: no tekken vocabulary ({type(error).__name__}: {error})") from None
    vocab, merges = byte_pairs({token: n for n, token in enumerate(raw)})
    vocab = {t: n + len(named) for t, n in vocab.items()} | {t: n for n, t in enumerate(named)}
    made = _byte_level(vocab, merges, pattern)
    made.add_special_tokens([AddedToken(t, special=True) for t in named])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    special = {k: t for k, t in special.items() if t in vocab}
    if "<s>" not in vocab:
        raise ZooError(f"{file}: it has no token <s>, with which every text begins")
    return Loaded(made, special, (file.name,), mistral=True)


def _rank(token: Mapping[str, Any]) -> int:
    return int(token["rank"])


def _tiktoken(root: Path, config: dict[str, Any], file: Path) -> Loaded:
    from tokenizers import AddedToken, processors

    ranks = _ranks_or_none(_bytes(file))
    if not ranks:
        raise ZooError(f"{file}: expected a token in base64 and its rank in every line")
    vocab, merges = byte_pairs(ranks)
    reference = str((config.get("auto_map") or {}) if isinstance(config.get("auto_map"), dict | list) else "")
    kimi = config.get("tokenizer_class") == "TikTokenTokenizer" or "tokenization_kimi" in reference
    made = _byte_level(vocab, merges, KIMI_SPLIT if kimi else TIKTOKEN_SPLIT)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    listed = config.get("added_tokens_decoder")
    by_id = {int(n): _content(t) for n, t in listed.items()} if isinstance(listed, dict) else {}
    top, base = max(by_id, default=0), len(ranks)
    if top > base + MAX_RESERVED:
        raise ZooError(f"tokenizer_config.json of {root}: an added token has the number {top}")
    names = [by_id.get(n, f"<|reserved_token_{n}|>") for n in range(base, top + 1)] if top >= base else []
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names += (
        [t for t in map(_content, extra) if t not in set(names)] if isinstance(extra, list) else list(extra)
    )
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in names])
    return _finish(root, config, made, "backend", (file.name,))


def _ranks_or_none(data: bytes) -> dict[bytes, int] | None:
    """The tokens and ranks of a tiktoken file, or None if it is none."""
    try:
        pairs = (line.split() for line in data.splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        return None


_READERS: dict[str, Callable[[Path, dict[str, Any], Path], Loaded]] = {
    _JSON: _from_json,
    "tekken.json": _tekken,
    "tokenizer.model": _sentencepiece,
    "tiktoken.model": _tiktoken,
    "vocab.json": _vocab_and_merges,
}
"""By the file's name, in the order in which they are looked for."""


# ---- the classes


def _byte_level(vocab: dict[str, int], merges: Sequence[tuple[str, str]], pattern: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _gpt2(vocab: Any, merges: Any, fields: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(
        models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("add_prefix_space")))
    made.decoder = decoders.ByteLevel()
    return made


def _neox(vocab: Any, merges: Any, fields: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import normalizers

    made = _gpt2(vocab, merges, fields)
    made.normalizer = normalizers.NFC()
    return made


def _cohere(vocab: Any, merges: Any, fields: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import pre_tokenizers

    made = _neox(vocab, merges, fields)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), made.pre_tokenizer]
    )
    return made


def _qwen(pattern: str) -> Callable[[Any, Any, Mapping[str, Any]], Tokenizer]:
    def build(vocab: Any, merges: Any, fields: Mapping[str, Any]) -> Tokenizer:
        from tokenizers import Regex, pre_tokenizers

        made = _neox(vocab, merges, fields)
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(
                    add_prefix_space=bool(fields.get("add_prefix_space")), use_regex=False
                ),
            ]
        )
        return made

    return build


def _llama(vocab: Any, merges: Any, fields: Mapping[str, Any], code: bool = False) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    unknown = {"unk_token": _content(fields.get("unk_token", "<unk>"))} if code else {}
    made = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, **unknown))
    prefix = fields.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if fields.get("legacy") and not code else "first"
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix or code:
        back.append(decoders.Strip(content=" ", left=1))
    made.decoder = decoders.Sequence(back)
    return made


def _code_llama(vocab: Any, merges: Any, fields: Mapping[str, Any]) -> Tokenizer:
    return _llama(vocab, merges, fields, code=True)


def _gemma(vocab: Any, merges: Any, fields: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = _content(fields.get("unk_token", "<unk>"))
    made = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, unk_token=unknown, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


@dataclass(frozen=True)
class _Class:
    build: Callable[[Any, Any, Mapping[str, Any]], Tokenizer]
    special: dict[str, str]  # named special tokens where the files name none
    always: bool = (
        False  # its post-processor is made from add_bos_token and add_eos_token, whatever the file says
    )


_GPT = {"unk_token": _END, "bos_token": _END, "eos_token": _END}
_QWEN = {"unk_token": _END, "eos_token": _END, "pad_token": _END}
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
CLASSES = {
    "GPT2Tokenizer": _Class(_gpt2, _GPT),
    "CodeGenTokenizer": _Class(_gpt2, _GPT),
    "GPTNeoXTokenizer": _Class(_neox, {**_GPT, "pad_token": "<|padding|>"}, always=True),
    "CohereTokenizer": _Class(
        _cohere,
        {
            "unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>",
            "pad_token": "<PAD>", "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>",
        },
    ),
    "Qwen2Tokenizer": _Class(_qwen(QWEN2_SPLIT), _QWEN),
    "Qwen3_5Tokenizer": _Class(_qwen(QWEN35_SPLIT), _QWEN),
    "LlamaTokenizer": _Class(_llama, _LLAMA),
    "CodeLlamaTokenizer": _Class(
        _code_llama,
        {
            **_LLAMA, "prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>",
            "eot_token": "▁<EOT>", "fill_token": "<FILL_ME>",
        },
        always=True,
    ),
    "GemmaTokenizer": _Class(
        _gemma,
        {
            "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
    ),
}  # fmt: skip


# ---- added tokens, special tokens, what is put around a text


def _finish(
    root: Path,
    config: Mapping[str, Any],
    made: Tokenizer,
    of: str,
    files: tuple[str, ...],
    in_json: Sequence[Mapping[str, Any]] = (),
    extra: Sequence[Any] = (),
) -> Loaded:
    from tokenizers import processors

    fields = dict(config)
    if fields.get("additional_special_tokens") and not fields.get("extra_special_tokens"):
        fields["extra_special_tokens"] = fields["additional_special_tokens"]
    by_id: dict[int, Any] = {}
    listed = fields.get("added_tokens_decoder")
    if isinstance(listed, dict):
        by_id = {int(n): _added(token) for n, token in listed.items()}
    else:
        for key, value in _json(root / "special_tokens_map.json").items():
            if key == "additional_special_tokens":
                fields.setdefault("extra_special_tokens", value)
            elif key == "extra_special_tokens" and isinstance(value, list):
                before = list(fields.get(key) or [])
                listed_before = set(map(repr, before))
                fields[key] = before + [t for t in value if repr(t) not in listed_before]
            elif isinstance(value, dict) and "content" in value:
                fields[key] = {**value, "special": True}
            else:
                fields[key] = value
        extras = fields.get("extra_special_tokens") or []
        names = {_content(fields[k]) for k in NAMED if fields.get(k)} | set(map(_content, extras))
        for token, number in _json(root / "added_tokens.json").items():
            by_id[number] = _added(
                {"content": token, "normalized": token not in names, "special": token in names}
            )
        for item in in_json:
            by_id[item["id"]] = _added({k: v for k, v in item.items() if k != "id"})
    by_content = {t.content: t for t in by_id.values()}

    special: dict[str, Any] = dict(CLASSES[of].special) if of != "backend" else {}
    extras = fields.get("extra_special_tokens") or []
    model_tokens = {k: v for k, v in fields.items() if k.endswith("_token") and k not in NAMED}
    model_tokens |= extras if isinstance(extras, dict) else {}
    if not model_tokens and isinstance(named := fields.get("model_specific_special_tokens"), dict):
        model_tokens = named  # as transformers 5 saves them
    for key, value in {**{k: fields[k] for k in NAMED if k in fields}, **model_tokens}.items():
        if value is None:
            special.pop(key, None)
        elif isinstance(value, str | dict):
            special[key] = by_content.get(
                _content(value), _added(value) if isinstance(value, dict) else value
            )
    if isinstance(extras, dict):  # they have names; a list of others may lie beside
        extras = fields.get("additional_special_tokens") or []
    tail = [*(extra or map(_as_given, extras))]

    # Those not there yet in this very form are added: by number, then the named ones, then the others.
    there = {repr(token): token for token in made.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(by_id.items()) if repr(token) not in there]
    known = {t.content for t in there.values()} | {t.content for t in new}
    for token in [*special.values(), *tail]:
        if _content(token) not in known:
            new.append(token)
            known.add(_content(token))
    names = {_content(t) for t in special.values()}
    made.add_tokens([_special(t, names) for t in new])
    if of == "Qwen2Tokenizer":
        made.add_tokens([_special(_content(t), names) for t in [*special.values(), *tail]])

    moved = [(t.content, n, made.token_to_id(t.content)) for n, t in by_id.items()]
    notes = [
        f"the tokenizer's files give {content!r:.60} the number {number}; it has {found}, as upstream's has it"
        for content, number, found in moved
        if found != number
    ]

    text = {k: _content(v) for k, v in special.items()}
    stated = "add_bos_token" in fields or "add_eos_token" in fields
    if stated or made.post_processor is None or (of != "backend" and CLASSES[of].always):
        default = of == "CodeLlamaTokenizer"
        ahead = text.get("bos_token") if fields.get("add_bos_token", default) else None
        behind = text.get("eos_token") if fields.get("add_eos_token") else None
        ends = [t for t in (ahead, behind) if t is not None]
        made.post_processor = processors.TemplateProcessing(
            single=[*([ahead] if ahead else []), "$A", *([behind] if behind else [])],
            special_tokens=[(end, made.token_to_id(end)) for end in dict.fromkeys(ends)],
        )
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = bool(fields.get("split_special_tokens", False))
    bpe = type(made.model).__name__ == "BPE"
    forced = fields.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    clean = bool(fields.get("clean_up_tokenization_spaces")) and (not bpe or bool(forced))
    return Loaded(made, text, files, clean, notes=tuple(notes[:4]))


def _added(token: Any) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise ZooError(f"the tokenizer's files list an added token without its text: {str(token)[:80]}")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(token["content"], **{k: bool(token[k]) for k in flags if token.get(k) is not None})


def _as_given(token: Any) -> Any:
    return _added(token) if isinstance(token, dict) else token


def _special(token: Any, names: set[str]) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and token.content in names:
        token.special = True
    return token


def _content(token: Any) -> str:
    if isinstance(token, str):
        return token
    content = token.get("content") if isinstance(token, dict) else getattr(token, "content", None)
    if not isinstance(content, str):
        raise ZooError(f"the tokenizer's files have a token without its text: {str(token)[:80]}")
    return content


# ---- merges


def _merges(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """SentencePiece keeps none: every pair of pieces that makes a piece, in the order of the pieces."""
    found = []
    _refuse_long(vocab)
    for piece, number in vocab.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found += [(number, len(a), len(b), a, b) for a, b in pairs if a in vocab and b in vocab]
    found.sort(key=lambda m: m[:3])
    return [(a, b) for *_, a, b in found]


def byte_pairs(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, in byte-level BPE's spelling, of tokens in bytes and their ranks."""
    _refuse_long(ranks)
    spell = byte_spelling()
    spelled = {token: token.decode("latin-1").translate(spell) for token in ranks}
    found = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            a, b = token[:i], token[i:]
            if a in ranks and b in ranks:
                found.append((rank, ranks[a], ranks[b], spelled[a], spelled[b]))
    found.sort()
    return {spelled[t]: n for t, n in ranks.items()}, [(a, b) for *_, a, b in found]


def _refuse_long(tokens: Iterable[str | bytes]) -> None:
    """Every cut of every token is looked up, which takes the square of its length."""
    if (n := max(map(len, tokens), default=0)) > MAX_TOKEN:
        raise ZooError(f"the tokenizer's files have a token of {n} characters; at most {MAX_TOKEN} are read")


def byte_spelling() -> dict[int, int]:
    """GPT-2's: bytes that print stand for themselves, the others are numbered from U+0100."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (b for b in range(256) if b not in prints)
    return {b: b for b in prints} | {b: 256 + n for n, b in enumerate(others)}


# ---- files


def _types(document: Mapping[str, Any]) -> set[Any]:
    """The types of all steps but the model."""
    found, stack = set(), [v for k, v in document.items() if k not in ("model", "added_tokens")]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            found.add(str(item.get("type")))
            stack += item.values()
        elif isinstance(item, list):
            stack += item
    return found


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "it belongs to the tokenizer") if path.is_file() else {}


def _bytes(file: Path) -> bytes:
    if file.stat().st_size > MAX_JSON:
        raise ZooError(f"{file}: over {MAX_JSON >> 20} MiB, which no tokenizer has")
    return file.read_bytes()


def _text(file: Path) -> str:
    try:
        return _bytes(file).decode()
    except UnicodeDecodeError as error:
        raise ZooError(f"{file}: not UTF-8 ({error})") from None
