"""What holds a family of zoo to upstream: for zoo's own families and for those of other packages.

    from zoo.testing import FamilyCase, Variant
    from zoo.testing.suite import FamilySuite

    CASE = FamilyCase("my_family", (Variant("my_family", "MyForCausalLM", {...}),))

    class TestMyFamily(FamilySuite):
        case = CASE

`FamilyCase` says what is unusual about the family's upstream and releases, `Variant` is one small checkpoint, made by
upstream's own class with every parameter perturbed. `FamilySuite` is the tests that every family passes.

The parts need torch, transformers (`pip install zoo-weights[upstream]`) and pytest, which are imported where they are used:

    build       a variant's checkpoint, its tokens, upstream's model of it
    names       every tensor that a release of a config has, without any weight
    gguf        a variant's checkpoint as a GGUF (needs the package gguf)
    released    helpers that spell a config as releases do
    assemble    a checkpoint's canonical tensors, put together the slow and obvious way
    built       both sides of a variant: upstream's logits and our decoder
    full_size   a family at the size of its releases
    suite       the tests
"""

from .case import FamilyCase, Gguf, Listed, cases
from .variant import BASE, EPS, FULL, LINEAR, SLIDING, VOCAB, Variant, llama3, rope, yarn

__all__ = [
    "BASE",
    "EPS",
    "FULL",
    "LINEAR",
    "SLIDING",
    "VOCAB",
    "FamilyCase",
    "Gguf",
    "Listed",
    "Variant",
    "cases",
    "llama3",
    "rope",
    "yarn",
]
