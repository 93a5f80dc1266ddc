"""The documentation names what is there: pages, links, commands, options, functions."""

from __future__ import annotations

import inspect
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import click
import pages
import pytest

import zoo
from zoo import families, manifest, proof
from zoo.cli import cli
from zoo.spec import Attention, Spec

ROOT = Path(zoo.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE = "gallery/"  # by `make docs`, which checks links into it
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="installed without its documentation")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", MADE, f"../{MADE}")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_line_is_one_that_zoo_takes(page: Path) -> None:
    for block in pages.blocks(page):
        for line in pages.lines(block.code) if block.language in pages.SHELL else ():
            args = pages.command(line)
            if args is None:
                assert not re.search(r"\bzoo \w", line), f"{line}: not seen as one of zoo"
            else:
                pages.parse(args)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_options_within_sentences_exist(page: Path) -> None:
    for name, rest in re.findall(r"`zoo ([a-z]+)([^`\n]*)`", page.read_text(encoding="utf-8")):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, f"zoo {name}"
        inner = command.commands.values() if isinstance(command, click.Group) else [command]
        known = {o for c in inner for p in c.params for o in p.opts} | {"--help"}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known, f"zoo {name}{rest}"


@pytest.mark.parametrize(
    "line", ["zoo lists", "zoo list --has", "zoo list --yeer 1", "zoo list --year x", "zoo verify", "zoo gallery", "zoo sign a b --key k", "zoo export a b --format ggml"]
)  # fmt: skip
def test_a_command_line_that_zoo_does_not_take_is_seen(line: str) -> None:
    args = pages.command(f"torchrun --nproc-per-node 2 -m {line}")
    assert args is not None
    with pytest.raises(click.UsageError):
        pages.parse(args)


def test_a_page_that_shows_what_is_not_printed_is_seen() -> None:
    printed = "PASSED  x  (fp32)\n\nlogits  ok  4.1e-06  <= 5e-05\nparity.json written; 3.7 s\n"
    assert not pages.said(printed, "PASSED x (fp32)\n...\nparity.json written; 12 s\n")
    assert not pages.said(printed, "...\nlogits  ok  9e-7  <= 5e-05\n...\n")
    assert pages.said(printed, "FAILED x (fp32)\n...\n")
    assert pages.said(printed, "PASSED x (fp32)\nparity.json written; 12 s\n")
    assert pages.said(printed, "PASSED x (fp32)\n...\nlogits ok\n...\n")


def test_every_page_is_in_the_navigation_and_every_command_in_the_reference() -> None:
    nav = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(nav) == sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md"))
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in cli.list_commands(click.Context(cli)):
        assert f"`zoo {name}" in reference, name


def test_the_python_pages_have_all_that_is_public() -> None:
    from zoo import family, testing

    there: set[str] = set()
    for page in (ROOT / "docs" / "api.md", *(ROOT / "docs" / "api").glob("*.md")):
        there |= set(re.findall(r"^::: (\S+?)(?:\(\))?$", page.read_text(encoding="utf-8"), re.M))
    for module in (zoo, family, testing):
        for name in module.__all__:
            it = getattr(module, name)
            if (inspect.isclass(it) or inspect.isfunction(it)) and it is not zoo.ZooError:
                assert f"{module.__name__}.{name}" in there, f"{module.__name__}.{name}"
                assert it.__doc__ and not it.__doc__.startswith(f"{name}("), f"{name} has no docstring"
    assert "zoo.ZooError" in there


def test_every_family_is_in_the_table_and_its_proof_is_of_what_it_is_today() -> None:
    import prove

    table = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    proofs = manifest._proofs()
    for name in families.families():
        again = f"run `make prove FAMILY={name}`"
        assert name in table, f"{name}: {again}"
        if name in proofs["families"]:
            releases, variants = prove.versions(name)
            assert proofs["families"][name] == releases, (
                f"{name}: rules or release Specs have changed: {again}"
            )
            assert proofs["variants"][name] == variants, f"{name}: rules or variants have changed: {again}"
    # Else `zoo list` reads every family and config to say which are as they were: 1 s in place of 0.1.
    assert proofs["sources"] == proof.sources_version(), "all are as they were proven: run `make stamp`"


def test_each_model_of_the_gallery_is_a_release_of_ours_or_is_missing_for_a_reason() -> None:
    import prove

    listed = tomllib.loads((ROOT / "docs" / "gallery.toml").read_text(encoding="utf-8"))
    ours = {source.repo: m.name for m in manifest.load_all() for source in m.sources}
    names = {m.name for m in manifest.load_all()}
    for name, model in listed["models"].items():
        assert ("release" in model) != ("missing" in model), name
        if "release" in model:
            assert model["release"] in names, f"{name}: there is no manifest {model['release']}"
        else:
            assert (have := ours.get(model["repo"])) is None, f"{name}: it is there now: release = {have!r}"
    table = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert table.endswith(prove.gallery()), "docs/families.md: run `make prove` for any family"


def test_a_family_whose_attention_is_scaled_otherwise_is_not_proven_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qwen3 = families.get("qwen3")

    def spec(config: families.Config) -> Spec:
        made = qwen3.spec(config)
        layers = tuple(
            replace(layer, mixer=replace(layer.mixer, scale=1.0))
            if isinstance(layer.mixer, Attention)
            else layer
            for layer in made.layers
        )
        return replace(made, layers=layers)

    proofs = manifest._proofs() | {"sources": "edited"}
    assert "qwen3" in proof.proven(proofs)
    other = replace(qwen3, spec=spec)
    monkeypatch.setitem(families._built_in(), "qwen3", other)
    monkeypatch.setattr(families, "get", lambda name: families.families()[name])
    families.families.cache_clear()
    proof._specs.cache_clear()
    try:
        assert proof.proven(proofs) == set(proofs["families"]) - {"qwen3"}
    finally:
        monkeypatch.undo()
        families.families.cache_clear()
        proof._specs.cache_clear()


def test_every_rule_expression_is_explained() -> None:
    from zoo.mapping import rules

    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    made = [
        n
        for n, f in vars(rules).items()
        if callable(f) and getattr(f, "__annotations__", {}).get("return") == "Expr"
    ]
    for name in made:
        assert f"`{name}(" in page or name.startswith("_") or name == "leaf", name
