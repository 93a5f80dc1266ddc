"""Codes of four and eight bits times a few rows of x, by tensor cores.

A tile of codes is fetched as words of 32 bits, and each is widened to bf16 in the registers that the tensor cores multiply
from. A word gives pairs of numbers half a word apart, so channels come in another order than they are stored in: x is put
into the same one (`arranged`), which costs nothing per weight, as a tile of x is shared by all rows.

Unusual: no number is converted. bf16 whose exponent is 0 or 1 are evenly spaced, so a code under a mask is one already, times
a power of two (`int4`); the parts of an fp8 or fp4 code are moved to where bf16 has them. Offsets of groups are added with the sum
of their x (`affine`). And where there is one row of x, the eight columns that tensor cores multiply at once are eight pieces of it (or the rows of a token's experts): a row of the
weight is eight rows of a tile, of which each needs one column.

Margin on an H200 (a copy moves 4.2 TB/s; `benchmarks/gpu_codes.py`), without and with. One row: int4 in groups of 128, 28672 x
4096 54 and 23 us (62 % of copy), 4096 x 14336 33 and 15, 6144 x 4096 15 and 7; fp8 with a scale to a row 56 and 37 (75 %), 25 and 25,
10 and 10, so `weights.rows_times` takes those (and all of one row, on Hopper, `zoo.kernels.stream`). 16 rows, where the weight was expanded: int4 143 and
30, 74 and 18, 31 and 10; fp8 154 and 37, 82 and 21, 34 and 10. Experts are in `zoo.kernels.experts`. One row of nvfp4 55 and 37 (42 % of copy),
43 and 20, 17 and 9; of bytes with a row's scale 42 and 38, 24 and 26, 12 and 10; 16 rows of these 157 and 38, 82 and 22, 34 and 12. What is left: with four bits a
program issues 2.6 instructions for a weight, of which 1.2 widen and multiply it, and the GPU has room for 3 x 10^13 in a second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.launch import INTERPRET, NVIDIA, Kernel, ceil_div, has_triton, hopper, triton
from zoo.kernels.weights import (
    AFFINE4,
    AFFINE8,
    FOUR_BITS,
    FP8,
    INT4,
    INT8,
    INTEGERS,
    MXFP4,
    MXFP8,
    NVFP4,
    PLAIN,
    SCALED,
    Weight,
)

COLUMNS = 8
"""Columns of x that tensor cores multiply at once, at the least."""
PROGRAMS = 640
"""Programs of four warps that keep a GPU busy."""
LARGE = 16384
"""Rows of a weight from which there are so many programs that one tile fetched ahead is enough."""

if triton is not None:
    import triton.language as tl

    from zoo.kernels.launch import after_previous
    from zoo.kernels.weights import WHOLE, e4m3, head, scale_column


def serves(x: Tensor, w: Weight) -> bool:
    """Whether `codes_times` takes the codes of w as words, and x. The interpreter multiplies no bf16, and GPUs before Hopper no pairs."""
    if w.kind in SCALED and x.is_cuda and not hopper(x):
        return False
    return w.words and has_triton(x) and x.dtype == (torch.float32 if INTERPRET else torch.bfloat16)


def pays(x: Tensor, w: Weight) -> bool:
    """Whether that is the fastest way for one row of x: for all codes but fp8 (of that experts with blocks). Where
    `zoo.kernels.stream` serves it is faster still."""
    other = w.kind in FOUR_BITS or w.kind < PLAIN
    return serves(x, w) and (other or (w.kind == FP8 and bool(w.lead)) or INTERPRET)


def tile(w: Weight) -> tuple[int, int, int, int, int]:
    """Rows and channels of a tile, tiles fetched ahead, warps and stages. Measured on an H200."""
    if w.kind == MXFP4 or (w.kind == MXFP8 and not w.lead and w.n <= 4096):
        return 128, 128, 2, 4, 3
    if w.kind == NVFP4 or (w.kind == AFFINE8 and not w.lead and _block(w) == 128):
        few = w.kind == NVFP4 and (bool(w.lead) or 4096 < w.n < LARGE)
        return 128, 128, 2 if few else 4, 4, 3
    block = _block(w) if not w.lead and w.n <= 4096 else min(64, _block(w))
    ahead = (2 if w.kind in FOUR_BITS else 4) if w.lead else 1 if w.n >= LARGE else 4
    return 128, block, ahead, 4, 3


def joined_tile(w: Weight) -> tuple[int, int, int, int, int]:
    """`tile` for the experts of a token, joined: low ones, of which each program holds most of its rows before h is there."""
    return 32, _block(w), 4 if w.kind == MXFP4 else 6, 2, 3


def _block(w: Weight) -> int:
    """Channels of a tile, at most: of integers they share a scale."""
    return min(128, w.columns & -w.columns) if w.kind in INTEGERS else 128


def shares(w: Weight) -> tuple[int, int, int, int, int, int]:
    """`tile` for several rows of x, and by how many programs the columns are shared. Measured on an H200."""
    high, block = 64, _block(w)
    split = max(1, min(8, PROGRAMS // ceil_div(w.n, high), w.k // (block * 2)))
    return high, block, 2 if w.kind in (INT4, AFFINE4) else 1, 4, 4, 1 << (split.bit_length() - 1)


def grouped_tile(average: float, *weights: Weight) -> tuple[int, int, int, int, int]:
    """Rows of x, rows and channels of the weights of a tile of the grouped products, warps and stages, when an expert has
    `average` rows of x. Measured on an H200: where few rows wait for what is read, as much as can be is read at a time."""
    if average <= 32:
        long = all(w.k % 128 == 0 and (w.kind == NVFP4 or w.columns % 128 == 0) for w in weights)
        return 16 if average <= 16 else 32, 128, 128 if long else 64, 4, 3 if long else 4
    if weights[0].kind == FP8 and all(w.k % 128 == 0 and w.columns % 128 == 0 for w in weights):
        return 64, 128, 128, 4, 3
    return 64, 128, 64, 4, 4 if weights[0].kind in (FP8, INT8) else 3


def grouped_registers(average: float, *weights: Weight) -> dict[str, int]:
    """As launch arguments, the registers that a thread of the grouped products may have at most. With so many of 4 bits a fourth program
    runs beside three others, which wait for each other's tiles: products of prompts by 5 to 6 % faster, measured on an H200."""
    four = NVIDIA and average > 32 and all(w.kind in (MXFP4, INT4) for w in weights)
    return {"maxnreg": 128} if four else {}


