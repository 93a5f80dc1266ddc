"""The rule algebra: every expression is a rearrangement, so reading it from right to left undoes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.mapping import changes
from zoo.mapping.rules import (
    Box,
    Expr,
    Fit,
    Target,
    cat,
    deinterleave,
    extra,
    joined,
    leaf,
    minus_exp,
    ranks,
    rope_halves,
    rules,
    squeeze,
    stack,
    swap,
    transpose,
    unflatten,
    ungroup,
)
from zoo.spec import MLP, Layer, Norm, Spec


def compiled(
    expr: Expr,
    shape: tuple[int, ...],
    parts: tuple[int, ...] | None = None,
    stacked: bool = False,
    n_ranks: int = 1,
) -> list[Fit]:
    axis = int(stacked)
    parts = parts or (shape[axis],)
    none: Any = None
    return list(expr.compile(Target(Box.whole(shape), parts, parts, axis, none, none, n_ranks=n_ranks)))


def view(flat: np.ndarray[Any, Any], box: Box) -> np.ndarray[Any, Any]:
    sizes, strides = box.flat()
    return np.lib.stride_tricks.as_strided(flat[box.offset :], sizes, [s * flat.itemsize for s in strides])


def apart(x: np.ndarray[Any, Any], fits: list[Fit]) -> dict[str, np.ndarray[Any, Any]]:
    """Canonical -> source tensors."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    for f in fits:
        target = out.setdefault(f.name, np.full(f.shape, -1, x.dtype))
        view(target.reshape(-1), f.source)[...] = view(x.reshape(-1), f.canonical)
    return out


