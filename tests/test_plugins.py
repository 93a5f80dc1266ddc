"""Families and releases of other packages: found by their entry points, and no better than those of zoo itself.

What breaks in one, or in a family file of ours, is named and breaks nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zoo import families, manifest
from zoo.errors import ZooError
from zoo.shipped import converters

MODULE = """
import dataclasses
from zoo.converters.qwen3 import FAMILY as QWEN
FAMILY = dataclasses.replace(QWEN, name={name!r}, model_types=({model_type!r},), architectures=({architecture!r},))
"""
RELEASE = """
name = "{name}"
family = "{family}"
formats = ["safetensors"]
[[sources]]
kind = "hub"
repo = "{repo}"
"""
OWN = {"architectures": ["OwnForCausalLM"], "model_type": "own"}

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package with one family (name, model type, architecture; or the text of its module), and manifests
    (text by file name)."""
    site = tmp_path / "site"
    site.mkdir()

    def add(
        name: str,
        model_type: str = "",
        architecture: str = "",
        text: str = MODULE,
        releases: dict[str, str] | None = None,
    ) -> None:
        package = site / f"plugin_{name}"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "family.py").write_text(
            text.format(name=name, model_type=model_type, architecture=architecture)
            if text is MODULE
            else text
        )
        entries = f"[zoo.families]\n{name} = plugin_{name}.family:FAMILY\n"
        if releases is not None:
            entries += f"[zoo.manifests]\n{name} = plugin_{name}.releases\n"
            for file, content in releases.items():
                (package / "releases" / file).parent.mkdir(parents=True, exist_ok=True)
                (package / "releases" / file).write_text(content)
        info = site / f"plugin_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
        families.refresh()
        manifest.refresh()

    monkeypatch.syspath_prepend(str(site))
    yield add
    for module in [m for m in sys.modules if m.startswith("plugin_")]:
        del sys.modules[module]
    monkeypatch.undo()
    families.refresh()
    manifest.refresh()


def test_an_installed_package_adds_a_family(install: Install) -> None:
    with pytest.raises(ZooError, match="OwnForCausalLM"):
        families.find(OWN)
    install("own", "own", "OwnForCausalLM")
    assert families.find(OWN).name == "own"
    assert families.find({"model_type": "own"}).name == "own"
    assert families.get("own").name == "own"
    assert "own" in families.families()
    assert str(families.package_of("own")) == "plugin-own 1.0"
    assert families.package_of("qwen3") is None


def test_it_cannot_take_a_release_from_a_family_of_ours(install: Install) -> None:
    install("thief", "qwen3", "Qwen3ForCausalLM")
    assert families.find({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}).name == "qwen3"
    install("qwen3", "qwen3", "Qwen3ForCausalLM")
    assert families.families()["qwen3"].model_types == ("qwen3",)
    assert families.families()["qwen3"].spec.__module__ == "zoo.converters.qwen3"
    assert families.package_of("qwen3") is None


def test_of_a_wrapper_that_several_claim_the_one_that_knows_the_text_model_gets_it(install: Install) -> None:
    wrapper = "Mistral3ForConditionalGeneration"
    ours = families.find({"architectures": [wrapper], "text_config": {"model_type": "mistral"}}).name
    install("own", "own_text", wrapper)
    assert (
        families.find({"architectures": [wrapper], "text_config": {"model_type": "own_text"}}).name == "own"
    )
    assert families.find({"architectures": [wrapper], "text_config": {"model_type": "mistral"}}).name == ours


def test_it_brings_readings_of_its_own_for_gguf_and_vendors_files(install: Install) -> None:
    text = MODULE.format(name="own", model_type="own", architecture="OwnForCausalLM") + (
        "FAMILY = dataclasses.replace(FAMILY, gguf=dict.fromkeys(('ownarch', 'llama'), lambda f, c: {}), own={'mistral': lambda c, names: dict(c)})\n"
    )
    install("own", text=text)
    assert [f.name for f, _ in families.naming_gguf("ownarch", "w.gguf")] == ["own"]
    assert [f.name for f, _ in families.naming_gguf("llama", "w.gguf")] == ["llama", "mixtral", "own"], (
        "ours is asked first"
    )
    assert families.own_config("mistral", {"moe": 1, "is": "own"}, (), "params.json") == {
        "moe": 1,
        "is": "own",
    }
    with pytest.raises(ZooError, match="'other' is not supported; supported: .*ownarch"):
        families.naming_gguf("other", "w.gguf")


# --- releases -----------------------------------------------------------------------------------------------


def test_its_releases_are_known(install: Install) -> None:
    config = '{"model_type": "own", "architectures": ["OwnForCausalLM"]}'
    release = RELEASE.format(name="own-1b", family="own", repo="they/Own-1B")
    files = {"own-1b.toml": release, "configs/own-1b.config.json": config}
    install("own", "own", "OwnForCausalLM", releases=files)
    for name in ("own-1b", "they/own-1b"):
        assert manifest.find(name).family == "own"
    assert "own-1b" in manifest.stems()
    assert [m.name for m in manifest.search("own-1b")] == ["own-1b"]
    assert manifest.find("own-1b").config == OWN


