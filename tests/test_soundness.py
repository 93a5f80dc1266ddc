"""Specs that can be written down but not computed with are refused, by what is wrong with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zoo.errors import ZooError
from zoo.soundness import refuse_unsound
from zoo.spec import MLP, Attention, Layer, Mamba, MoE, Norm, Router, Spec

OWN = Attention(n_heads=4, n_kv_heads=2, head_dim=6, scale=1.0)


def spec(*mixers: Attention | Mamba) -> Spec:
    norm = Norm(1e-6)
    layers = tuple(Layer(mixer, MLP(8), attn_norm=norm, ffn_norm=norm) for mixer in mixers)
    return Spec("own", d_model=8, vocab_size=16, layers=layers, norm=norm, tied=True, context_length=32)


def test_values_are_as_wide_as_keys_unless_said_otherwise() -> None:
    assert OWN.v_head_dim == 6
    assert Attention(n_heads=4, n_kv_heads=2, head_dim=6, v_head_dim=3, scale=1.0).v_head_dim == 3
    assert spec(OWN).to_dict()["layer_kinds"][0]["mixer"]["v_head_dim"] == 6
    assert Spec.from_dict(spec(OWN).to_dict()) == spec(OWN)


def test_a_layer_may_take_keys_and_values_of_one_before_it_that_has_them() -> None:
    refuse_unsound(spec(OWN, replace(OWN, n_heads=2, kv_from=0)), "zoo.json")


@pytest.mark.parametrize(
    ("mixers", "says"),
    [
        ([replace(OWN, kv_from=7)], "layer 0 .* layer 7, which is not one of the 0 layers before it"),
        ([OWN, replace(OWN, kv_from=1)], "layer 1 .* layer 1, which is not one of the 1 layers before it"),
        ([replace(OWN, kv_from=1), OWN], "layer 0 .* layer 1, which is not one of the 0"),
        ([OWN, replace(OWN, kv_from=-1)], "layer 1 .* layer -1, which is not one of the 1"),
        ([OWN, replace(OWN, kv_from=0), replace(OWN, kv_from=1)], "layer 2 .* layer 1, which has none of its own"),
        ([Mamba(4, 4, 2, 4, 4, Norm(1e-6)), replace(OWN, kv_from=0)], "layer 1 .* layer 0, which has none of its own"),
        ([OWN, replace(OWN, n_kv_heads=1, kv_from=0)], r"\(2, 6, 6\); its own are \(1, 6, 6\)"),
        ([OWN, replace(OWN, head_dim=4, kv_from=0)], r"\(2, 6, 6\); its own are \(2, 4, 6\)"),
        ([OWN, replace(OWN, v_head_dim=4, kv_from=0)], r"\(2, 6, 6\); its own are \(2, 6, 4\)"),
    ],
)  # fmt: skip
def test_keys_and_values_that_are_not_there_to_take_are_refused(
    mixers: list[Attention | Mamba], says: str
) -> None:
    with pytest.raises(ZooError, match=f"^zoo.json: .*{says}"):
        refuse_unsound(spec(*mixers), "zoo.json")


def test_scores_that_are_nothing_and_experts_that_are_not_eligible_are_refused() -> None:
    with pytest.raises(ZooError, match=r"scores times 0\.0 tell no key from another"):
        refuse_unsound(spec(replace(OWN, scale=0.0)), "zoo.json")
    for top_k, says in ((4, None), (5, "5 experts cannot be chosen of the 4 in 2 of 4 groups")):
        moe = MoE(8, MLP(8), Router(top_k, "softmax", n_groups=4, top_groups=2))
        one = spec(OWN)
        grouped = replace(one, layers=(replace(one.layers[0], ffn=moe),))
        if says is None:
            refuse_unsound(grouped, "zoo.json")
            continue
        with pytest.raises(ZooError, match=says):
            refuse_unsound(grouped, "zoo.json")
