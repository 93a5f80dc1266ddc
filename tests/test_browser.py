"""The gallery in a real browser, Debian's chromium: what a reader does with it, by hand, by keyboard, on a phone and on paper."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gallery_site import NAMES, UNDRAWN, rows, site
from in_browser import DESK, PHONE, overflow, violations, windows

from zoo import manifest, sizes
from zoo.gallery.data import collect

# One process of the tests starts one browser.
pytestmark = pytest.mark.xdist_group("browser")
PAGES = ("index.html", "compare.html", "timeline.html", "fit.html", "r/qwen3-next-80b-a3b-instruct.html", f"r/{UNDRAWN}.html")  # fmt: skip


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with windows() as of:
        yield of


def at(path: str) -> str:
    return f"{site().as_uri()}/{path}"


def cards(page: Any) -> list[str]:
    return page.locator("#cards h2").all_text_contents()


def each_option(page: Any, field: str) -> dict[str, list[str]]:
    """Every option of a list -> the cards that are shown when it is chosen."""
    return dict(page.evaluate(
        """field => { const s = document.getElementById(field), found = [];
        for (const o of s.options) { s.value = o.value; s.dispatchEvent(new Event("input", { bubbles: true }));
          found.push([o.text, [...document.querySelectorAll("#cards h2")].map(h => h.textContent)]); }
        s.value = s.options[0].value; s.dispatchEvent(new Event("input", { bubbles: true })); return found }""",
        field,
    ))  # fmt: skip


def test_searching_and_every_filter_show_what_has_it_and_the_address_keeps_it(window: Any) -> None:
    page = window().open(at("index.html"))
    assert set(cards(page)) == set(NAMES) and len(cards(page)) == len(NAMES)
    page.fill("#search", "MLA 2024")
    assert cards(page) == ["deepseek-v3"]
    page.fill("#search", "no such thing")
    assert cards(page) == [] and page.inner_text("#count") == f"0 of {len(NAMES)} releases"
    page.fill("#search", "")
    groups = json.loads((site() / "gallery.json").read_text())["choices"]
    for field in (*groups, "vendor", "year"):
        found = each_option(page, field)
        assert len(found) > 2 and set(found.pop(next(iter(found)))) == set(NAMES)  # 'any'
        for choice, shown in found.items():
            has = {
                n for n, r in rows().items()
                if (choice in r.get("choices", {}).get(field, []) if field in groups else r.get({"year": "released"}.get(field, field), "").startswith(choice))
            }  # fmt: skip
            assert set(shown) == has != set(), (field, choice)
    page.select_option("#attention", "MLA")
    page.select_option("#year", "2025")
    assert cards(page) == ["kimi-linear-48b-a3b", "deepseek-r1"]
    again = window().open(at("index.html" + page.evaluate("location.hash")))
    assert cards(again) == ["kimi-linear-48b-a3b", "deepseek-r1"]
    again.get_by_role("button", name="Clear all").click()
    again.wait_for_function(
        f"document.querySelectorAll('#cards h2').length === {len(NAMES)}"
    )  # the form, then the cards
    assert len(cards(again)) == len(NAMES) and again.evaluate("location.hash") in ("", "#")


def test_sorting_goes_by_what_it_says(window: Any) -> None:
    found = each_option(window().open(at("index.html")), "sort")
    for by, key in {
        "largest": lambda r: -r["params"], "smallest": lambda r: r["params"], "most active": lambda r: -r["active"],
        "longest context": lambda r: -r["context"], "smallest cache a token": lambda r: r["kv_per_token"],
        "newest": lambda r: r.get("released", ""), "oldest": lambda r: r.get("released", "9"), "name": lambda r: r["name"],
    }.items():  # fmt: skip
        values = [key(rows()[n]) for n in found[by] if n != UNDRAWN]
        assert values == sorted(values, reverse=by == "newest") and len(values) == len(NAMES) - 1, by


def test_two_to_four_are_compared_from_their_cards(window: Any) -> None:
    page = window().open(at("index.html#sort=name"))
    picked = ["bloom-7b1", "deepseek-r1", "deepseek-v3", "gemma-3-27b", "gpt2-xl"]
    for name in picked:
        page.check(f"input[value='{name}']")
    # a fifth takes the place of the first
    assert page.locator("#cards input:checked").count() == 4
    page.locator("#bar a").click()
    page.wait_for_selector("#table tbody tr")
    assert page.locator("#table thead th").all_inner_texts() == picked[1:]
    assert page.locator("#pictures figure").count() == 4
    page.select_option("#m2", "")
    page.select_option("#m3", "")
    assert not page.locator("#pictures i").count(), "equal drawings have nothing that is marked"
    assert page.locator("#table thead th").all_inner_texts() == ["deepseek-r1", "deepseek-v3"]
    same = {r.split("\t")[0]: r.split("\t")[1:] for r in page.locator("#table tbody tr").all_inner_texts()}
    page.select_option("#m1", "gpt-oss-20b")
    marked = page.locator("#pictures figure").nth(1).locator("i").evaluate_all("es => es.map(e => e.title)")
    assert {"24 layers", "4 of 32 active"} <= set(marked) and not {"Head", "Router"} & set(marked)
    box = "e => (r => [r.left, r.right, r.top, r.bottom])(e.getBoundingClientRect())"
    left, right, top, bottom = page.locator("#pictures img").nth(1).evaluate(box)
    for mark in page.locator("#pictures figure").nth(1).locator("i").all():
        x0, x1, y0, y1 = mark.evaluate(box)
        assert left <= x0 < x1 <= right and top <= y0 < y1 <= bottom
    assert same["layers"] == ["61", "61"] and same["≠\u00a0released"] == ["2025-01-20", "2024-12-26"]


def test_the_calculator_says_what_zoo_counts(window: Any) -> None:
    page = window().open(at("fit.html#deepseek-v3"))
    specs = {r.manifest.name: r.spec for r in collect(NAMES) if r.spec is not None}

    def said(where: str) -> dict[str, str]:
        return dict(page.evaluate(f"[...document.querySelectorAll('#{where} tr')].map(r => [r.cells[0].textContent, r.cells[r.cells.length - 1].textContent])"))  # fmt: skip

    def gb(n: float) -> str:
        x = n / 1e9
        return f"{x:.0f} GB" if x >= 99.95 else f"{x:.1f} GB" if x >= 0.995 else f"{float(f'{x:.2g}'):g} GB"

    for name, dtype, tokens, batch, kv in (
        ("deepseek-v3", "fp8", 32_768, 4, "fp8"), ("gpt-oss-20b", "int4", 5_000, 3, "bf16"),
        ("qwen3-next-80b-a3b-instruct", "bf16", 262_144, 8, "bf16"), ("gpt2-xl", "fp32", 10**6, 64, "fp32"),
    ):  # fmt: skip
        spec = specs[name]
        page.select_option("#release", name)
        page.select_option("#dtype", dtype)
        page.fill("#context", str(tokens))
        page.fill("#batch", str(batch))
        page.select_option("#kv", kv)
        size, seen = sizes.KV_BYTES[kv], min(tokens, spec.context_length)
        weights = sizes.weight_bytes(spec, dtype)
        cache, state = batch * sizes.kv_bytes(spec, seen, size), batch * sizes.state_bytes(spec, size)
        needs = said("needs")
        assert float(needs["Weights"].split()[0]) == pytest.approx(weights / 1e9, rel=0.01)
        for what, n in (
            ("KV cache", cache),
            ("Recurrent state", state),
            ("Together", weights + cache + state),
        ):
            assert needs.get(what, "0").split()[0] == (gb(n).split()[0] if n else "0"), (name, what)
        for card, text in said("hardware").items():
            memory = json.loads((site() / "gallery.json").read_text())["cards"][card]
            many = -(-(weights + cache + state) // int(memory * 9e8))
            assert text == ("fits on one" if many == 1 else f"{many:,} of them"), (name, card)
        assert ("sees at most" in page.inner_text("#said")) == (tokens > spec.context_length)
    again = window().open(at("fit.html" + page.evaluate("location.hash")))
    asked = again.locator("#ask").locator("input, select").evaluate_all("es => es.map(e => e.value)")
    assert asked == ["gpt2-xl", "fp32", "1000000", "64", "fp32"], "the address keeps what was asked"


FOCUS = """e => { const s = getComputedStyle(e), r = e.getBoundingClientRect(), bar = document.querySelector("#bar:not([hidden])"),
    low = bar && !bar.contains(e) ? bar.getBoundingClientRect().top : innerHeight;
  return { name: e.id || e.value || e.textContent, tag: e.tagName + (e.name || ""), inBar: !!bar && bar.contains(e), inMain: !!e.closest("main"),
    seen: s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2 && r.top >= 0 && r.bottom <= low + 1 && r.left >= 0 && r.right <= innerWidth + 1 } }"""


def test_the_keyboard_alone_reaches_and_works_everything(window: Any) -> None:
    page = window().open(at("index.html#sort=name"))

    def press(key: str) -> dict[str, Any]:
        """What has the focus after it; it shows, and nothing lies over it."""
        page.keyboard.press(key)
        now = page.evaluate(f"({FOCUS})(document.activeElement)")
        assert now["seen"], now
        return now

    controls = page.locator("#ask").locator("input, select, button").evaluate_all("es => es.map(e => e.id || e.textContent)")  # fmt: skip
    way = [
        "Skip to the content",
        "Gallery",
        "Compare",
        "Timeline",
        "What fits",
        "gallery.json",
        "its schema",
        *controls,
        "bloom-7b1",
    ]
    assert [press("Tab")["name"] for _ in way] == way
    assert press("Tab")["tag"] == "INPUTcompare"
    press("Space")
    assert press("Tab")["name"] == "deepseek-r1"
    press("Tab")
    press("Space")
    for _ in range(2 * len(NAMES)):  # over the cards that are left, to the bar behind them
        if (now := press("Tab"))["inBar"]:
            break
    assert now["name"] == "Compare bloom-7b1, deepseek-r1"
    page.keyboard.press("Enter")
    page.wait_for_selector("#table tbody tr")
    assert page.locator("#table thead th").all_inner_texts() == ["bloom-7b1", "deepseek-r1"]
    page.focus("#m0")
    page.keyboard.type("gpt2")
    assert page.locator("#table thead th").first.inner_text() == "gpt2-xl"
    page = window().open(at("index.html#search=kimi"))
    page.focus("#search")
    press("Escape")
    assert len(cards(page)) == len(NAMES), "Escape empties the search"
    page = window().open(at("r/gpt-oss-20b.html"))
    assert press("Tab")["name"] == "Skip to the content"
    page.keyboard.press("Enter")
    assert press("Tab")["inMain"]
    page.focus("summary")
    press("Enter")
    assert page.locator("details[open] td").count() > 4


@pytest.mark.parametrize(
    ("path", "theme"),
    [
        pytest.param(
            path, theme, marks=() if (n, theme) in ((0, "dark"), (4, "light")) else pytest.mark.proof
        )
        for n, path in enumerate(PAGES)
        for theme in ("light", "dark")
    ],
)
def test_axe_finds_nothing_wrong(path: str, theme: str, window: Any) -> None:
    page = window(PHONE if theme == "dark" else DESK, theme).open(at(path))
    assert not violations(page)
    assert overflow(page) == 0


def test_on_a_phone_nothing_is_wider_than_the_window(window: Any) -> None:
    for path in ("compare.html#deepseek-v3,gpt-oss-20b,gemma-4-e2b-it", *PAGES[2:5:2]):  # axe opens the rest
        page = window(PHONE, "dark").open(at(path))
        assert overflow(page) == 0, path
    page = window(PHONE, "dark").open(at("compare.html#deepseek-v3,gpt-oss-20b"))
    assert page.evaluate("document.querySelector('.scroll').scrollWidth") <= PHONE[0], (
        "two are seen beside each other"
    )


def test_on_a_phone_filters_are_folded_away_and_open_by_touch(window: Any) -> None:
    page = window(PHONE, "dark").open(at("index.html#attention=MLA"))
    assert (
        not page.locator("#attention").is_visible() and page.inner_text("summary") == "Filters and order (1)"
    )
    assert page.evaluate("document.querySelector('#cards li').getBoundingClientRect().top") < PHONE[1] / 2
    page.locator("summary").click()
    page.select_option("#attention", "")
    assert page.inner_text("summary") == "Filters and order" and len(cards(page)) == len(NAMES)


def test_on_paper_pages_and_drawings_are_light_and_without_controls(window: Any) -> None:
    from PIL import Image

    def brightness(e: Any) -> float:
        grey = Image.open(io.BytesIO(e.screenshot())).convert("L")
        return sum(n * many for n, many in enumerate(grey.histogram())) / (grey.width * grey.height)

    page = window(DESK, "dark").open(at("compare.html#deepseek-v3,gpt-oss-20b"))
    assert brightness(page.locator("#pictures img").first) < 80 and page.locator("nav").is_visible()
    page.emulate_media(media="print")
    assert brightness(page.locator("#pictures img").first) > 200
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible() and not page.locator("#ask").is_visible()
    page.emulate_media(media="screen")


def test_the_first_view_loads_four_files_and_the_pictures_that_are_seen(window: Any) -> None:
    seen = window((800, 600))
    seen.asked.clear()
    seen.open(at("index.html"))
    names = [u.rsplit("/", 1)[-1] for u in seen.asked if u.startswith("file:")]
    assert all(u.startswith(site().as_uri()) for u in seen.asked if u != "about:blank")
    assert sorted(n for n in names if not n.endswith(".svg")) == [
        "data.js",
        "gallery.css",
        "gallery.js",
        "index.html",
    ]


MISPLACED = """() => { const svg = document.querySelector("svg"), [, , w, h] = svg.getAttribute("viewBox").split(" ").map(Number), wrong = [];
  const box = e => { const b = e.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height] };
  const rects = [...svg.querySelectorAll("rect:not(.p)")].map(box).sort((a, b) => (a[2] - a[0]) * (a[3] - a[1]) - (b[2] - b[0]) * (b[3] - b[1]));
  const texts = [...svg.querySelectorAll("text")].map(e => [e.textContent, box(e)]);
  texts.forEach(([text, [l, t, r, b]], n) => {
    if (l < 0 || t < 0 || r > w || b > h) wrong.push(text + ": beyond the picture");
    const m = (t + b) / 2, round = rects.find(([x0, y0, x1, y1]) => x0 <= l && l <= x1 && y0 <= m && m <= y1);
    if (round && (r > round[2] || b > round[3] + 2)) wrong.push(text + ": beyond its box");
    for (const [other, [L, T, R, B]] of texts.slice(n + 1))
      if (l < R - 1 && L < r - 1 && t + 3 < B - 3 && T + 3 < b - 3) wrong.push(`${text}: over ${other}`);
  }); return wrong }"""


def test_a_browser_puts_the_text_of_drawings_where_zoo_reckoned(window: Any) -> None:
    page = window().open("about:blank")
    for name in ("gemma-4-e2b-it", "qwen3-next-80b-a3b-instruct"):
        svg = (site() / "svg" / rows()[name]["drawing"]).read_text()
        page.set_content(svg)
        assert not page.evaluate(MISPLACED), name
    page.set_content(
        svg.replace(">Router<", ">A title that is wider than the box in which it stands by far<")
    )
    assert "A title that is wider than the box in which it stands by far: beyond its box" in page.evaluate(
        MISPLACED
    )


@pytest.mark.proof
def test_every_drawing_is_read_in_a_browser_without_overlaps(window: Any) -> None:
    from zoo import draw, families

    page, seen = window().open("about:blank"), set()
    for m in manifest.load_all():
        if m.config is None:
            continue
        family = families.get(m.family)
        spec = families.spec_of(m.config, family, m.name)
        svg = draw.drawing(spec, draw.Facts(m.name, (), draw.ahead(m.config, family)))
        page.set_content(svg)
        assert not page.evaluate(MISPLACED), m.name
        seen.add(m.family)
    assert seen == {m.family for m in manifest.load_all()}, "a picture of every family"


@pytest.mark.proof
def test_every_page_of_the_whole_gallery_opens_without_an_error(window: Any, tmp_path: Path) -> None:
    from zoo import gallery

    releases = gallery.write(tmp_path / "site")
    assert {r.manifest.family for r in releases} == {m.family for m in manifest.load_all()}
    seen = window((1000, 700))
    seen.page.goto((tmp_path / "site" / "index.html").as_uri())
    seen.page.wait_for_selector("#cards li")
    drawings = sum(u.endswith(".svg") for u in seen.asked)
    assert 1 <= drawings <= 60, "what is not seen yet is not loaded yet"
    for file in sorted((tmp_path / "site").rglob("*.html")):
        seen.page.goto(file.as_uri())
        assert not seen.wrong, (file, seen.wrong)
        assert seen.page.locator("h1").count() == 1
    assert all(u.startswith(((tmp_path / "site").as_uri(), "about:")) for u in seen.asked)