def constants(w: Weight, together: int = 1) -> dict[str, Any]:
    """What `codes_times` is compiled with and launched by, for one row of x, or one for each of `together` experts (a power of two)."""
    rows, block, ahead, warps, stages = tile(w) if together == 1 else joined_tile(w)
    columns = max(together, COLUMNS)
    step = columns // together * block
    ahead = min(ahead, ceil_div(w.k, step))
    return {
        "COLUMNS": sharing(w), "R": max(rows, columns), "M": columns, "BLOCK": block, "AHEAD": ahead, "EVEN": even(w, step, ahead),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def sharing(w: Weight) -> int:
    """How many columns share a scale, 0: all. Kernels are compiled for it: a tile is multiplied in few instructions, of which
    dividing by it would be a tenth."""
    return w.columns if w.columns < w.k else 0


def even(w: Weight, step: int, ahead: int) -> bool:
    """Whether tiles that reach over `step` channels, the first `ahead` of which are always there, end where a row does."""
    return w.k % step == 0 and w.k >= step * ahead


def in_order(x: Tensor, w: Weight) -> Tensor:
    """x [.., K], of whole 64 channels, in the order of `channel`. (Of 2048 x 2048 by torch's permuting: some 25 us on an H200.)"""
    if INTERPRET or not x.is_cuda:
        p = 4 if w.kind in FOUR_BITS else 2
        parts = x.reshape(-1, w.k // 64, 4, 8 // p, 2, p)
        return parts.permute(0, 1, 5, 3, 2, 4).reshape(x.shape)
    x, block = x.contiguous(), 2048
    out = torch.empty_like(x)
    _in_order[(ceil_div(x.numel(), block),)](x, out, x.numel(), KIND=w.kind, BLOCK=block, num_warps=4)
    return out


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
    def int4(w, p: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
        """Words of eight codes -> codes p and p + 4, each less 8 (where offsets say of what: as they are), over 64."""
        ZERO: tl.constexpr = 0.125 if KIND == 4 else 0.0
        if p >= 2:
            w = w >> 8
        if p % 2 == 0:
            low, high = halves(w & 0x000F000F, DTYPE)
            return tl.join(low * 2.0**127 - ZERO, high * 2.0**127 - ZERO)
        else:
            low, high = halves(w & 0x00F000F0, DTYPE)
            return tl.join(low * 2.0**123 - ZERO, high * 2.0**123 - ZERO)

    @triton.jit
    def int8(w, p: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
        """Words of four codes -> codes p and p + 2 over 64. (INT8: they have a sign.)"""
        if p == 1:
            w = w >> 8
        if KIND == -1:
            w = w ^ 0x00800080  # 128 more
        ZERO: tl.constexpr = 2.0 if KIND == -1 else 0.0
        low, high = halves(w & 0x00FF00FF, DTYPE)
        return tl.join(low * 2.0**127 - ZERO, high * 2.0**127 - ZERO)

    @triton.jit
    def pair_times(pair, factor, DTYPE: tl.constexpr):
        """Words of two bf16 times others."""
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
    def fp4(w, factor, p: tl.constexpr, DTYPE: tl.constexpr):
        """Words of eight e2m1 codes -> the values of codes p and p + 4 times those of `factor`, over 2^126."""
        if p == 0:
            magnitude = w << 6
        elif p == 1:
            magnitude = w << 2
        else:
            magnitude = w >> (4 * p - 6)
        return pair_times((magnitude & 0x01C001C0) | ((w << (12 - 4 * p)) & 0x80008000), factor, DTYPE)

    @triton.jit
    def mxfp8(w, factor, p: tl.constexpr, DTYPE: tl.constexpr):
        """Words of four e4m3 codes -> the values of codes p and p + 2 times those of `factor`, over 2^120. No code is NaN."""
        if p == 0:
            w = w << 8
        return pair_times(((w >> 4) & 0x07F007F0) | (w & 0x80008000), factor, DTYPE)

    @triton.jit
    def fp8(w, p: tl.constexpr, DTYPE: tl.constexpr):
        """Words of four e4m3 codes -> the values of codes p and p + 2. No code is NaN."""
        if p == 0:
            w = w << 8
        low, high = halves(((w >> 4) & 0x07F007F0) | (w & 0x80008000), DTYPE)
        return tl.join(low * 2.0**120, high * 2.0**120)

    @triton.jit
    def factors(s, KIND: tl.constexpr):
        """Words of two bf16, both what values are to be multiplied by: of e8m0 exponents s 2^(s - 127 + 126 - 60), of e4m3 codes 120 for
        126; NVFP4: of scales s in e4m3 those times 2^(126 - 8)."""
        if KIND == 6:
            both = (e4m3(s) * 2.0**126).to(tl.uint32, bitcast=True) >> 16
            return both * 0x00010001
        elif KIND == -3:
            return tl.minimum(s.to(tl.uint32) + 60, 255) * 0x00800080
        else:
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
        """Words [R, W] of codes -> numbers [R, K] (with `exponents` [R, K / 32]: times those and 2^-60; NVFP4: times the scales [R, K / 16]
        and 2^-8; integers: over 64)."""
        P: tl.constexpr = 4 if KIND >= 3 else 2
        J: tl.constexpr = K // (8 * P * RUN)
        w = tl.reshape(w, (R, J, 4, RUN))
        if KIND == 3 or KIND == 6 or KIND == -3:
            UNIT: tl.constexpr = 16 if KIND == 6 else 32  # columns that share a scale, and words of these
            OF_ONE: tl.constexpr = UNIT // (8 if KIND >= 3 else 4)
            f = factors(exponents, KIND)
            f = tl.reshape(tl.broadcast_to(f[:, :, None], (R, K // UNIT, OF_ONE)), (R, J, 4, RUN))
        if KIND < 3:
            if KIND == -3:
                both = tl.join(mxfp8(w, f, 0, DTYPE), mxfp8(w, f, 1, DTYPE))
            elif KIND < 0:
                both = tl.join(int8(w, 0, KIND, DTYPE), int8(w, 1, KIND, DTYPE))
            else:
                both = tl.join(fp8(w, 0, DTYPE), fp8(w, 1, DTYPE))
            a = tl.permute(both, (0, 1, 5, 3, 2, 4))
        else:
            if KIND == 3 or KIND == 6:
                even = tl.join(fp4(w, f, 0, DTYPE), fp4(w, f, 2, DTYPE))
                odd = tl.join(fp4(w, f, 1, DTYPE), fp4(w, f, 3, DTYPE))
            else:
                even = tl.join(int4(w, 0, KIND, DTYPE), int4(w, 2, KIND, DTYPE))
                odd = tl.join(int4(w, 1, KIND, DTYPE), int4(w, 3, KIND, DTYPE))
            a = tl.permute(tl.join(even, odd), (0, 1, 5, 6, 3, 2, 4))
        return tl.reshape(a, (R, K))

    @triton.jit
    def channel(i, KIND: tl.constexpr):
        """Which channel of 64 is the i-th of those that `widened` gives for a tile of 64."""
        P: tl.constexpr = 4 if KIND >= 3 else 2
        RUN: tl.constexpr = 8 // P
        half, c, run, p = i % 2, i // 2 % 4, i // 8 % RUN, i // (8 * RUN)
        return i // 64 * 64 + ((c * RUN + run) * 2 + half) * P + p % P

    @Kernel
    def _in_order(x_ptr, out_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, tl.load(x_ptr + channel(i, KIND), mask=i < n), mask=i < n)

    @triton.jit
    def words_tile(at, word, words, start, CODES: tl.constexpr, EVEN: tl.constexpr):
        """Words [R, W] of a tile from channel start on."""
        if EVEN:
            return tl.load(at + start // CODES)
        else:
            return tl.load(at + start // CODES, mask=start // CODES + word < words, other=0)

    @triton.jit
    def scales_tile(s_at, first, K, COLUMNS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
        """Scales [R], exponents [R, BLOCK / 32] (NVFP4: scales [R, BLOCK / 16]), or scales with their offsets in the upper half [R], of
        BLOCK channels from `first` [R] on, where there are such."""
        if KIND == 1 or KIND == -1:
            return first
        elif KIND == 5 or KIND == -2:
            pair = s_at.to(tl.pointer_type(tl.uint64)) + (first // COLUMNS if COLUMNS > 0 else first * 0)
            return tl.load(pair, mask=first < K, other=0)
        elif KIND == 3 or KIND == 6 or KIND == -3:
            UNIT: tl.constexpr = 16 if KIND == 6 else 32
            group = (first // UNIT)[:, None] + tl.arange(0, BLOCK // UNIT)[None, :]
            at = s_at[:, None] + scale_column(group, UNIT, UNIT, KIND)
            return tl.load(at, mask=group * UNIT < K, other=0)
        else:
            group = first // COLUMNS if COLUMNS > 0 else first * 0
            return tl.load(s_at + group, mask=first < K, other=0.0)

    @triton.jit
    def x_tile(x_at, x_k, start, K, EVEN: tl.constexpr):
        if EVEN:
            return tl.load(x_at + start)
        else:
            return tl.load(x_at + start, mask=start + x_k < K, other=0.0)

    @triton.jit
    def affine(acc, y, pair, x_sum):
        """acc [R, M] plus sums y of codes over 64 times x, of which x_sum [M] is the sum, scales and offsets being `pair` [R]."""
        scale = (pair & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
        offset = (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True) / 64
        return acc + y * scale[:, None] + offset[:, None] * x_sum[None, :]

    @triton.jit
    def plus_tile(
        acc, w, s, x, KIND: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr
    ):  # fmt: skip
        """acc plus a tile of words w with scales s times x [M, BLOCK]."""
        dtype: tl.constexpr = x.dtype
        if KIND == 5 or KIND == -2:
            x_sum = tl.sum(x.to(tl.float32), 1)
        x = arranged(x, M, BLOCK, 4 if KIND >= 3 else 2, RUN)
        a = widened(w, s, R, BLOCK, RUN, KIND, dtype)
        if KIND == 1 or KIND == 3 or KIND == 6 or KIND == -1 or KIND == -3:
            acc = tl.dot(a, x, acc, input_precision="ieee")
            return settled(acc, dtype) if M > 8 else acc  # of eight columns nobody goes ahead
        elif KIND == 5 or KIND == -2:
            return affine(acc, tl.dot(a, x, input_precision="ieee"), s, x_sum)
        else:
            return acc + tl.dot(a, x, input_precision="ieee") * s.to(tl.float32)[:, None]

    @triton.jit
    def codes_times(
        x_ptr, x_row, x_chunk, w_ptr, n, chunk, s_ptr, s_row, K, s_columns,
        KIND: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, AHEAD: tl.constexpr,
        EVEN: tl.constexpr, OVERLAP: tl.constexpr, WAIT: tl.constexpr,
    ):  # fmt: skip
        """Rows n [R] of codes with K columns times the rows that begin at x_row [M] behind x_ptr: fp32 [R, M].

        `chunk` [R], `x_chunk` [M]: where, of every STEP channels, the BLOCK begin that a row is multiplied in; it counts
        where both are the same. `s_row` [R]: rows of scales. The first AHEAD tiles are all fetched at once, `WAIT`: before
        waiting for x, which is not there yet."""
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
        tiles, scales, xs = (), (), ()
        for i in tl.static_range(AHEAD):
            tiles += (words_tile(at, word, words, i * STEP, CODES, EVEN),)  # type: ignore[assignment]
            scales += (scales_tile(s_at, chunk + i * STEP, K, COLUMNS, KIND, BLOCK),)  # type: ignore[assignment]
        # A row's scale is too small to be copied asynchronously: it is on its way while the tile before is multiplied.
        s = scales_tile(s_at, chunk + AHEAD * STEP, K, COLUMNS, KIND, BLOCK)
        if WAIT:
            after_previous(OVERLAP)
        for i in tl.static_range(AHEAD):
            xs += (x_tile(x_at, x_k, i * STEP, K, EVEN),)  # type: ignore[assignment]
        for start in range(AHEAD * STEP, K, STEP):
            w = words_tile(at, word, words, start, CODES, EVEN)
            x = x_tile(x_at, x_k, start, K, EVEN)
            # Carried around the loop, what codes are multiplied by has the compiler move what is widened through shared memory.
            if KIND == 3 or KIND == 6 or KIND == -3:
                s = scales_tile(s_at, chunk + start, K, COLUMNS, KIND, BLOCK)
                acc = plus_tile(acc, w, s, x, KIND, R, M, BLOCK, RUN)
            else:
                s_next = scales_tile(s_at, chunk + start + STEP, K, COLUMNS, KIND, BLOCK)
                acc = plus_tile(acc, w, s, x, KIND, R, M, BLOCK, RUN)
                s = s_next
        for i in tl.static_range(AHEAD):
            acc = plus_tile(acc, tiles[i], scales[i], xs[i], KIND, R, M, BLOCK, RUN)
        return finished(acc, s_at, KIND)

    @triton.jit
    def finished(acc, s_at, KIND: tl.constexpr):
        """Sums of products with `widened` numbers, made whole: times a row's scale, where there is one, or a power of two."""
        if KIND == 1:
            return acc * tl.load(s_at).to(tl.float32)[:, None]
        elif KIND == -1:
            return acc * (tl.load(s_at).to(tl.float32) * 64.0)[:, None]
        elif KIND == 3 or KIND == -3:
            return acc * WHOLE
        elif KIND == 6:
            times, over = head(s_at, None)
            return acc * (times * 256.0 / over)[:, None]
        elif KIND >= 4 or KIND == -2:
            return acc * 64.0
        else:
            return acc

    @triton.jit
    def settled(acc, DTYPE: tl.constexpr):
        """acc, after a product that is still being made of it. Tensor cores read the registers of `widened` numbers while they
        work, and Triton (3.6) lets the next ones be written there meanwhile: it waits only where something reads acc. (On an
        H200 two groups of warps gave wrong sums and NaN; who waits has other programs beside him that multiply.)"""
        if DTYPE == tl.bfloat16:  # the interpreter knows no assembler; nothing is left of this move
            return tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=False, pack=1
            )
        else:
            return acc

    @triton.jit
    def own_columns(acc, R: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
        """acc [R, M], of which row r needs column r % M, each S rows summed: [R / S]."""
        own = (tl.arange(0, R) % M)[:, None] == tl.arange(0, M)[None, :]
        return tl.sum(tl.reshape(tl.sum(tl.where(own, acc, 0.0), 1), (R // S, S)), 1)
