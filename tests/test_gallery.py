"""The gallery: what it says is what the Specs say, and it needs nothing but its own folder."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from gallery_site import NAMES, UNDRAWN, rows, site

from zoo import gallery, manifest, sizes
from zoo.cli import cli
from zoo.errors import ZooError
from zoo.gallery import pages
from zoo.gallery.choices import CHOICES
from zoo.gallery.copies import base
from zoo.gallery.data import Release, collect
from zoo.layout import total_params


class Page(HTMLParser):
    """Links, what is loaded, ids, labels, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.ids, self.tags = [], [], [], []  # type: ignore[var-annotated]
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.tags.append(tag)
        self.ids += [of["id"]] if "id" in of else []
        self.links += [of["href"]] if tag == "a" else []
        self.loads += [of[k] for k in ("src", "data", "href") if k in of and tag != "a"]

    def handle_data(self, data: str) -> None:
        self.text += data


def every_page() -> dict[Path, Page]:
    return {p: Page(p.read_text()) for p in (*site().glob("*.html"), *site().glob("r/*.html"))}


def test_the_site_loads_nothing_from_elsewhere_and_no_link_in_it_is_dead() -> None:
    found = every_page()
    assert len(found) == 4 + len(NAMES)
    for path, p in found.items():
        assert all((path.parent / of).is_file() for of in p.loads), p.loads
        for link in p.links:
            assert link.startswith(("https://", "#")) or (path.parent / link.partition("#")[0]).is_file()
        assert len(set(p.ids)) == len(p.ids) and p.tags.count("h1") == 1 and "main" in p.ids
    for name in ("gallery.css", "gallery.js", "data.js", "lines.js"):
        assert not re.search(
            r"url\(|@import|fetch\(|XMLHttp|https?://(?!www\.w3)", (site() / name).read_text()
        ), name


