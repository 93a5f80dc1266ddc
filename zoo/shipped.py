"""The families and releases that come with zoo, as the packages `zoo.converters` and `zoo.manifests`, wherever their files are.

In a checkout they are the folders `converters/` and `manifests/` beside this package, where people look for them; in a wheel
they lie inside it, because a wheel that claimed those two names at the top level would overwrite other people's packages of
those names, and be overwritten by them. Modules have one name in both, so what is pickled or printed in one is found in the other.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

_HERE = os.path.dirname(__file__)


def _package(name: str) -> ModuleType:
    full = f"zoo.{name}"
    folder = os.path.join(os.path.dirname(_HERE), name)
    if os.path.isdir(os.path.join(_HERE, name)):
        return importlib.import_module(full)
    spec = importlib.util.spec_from_file_location(
        full, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    if spec is None or spec.loader is None or not os.path.isdir(folder):
        raise ImportError(
            f"zoo's {name} are neither in {_HERE} (an installed package) nor in {folder} (a checkout)"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module


converters = _package("converters")
manifests = _package("manifests")
FAMILIES: str = converters.__path__[0]
RELEASES: str = manifests.__path__[0]
