"""What MkDocs asks: the gallery as files of the site, so that links into it are checked like any other."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from zoo import gallery

_HOLDER = tempfile.TemporaryDirectory(prefix="zoo-docs-")  # until the site is written


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = Path(_HOLDER.name)
    gallery.write(made)
    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        files.append(File.generated(config, f"gallery/{path.relative_to(made)}", abs_src_path=str(path)))
    return files