def test_the_data_is_as_its_schema_says() -> None:
    import jsonschema

    schema = json.loads((site() / "gallery.schema.json").read_text())
    data = json.loads((site() / "gallery.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    judge.validate(data)
    for break_it in (
        lambda d: next(iter(d["architectures"].values())).pop("cache"),
        lambda d: d["releases"][0].pop("not_drawn"),
        lambda d: d["releases"][0].update(drawn_as="gpt2"),
        lambda d: d["releases"][1].update(not_drawn="why"),
        lambda d: d["releases"][1].update(colour="red"),
        lambda d: next(iter(d["architectures"].values())).update(params="8B"),
    ):
        other = json.loads(json.dumps(data))
        break_it(other)
        assert not judge.is_valid(other)


def test_the_data_is_what_the_specs_say() -> None:
    for r in collect(NAMES):
        if r.spec is None:
            assert r.row["name"] == UNDRAWN and "drawing" not in r.row and "params" not in r.row
            continue
        row = rows()[r.manifest.name]
        assert row["params"] == total_params(r.spec) and row["layers"] == r.spec.n_layers
        for tokens, itemsize in ((100, 2), (40_000, 1)):
            cache = sum(n * min(tokens, kept or tokens) for n, kept in row["cache"]) * itemsize
            assert cache == sizes.kv_bytes(r.spec, tokens, itemsize)
            assert row["state"][0] + itemsize * row["state"][1] == sizes.state_bytes(r.spec, itemsize)
        for dtype, bits in sizes.BITS.items():
            rest = row["params"] - row["matrices"]
            count = row["params"] * bits if bits >= 16 else row["matrices"] * bits + rest * 16
            assert count // 8 == sizes.weight_bytes(r.spec, dtype)
    assert rows()["deepseek-v3"]["drawing"] == rows()["deepseek-r1"]["drawing"], "equal pictures are one file"
    for file, name in (("data.js", "DATA"), ("lines.js", "LINES")):
        script = (site() / file).read_text()
        packed = script.removeprefix(f'const {name} = "').removesuffix('";\n')
        unpacked = json.loads(zlib.decompress(base64.b64decode(packed, validate=True)))
        if name == "DATA":
            assert unpacked == json.loads((site() / "gallery.json").read_text())
        else:
            assert set(unpacked["at"]) == {r["drawing"] for r in rows().values() if "drawing" in r}


@pytest.mark.parametrize(
    ("name", "made", "not_made"),
    [
        ("gpt2-xl", "MHA; biases; learned; LayerNorm; before (pre-norm); dense; not gated; tied head", "RoPE; NoPE; GQA"),
        ("olmo-2-7b", "MHA; QK-norm; RoPE; RMSNorm; after (post-norm in the branch); SwiGLU", "before (pre-norm); biases"),
        ("gemma-3-27b", "GQA; sliding window; QK-norm; before and after; GeGLU", "MoE; partial RoPE"),
        ("deepseek-v3", "MLA; MoE; MoE with shared expert; MoE, first layers dense; MoE, 128 experts or more", "GQA; NoPE; QK-norm"),
        ("gpt-oss-20b", "GQA; sliding window; sinks; biases; MoE", "MoE with shared expert; MoE, 128 experts or more"),
        ("qwen3-next-80b-a3b-instruct", "Gated DeltaNet; GQA; output gate; partial RoPE; MoE with shared expert", "MLA; sliding window"),
        ("kimi-linear-48b-a3b", "Kimi Delta Attention; MLA; NoPE", "RoPE; Gated DeltaNet"),
        ("nemotron-3-nano-30b-a3b", "Mamba-2; GQA; NoPE; not gated; MoE", "SwiGLU; RoPE"),
        ("bloom-7b1", "ALiBi; LayerNorm", "learned; NoPE"),
        ("gemma-4-e2b-it", "shared keys and values; per-layer embeddings; MQA", "several residual streams"),
    ],
)  # fmt: skip
def test_a_release_has_the_choices_that_it_made(name: str, made: str, not_made: str) -> None:
    found = [c for group in rows()[name]["choices"].values() for c in group]
    assert set(made.split("; ")) <= set(found) and not set(not_made.split("; ")) & set(found), found


def test_a_page_has_the_drawing_the_facts_the_tensors_and_the_commands() -> None:
    text = (site() / "r" / "qwen3-next-80b-a3b-instruct.html").read_text()
    p = Page(text)
    for said in (
        "80.0B total, 3.00B active (A3B leaves out", "3.87B active per token", "routed experts", "77,309,411,328", "GGGFGGGF",
        "layers.{i}.delta.qkvz.weight", "zoo pull qwen3-next-80b-a3b-instruct", "zoo verify", "G: Gated DeltaNet", "Apache-2.0",
    ):  # fmt: skip
        assert said in p.text, said
    assert f"svg/{rows()['qwen3-next-80b-a3b-instruct']['drawing']}" in text
    undrawn = Page((site() / "r" / f"{UNDRAWN}.html").read_text())
    assert "Not drawn: no public copy of its config is known" in undrawn.text and "object" not in undrawn.tags
    assert "Drawn of its family, deepseek_v3: deepseek-r1, deepseek-v3" in undrawn.text


def test_a_quantised_copy_is_drawn_as_the_release_it_is_a_copy_of_and_says_so(tmp_path: Path) -> None:
    both = {r.manifest.name: r for r in gallery.write(tmp_path / "site", ["qwen3-8b", "qwen3-8b-awq"])}
    copy, original = both["qwen3-8b-awq"], both["qwen3-8b"]
    assert copy.drawing == original.drawing and copy.counted == original.counted
    assert copy.row["weights"] == "awq4" and copy.row["drawn_as"] == "qwen3-8b"
    assert "drawn_as" not in original.row and len(list((tmp_path / "site" / "svg").iterdir())) == 1
    text = (tmp_path / "site" / "r" / "qwen3-8b-awq.html").read_text()
    p = Page(text)
    assert "Drawn as qwen3-8b, of which it is a quantised copy (awq4)" in p.text
    assert "qwen3-8b.html" in p.links and f"svg/{original.drawing}" in text and "36 layers" in p.text
    assert "2 of them drawn, 1 as the release that" in (tmp_path / "site" / "index.html").read_text()
    assert "of 1" in Page((tmp_path / "site" / "timeline.html").read_text()).text, "a copy made no choice"
    alone = Page(pages.release(copy))
    assert "qwen3-8b.html" not in alone.links and "layers.{i}.attn.out.weight" in alone.text


def test_what_a_release_is_a_copy_of_is_certain_or_not_said() -> None:
    import dataclasses

    m = manifest.find("qwen3-0.6b-gptq-int8")
    original = base(m)
    assert original is not None and original.name == "qwen3-0.6b"
    for change in (
        {"quantization": None}, {"family": "qwen2"}, {"params_total": None}, {"params_total": m.params_total + 1},
        {"context_length": 1}, {"name": "qwen3-0.6b-int9"}, {"name": "no-such-model-fp8"}, {"name": "-fp8"},
    ):  # fmt: skip
        assert base(dataclasses.replace(m, **change)) is None, change
    assert base(manifest.find("qwen2.5-7b-instruct-awq")) is None, "no release is called qwen2.5-7b-instruct"
    assert base(original) is None


def test_releases_are_listed_by_what_they_have() -> None:
    def names(*args: str) -> set[str]:
        done = CliRunner().invoke(cli, ["list", *args, "--json"], catch_exceptions=False)
        return {r["name"] for r in json.loads(done.stdout)}

    assert {"deepseek-v3", "deepseek-r1"} <= names("deepseek", "--has", "mla")
    assert names("gpt-oss", "--has", "sinks", "--has", "sliding window") == {"gpt-oss-20b", "gpt-oss-120b"}
    assert not names("gpt-oss", "--has", "MLA")
    assert manifest.find("deepseek-r1-0528-nvfp4").config is None, "its original says what it has"
    assert "deepseek-r1-0528-nvfp4" in names("deepseek", "nvfp4", "--has", "MLA")
    shown = CliRunner().invoke(cli, ["show", "deepseek-r1-0528-nvfp4"]).output
    assert "128 heads of 128+64" in shown and "counted as deepseek-r1-0528" in " ".join(shown.split())
    undrawn = CliRunner().invoke(cli, ["list", UNDRAWN, "--has", "MLA"])
    n = len(manifest.search(UNDRAWN))  # it and its quantised copies
    assert f"not listed: {n} whose config has no public copy, and may have MLA" in undrawn.stderr
    with pytest.raises(ZooError, match="no choice is called 'magic'; there are: MHA; GQA"):
        CliRunner().invoke(cli, ["list", "--has", "magic"], catch_exceptions=False)


def test_the_timeline_says_where_a_choice_first_appeared_and_how_many_of_a_year_made_it() -> None:
    text = " ".join(Page((site() / "timeline.html").read_text()).text.split())
    assert "MLA 2024-12-26 deepseek-v3" in text and "2019-11-05 gpt2-xl" in text and "2024 of 3" in text


def test_what_a_manifest_says_is_text_and_nothing_else() -> None:
    import dataclasses

    bad = "<script>alert(1)</script>\"'&\x1b"
    m = dataclasses.replace(
        manifest.find("gpt2"), licence=bad, aliases=(bad,), params_convention=bad, params_total=1
    )
    p = Page(pages.release(Release(m, None, "", None, {})))
    assert "script" not in p.tags and "<script>alert(1)</script>" in p.text and "\x1b" not in p.text


def test_a_folder_that_holds_something_else_is_left_alone_and_a_gallery_is_made_anew(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ZooError, match="holds something that is no gallery"):
        gallery.write(other, ["gpt2"])
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]
    out = tmp_path / "site"
    done = CliRunner().invoke(
        cli, ["gallery", "gpt2", "gpt-oss-20b", "-o", str(out), "--json"], catch_exceptions=False
    )
    assert json.loads(done.stdout) == {"gallery": str(out), "releases": 2, "drawn": 2}
    gallery.write(out, ["gpt2"])
    assert [p.name for p in (out / "r").iterdir()] == ["gpt2.html"] and len(
        list((out / "svg").iterdir())
    ) == 1


@pytest.mark.proof
def test_the_whole_gallery_is_small_and_every_choice_is_somebodys(tmp_path: Path) -> None:
    out = tmp_path / "site"
    releases = gallery.write(out)
    assert len(releases) == len(manifest.stems())
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert size <= 3_000_000
    made = {c for r in releases for group in r.counted.get("choices", {}).values() for c in group}
    assert made == {c for of in CHOICES.values() for c in of}, "a choice that nobody makes"
