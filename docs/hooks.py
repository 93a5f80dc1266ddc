"""What MkDocs asks: the gallery as files of the site, so that links into it are checked like any other; and for the Python pages,
functions that share a name with a module."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import griffe
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


class Functions(griffe.Extension):
    """`zoo.pull`, `zoo.spec`, `zoo.verify` are functions although modules have the same names: here `zoo.pull()` is the function."""

    def __init__(self) -> None:
        self.found: dict[str, griffe.Function] = {}

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.parent is not None and func.parent.path == "zoo":
            self.found[func.name] = func

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if pkg.path == "zoo":
            pkg.members |= {f"{name}()": func for name, func in self.found.items()}
