"""Pages in Debian's chromium, by Playwright, which is told where it is and downloads none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs zoo-weights[browser]")
axe_core = pytest.importorskip("axe_playwright_python", reason="needs zoo-weights[browser]")

CHROMIUM = next((c for c in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if c), None)
# A page of the gallery that gallery.js fills says when it has; others are whole as they come.
FILLED = "() => !document.body?.dataset.page || 'filled' in document.body.dataset"
PHONE, DESK = (390, 844), (1280, 800)


class Window:
    """A page that keeps what went wrong on it, and what it asked for."""

    def __init__(self, page: Any) -> None:
        self.page, self.wrong, self.asked = page, [], []  # type: ignore[var-annotated]
        page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: self.wrong.append(str(e)))
        page.on("requestfailed", self._failed)
        page.on("request", lambda r: self.asked.append(r.url))

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # by leaving the page
            self.wrong.append(f"not loaded: {request.url}")

    def open(self, address: str) -> Any:
        self.page.goto("about:blank")  # another part after # alone would not load the page again
        self.page.goto(address)
        self.page.wait_for_function(FILLED)
        return self.page


class Windows:
    """A window of each size and theme: the same one each time it is asked for. No network."""

    def __init__(self, browser: Any) -> None:
        self._browser, self.made = browser, {}  # type: ignore[var-annotated]

    def __call__(self, size: tuple[int, int] = DESK, theme: str = "light") -> Window:
        if (size, theme) not in self.made:
            width, height = size
            context = self._browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=theme, offline=True
            )
            context.set_default_timeout(20_000)
            self.made[size, theme] = Window(context.new_page())
        return self.made[size, theme]


@contextlib.contextmanager
def windows() -> Iterator[Windows]:
    """For a module's tests, not a session's: Playwright keeps an event loop running in the thread, and others have their own.

    Nothing may have gone wrong in any window in the end, and nothing been asked for beyond files on disk.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM)
        opened = Windows(browser)
        yield opened
        for w in opened.made.values():
            assert not w.wrong, w.wrong
            assert all(u.startswith(("file:", "about:", "data:")) for u in w.asked)
        browser.close()


def violations(page: Any) -> list[str]:
    """What axe-core finds wrong with the page for those who do not see it well, or work it by keyboard."""
    page.evaluate(files(axe_core).joinpath("axe.min.js").read_text() + ";0")
    found = page.evaluate("axe.run({ resultTypes: ['violations'], preload: false })")["violations"]
    return [f"{v['id']}: {v['help']}: {[n['html'] for n in v['nodes']]}" for v in found]


def overflow(page: Any) -> int:
    """By how many pixels the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")
