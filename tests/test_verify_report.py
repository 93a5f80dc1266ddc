"""The report is one page that needs nothing else, says what the certificate says, and shows in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from verified import broken, canonical

import zoo

pytest.importorskip("matplotlib")

from zoo.verify import report

CHROMIUM = next((c for c in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if c), None)


@pytest.fixture(scope="module")
def page() -> str:
    return report.page(zoo.verify(canonical("qwen3_moe"), self_test=True, write=False).to_json())


class Reader(HTMLParser):
    """Text, the attributes that could load something, and every id."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith("#"):
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


def test_pictures_do_not_share_ids(page: str) -> None:
    ids = read(page).ids
    assert len(ids) == len(set(ids)) > 20
    assert page.count("<svg") == 4


def test_it_shows_levels_bounds_faults_and_provenance(page: str) -> None:
    text = read(page).text
    for wanted in (
        "passed", "Error over the layers", "upstream against itself", "KL divergence", "where the bound comes from",
        "Seeded faults", "gate and up of the experts exchanged", "layers, layer", "sha256", "transformers", "64 of 64 token ids",
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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_it_opens_in_a_browser_and_prints(page: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    common = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    shot = [*common, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1100,2400", file.as_uri()]
    subprocess.run(shot, check=True, capture_output=True, timeout=120)
    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "shot.png")
    assert image.shape[:2] == (2400, 1100)
    ink = image[..., :3].min(-1) < 0.6
    assert ink[:200].any(), "no heading"
    assert 0.01 < ink[:2000].mean() < 0.3, "blank, or covered"
    blue = (image[..., 2] > 0.5) & (image[..., 0] < 0.35)
    assert blue.mean() > 0.001, "no curves"
    subprocess.run(
        [*common, f"--print-to-pdf={tmp_path / 'p.pdf'}", file.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pdf = (tmp_path / "p.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8


def test_a_page_does_not_say_that_what_was_not_compared_does_not_agree() -> None:
    cert = zoo.verify(canonical("llama"), level="plan", write=False)
    cert.not_checked.append("bytes: the source is not there any more")
    text = report.page(cert.to_json())
    assert "compared only in the shapes of its tensors" in text and "does not agree" not in text