def together(
    sources: dict[str, np.ndarray[Any, Any]], fits: list[Fit], shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Source tensors -> canonical."""
    out = np.full(shape, -1, np.int64)
    for f in fits:
        view(out.reshape(-1), f.canonical)[...] = view(
            np.ascontiguousarray(sources[f.name]).reshape(-1), f.source
        )
    return out


# --- expressions by what they mean, in numpy ------------------------------------------------------------------


def x(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


def test_cat_puts_parts_one_after_the_other_along_the_output_axis() -> None:
    q, k = x(6, 4), x(2, 4) + 100
    fits = compiled(cat("q", "k"), (8, 4), (6, 2))
    assert (together({"q": q, "k": k}, fits, (8, 4)) == np.concatenate([q, k])).all()


def test_stack_of_cat_fuses_each_expert() -> None:
    sources = {f"{e}.{n}": x(3, 4) + 100 * e + 50 * (n == "up") for e in range(2) for n in ("gate", "up")}
    fits = compiled(stack(cat("{e}.gate", "{e}.up")), (2, 6, 4), (3, 3), stacked=True)
    want = np.stack([np.concatenate([sources[f"{e}.gate"], sources[f"{e}.up"]]) for e in range(2)])
    assert (together(sources, fits, (2, 6, 4)) == want).all()


def test_transpose_swaps_the_last_two_axes_of_each_expert() -> None:
    w = x(2, 4, 6)
    fits = compiled(transpose("w"), (2, 6, 4), (3, 3), stacked=True)
    assert (together({"w": w}, fits, (2, 6, 4)) == w.swapaxes(1, 2)).all()


def test_deinterleave_parts_alternating_rows() -> None:
    w = x(6, 4)
    fits = compiled(deinterleave("w"), (6, 4), (3, 3))
    assert (together({"w": w}, fits, (6, 4)) == np.concatenate([w[0::2], w[1::2]])).all()


def test_transpose_of_deinterleave_is_gpt_oss() -> None:
    w = x(2, 4, 6)  # [E, D, 2F], gate and up alternating along the last axis
    fits = compiled(transpose(deinterleave("w")), (2, 6, 4), (3, 3), stacked=True)
    want = np.concatenate([w[:, :, 0::2], w[:, :, 1::2]], axis=2).swapaxes(1, 2)
    assert (together({"w": w}, fits, (2, 6, 4)) == want).all()


def test_rope_halves_takes_the_even_members_of_a_head_first() -> None:
    w = x(12, 2)  # 2 heads of 6 rows, in pairs
    fits = compiled(rope_halves("w", 2), (12, 2))
    heads = w.reshape(2, 3, 2, 2)
    assert (together({"w": w}, fits, (12, 2)) == heads.swapaxes(1, 2).reshape(12, 2)).all()


def test_ungroup_collects_each_part_from_all_heads() -> None:
    w = x(12, 2)  # 2 heads, each [q 1 | k 1 | v 4]
    fits = compiled(ungroup("w", 2, 3), (12, 2), (2, 2, 8))
    heads = w.reshape(2, 6, 2)
    want = np.concatenate([heads[:, a:b].reshape(-1, 2) for a, b in ((0, 1), (1, 2), (2, 6))])
    assert (together({"w": w}, fits, (12, 2)) == want).all()


def test_squeeze_drops_axes_of_one() -> None:
    fits = compiled(squeeze("w", 1), (5, 4))
    assert fits[0].shape == (5, 1, 4)
    assert (together({"w": x(5, 1, 4)}, fits, (5, 4)) == x(5, 4)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_swap_takes_the_first_of_every_group_first(axis: int) -> None:
    w = x(12, 12)  # 2 groups of 3 heads, each of 2
    fits = compiled(swap("w", 2, 3, axis), (12, 12))
    heads = w.reshape(3, 2, 2, 12) if axis == 0 else w.reshape(12, 3, 2, 2)
    assert (together({"w": w}, fits, (12, 12)) == heads.swapaxes(axis, axis + 1).reshape(12, 12)).all()


def test_joined_parts_of_one_tensor_are_rearranged_each_by_itself() -> None:
    w = x(10, 3)  # q 2 | k 2 | v 6, of which v's rows are swapped
    fits = compiled(joined("w", "w", swap("w", 2, 3)), (10, 3), (2, 2, 6))
    assert {f.shape for f in fits} == {(10, 3)}
    want = np.concatenate([w[:4], w[4:].reshape(3, 2, 1, 3).swapaxes(0, 1).reshape(6, 3)])
    assert (together({"w": w}, fits, (10, 3)) == want).all()


def test_unflatten_lays_a_vector_in_rows() -> None:
    (fit,) = compiled(unflatten("w", 2), (6,))
    assert fit.shape == (2, 3)
    assert (together({"w": x(2, 3)}, [fit], (6,)) == x(6)).all()


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=64))
def test_a_decay_gives_back_a_logarithm_with_the_same_decay_and_one_of_bf16_to_the_bit(
    values: list[float],
) -> None:
    w = np.asarray(values, np.float32)
    x = changes.stored(w, "-exp")
    for others in (
        x,
        np.nextafter(x, np.float32(0)),
        np.nextafter(x, np.float32(-np.inf)),
    ):  # libraries differ so far
        made = changes.weights(others, "-exp")
        assert not changes.unsound(others, made, "-exp").size
        assert (
            np.abs(changes.stored(made, "-exp") - others)
            <= np.spacing(np.abs(others)) * np.maximum(1, np.abs(w))
        ).all()
    short = (w.view(np.uint32) & 0xFFFF0000).view(np.float32)
    back = changes.weights(changes.stored(short, "-exp"), "-exp")
    assert ((back == short) | (np.abs(short) < 2**-13)).all()  # smaller ones have one decay
    assert compiled(minus_exp(swap("w", 1, 1)), (3,))[0].change == "-exp"


def test_what_is_no_decay_has_no_logarithm() -> None:
    x = np.asarray([-1, 0, 0.5, np.nan, -np.inf], np.float32)
    w = changes.weights(x, "-exp")
    assert changes.unsound(x, w, "-exp").tolist() == [1, 2]


@pytest.mark.parametrize("axis", [0, 1])
def test_ranks_join_slices(axis: int) -> None:
    w = x(6, 4)
    fits = compiled(ranks("rank{r}.w", axis), (6, 4), n_ranks=2)
    sources = {f"rank{r}.w": part for r, part in enumerate(np.split(w, 2, axis))}
    assert (together(sources, fits, (6, 4)) == w).all()


def test_a_tensor_on_every_rank_is_taken_once_and_given_back_to_all() -> None:
    fits = compiled(ranks("rank{r}.w", None), (5,), n_ranks=3)
    assert [f.copy for f in fits] == [False, True, True]
    assert all((part == x(5)).all() for part in apart(x(5), fits).values())


# --- any expression at all ------------------------------------------------------------------------------------

Case = tuple[Expr, tuple[int, ...], tuple[int, ...], bool, int]


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """A random expression with a canonical tensor that it fits."""
    size = st.integers(1, 4)
    heads, columns, n_ranks = draw(size), draw(size) * 2, draw(st.sampled_from([1, 2]))
    stacked = draw(st.booleans())
    n_experts = draw(size)
    n = iter(range(1000))

    def name() -> str:
        return f"t{next(n)}" + (".{e}" if stacked and one_each else "")

    one_each = draw(st.booleans())
    exprs: list[Expr] = []
    parts: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(
            st.sampled_from(["leaf", "transpose", "halves", "ranks", "ungroup", "both", "swap", "joined"])
        )
        rows = heads * 2 * draw(size)
        if kind == "ungroup" and not (stacked and not one_each):
            k = draw(st.integers(1, 3))
            exprs.append(ungroup(name(), heads, k))
            parts += [heads * draw(size) for _ in range(k)]
            continue
        if kind == "joined" and not (stacked and not one_each):
            one = name()
            exprs.append(joined(one, swap(one, heads, 2)))
            parts += [draw(size), rows]
            continue
        parts.append(rows)
        if kind == "transpose":
            exprs.append(transpose(name()))
        elif kind == "halves":
            exprs.append(rope_halves(name(), heads))
        elif kind == "both":
            exprs.append(transpose(rope_halves(name(), heads)))
        elif kind == "swap" and not stacked:
            exprs.append(swap(name(), heads, 2, 0))
        elif kind == "ranks" and not stacked:
            exprs.append(ranks("r{r}." + name(), draw(st.sampled_from([0, 1, None]))))
        else:
            exprs.append(leaf(name()))
    expr = cat(*exprs) if len(parts) > 1 else exprs[0]
    if stacked and one_each:
        expr = stack(expr)
    shape = (*((n_experts,) if stacked else ()), sum(parts), columns)
    return expr, shape, tuple(parts), stacked, n_ranks


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_canonical_element_comes_from_one_place_and_goes_back_there(case: Case) -> None:
    expr, shape, parts, stacked, n_ranks = case
    fits = compiled(expr, shape, parts, stacked, n_ranks)
    canonical = x(*shape)
    sources = apart(canonical, fits)
    assert all((s >= 0).all() for s in sources.values()), "a source element is given nothing"
    original = sum(s.size for n, s in sources.items() if not all(f.copy for f in fits if f.name == n))
    assert original == canonical.size
    assert (together(sources, fits, shape) == canonical).all()


# --- what does not apply is refused ------------------------------------------------------------------------------


def test_a_rule_must_fuse_as_many_tensors_as_the_layout() -> None:
    with pytest.raises(ZooError, match="fuses 2 tensors where the layout has 3 parts"):
        compiled(cat("a", "b"), (6, 4), (2, 2, 2))


def test_blocks_of_scales_are_not_torn_by_a_permutation() -> None:
    none: Any = None
    target = Target(Box.whole((1, 1)), (1,), (128,), 0, none, none, unit=(128, 128))
    with pytest.raises(ZooError, match="dequantise with --dtype"):
        list(rope_halves("w", 4).compile(target))


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ZooError, match="does not split over 2 ranks"):
        compiled(ranks("rank{r}.w", 0), (5, 4), n_ranks=2)


def spec_of(n_layers: int) -> Spec:
    norm = Norm(1e-5)
    layers = (Layer(None, MLP(4)), *(Layer(None, MLP(8)),) * (n_layers - 1))
    return Spec("any", 4, 8, layers, norm, tied=True, context_length=8)


def test_an_extra_of_a_layer_is_one_that_the_model_does_not_have() -> None:
    mtp = extra("model.layers.{i}.*", "MTP")
    assert mtp.matches("model.layers.4.enorm.weight", spec_of(4), ())
    assert not mtp.matches("model.layers.3.enorm.weight", spec_of(4), ())


def test_an_extra_of_a_layer_may_need_another_tensor_beside_it() -> None:
    mtp = extra("model.layers.{i}.*", "MTP", beside="eh_proj.weight")
    names = {"model.layers.4.eh_proj.weight"}
    assert mtp.matches("model.layers.4.enorm.weight", spec_of(4), names)
    assert not mtp.matches("model.layers.5.enorm.weight", spec_of(4), names)


def test_an_extra_of_a_layer_that_the_model_has_must_say_of_which() -> None:
    unused = extra("model.layers.{i}.k_proj", "shared", when=lambda layer: layer.ffn == MLP(4))
    assert unused.matches("model.layers.0.k_proj", spec_of(4), ())
    assert not unused.matches("model.layers.1.k_proj", spec_of(4), ())
    assert not unused.matches("model.layers.4.k_proj", spec_of(4), ())


def test_the_version_of_a_rule_set_changes_with_its_rules_only() -> None:
    def made(k: str, why: str = "why") -> str:
        return rules(("a", cat("q", k)), extra("e", why)).version

    assert made("k") == made("k")
    assert made("k") != made("v")
    assert made("k") != made("k", "because")
