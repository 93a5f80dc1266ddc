"""What other packages bring: entry points of the groups `zoo.families` and `zoo.manifests`.

`importlib.metadata` takes longer to import than a whole listing takes. So the files that it would parse are first
searched for the group's name; where none has it, there is nothing to ask it.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True)
class Package:
    """An installed distribution."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Entry:
    """One line of a package's entry points: `name = value`."""

    name: str
    value: str  # module[:attribute]
    package: Package
    point: EntryPoint

    def load(self) -> Any:
        """What it names. Raises whatever its import raises."""
        return self.point.load()


@functools.cache
def entries(group: str) -> tuple[Entry, ...]:
    """The entry points of a group, in the order of the packages' names."""
    if not _anywhere(f"[{group}]"):
        return ()
    from importlib.metadata import entry_points

    try:
        points = entry_points(group=group)
    except (ValueError, OSError) as error:  # one package's are no text, and importlib reads all or none
        warnings.warn(
            f"no other package's {group} are known: an installed one has broken entry points ({error})",
            stacklevel=2,
        )
        return ()
    found = []
    for point in points:
        if point.dist is not None:
            package = Package(point.dist.metadata["Name"], point.dist.version)
            found.append(Entry(point.name, point.value, package, point))
    return tuple(sorted(found, key=lambda e: (e.package.name, e.name)))


def _anywhere(header: str) -> bool:
    """Whether an installed package may have this section in its entry points."""
    for folder in sys.path:
        if os.path.isfile(folder):
            return True  # an archive: only importlib.metadata looks inside
        try:
            names = [n for n in os.listdir(folder or ".") if n.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for name in names:
            try:
                with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                    if header.encode() in file.read():
                        return True
            except OSError:
                continue
    return False
