"""Codes of mxfp4 and fp8 times one row of x, by tensor cores, from the registers that they are fetched to.

Tensor cores multiply 16 rows of a weight by 8 columns of x, 16 channels at a time; four threads, a quad, share a row and bring
four channels each. Which channels is their affair, as long as x comes in the same order: so a thread fetches 16 bytes of its
row at once, and the x that they multiply. Nothing goes through shared memory, no thread waits for another before the sum is
done, and what is on its way before x exists is all that registers hold.

Unusual: Triton does not know that an instruction is made by a warp as a whole. Tensors have an element for each thread, of which it
is taken that element i is thread i's (`tests/test_kernels.py` shows on a GPU that it is). All eight columns are the same x. No
number is converted (see `zoo.kernels.codes`, which takes all other codes and rows).

Margin on an H200, of a whole layer of a step at batch 1: gpt-oss-20b's in mxfp4 64.0 us, 68.6 by `zoo.kernels.codes`; an 8B model's in
fp8 79.9, 81.3 by `zoo.kernels.weights.rows_times` and `codes`. Of int4 and of smaller weights in fp8 nothing is gained. What is left
of such a layer, some 28 us over what its bytes take, is there in bf16 too: 3 us to each of four products, during which the
first bytes come and the last programs end, and 1 to 3 us to each kernel between them.

Tried and slower: asking L2 for a program's rows before x exists, line by line (by 1 to 8 us a layer), or in bulk by one thread (all, 32
or 16 KB of them by 8 to 17 us a layer of 8B in fp8, of the two small products alone by 2 to 3; of int4 by 0 to 6, of bf16 by 2 to 18);
norms taken along into the products after them (8B by 2 in fp8, by 9 in int4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.codes import even, sharing
from zoo.kernels.launch import NVIDIA, hopper, triton
from zoo.kernels.weights import FP8, FP8_ROWS, MXFP4, Weight

if triton is not None:
    import triton.language as tl

    from zoo.kernels.codes import factors
    from zoo.kernels.launch import after_previous
    from zoo.kernels.weights import WHOLE, scale_row

ROWS = 16
"""Rows of a weight that tensor cores multiply at once."""


def serves(x: Tensor, w: Weight) -> bool:
    """Whether this is the fastest way for one row of x: mxfp4 of experts, and large weights in fp8. Measured on an H200."""
    pays = w.kind == MXFP4 if w.lead else w.kind in (FP8, FP8_ROWS) and w.n > 4096 <= w.k
    return pays and w.words and x.dtype == torch.bfloat16 and NVIDIA and hopper(x)


def constants(w: Weight, experts: int = 1) -> dict[str, Any]:
    """What kernels are compiled with, in which several warps share a row's channels: of one of a token's experts, or of each of so
    many together. Measured on an H200."""
    piece = 32 if w.kind == MXFP4 else 16
    most = 8 // experts if experts > 1 else 4 if w.kind == MXFP4 else 8
    warps = next(n for n in (8, 4, 2, 1) if n == 1 or (n <= most and n * 8 * piece <= w.k))
    step = 4 * warps * piece
    return {
        "COLUMNS": sharing(w), "WARPS": warps, "EVEN": even(w, step, 2), "num_warps": warps * experts,
    }  # fmt: skip


if triton is not None:
    # $0 - $3: sums. $4, $5: a word of codes of a row, and of the one 8 further. Then pairs of channels of x, the sums before,
    # and of mxfp4 what the codes of either row are multiplied by.

    def _block(*lines: str) -> str:
        return "\n".join(
            (
                "{",
                ".reg .b32 p0, q0, p1, q1, p2, q2, p3, q3, s, t, u, v;",
                ".reg .f32 e0, e1, e2, e3;",
                *lines,
                "}",
            )
        )

    def _product(i: int, x: str, next_x: str, before: str, after: str) -> list[str]:
        """Pairs p and q, i and i + 1, of both rows, times the first channels of two pairs of x and the second ones."""
        return [
            f"prmt.b32 s, {x}, {next_x}, 0x5410;", f"prmt.b32 t, {x}, {next_x}, 0x7632;",
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            f"{{{after}}}, {{p{i}, q{i}, p{i + 1}, q{i + 1}}}, {{s, t}}, {{{before}}};",
        ]  # fmt: skip

    def _mxfp4(out: str, w: str, factor: str) -> list[str]:
        """Four pairs of e2m1 codes, half a word apart, times their factor (see `zoo.kernels.codes.mxfp4`)."""
        lines = []
        for p, move in enumerate(
            ("shl.b32 t, {}, 6;", "shl.b32 t, {}, 2;", "shr.u32 t, {}, 2;", "shr.u32 t, {}, 6;")
        ):
            lines += [
                move.format(w), "and.b32 t, t, 0x01C001C0;", f"shl.b32 u, {w}, {12 - 4 * p};", "and.b32 u, u, 0x80008000;",
                "or.b32 t, t, u;", f"mul.rn.bf16x2 {out}{p}, t, {factor};",
            ]  # fmt: skip
        return lines

    def _fp8(out: str, w: str) -> list[str]:
        """Two pairs of e4m3 codes, half a word apart (see `zoo.kernels.codes.fp8`)."""
        lines = [f"shl.b32 s, {w}, 8;", "mov.b32 v, 0x7B807B80;"]  # both 2^120
        for p, word in enumerate(("s", w)):
            lines += [
                f"shr.u32 t, {word}, 4;", "and.b32 t, t, 0x07F007F0;", f"and.b32 u, {word}, 0x80008000;",
                "or.b32 t, t, u;", f"mul.rn.bf16x2 {out}{p}, t, v;",
            ]  # fmt: skip
        return lines

    _SUMS, _BETWEEN = "$0, $1, $2, $3", "e0, e1, e2, e3"
    MXFP4_WORD = tl.constexpr(
        _block(
            *_mxfp4("p", "$4", "$14"), *_mxfp4("q", "$5", "$15"),
            *_product(0, "$6", "$8", "$10, $11, $12, $13", _BETWEEN), *_product(2, "$7", "$9", _BETWEEN, _SUMS),
        )
    )  # fmt: skip
    FP8_WORD = tl.constexpr(
        _block(*_fp8("p", "$4"), *_fp8("q", "$5"), *_product(0, "$6", "$7", "$8, $9, $10, $11", _SUMS))
    )

    @triton.jit
    def four_of(x):
        """[T, 4] -> four of [T]."""
        even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d

    @triton.jit
    def eight_more(a, b, c, d, w, v, x0, x1, x2, x3, f, g):
        """Sums plus words w and v of eight e2m1 codes, of two rows, times channels x0 .. of x, and factors f and g."""
        return tl.inline_asm_elementwise(
            MXFP4_WORD, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f,r,r", [w, v, x0, x1, x2, x3, a, b, c, d, f, g],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip

    @triton.jit
    def four_more(a, b, c, d, w, v, x0, x1):
        """Sums plus words w and v of four e4m3 codes, of two rows, times channels x0 and x1 of x."""
        return tl.inline_asm_elementwise(
            FP8_WORD, "=f,=f,=f,=f,r,r,r,r,f,f,f,f", [w, v, x0, x1, a, b, c, d],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip

    @triton.jit
    def words_at(at, there, EVEN: tl.constexpr):
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=there[:, None], other=0)

    @triton.jit
    def scale_at(s_ptr, piece, n, COLUMNS: tl.constexpr, KIND: tl.constexpr):
        """The scales, or exponents, of pieces [T] of rows whose scales begin at s_ptr [T]."""
        if KIND == 3:
            return tl.load(s_ptr + piece, mask=piece < n, other=0)
        elif COLUMNS == 0:
            return tl.load(s_ptr)
        else:
            return tl.load(s_ptr + piece * 16 // COLUMNS, mask=piece < n, other=0.0)

    @triton.jit
    def two_rows_times(
        x_ptr, x_from, w_ptr, row, next_row, s_ptr, s_row, next_s_row, first, K, s_columns,
        KIND: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr, WAIT: tl.constexpr,
    ):  # fmt: skip
        """For each thread [T] the sums of the channels that its quad has of rows `row` and `next_row` [T], the same for the eight
        quads of a warp but 8 rows further, times x from x_from [T] on. `first` [T]: where, in pieces of 16 bytes, each begins,
        to go on STEP further."""
        PIECE: tl.constexpr = 32 if KIND == 3 else 16
        n, words = K // PIECE, K // PIECE * 4
        i = tl.arange(0, 4)[None, :]
        base = w_ptr.to(tl.pointer_type(tl.uint32))
        at = base + (row.to(tl.int64) * words + first * 4)[:, None] + i
        next_at = base + (next_row.to(tl.int64) * words + first * 4)[:, None] + i
        x_at = x_ptr.to(tl.pointer_type(tl.uint32)) + (x_from // 2 + first * (PIECE // 2))[:, None] + i
        s_at, next_s_at = s_ptr + s_row.to(tl.int64) * s_columns, s_ptr + next_s_row.to(tl.int64) * s_columns
        w, v = words_at(at, first < n, EVEN), words_at(next_at, first < n, EVEN)
        s, t = scale_at(s_at, first, n, COLUMNS, KIND), scale_at(next_s_at, first, n, COLUMNS, KIND)
        ahead = first + STEP
        w1, v1 = words_at(at + STEP * 4, ahead < n, EVEN), words_at(next_at + STEP * 4, ahead < n, EVEN)
        s1, t1 = scale_at(s_at, ahead, n, COLUMNS, KIND), scale_at(next_s_at, ahead, n, COLUMNS, KIND)
        if WAIT:
            after_previous(OVERLAP)
        zero = tl.zeros([first.shape[0]], dtype=tl.float32)
        a, b, c, d = zero, zero, zero, zero
        y, z = zero, zero
        for start in range(0, n, STEP):
            here, ahead = first + start < n, first + start + 2 * STEP
            far = (start + 2 * STEP) * 4
            w2 = tl.load(at + far, mask=(ahead < n)[:, None], other=0)
            v2 = tl.load(next_at + far, mask=(ahead < n)[:, None], other=0)
            s2, t2 = s1, t1
            if KIND == 3 or COLUMNS > 0:
                s2, t2 = scale_at(s_at, ahead, n, COLUMNS, KIND), scale_at(next_s_at, ahead, n, COLUMNS, KIND)
            if KIND == 2:
                a, b, c, d = zero, zero, zero, zero
            wa, wb, wc, wd = four_of(w)
            va, vb, vc, vd = four_of(v)
            x_here = x_at + start * (PIECE // 2)
            x0, x1, x2, x3 = four_of(words_at(x_here, here, EVEN))
            if KIND == 3:
                f, g = factors(s, KIND), factors(t, KIND)
                a, b, c, d = eight_more(a, b, c, d, wa, va, x0, x1, x2, x3, f, g)
                x0, x1, x2, x3 = four_of(words_at(x_here + 4, here, EVEN))
                a, b, c, d = eight_more(a, b, c, d, wb, vb, x0, x1, x2, x3, f, g)
                x0, x1, x2, x3 = four_of(words_at(x_here + 8, here, EVEN))
                a, b, c, d = eight_more(a, b, c, d, wc, vc, x0, x1, x2, x3, f, g)
                x0, x1, x2, x3 = four_of(words_at(x_here + 12, here, EVEN))
                a, b, c, d = eight_more(a, b, c, d, wd, vd, x0, x1, x2, x3, f, g)
            else:
                a, b, c, d = four_more(a, b, c, d, wa, va, x0, x1)
                a, b, c, d = four_more(a, b, c, d, wb, vb, x2, x3)
                x0, x1, x2, x3 = four_of(words_at(x_here + 4, here, EVEN))
                a, b, c, d = four_more(a, b, c, d, wc, vc, x0, x1)
                a, b, c, d = four_more(a, b, c, d, wd, vd, x2, x3)
            if KIND == 2:
                y += a * s.to(tl.float32)
                z += c * t.to(tl.float32)
            w, v, s, t = w1, v1, s1, t1
            w1, v1, s1, t1 = w2, v2, s2, t2
        if KIND == 1:
            return a * s.to(tl.float32), c * t.to(tl.float32)
        elif KIND == 2:
            return y, z
        else:
            return a * WHOLE, c * WHOLE

    @triton.jit
    def row_of_thread(base, N, WARPS: tl.constexpr):
        """The row of each thread [T] of the 8 from base on, less than N (else 0: its sum is not stored), and where it is."""
        n = base + tl.arange(0, 32 * WARPS) % 32 // 4
        return tl.where(n < N, n, 0), n < N

    @triton.jit
    def one_row_times(
        x_ptr, w_ptr, s_ptr, rows_ptr, row, mask, next_row, next_mask, K, s_columns,
        KIND: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, WARPS: tl.constexpr, OVERLAP: tl.constexpr, WAIT: tl.constexpr,
    ):  # fmt: skip
        """Rows `row` and `next_row` [T] of a matrix times one x, the warps sharing its channels: two of [32], four of the same number
        for each quad."""
        e = tl.arange(0, 32 * WARPS)
        y, z = two_rows_times(
            x_ptr, e * 0, w_ptr, row, next_row, s_ptr, scale_row(rows_ptr, row, mask, KIND),
            scale_row(rows_ptr, next_row, next_mask, KIND), e // 32 * 4 + e % 4, K, s_columns,
            KIND, COLUMNS, 4 * WARPS, EVEN, OVERLAP, WAIT,
        )  # fmt: skip
        return tl.sum(tl.reshape(y, (WARPS, 32)), 0), tl.sum(tl.reshape(z, (WARPS, 32)), 0)
