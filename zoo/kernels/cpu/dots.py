"""Products of bf16 on a CPU with AVX-512's instruction for bf16 but without AMX, for up to some hundred rows.

The instruction multiplies 32 numbers by 32 and adds neighbours to 16 sums in fp32. Four rows of the weight meet four of x, both
read where they lie: sixteen vectors of sums stay in registers along all of a row, and are added up, rounded and written
together at its end. Nothing is brought into another order beforehand, as oneDNN, which torch asks, brings the weight at
every call; four rows of the weight stay in the first cache while all of x, which stays in the second, passes them.

Unusual: where rows of x are no multiple of four, the last one stands in for what is missing, and its results are written
again. The rows of the weight that come next are fetched by hand meanwhile, which no CPU does by itself where a row is a
page.

Margin on 2 cores, which are two threads of one, of a Xeon whose AMX was not used, of 64 experts, against torch's own, 1536 x
2048: 2 rows 215 and 422 us, 8 rows 344 and 820, 32 rows 1.19 and 1.54 ms, 64 rows 2.8 and 2.9, 128 rows 5.1 and 5.8; 2048 x
768: 32 rows 643 and 844 us, 128 rows 2.7 and 3.0 ms. From 16 rows on it does 140-169 GFLOP/s; that CPU can do no more.
Prompts of 256 tokens for 64 experts take 0.91 of the time, decoding them 0.84. One row of 2048 or more
`zoo.kernels.cpu.rows` reads faster, 184 and 212 us.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from llvmlite import ir
from numba import prange
from numba.extending import intrinsic
from torch import Tensor

from zoo.kernels.cpu import compiled, compiles_for, grouped, offsets, taken, threads
from zoo.kernels.cpu.vectors import (
    ADDRESS,
    FLOAT,
    FLOATS,
    HALF,
    PAIRS,
    addresses,
    at,
    call,
    fetch,
    load,
    number,
    or_last,
    rounded,
    row_of,
    shuffled,
    store,
)

ROWS, NUMBERS = 128, 1 << 18
"""Rows, and numbers of x, up to which this is faster: then x no longer stays in a core's second cache."""
BLOCK = 4  # rows of the weight, and rows of x at most, taken at a time


@functools.cache
def available() -> bool:
    """Whether this CPU has the instruction."""
    ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return ask is not None and bool(ask()) and compiles_for("avx512bf16")


