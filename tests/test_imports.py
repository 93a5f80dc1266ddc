"""What zoo's modules import of each other: never in a circle, not even one hidden in a function or left to types."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import zoo

ROOT = Path(zoo.__file__).parent


def modules() -> dict[str, Path]:
    """Name -> file of each module of zoo."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("zoo", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: set[str], package: str) -> set[str]:
    """The modules among `known` that `source`, a module of `package`, imports anywhere.

    `from a import b` imports a.b if that is a module, else a. That importing a.b runs a's `__init__` doesn't count.
    """
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                inner = f"{base}.{name.name}"
                found.add(inner if inner in known else base)
    return found & known


def graph() -> dict[str, set[str]]:
    files = modules()
    return {
        name: imports(
            path.read_text("utf-8"),
            set(files),
            name if path.name == "__init__.py" else name.rpartition(".")[0],
        )
        for name, path in files.items()
    }


def circle(of: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, each importing the next, or nothing."""
    try:
        TopologicalSorter(of).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_modules_of_zoo_import_each_other_in_a_circle() -> None:
    found = circle(graph())
    assert not found, "a circle of imports: " + " -> ".join(found)


def test_imports_are_seen_wherever_they_stand() -> None:
    known = {"zoo", "zoo.a", "zoo.b", "zoo.b.c", "zoo.d", "zoo.e"}
    source = (
        "from typing import TYPE_CHECKING\n"
        "import zoo.a\n"
        "from zoo.b import c, thing\n"
        "if TYPE_CHECKING:\n    import zoo\n    from zoo.e import T\n"
        "def f():\n    from . import d\n"
    )
    assert imports(source, known, "zoo") == known
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) in (
        ["a", "b", "c", "a"],
        ["b", "c", "a", "b"],
        ["c", "a", "b", "c"],
    )
