"""Every family of zoo's own passes the suite that families of other packages pass too."""

from __future__ import annotations

import pytest
import tiny

from zoo import families, manifest
from zoo.testing import full_size
from zoo.testing.suite import FamilySuite

for _name, _case in tiny.CASES.items():
    _class = f"Test_{_name}"
    globals()[_class] = type(_class, (FamilySuite,), {"case": _case, "__module__": __name__})


def test_every_family_is_complete() -> None:
    """A family that nobody tests at some size would be found by nobody."""
    manifests = {m.family for m in manifest.load_all()}
    lacks = []
    for name in families.families():
        case = tiny.CASES.get(name)
        if case is None:
            lacks.append(
                f"{name}: no case. Write tests/families/{name}.py with CASE = FamilyCase({name!r}, ...)"
            )
        elif not case.variants and not case.without_upstream:
            lacks.append(
                f"{name}: no variant. Add one to CASE in tests/families/{name}.py, or say `without_upstream`"
            )
        if name not in manifests:
            lacks.append(f"{name}: no manifest. Add manifests/<release>.toml with family = {name!r}")
        if not full_size.stems().get(name):
            lacks.append(
                f"{name}: no config. Add manifests/configs/<release>.config.json, and where it was read to sources.toml"
            )
    lacks += [
        f"{name}: no family. tests/families/{name}.py is of none"
        for name in set(tiny.CASES) - set(families.families())
    ]
    if "" in full_size.stems():
        lacks.append(f"configs that no family claims: {full_size.stems()['']}")
    assert not lacks, "docs/adding-a-family.md says how:\n" + "\n".join(lacks)


def test_every_config_of_a_release_is_counted_under_the_family_of_its_manifest() -> None:
    for m in manifest.load_all():
        if m.config is not None:
            assert families.find(m.config).name == m.family, m.name
    assert sum(len(stems) for stems in full_size.stems().values()) >= 61


@pytest.mark.parametrize("name", sorted(tiny.CASES))
def test_a_case_names_releases_variants_and_rules_that_there_are(name: str) -> None:
    case = tiny.CASES[name]
    stems = {*case.mtp_layers, *case.packed_otherwise, *(of.stem for of in case.listed.values())}
    assert stems | {stem for stem, _, _ in case.refused} <= set(full_size.stems().get(name, ()))
    assert not case.variants or case.main_variant in case.variants
    assert (case.__module__, bool(case.without_upstream)) == ("zoo.testing.case", not case.variants)
