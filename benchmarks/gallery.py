"""How long the whole gallery takes to be written and to be seen, and how large it is.

    python benchmarks/gallery.py [--rounds 9] [--json FILE]

From disk, in chromium at 1280 x 800, a new profile each round: milliseconds from asking for index.html to the first paint and to all
that the first view loads: the cards are there, and the drawings that are seen. Needs zoo[browser] and chromium.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from about import machine

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WATCH = """const cards = new MutationObserver(() => { if (document.querySelector("#cards li")) { cards.disconnect(); requestAnimationFrame(() => {
    const seen = [...document.images].filter(i => i.getBoundingClientRect().top < innerHeight);
    Promise.all(seen.map(i => i.complete || new Promise(done => i.onload = done))).then(() => window.loadedAt = performance.now()) }) } });
cards.observe(document, { childList: true, subtree: true })"""
SEEN = """() => performance.getEntriesByName("first-contentful-paint").length && window.loadedAt &&
    [performance.getEntriesByName("first-contentful-paint")[0].startTime, window.loadedAt]"""


def measure(rounds: int) -> dict[str, Any]:
    from in_browser import CHROMIUM, sync_api

    from zoo import gallery

    with tempfile.TemporaryDirectory() as tmp, sync_api.sync_playwright() as p:
        site = Path(tmp) / "site"
        began = time.perf_counter()
        releases = gallery.write(site)
        seconds = time.perf_counter() - began
        size = sum(f.stat().st_size for f in site.rglob("*") if f.is_file())
        browser, seen = p.chromium.launch(executable_path=CHROMIUM), []
        for n in range(rounds + 1):
            context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
            page = context.new_page()
            page.add_init_script(WATCH)
            page.goto((site / "index.html").as_uri())
            if n:  # the first round fills the system's caches
                seen.append(page.wait_for_function(SEEN).json_value())
            context.close()
        browser.close()
    paint, load = (statistics.median(x) for x in zip(*seen, strict=True))
    return {
        "releases": len(releases),
        "bytes": size,
        "write_s": seconds,
        "first_paint_ms": paint,
        "loaded_ms": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args.rounds)
    print(
        f"{result['releases']} releases, {result['bytes'] / 1e6:.2f} MB, written in {result['write_s']:.1f} s; "
        f"first paint after {result['first_paint_ms']:.0f} ms, loaded after {result['loaded_ms']:.0f} ms"
    )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine("gallery.py"), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