def test_it_cannot_take_the_name_of_a_release_of_ours(install: Install) -> None:
    before = manifest.find("qwen3-8b")
    thief = RELEASE.format(name="qwen3-8b", family="own", repo="they/Own-1B")
    other = RELEASE.format(name="aaa", family="own", repo="Qwen/Qwen3-8B")
    install("own", "own", "OwnForCausalLM", releases={"qwen3-8b.toml": thief, "aaa.toml": other})
    assert manifest.find("qwen3-8b") == before
    assert manifest.find("Qwen/Qwen3-8B") == before
    assert manifest.find("aaa").family == "own"


def test_a_manifest_that_breaks_the_schema_is_named_and_left_out_of_the_listing(install: Install) -> None:
    n = len(manifest.load_all())
    install("own", "own", "OwnForCausalLM", releases={"own-1b.toml": 'name = "own-1b"'})
    with pytest.warns(UserWarning, match=r"own-1b\.toml: left out of the listing: .*family: missing"):
        assert len(manifest.load_all()) == n


def test_manifests_that_are_not_where_the_package_says_are_named(install: Install) -> None:
    n = len(manifest.load_all())
    install("own", "own", "OwnForCausalLM", releases={})
    with pytest.warns(
        UserWarning, match=r"plugin-own 1\.0: its manifests \(plugin_own\.releases\) can't be read"
    ):
        assert len(manifest.load_all()) == n


# --- what breaks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "SyntaxError"),
        ("FAMILY = 1 / 0", "ZeroDivisionError"),
        ("FAMILY = 7", "is a int; expected a zoo.family.Family"),
    ],
)
def test_a_package_that_breaks_is_named_and_breaks_nothing_else(
    text: str, says: str, install: Install
) -> None:
    install("bad", text=text)
    install("own", "own", "OwnForCausalLM")
    with pytest.warns(UserWarning, match=f"package plugin-bad 1.0, family bad: .*{says}"):
        assert families.find(OWN).name == "own"
    with pytest.raises(ZooError, match=f"(?s)no family is called 'bad'.*plugin-bad 1.0.*{says}"):
        families.get("bad")
    with pytest.raises(ZooError, match=f"(?s)no family for .*plugin-bad 1.0.*{says}"):
        families.find({"architectures": ["BadForCausalLM"]})


@pytest.mark.parametrize(
    ("text", "says"), [("x = 1\nimport no_such_module\n", "bad_one.py:2: "), ("x = 1\ndef f(:\n", "bad_one.py:2: ")]
)  # fmt: skip
def test_a_broken_family_file_of_ours_breaks_no_other(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_one.py").write_text(text)
    monkeypatch.setattr(converters, "__path__", [*converters.__path__, str(tmp_path)])
    families.refresh()
    try:
        with pytest.warns(UserWarning, match=f"{says}the family in zoo.converters.bad_one can't be imported"):
            assert families.find({"architectures": ["Qwen3ForCausalLM"]}).name == "qwen3"
        with pytest.raises(ZooError, match=says):
            families.get("bad_one")
        with pytest.raises(ZooError, match=f"(?s)no family for .*{says}"):
            families.find({"architectures": ["BadOneForCausalLM"]})
        assert families.get("qwen3").name == "qwen3"
    finally:
        monkeypatch.undo()
        families.refresh()


# --- whose mistake it is ------------------------------------------------------------------------------------

SPEC = """
from zoo.family import Attention, Config, Family, Norm, Spec
def spec(c: Config) -> Spec:
    {line}
FAMILY = Family("own", ("own",), ("OwnForCausalLM",), spec, {{}})
"""


@pytest.mark.parametrize(
    "line",
    [
        "return no_such_name",
        "n = m; m = c['hidden_size']",
        "return c.no_such_method()",
        "import no_such_module",
        "return Norm(1e-6).no_such_field",
        "return c['hidden_size'].no_such_field",
        "return Attention(n_head=4)",
        "return Attention(1, 2)",
        "assert c['hidden_size'] == 'x'",
        "c.get()",
        "return c.choice('hidden_size')",
    ],
)
def test_a_mistake_in_a_familys_code_is_placed_there(line: str, install: Install) -> None:
    install("own", text=SPEC.format(line=line))
    with pytest.raises(
        ZooError,
        match=r"family\.py:4: the code of family own fails on config\.json \(.*The mistake is the family's",
    ):
        families.spec_of({**OWN, "hidden_size": 64})


@pytest.mark.parametrize("line", ["return None", "return Spec", "pass"])
def test_a_family_that_makes_no_spec_is_placed_where_it_begins(line: str, install: Install) -> None:
    install("own", text=SPEC.format(line=line))
    with pytest.raises(ZooError, match=r"family\.py:3: the code of family own fails on config\.json"):
        families.spec_of(OWN)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("return c['x'] + 1", "a text"),
        ("return c['x'].items()", [1]),
        ("return c['x'] / 0 if c['x'] else 1 / c['x']", 0),
        ("return c['x'][7]", [1]),
        ("return float(c['x'])", "abc"),
        ("return range(c['x'])", 1.5),
        ("return c['x'] > 0", "abc"),
    ],
)
def test_a_value_that_makes_no_model_is_the_configs(line: str, value: object, install: Install) -> None:
    install("own", text=SPEC.format(line=line))
    with pytest.raises(
        ZooError,
        match=r"^config\.json: (x is \S+; expected .*)?\(?a field has a value that makes no own model \(",
    ):
        families.spec_of({**OWN, "x": value})
