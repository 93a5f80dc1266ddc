"""The gallery: a static site of releases, drawn from their Specs, that opens from disk: `zoo gallery -o DIR`.

choices.py says what releases are filtered by, data.py makes gallery.json, pages.py the HTML; gallery.js fills the pages that
are filtered, compared and calculated. No network, no library, no build.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.gallery import pages
from zoo.gallery.data import Release, collect, document, lines
from zoo.untrusted.plain import write_plain

__all__ = ["write"]

DATA = "gallery.json"


def write(out: Path, names: Iterable[str] = ()) -> list[Release]:
    """Write the site of these releases, or of all, into `out`; what it holds.

    Errors: no release is called that; `out` holds something else than a gallery.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / DATA).is_file())):
        raise ZooError(f"{out}: holds something that is no gallery; name a folder that is new, empty, or one")
    if link := next((f for f in (out / "r", out / "svg") if f.is_symlink()), None):
        raise ZooError(f"{link}: is a link, and zoo did not make it: remove it, or name another folder")
    releases = collect(names)
    text = _json(document(releases))
    files = {
        DATA: text + "\n",
        "data.js": _packed("DATA", text),
        "lines.js": _packed("LINES", _json(lines(releases))),
        "index.html": pages.index(releases),
        "compare.html": pages.compare(),
        "timeline.html": pages.timeline(releases),
        "fit.html": pages.fit(),
    }
    for name in ("gallery.css", "gallery.js", "gallery.schema.json"):
        files[name] = (Path(__file__).parent / name).read_text(encoding="utf-8")
    for r in releases:
        files[f"r/{r.manifest.name}.html"] = pages.release(r, releases)
        if r.drawing is not None:
            files[f"svg/{r.drawing}"] = r.svg
    out.mkdir(parents=True, exist_ok=True)
    # First: what a full disk leaves is a gallery, and can be written again.
    write_plain(out / DATA, files.pop(DATA).encode())
    for folder in (out / "r", out / "svg"):
        folder.mkdir(exist_ok=True)
    for old in (*(out / "r").glob("*.html"), *(out / "svg").glob("*.svg")):
        if str(old.relative_to(out)) not in files:
            old.unlink()  # of an earlier gallery
    for name, content in files.items():
        write_plain(out / name, content.encode())
    return releases


def _json(x: Any) -> str:
    return json.dumps(x, ensure_ascii=False, separators=(",", ":"))


def _packed(name: str, text: str) -> str:
    """JSON as a script: its zlib stream in base64, a seventh of the text. gallery.js unpacks it with DecompressionStream."""
    return f'const {name} = "{base64.b64encode(zlib.compress(text.encode(), 9)).decode()}";\n'
