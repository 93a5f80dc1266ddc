"""The built documentation: it is complete, and a browser that shows it asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pages
import pytest

pytest.importorskip("material", reason="the extra `docs` is not installed")
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not pages.DOCS.is_dir(), reason="installed without its documentation"),
]

FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=pages.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Page(HTMLParser):
    """What a page fetches, where it links to, and the text of its main part."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.unlabelled: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag == "img" and not found.get("alt"):
            self.unlabelled.append(str(found.get("src")))
        is_page = tag == "link" and found.get("rel") in ("canonical", "prev", "next")
        if tag in FETCHED and not is_page and found.get(FETCHED[tag]):
            self.fetched.append(str(found[FETCHED[tag]]))


def test_it_needs_no_other_host_and_all_it_names_is_there(site: Path) -> None:
    texts = [
        p for p in site.rglob("*.html") if p.relative_to(site).parts[0] != "gallery" and p.name != "404.html"
    ]
    read = {p.resolve(): Page(p) for p in texts}
    assert len(read) == len(list(pages.DOCS.rglob("*.md")))
    for file, page in read.items():
        assert not page.unlabelled, file
        for target in page.fetched:
            assert not re.match(r"(https?:)?//", target), f"{file}: fetches {target}"
            assert target.startswith("data:") or (file.parent / target.partition("?")[0]).is_file(), (
                file,
                target,
            )
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            path, _, part = link.partition("#")
            there = (file.parent / path).resolve() if path else file
            assert there.is_file(), (file, link)
            if part and there in read and part != "__skip":
                assert part in read[there].ids, (file, link)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_gallery_the_search_and_the_help_of_every_command_are_in_it(site: Path) -> None:
    from zoo import manifest

    assert len(list((site / "gallery" / "r").glob("*.html"))) == len(manifest.load_all())
    assert (site / "search" / "search_index.js").stat().st_size > 100_000
    cli = (site / "cli.html").read_text(encoding="utf-8")
    assert "zoo golden record" in cli and "--max-shard-size" in cli
    python = (site / "api.html").read_text(encoding="utf-8")
    assert 'id="zoo.pull"' in python and "Interrupted at any point" in python


@pytest.mark.xdist_group("browser")
def test_in_a_browser_from_disk_every_page_fits_and_the_search_finds(site: Path) -> None:
    import in_browser

    with in_browser.windows() as window:
        for source in sorted(pages.DOCS.rglob("*.md")):
            address = (site / source.relative_to(pages.DOCS)).with_suffix(".html").as_uri()
            for size, theme in ((in_browser.DESK, "light"), (in_browser.PHONE, "dark")):
                page = window(size, theme).open(address)
                assert in_browser.overflow(page) <= 0, (source, size)
                wide = "[...document.querySelectorAll('.md-typeset table')].filter(t => t.getBoundingClientRect().width > innerWidth).length"
                assert size != in_browser.PHONE or not page.evaluate(wide), f"{source}: a table is cut off"
        for name in ("index", "cli", "tasks/compare", "verification", "api"):
            for theme in ("light", "dark"):
                page = window(in_browser.DESK, theme).open((site / f"{name}.html").as_uri())
                # The theme wraps each button that copies in a landmark of its own.
                wrong = [v for v in in_browser.violations(page) if not v.startswith("landmark-unique")]
                assert not wrong, (name, theme, wrong)
        # The theme looks at the field when a key is released.
        page.locator("[data-md-component=search-query]").press_sequentially("golden record")
        page.wait_for_selector(".md-search-result__item")
        assert "Verification" in page.inner_text(".md-search-result__list")
        page = window().open((site / "index.html").as_uri())
        page.click(".md-tabs >> text=Gallery")
        page.click("text=Documentation")
        assert page.url.endswith("/index.html") and "/gallery/" not in page.url
        paper = window(in_browser.DESK, "dark").open((site / "tasks" / "quantised.html").as_uri())
        paper.emulate_media(media="print")
        # Paper is light, whatever the screen is. Colours change by transitions.
        paper.wait_for_function(
            "getComputedStyle(document.querySelector('pre code')).color.match(/\\d+/)[0] < 128"
        )
