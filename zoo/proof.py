"""What a proof is of: a hash over all that a family says of its releases, and of what it was when it was proven.

`proofs.json` holds, per family that `tests/prove.py` has proven, the versions of then:

- `families`: over the rules of every naming, their conditions, and the Specs of the family's release configs. `zoo
  list` compares it. A condition is hashed by what it decides: for each kind of layer of those Specs, which rules apply.
  So it is the same in every version of Python, and a condition that is spelt anew is no other condition.
- `variants`: the same over the small checkpoints that were compared with upstream. They are not installed: a test
  compares.
- `sources`: over the bytes of the code that all of this comes from. Where they are as they were, so is everything
  above, and nothing is imported to say so; `zoo list` looks further only in a checkout that has been edited.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from zoo.shipped import FAMILIES, RELEASES

if TYPE_CHECKING:
    from zoo.families import Family
    from zoo.spec import Spec

# What a family's Specs and rules are computed by, beside the family's own file.
_CODE = ("config.py", "families.py", "layout.py", "mapping/rules.py", "spec.py")


def sources_version() -> str:
    """Hash of the bytes of every family file, of the code beneath them and of the release configs."""
    import hashlib

    own, configs = os.path.dirname(__file__), os.path.join(RELEASES, "configs")
    paths = [os.path.join(own, name) for name in _CODE]
    for folder, end in (
        (FAMILIES, ".py"),
        (os.path.join(own, "family"), ".py"),
        (configs, ".json"),
    ):
        paths += [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(end)]
    found = hashlib.sha256()
    for path in paths:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                # Ends of lines may differ between a checkout and a wheel.
                raw = file.read().replace(b"\r\n", b"\n")
            found.update(f"{os.path.basename(path)} {len(raw)}\n".encode() + raw)
    return found.hexdigest()[:16]


def version(family: Family, specs: Iterable[Spec]) -> str:
    """Hash of a family's rules in every naming, of which of them apply to these Specs, and of the Specs."""
    import hashlib

    said: list[Any] = []
    for naming, rules in sorted(family.rules.items()):
        said.append([naming, rules.version])
    for spec in specs:
        said.append(spec.to_dict())
        for _, rules in sorted(family.rules.items()):
            said.append(
                [_applying(rules.rules, layer, spec) for layer in (None, *dict.fromkeys(spec.layers))]
            )
            said.append(
                [
                    e.pattern
                    for e in rules.extras
                    for la in dict.fromkeys(spec.layers)
                    if e.when and e.when(la)
                ]
            )
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def _applying(rules: Iterable[Any], layer: Any, spec: Spec) -> list[int]:
    """Which rules' conditions hold: rules of a layer are asked with one, the others without."""
    return [
        n
        for n, rule in enumerate(rules)
        if ("{i}" in rule.key) == (layer is not None) and (rule.when is None or rule.when(layer, spec))
    ]


def release_specs(family: Family) -> list[Spec]:
    """The Specs of the family's release configs, by name of the config."""
    return [spec for name, spec in _specs() if name == family.name]


@functools.cache
def _specs() -> list[tuple[str, Spec]]:
    from zoo import families
    from zoo.errors import ZooError

    folder, found = os.path.join(RELEASES, "configs"), []
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".config.json"):
            continue
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            config = json.load(file)
        try:
            family = families.find(config, name)
            found.append((family.name, families.spec_of(config, family, name)))
        except ZooError:
            continue  # refused now: its family's version is another one
    return found


def proven(proofs: Mapping[str, Any]) -> frozenset[str]:
    """The families that are what they were when they were proven."""
    if proofs.get("sources") == sources_version():
        return frozenset(proofs.get("families", {}))
    from zoo import families
    from zoo.errors import ZooError

    found = set()
    for name, then in proofs.get("families", {}).items():
        try:
            family = families.get(name)
            if version(family, release_specs(family)) == then:
                found.add(name)
        except ZooError:
            continue  # no such family any more
    return frozenset(found)
