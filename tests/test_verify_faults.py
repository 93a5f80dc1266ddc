"""The verifier catches every mistake of the catalogue that a family can have, in every family."""

from __future__ import annotations

import pytest
import tiny
from verified import canonical

import zoo
from zoo.verify.faults import CATALOGUE, applicable
from zoo.verify.faults.parts import PARTS

# Faults that change not one bit of what this variant computes.
WITHOUT_EFFECT: dict[str, set[str]] = {}


@pytest.mark.parametrize("family", sorted(tiny.MAIN))
def test_every_applicable_fault_is_caught(family: str) -> None:
    cert = zoo.verify(canonical(tiny.MAIN[family]), level="logits", self_test=True, write=False)
    assert cert.faults is not None
    missed = [r["fault"] for r in cert.faults["results"] if not r["caught"]]
    assert not missed
    assert cert.passed
    # What only a comparison of bytes sees would go unseen if the rules themselves were wrong.
    numbers = [r for r in cert.faults["results"] if r["level"] in ("layers", "logits")]
    assert all(r in numbers for r in cert.faults["results"] if r["kind"] == "spec")
    assert len(numbers) >= 0.95 * cert.faults["applicable"] >= 20
    assert set(cert.faults["without_effect"]) == WITHOUT_EFFECT.get(family, set())


def test_the_catalogue_has_more_than_forty_faults_and_every_one_applies_to_some_family() -> None:
    assert len(CATALOGUE) >= 40
    specs = [zoo.spec(canonical(name)) for name in tiny.MAIN.values()]
    quantised = {"layers.0.mlp.down": "fp8-block"}
    used = {f.name for spec in specs for f in applicable(spec, quantised)}
    # Grok alone caps scores and router logits and scales its branches and logits; upstream cannot run it.
    elsewhere = {
        "attention_softcap_dropped",
        "attention_softcap_value",
        "router_softcap_dropped",
        "moe_scale_dropped",
        "logit_scale_dropped",
        "dt_clamp_dropped",  # no release has a floor under dt: see Nemotron-H's disagreements
    }
    assert (
        set(CATALOGUE) - used <= elsewhere | PARTS
    )  # those of parts have a decoder each in test_model_new_parts


def test_a_fault_acts_where_the_layout_says_and_leaves_the_clean_model_alone() -> None:
    from zoo.formats.canonical import read
    from zoo.verify.oracle import DTYPES
    from zoo.verify.ours import subject_of

    clean = subject_of(read(canonical("llama")), DTYPES["fp32"])
    before = {n: t.clone() for n, t in clean.tensors.items()}
    for fault in applicable(clean.spec):
        faulty = fault.inject(clean)
        changed = {n for n, t in faulty.tensors.items() if n not in before or not t.equal(before[n])}
        assert changed or faulty.spec != clean.spec, f"{fault.name} changes nothing"
        assert all(t.equal(before[n]) for n, t in clean.tensors.items()), (
            f"{fault.name} changed the clean model"
        )