def fits(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether `rows` rows of x and a weight [.., N, K], both bf16, are for `times`."""
    n, k = weight.shape[-2:]
    return rows <= ROWS and rows * k <= NUMBERS and not (n % BLOCK or k % 32)


def times(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    counts: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """x [M, K] times weight [N, K], transposed, plus bias [N]: [M, N]. Or, of a stack [E, N, K] with bias [E, N]: the first
    `counts[0]` rows of x times the weight of `experts[0]`, and so on (int64 [G]); the rows x[tokens] (int64) in place of x,
    where given. All bf16, N a multiple of 4 and K of 32, the weight contiguous."""
    k, n = x.shape[-1], weight.shape[-2]
    m = len(x if tokens is None else tokens)
    which, sizes = grouped(experts, counts, m)
    x = x if x.is_contiguous() else x.contiguous()
    out = torch.empty(m, n, dtype=x.dtype)
    with threads() as t:
        _grouped(
            weight.data_ptr(), x.data_ptr(), taken(tokens, m), n, k, which, sizes, offsets(bias, n), out.data_ptr(), t,
        )  # fmt: skip
    return out


def _block(rows: int, lines: int) -> Any:
    @intrinsic
    def block(
        context: Any, weight: Any, x: Any, stride: Any, tokens: Any, row: Any, last: Any, bias: Any, out: Any, across: Any,
        ahead: Any, advance: Any,
    ) -> Any:  # fmt: skip
        """Four rows of the weight times `rows` rows of x[tokens] from `row` on, plus bias: four results in each row of `out`,
        which are `across` bytes apart; rows of the weight and of x are `stride` bytes long. For each 64 of them `lines`
        lines are fetched, the first `ahead`, the next `advance` bytes further."""

        def code(
            b: Any, weight: Any, x: Any, stride: Any, tokens: Any, row: Any, last: Any, bias: Any, out: Any, across: Any,
            ahead: Any, advance: Any,
        ) -> None:  # fmt: skip
            which = [or_last(b, row, r, last) for r in range(rows)]
            of_x = [row_of(b, x, stride, tokens, r) for r in which]
            of_weight = [b.add(weight, b.mul(stride, number(i))) for i in range(BLOCK)]
            before, loop, after = b.block, b.append_basic_block(), b.append_basic_block()
            b.branch(loop)
            b.position_at_end(loop)
            offset, fetched = b.phi(ADDRESS), b.phi(ADDRESS)
            sums = [b.phi(FLOATS) for _ in range(rows * BLOCK)]
            fetch(b, fetched, lines)
            xs = [load(b, at(b, address, offset, PAIRS)) for address in of_x]
            ws = [load(b, at(b, address, offset, PAIRS)) for address in of_weight]
            factors = [(y, w) for y in xs for w in ws]
            added = [
                call(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, (s, *f))
                for s, f in zip(sums, factors, strict=True)
            ]
            following = b.add(offset, number(64))
            variables = [(offset, number(0), following), (fetched, ahead, b.add(fetched, advance))]
            zeros = ir.Constant(FLOATS, None)
            for phi, first, then in (*variables, *((s, zeros, a) for s, a in zip(sums, added, strict=True))):
                phi.add_incoming(first, before)
                phi.add_incoming(then, loop)
            b.cbranch(b.icmp_signed("<", following, stride), loop, after)
            b.position_at_end(after)
            four = load(b, at(b, bias, 0, ir.VectorType(FLOAT, BLOCK)))
            y = rounded(b, b.fadd(_added_up(b, added), shuffled(b, four, four, [*range(BLOCK)] * 4)))
            for i, r in enumerate(which):
                results = shuffled(b, y, y, range(BLOCK * i, BLOCK * (i + 1)))
                store(b, results, at(b, out, b.mul(r, across), ir.VectorType(HALF, BLOCK)))

        return addresses(11, code)

    return block


def _added_up(b: Any, vectors: list[Any]) -> Any:
    """Up to 16 vectors' sums: that of the i-th at i. Bit by bit, two become one of twice as many sums of half as many."""
    for bit in (1, 2, 4, 8):
        own = [i + 16 if i & bit else i for i in range(16)]
        other = [i ^ bit ^ 16 if i & bit else i ^ bit for i in range(16)]
        # One that is left alone is added to itself, turned.
        pairs = zip(vectors[::2], vectors[1::2] or vectors, strict=True)
        vectors = [b.fadd(shuffled(b, *pair, own), shuffled(b, *pair, other)) for pair in pairs]
    return vectors[0]


_two, _two_ahead, _four, _four_ahead = _block(2, 1), _block(2, BLOCK), _block(4, 1), _block(4, BLOCK)


@compiled()
def _panel(weight, following, stride, x, tokens, bias, out, across, first, last):
    """Four rows of the weight times the rows first .. last of x[tokens]. Meanwhile the four `following` are fetched, as
    evenly as memory delivers."""
    blocks = (last - first + 4) // 4
    advance = 256 // blocks
    for row in range(first, last + 1, 4):
        if blocks < 4 and row + 1 < last:
            _four_ahead(weight, x, stride, tokens, row, last, bias, out, across, following, advance)
        elif blocks < 4:
            _two_ahead(weight, x, stride, tokens, row, last, bias, out, across, following, advance)
        elif row + 1 < last:
            _four(weight, x, stride, tokens, row, last, bias, out, across, following, advance)
        else:
            _two(weight, x, stride, tokens, row, last, bias, out, across, following, advance)
        following += stride // 64 * advance


@compiled(parallel=True)
def _grouped(weight, x, tokens, n, k, experts, counts, bias, out, threads):
    """Each thread computes its share of the results of every group. weight, x and out: where they lie."""
    for t in prange(threads):
        low, high, start = n // 4 * t // threads * 4, n // 4 * (t + 1) // threads * 4, 0
        for g in range(len(experts)):
            of = experts[g] if len(bias) > 1 else 0
            for i in range(low, high, 4):
                panel = weight + 2 * k * (experts[g] * n + i)
                following = panel + 8 * k
                if i + 4 == high:  # the next expert's, or, of the last, what is there already
                    following = weight + 2 * k * (experts[g + 1] * n + low) if g + 1 < len(experts) else panel
                _panel(
                    panel, following, 2 * k, x, tokens.ctypes.data, bias[of, i:].ctypes.data, out + 2 * i, 2 * n,
                    start, start + counts[g] - 1,
                )  # fmt: skip
            start += counts[g]
