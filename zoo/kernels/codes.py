"""Codes of four and eight bits times a few rows of x, by tensor cores.

A tile of codes is fetched as words of 32 bits, and each is widened to bf16 in the registers that the tensor cores multiply
from. A word gives pairs of numbers half a word apart, so channels come in another order than they are stored in: x is put
into the same one (`arranged`), which costs nothing per weight, as a tile of x is shared by all rows.

Unusual: no number is converted. bf16 whose exponent is 0 or 1 are evenly spaced, so a code under a mask is one already, times
a power of two (`int4`); the parts of an fp8 or fp4 code are moved to where bf16 has them. And where there is one row of x,
the eight columns that tensor cores multiply at once are eight pieces of it (or the rows of a token's experts): a row of the
weight is eight rows of a tile, of which each needs one column.

Margin, one H200 (copy 4.26 TB/s), one row, by arithmetic of fp32 before and so: int4 in groups of 128, 28672 x 4096, 53 and
23 us; 4096 x 14336, 32 and 22; fp8 with a scale to a row, 28672 x 4096, 57 and 37 (but 4096 x 4096 9 and 12). One token: 8 of
128 experts of 768 x 2048 in int4 33 and 18 us, 4 of 32 experts of 2880 x 2880 in mxfp4 57 and 40.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.launch import INTERPRET, has_triton, triton
from zoo.kernels.weights import INT4, MXFP4, Weight

COLUMNS = 8
"""Columns of x that tensor cores multiply at once, at the least."""
LARGE = 16384
"""Rows of a weight in fp8 from which this is faster."""

if triton is not None:
    import triton.language as tl

    from zoo.kernels.launch import after_previous


def serves(x: Tensor, w: Weight) -> bool:
    """Whether `codes_times` takes the codes of w as words, and x. The interpreter multiplies no bf16."""
    return w.words and has_triton(x) and x.dtype == (torch.float32 if INTERPRET else torch.bfloat16)


def pays(x: Tensor, w: Weight) -> bool:
    """Whether that is the fastest way for one row of x. Codes of fp8 are bytes already, and fewer to a tile: of less than all
    that is in flight at once, arithmetic of fp32 is as fast."""
    large = w.kind in (MXFP4, INT4) or (not w.lead and w.n >= LARGE)
    return serves(x, w) and (large or INTERPRET)


def tile(w: Weight) -> tuple[int, int, int, int]:
    """Rows and channels of a tile, warps and stages. Measured on an H200."""
    if w.kind == MXFP4:
        return 64, 128, 4, 3
    block = (
        64
        if w.kind != INT4
        else min(128 if not w.lead and w.k <= 4096 and w.n < LARGE else 64, w.columns & -w.columns)
    )
    return 64 if w.lead else 128, block, 4, 3


def even(w: Weight, step: int) -> bool:
    """Whether tiles that reach over `step` channels end where a row does."""
    return w.k % step == 0


if triton is not None:

    @triton.jit
    def halves(pair, DTYPE: tl.constexpr):
        """Words of two bf16 -> the low and the high ones, in `DTYPE`."""
        if DTYPE == tl.bfloat16:
            low = pair.to(tl.uint16).to(DTYPE, bitcast=True)
            high = (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
        else:
            low = (pair << 16).to(tl.float32, bitcast=True)
            high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        return low, high

    @triton.jit
    def int4(w, p: tl.constexpr, DTYPE: tl.constexpr):
        """Words of eight codes -> codes p and p + 4, each less 8, over 64."""
        if p >= 2:
            w = w >> 8
        if p % 2 == 0:
            low, high = halves(w & 0x000F000F, DTYPE)
            return tl.join(low * 2.0**127 - 0.125, high * 2.0**127 - 0.125)
        else:
            low, high = halves(w & 0x00F000F0, DTYPE)
            return tl.join(low * 2.0**123 - 0.125, high * 2.0**123 - 0.125)

    @triton.jit
    def mxfp4(w, factor, p: tl.constexpr, DTYPE: tl.constexpr):
        """Words of eight e2m1 codes -> the values of codes p and p + 4 times those of `factor`, over 2^126."""
        if p == 0:
            magnitude = w << 6
        elif p == 1:
            magnitude = w << 2
        else:
            magnitude = w >> (4 * p - 6)
        pair = (magnitude & 0x01C001C0) | ((w << (12 - 4 * p)) & 0x80008000)
        if DTYPE == tl.bfloat16:  # the compiler would multiply them one by one
            pair = tl.inline_asm_elementwise(
                "mul.bf16x2 $0, $1, $2;", "=r,r,r", [pair, factor], dtype=tl.uint32, is_pure=True, pack=1
            )
            low, high = halves(pair, DTYPE)
        else:
            low, high = halves(pair, DTYPE)
            factor, _ = halves(factor, DTYPE)
            low, high = low * factor, high * factor
        return tl.join(low, high)

    @triton.jit
    def fp8(w, p: tl.constexpr, DTYPE: tl.constexpr):
        """Words of four e4m3 codes -> the values of codes p and p + 2. No code is NaN."""
        if p == 0:
            w = w << 8
        low, high = halves(((w >> 4) & 0x07F007F0) | (w & 0x80008000), DTYPE)
        return tl.join(low * 2.0**120, high * 2.0**120)

    @triton.jit
    def factors(s):
        """Words of two bf16, both 2^(s - 127 + 126 - 60), of e8m0 exponents s."""
        return tl.minimum(s.to(tl.uint32) + 66, 255) * 0x00800080

    # Words of a tile are numbered (j, c, i): c are the four threads that share a row, i the words of a run; their codes (half, p).

    @triton.jit
    def arranged(x, M: tl.constexpr, K: tl.constexpr, P: tl.constexpr, RUN: tl.constexpr):
        """x [M, K] -> [K, M], channels in the order of those that `widened` gives."""
        x = tl.reshape(x, (M, K // (8 * P * RUN), 4, RUN, 2, P))
        return tl.reshape(tl.permute(x, (1, 5, 3, 2, 4, 0)), (K, M))

    @triton.jit
    def widened(
        w,
        exponents,
        R: tl.constexpr,
        K: tl.constexpr,
        RUN: tl.constexpr,
        KIND: tl.constexpr,
        DTYPE: tl.constexpr,
    ):
        """Words [R, W] of codes -> numbers [R, K] (mxfp4: times 2^-60 and the `exponents` [R, K / 32]; int4: over 64)."""
        P: tl.constexpr = 4 if KIND >= 3 else 2
        J: tl.constexpr = K // (8 * P * RUN)
        w = tl.reshape(w, (R, J, 4, RUN))
        if KIND < 3:
            a = tl.permute(tl.join(fp8(w, 0, DTYPE), fp8(w, 1, DTYPE)), (0, 1, 5, 3, 2, 4))
        else:
            if KIND == 3:
                tl.static_assert(RUN == 4)  # the words of a thread have one exponent
                f = factors(exponents)
                f = tl.reshape(tl.broadcast_to(f[:, :, None], (R, K // 32, 4)), (R, J, 4, RUN))
                even = tl.join(mxfp4(w, f, 0, DTYPE), mxfp4(w, f, 2, DTYPE))
                odd = tl.join(mxfp4(w, f, 1, DTYPE), mxfp4(w, f, 3, DTYPE))
            else:
                even = tl.join(int4(w, 0, DTYPE), int4(w, 2, DTYPE))
                odd = tl.join(int4(w, 1, DTYPE), int4(w, 3, DTYPE))
            a = tl.permute(tl.join(even, odd), (0, 1, 5, 6, 3, 2, 4))
        return tl.reshape(a, (R, K))

    @triton.jit
    def words_at(at, word, first, words, EVEN: tl.constexpr):
        if EVEN:
            return tl.load(at + first)
        else:
            return tl.load(at + first, mask=first + word < words, other=0)

    @triton.jit
    def plus_tile(
        acc, w, start, x_at, x_k, s_at, chunk, K, columns,
        KIND: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr,
    ):  # fmt: skip
        """acc plus the words w, from channel start + chunk on, times what they are multiplied by."""
        if EVEN:
            x = tl.load(x_at + start)
        else:
            x = tl.load(x_at + start, mask=start + x_k < K, other=0.0)
        dtype: tl.constexpr = x_at.dtype.element_ty
        x = arranged(x, M, BLOCK, 4 if KIND >= 3 else 2, RUN)
        first = start + chunk
        if KIND == 3:
            group = (first // 32)[:, None] + tl.arange(0, BLOCK // 32)[None, :]
            if EVEN:
                s = tl.load(s_at[:, None] + group)
            else:
                s = tl.load(s_at[:, None] + group, mask=group * 32 < K, other=0)
        else:
            s = 0
        a = widened(w, s, R, BLOCK, RUN, KIND, dtype)
        if KIND == 1 or KIND == 3:
            return tl.dot(a, x, acc, input_precision="ieee")
        else:
            if EVEN:
                s = tl.load(s_at + first // columns)
            else:
                s = tl.load(s_at + first // columns, mask=first < K, other=0.0)
            return acc + tl.dot(a, x, input_precision="ieee") * s.to(tl.float32)[:, None]

    @triton.jit
    def codes_times(
        x_ptr, x_row, x_chunk, w_ptr, n, chunk, s_ptr, s_row, K, s_columns, columns,
        KIND: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
        OVERLAP: tl.constexpr, WAIT: tl.constexpr,
    ):  # fmt: skip
        """Rows n [R] of codes with K columns times the rows that begin at x_row [M] behind x_ptr: fp32 [R, M].

        `chunk` [R], `x_chunk` [M]: where, of every STEP channels, the BLOCK begin that a row is multiplied in; it counts
        where both are the same. `s_row` [R]: rows of scales. `WAIT`: x is not there yet; the first tile of codes is fetched
        before waiting for it, and counted last."""
        CODES: tl.constexpr = 8 if KIND >= 3 else 4
        # Of a row of a tile four threads fetch 16 bytes each, or what there is.
        RUN: tl.constexpr = 4 if BLOCK >= 16 * CODES else BLOCK // (4 * CODES)
        words, K = K // 32 * (32 // CODES), K // 32 * 32  # and plainly a multiple of 16 bytes
        x_k = x_chunk[:, None] + tl.arange(0, BLOCK)[None, :]
        x_at = x_ptr + x_row[:, None] + x_k
        word = (chunk // CODES)[:, None] + tl.arange(0, BLOCK // CODES)[None, :]
        at = w_ptr.to(tl.pointer_type(tl.uint32)) + n.to(tl.int64)[:, None] * words + word
        s_at = s_ptr + s_row.to(tl.int64) * s_columns
        acc = tl.zeros([R, M], dtype=tl.float32)
        w = words_at(at, word, 0, words, EVEN)
        if WAIT:
            after_previous(OVERLAP)
        for start in range(STEP, K, STEP):
            later = words_at(at, word, start // CODES, words, EVEN)
            acc = plus_tile(
                acc, later, start, x_at, x_k, s_at, chunk, K, columns, KIND, R, M, BLOCK, RUN, EVEN
            )
        acc = plus_tile(acc, w, 0, x_at, x_k, s_at, chunk, K, columns, KIND, R, M, BLOCK, RUN, EVEN)
        if KIND == 1:
            acc *= tl.load(s_at).to(tl.float32)[:, None]
        elif KIND == 3:
            acc *= 1152921504606846976.0  # 2^60
        elif KIND == 4:
            acc *= 64.0
        return acc

    @triton.jit
    def own_columns(acc, R: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
        """acc [R, M], of which row r needs column r % M, each S rows summed: [R / S]."""
        own = (tl.arange(0, R) % M)[:, None] == tl.arange(0, M)[None, :]
        return tl.sum(tl.reshape(tl.sum(tl.where(own, acc, 0.0), 1), (R // S, S)), 1)
