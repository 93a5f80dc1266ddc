"""The experts of many tokens in CUDA C++ (`zoo.kernels.grouped`): where numbers lie, everywhere; what they compute, on a GPU of Hopper's
kind, against the same in fp32 with the weights expanded."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zoo.kernels import codes, experts, grouped, weights
from zoo.kernels.gated import gated_reference
from zoo.spec import MLP

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from random_codes import components


def channel(i: int, pairs: int) -> int:
    """As `channel` of cuda/grouped.cu; `pairs` of a word."""
    run = 8 // pairs
    return i // 64 * 64 + ((i // 2 % 4 * run + i // 8 % run) * 2 + i % 2) * pairs + i // (8 * run) % pairs


def column_of(row: int, gated: bool) -> int:
    """As `column_of` of cuda/grouped.cu."""
    r, hi, warp, m, group = row % 8, row // 8 % 2, row // 16 % 4, row // 64 % 2, row // 128
    if gated:
        return (group * 4 + warp) * 16 + r // 2 * 4 + m * 2 + r % 2
    return (group * 4 + warp) * 32 + r // 2 * 8 + (m * 2 + hi) * 2 + r % 2


@pytest.mark.parametrize(("kind", "pairs"), [(weights.FP8, 2), (weights.MXFP4, 4)])
def test_a_code_meets_the_channel_of_x_that_it_is_of(kind: int, pairs: int) -> None:
    words, meets = 8 // pairs * 1, {}
    for c in range(4):  # the threads that share a row, each with as many words of it
        for q in range(words):
            for p in range(pairs):
                for half in range(2):
                    code = (c * words + q) * 2 * pairs + p + half * pairs
                    step = (
                        p if pairs == 4 else p * 2 + q // 2
                    )  # of 16 channels, as `multiply` places its pairs
                    meets[step * 16 + 2 * c + half + 8 * (q % 2)] = code
    w = weights.Weight(torch.empty(0), 1, 64, kind)
    given = codes.in_order(torch.arange(64.0)[None], w)[0].long().tolist()
    assert [meets[i] for i in range(64)] == given == [channel(i, pairs) for i in range(64)]
    assert grouped.order_of(w) == pairs // 2


@pytest.mark.parametrize("gated", [False, True])
def test_each_row_of_a_tile_has_a_column_and_a_threads_lie_side_by_side(gated: bool) -> None:
    both = [column_of(r, gated) * (1 + gated) + gated * (r // 8 % 2) for r in range(256)]
    assert sorted(both) == list(range(256))
    for rows in (16, 32, 64):  # that are fetched at once: what is added to a row is added to its channel
        for r in range(rows):
            for i in range(0, 256, rows):
                for pairs in (2, 4):
                    sum_ = channel(column_of(r, gated), pairs) + channel(column_of(i, gated), pairs)
                    assert channel(column_of(r + i, gated), pairs) == sum_
    for warp in range(8):
        for c in range(4):  # once 8 x 8 results are transposed a thread has those of rows 2 c and 2 c + 1
            first = warp // 4 * 128 + warp % 4 * 16 + 2 * c
            mine = [
                column_of(first + m * 64 + hi * 8 + e, gated)
                for m in (0, 1) for hi in ((0,) if gated else (0, 1)) for e in (0, 1)
            ]  # fmt: skip
            assert mine == list(range(mine[0], mine[0] + len(mine))) and mine[0] % len(mine) == 0


def test_what_is_on_its_way_fits_in_shared_memory() -> None:
    for kind in (weights.PLAIN, weights.FP8, weights.MXFP4):
        assert 3 <= grouped.stages(227 * 1024, kind, grouped.MOST) <= 8


on_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9),
    reason="no GPU of Hopper's kind",
)


@on_hopper
@pytest.mark.parametrize(
    "scheme", ["bf16", "fp8-channel", "fp8-block", "int4-group128", "mxfp4", "nvfp4", "int8-channel"]
)
@pytest.mark.parametrize(
    ("n", "d", "f", "top_k", "gated", "act"),
    [
        (8, 512, 768, 4, True, "silu"),
        (4, 2880, 576, 2, True, "silu_clamped"),
        (4, 704, 640, 1, False, "relu2"),
    ],
)
def test_experts_of_many_tokens(
    n: int, d: int, f: int, top_k: int, gated: bool, act: str, scheme: str
) -> None:
    """Of none, one, several and many rows of x to an expert."""
    if (scheme == "int4-group128" and (d % 128 or f % 128)) or (scheme == "fp8-block" and f % 128):
        pytest.skip("scales of other channels or rows")
    torch.manual_seed(d)
    limits = {"limit": 7.0, "alpha": 1.702} if act == "silu_clamped" else {}
    spec = MLP(f, act=act, gated=gated, **limits)  # type: ignore[arg-type]
    with torch.device("cuda"):
        made = []
        for parts, k in (((f, f) if gated else (f,), d), ((d,), f)):
            if scheme == "bf16":
                w = weights.plain(torch.randn(n, sum(parts), k, dtype=torch.bfloat16) / 10)
            else:
                w = weights.quantised(scheme, components(scheme, parts, k, n), parts)  # type: ignore[assignment]
                assert w is not None
            made.append(replace(w, bias=torch.randn(n, w.n, dtype=torch.bfloat16)))
        up, down = made
        x = torch.randn(700, d, dtype=torch.bfloat16)
        chance = torch.rand(n) ** 3 + 1e-3
        chance[0] = 0 if n > top_k + 1 else 1e-3
        chosen = torch.multinomial(chance.expand(len(x), n), top_k).int()
        shares = torch.rand(len(x), top_k, dtype=torch.bfloat16)
    assert grouped.serves(x, up, down, spec)
    order, tiles = experts.sort_by_expert(chosen, n, grouped.MOST)
    h = grouped.up_rows(x, order, tiles, up, down, spec, top_k)
    y = grouped.down_rows(h, order, tiles, down).view(len(x), top_k, d)
    # Of integers of four bits each weight is rounded, as if expanded beforehand; other scales multiply sums, or are exact.
    rounded = torch.bfloat16 if scheme in ("bf16", "int4-group128") else torch.float32
    dense = [weights.expanded(w, rounded).float() for w in (up, down)]
    for e in range(n):
        token, j = torch.where(chosen == e)
        if len(token):
            hidden = gated_reference(
                (x[token].float() @ dense[0][e].T + up.bias[e].float()).bfloat16().float(), spec
            )  # type: ignore[index]
            expected = hidden.bfloat16().float() @ dense[1][e].T + down.bias[e].float()  # type: ignore[index]
            assert bool(torch.isfinite(y[token, j]).all())
            assert (y[token, j].float() - expected).norm() <= 0.008 * expected.norm()
    again = grouped.down_rows(grouped.up_rows(x, order, tiles, up, down, spec, top_k), order, tiles, down)
    assert torch.equal(again.view_as(y), y)
    whole = experts.experts(x, chosen, shares, up, down, spec, shared=x)
    assert (
        whole.float() - x.float() - (y.float() * shares[..., None].float()).sum(1)
    ).norm() <= 0.01 * whole.float().norm()


@on_hopper
def test_what_the_grouped_kernel_does_not_serve_is_left_to_others() -> None:
    spec = MLP(128)
    with torch.device("cuda"):
        x = torch.randn(64, 256, dtype=torch.bfloat16)
        up = weights.quantised("fp8-block", components("fp8-block", (128, 128), 256, 2), (128, 128))
        down = weights.quantised("fp8-block", components("fp8-block", (256,), 128, 2), (256,))
        assert up is not None and down is not None and up.scale is not None
        assert grouped.serves(x, up, down, spec)
        assert not grouped.serves(x.float(), up, down, spec)
        assert not grouped.serves(x, replace(up, steady=False), down, spec)
        assert not grouped.serves(x, replace(up, scale=up.scale.bfloat16()), down, spec)


def test_scales_that_are_far_apart_are_told() -> None:
    """Sums go from one block's scale to the next by their quotient."""
    c = components("fp8-block", (128, 128), 256, 2)
    for value, steady in ((1.0, True), (0.0, False), (1e30, False), (float("nan"), False)):
        c["scale"][1, 0, 1] = value
        w = weights.quantised("fp8-block", c, (128, 128))
        assert w is not None and w.steady is steady
