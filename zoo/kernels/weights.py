"""A weight as kernels read it: plain, fp8, mxfp8, mxfp4, nvfp4 or integers of four and eight bits, one matrix or one per expert.

Unusual: quantised weights are expanded in registers, where they are used. One row (`rows_times`) multiplies
partial sums by the scales; tiles of a matrix product (`weight_tile`) are expanded and rounded to the dtype
of x first, as a weight expanded beforehand would be. bf16 times codes is `zoo.kernels.codes` or `stream`, mostly.

Margin: what a thread multiplies of x it fetches as the codes of fp8 lie. Fetched as x lies, x went through shared memory for each tile,
with four barriers: a layer of an 8B model takes 81 us in a step on an H200, 85 before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.affine import by_groups, each_row, paired
from zoo.kernels.launch import Kernel, ceil_div, hopper, triton
from zoo.quant.base import Scheme, check_shape
from zoo.quant.bitsandbytes import ONE_OF_127
from zoo.quant.fp8 import scale_grid
from zoo.quant.schemes import block_size
from zoo.quant.schemes import scheme as named

if triton is not None:
    import triton.language as tl

    from zoo.kernels.launch import ASM, after_previous

PLAIN, FP8_ROWS, FP8, MXFP4, INT4, AFFINE4, NVFP4 = range(7)  # FP8_ROWS: a row of the weight has one scale
INT8, AFFINE8, MXFP8 = -1, -2, -3  # INT8: bytes with a sign, a row of which has one scale
"""Kinds of codes. Those of four bits are 3 and more, which is what kernels ask; all others have a byte each."""
INTEGERS, FOUR_BITS = (INT4, AFFINE4, AFFINE8), (MXFP4, INT4, AFFINE4, NVFP4)
SCALED = (MXFP4, NVFP4, MXFP8)  # scales of few columns, by which codes are multiplied before they meet x
HEAD = 16
"""Bytes before the scales of a row in nvfp4: two numbers of fp32, by the first of which they are multiplied, and by the second divided."""
SCALE_ROWS = 128  # of a weight in fp8 that share a scale, as a rule: then no table is read to find it


@dataclass(frozen=True)
class Weight:
    """`codes` [E, N, K] (mxfp4: [E, N, K / 32, 16] bytes, others of four bits: [E, N, K / 2]) and for quantised ones `scale` [E, R, C] and
    `rows` [N] int32, the row of `scale` that a row of the weight uses (None: of fp8 row n // 128, of others n).
    AFFINE4, AFFINE8: each scale has its offset behind it (see `zoo.kernels.affine`). NVFP4: bytes, see `HEAD`.
    `bias` [E, N]. `order` [K] int64: the column of the weight that each column of codes is (None: the same). A lone matrix has E = 1."""

    codes: Tensor
    n: int
    k: int
    kind: int = PLAIN
    scale: Tensor | None = None
    rows: Tensor | None = None
    columns: int = 0  # how many columns share a scale
    bias: Tensor | None = None
    words: bool = False  # whether rows of codes are whole words of 32 bits, 16 bytes at a time, none of a NaN
    order: Tensor | None = None
    steady: bool = (
        True  # whether no scale of an expert's blocks is 2^64 times another (or is 0, negative or no number)
    )
    # What is made of it once: descriptions of its tiles for the copy engine, by their shape and by where the codes lie.
    tiles: dict[tuple[int, ...], Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    @property
    def n_scales(self) -> tuple[int, int]:
        return (0, 0) if self.scale is None else (self.scale.shape[-2], self.scale.shape[-1])

    @property
    def pointers(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Codes, scales, scale rows and bias: kernel arguments."""
        return self.codes, self.scale, self.rows, self.bias

    @property
    def group(self) -> int:
        """What the columns of a tile are a multiple of: each has one scale."""
        return 32 if self.kind in FOUR_BITS else 128

    @property
    def whole(self) -> bool:
        """Whether rows of codes are whole runs of 16 bytes, where one row of x is multiplied by such."""
        one_byte = self.kind != PLAIN and self.kind not in FOUR_BITS
        return not one_byte or (self.k % 16 == 0 and aligned(self.codes))

    @property
    def lead(self) -> torch.Size:
        """[E] or, of a lone matrix, []."""
        return self.codes.shape[: -3 if self.kind == MXFP4 else -2]


def plain(weight: Tensor, bias: Tensor | None = None) -> Weight:
    """A weight [N, K] or [E, N, K] that is what it is."""
    return Weight(weight, weight.shape[-2], weight.shape[-1], bias=bias)


def quantised(
    scheme: str, components: dict[str, Tensor], parts: tuple[int, ...], bias: Tensor | None = None
) -> Weight | None:
    """The weight of these components as the kernels read it; None where they cannot (see `zoo.quant`). GPTQ and packed integers of
    four bits lie as int4 does: with zero points of 8 they are int4. With others, or of eight bits, they have offsets, as AWQ and MLX's
    integers do. Where inputs are in groups of an order of their own, codes are laid out by groups once, beside the released ones."""
    s, order = named(scheme), None
    if "order" in components and s.bits in (4, 8):
        if (sorted_ := by_groups(s, components)) is None:
            return None
        components, order = sorted_
    if not all(c.is_contiguous() for c in components.values()):
        return None
    if s.module == "fp4" or scheme in ("mxfp4", "mlx-mxfp4", "mlx-nvfp4"):
        return _e2m1(s, components, parts, bias)
    if scheme in ("fp8-block-1x32", "mlx-mxfp8"):
        return _mxfp8(components, parts, bias)
    if scheme.startswith("int4") or symmetric(s, components):
        w = _int4(s, components, parts, bias)
    elif scheme in ("int8-channel", "int8-tensor", "bnb8"):
        w = _int8(s, components, parts, bias)
    elif s.module:
        w = _affine(s, components, parts, bias)
    else:
        w = _fp8(scheme, components, parts, bias)
    return w if w is None or order is None else replace(w, order=order)


def _e2m1(s: Scheme, c: dict[str, Tensor], parts: tuple[int, ...], bias: Tensor | None) -> Weight | None:
    codes, scale, n = c["weight"].view(torch.uint8), c["scale"].view(torch.uint8), sum(parts)
    if s.group != 16:
        if s.name != "mxfp4":  # the same bytes, not told apart by groups
            codes = codes.unflatten(-1, (-1, 16))
        return Weight(codes, n, codes.shape[-2] * 32, MXFP4, scale, None, 32, bias, aligned(codes))
    k = codes.shape[-1] * 2
    if k % 32 or scale.shape != (*codes.shape[:-1], k // 16) or has_nan(scale):
        return None
    # e4m3 in Triton is of compute capability 8.9, and pairs of bf16 are multiplied from 9.0 on.
    if codes.is_cuda and not hopper(codes):
        return None
    of_all = c.get("global_scale")
    factor = torch.ones(*codes.shape[:-1], 2, device=codes.device)
    if of_all is not None:
        factor[..., 0 if s.name == "nvfp4" else 1] = each_row(of_all.float(), c["weight"], parts)
    head = torch.nn.functional.pad(factor.view(torch.uint8), (0, HEAD - 8))
    scale = torch.cat((head, scale, scale.new_zeros(*scale.shape[:-1], -scale.shape[-1] % 16)), -1)
    return Weight(codes, n, k, NVFP4, scale, None, 16, bias, aligned(codes))


def _mxfp8(c: dict[str, Tensor], parts: tuple[int, ...], bias: Tensor | None) -> Weight | None:
    codes, scale = c["weight"].view(torch.float8_e4m3fn), c["scale"]
    k = codes.shape[-1]
    if codes.is_cuda and not hopper(codes):  # e4m3 in Triton is of compute capability 8.9
        return None
    if (
        scale.dtype not in (torch.uint8, torch.float8_e8m0fnu)
        or k % 32
        or scale.shape != (*codes.shape[:-1], k // 32)
    ):
        return None
    words = aligned(codes) and not has_nan(codes)
    return Weight(codes, sum(parts), k, MXFP8, scale.view(torch.uint8), None, 32, bias, words)


def _int4(s: Scheme, c: dict[str, Tensor], parts: tuple[int, ...], bias: Tensor | None) -> Weight | None:
    codes, k = c["weight"], c["weight"].shape[-1] * 8
    columns = s.group or k
    if k % 32 or columns % 32:
        return None
    if (shape := c.get("shape")) is not None:
        check_shape(shape, parts, k)
    return Weight(
        codes.view(torch.uint8), sum(parts), k, INT4, c["scale"], None, columns, bias, aligned(codes)
    )


def _int8(s: Scheme, c: dict[str, Tensor], parts: tuple[int, ...], bias: Tensor | None) -> Weight | None:
    codes, scale = c["weight"], c["scale"]
    n, k = codes.shape[-2:]
    if s.name == "int8-tensor":
        scale = each_row(scale, codes, parts)[..., None]
    elif s.module == "bitsandbytes":
        if (form := c.get("form")) is not None and bool((form != 0).any()):
            return None
        scale = scale.float() * ONE_OF_127
    if scale.shape != (*codes.shape[:-1], 1) or n != sum(parts):
        return None
    words = k % 32 == 0 and aligned(codes)
    return Weight(codes, n, k, INT8, scale.float(), None, k, bias, words)


def _fp8(scheme: str, c: dict[str, Tensor], parts: tuple[int, ...], bias: Tensor | None) -> Weight | None:
    codes, scale, n = c["weight"], c["scale"], sum(parts)
    rows, columns = block_size(scheme)
    k = codes.shape[-1]
    if columns % 128 and columns < k:
        return None
    if scheme == "fp8-tensor" or scale.dtype not in (torch.float32, torch.bfloat16):
        scale = scale_grid(scale, tuple(codes.shape[:-2]), parts, k, (rows, columns)).contiguous()
    kind, columns, scale = FP8 if 0 < columns < k else FP8_ROWS, columns or k, scale.float()
    words = k % 32 == 0 and aligned(codes) and not has_nan(codes)
    if rows == SCALE_ROWS and not any(part % rows for part in parts[:-1]):
        steady = kind == FP8_ROWS or codes.dim() < 3 or _steady(scale)
        return Weight(codes, n, k, kind, scale, None, columns, bias, words, steady=steady)
    index, first = [], 0
    for part in parts:
        index.append(first + torch.arange(part) // (rows or part))
        first += ceil_div(part, rows or part)
    table = torch.cat(index).to(torch.int32).to(codes.device)
    return Weight(codes, n, k, kind, scale, table, columns, bias, words)


def symmetric(s: Scheme, components: dict[str, Tensor]) -> bool:
    """Whether codes of such a scheme are four bits each, less 8, in words along the inputs. (Groups are in order.)"""
    if s.bits != 4 or s.module not in ("gptq", "integers"):
        return False
    zero = components.get("zero")
    less_one = s.module == "gptq" and not s.name.startswith("gptq4-v2")  # GPTQ's first format has them so
    return zero is None or not bool((zero != (0x77777777 if less_one else 0x88888888 - (1 << 32))).any())


def _affine(
    s: Scheme, components: dict[str, Tensor], parts: tuple[int, ...], bias: Tensor | None
) -> Weight | None:
    if (made := paired(s, components, parts)) is None:
        return None
    codes, scale = made
    n, k = codes.shape[-2], codes.shape[-1] * (8 // s.bits)
    columns = s.group or k
    if k % 32 or columns % 32:
        return None
    kind = AFFINE4 if s.bits == 4 else AFFINE8
    return Weight(codes, n, k, kind, scale, None, columns, bias, aligned(codes))


def aligned(codes: Tensor) -> bool:
    return codes.data_ptr() % 16 == 0


def has_nan(codes: Tensor) -> bool:
    """Whether e4m3 codes have one that is no number: only damaged weights do."""
    flat = codes.view(torch.uint8).flatten()
    pieces = flat.split(1 << 26) if len(flat) else ()
    return any(bool((piece & 127 == 127).any()) for piece in pieces)


def _steady(scale: Tensor) -> bool:
    low, high = scale.aminmax()
    return 0 < float(low) and float(high) < float(low) * 2.0**64


def expanded(w: Weight, dtype: torch.dtype) -> Tensor:
    """The weights in `dtype`, [E, N, K] or, of a lone matrix, [N, K]. On a GPU; see `zoo.quant` for elsewhere."""
    return _logical(laid_out(w, dtype), w)


def laid_out(w: Weight, dtype: torch.dtype) -> Tensor:
    """`expanded`, the columns as codes have them (see `ordered`). It moves 3.9 TB/s on an H200, of 4.2 that a copy does.

    Tried and slower, for products of 2048 rows of x: some 33 MB at a time, which L2 would hold until they are multiplied (by 0 to 8 %)."""
    out = torch.empty(*w.lead, w.n, w.k, dtype=dtype, device=w.codes.device)
    block_n, block_k = 32, 128
    grid = (ceil_div(w.k, block_k), ceil_div(w.n, block_n), out.numel() // (w.n * w.k))
    _expanded[grid](
        *w.pointers[:3],
        out,
        w.n,
        w.k,
        *w.n_scales,
        w.columns,
        KIND=w.kind,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return out


def ordered(x: Tensor, w: Weight) -> Tensor:
    """x [.., K] in the order of the columns of codes. On a GPU. (One row of 4096 by torch takes 4 us more, 2048 of 14336 60 less.)"""
    if w.order is None:
        return x
    if x.numel() > 64 * w.k:
        return x.index_select(-1, w.order)
    x, block = x.contiguous(), 1024
    out = torch.empty_like(x)
    _ordered[(x.numel() // w.k, ceil_div(w.k, block))](x, w.order, out, w.k, BLOCK=block, num_warps=4)
    return out


def _logical(y: Tensor, w: Weight) -> Tensor:
    """y [.., K], of columns as codes have them, in the order of the weight's."""
    return y if w.order is None else torch.empty_like(y).index_copy_(-1, w.order, y)


def looked_up(w: Weight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of a lone matrix that `ids` [...] (int64, 0 to N - 1) say, in `dtype`: [..., K]. On a GPU; see `zoo.quant.looked_up`."""
    out = torch.empty(*ids.shape, w.k, dtype=dtype, device=w.codes.device)
    block_n, block_k = 16, 128
    _looked_up[(ceil_div(w.k, block_k), ceil_div(ids.numel(), block_n))](
        *w.pointers[:3], ids.contiguous(), out, ids.numel(), w.n, w.k, w.n_scales[1], w.columns,
        KIND=w.kind, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return _logical(out, w)


if triton is not None:

    @triton.jit
    def fp4(code):
        """An e2m1 code in the low four bits -> fp32, times 2^-14 (its bits are a half's, see `fp4_scale`)."""
        bits = ((code & 7).to(tl.uint16) << 9) | ((code & 8).to(tl.uint16) << 12)
        return bits.to(tl.float16, bitcast=True).to(tl.float32)

    @triton.jit
    def fp4_scale(s):
        """2^(s - 127) * 2^14 of an e8m0 exponent s."""
        return (s.to(tl.int32) << 23).to(tl.float32, bitcast=True) * 16384.0

    WHOLE = tl.constexpr(2.0**60)  # times what is `tiny`

    @triton.jit
    def tiny_bits(w, s):
        """Bytes of two e2m1 codes and their e8m0 exponents -> the bits of two bf16, 2^-126 of the values of the low and of the
        high code, which are theirs where the exponent ends and the fraction begins; and of what makes up for that but
        2^60, and for the scale."""
        code = w.to(tl.uint16)
        low, high = ((code & 7) << 6) | ((code & 8) << 12), ((code & 0x70) << 2) | ((code & 0x80) << 8)
        return low, high, (tl.minimum(s.to(tl.int32) + 66, 255) << 7).to(tl.uint16)  # 2^(s - 127 + 126 - 60)

    @triton.jit
    def tiny_fp4(w, s):
        """Bytes of two e2m1 codes and their e8m0 exponents -> 2^-60 of the values of the low and of the high one, as bf16, by
        one product of bf16. (By way of fp32 the products of 32 experts of 2880, top 4, took 1.95 ms, so they take 1.63.)
        Exact for scales from 2^-72 to 2^61, beyond which they are infinite."""
        low, high, factor = tiny_bits(w, s)
        factor = factor.to(tl.bfloat16, bitcast=True)
        return low.to(tl.bfloat16, bitcast=True) * factor, high.to(tl.bfloat16, bitcast=True) * factor

    @triton.jit
    def two_values(w, c: tl.constexpr, KIND: tl.constexpr):
        """Words of eight codes -> the values of codes c and c + 4, each half a word, in fp32 (of e2m1: times 2^-14)."""
        if KIND == 3 or KIND == 6:
            if c < 3:
                pair = (w << (9 - 4 * c)) & 0x0E000E00
            else:
                pair = (w >> 3) & 0x0E000E00
            pair = pair | ((w << (12 - 4 * c)) & 0x80008000)
        else:
            pair = ((w >> (4 * c)) & 0x000F000F) | 0x64006400  # as a half 1024 + code
        low = pair.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        if KIND == 4:
            low, high = low - 1032.0, high - 1032.0
        elif KIND == 5:
            low, high = low - 1024.0, high - 1024.0
        return low, high

    @triton.jit
    def e4m3(s):
        """The values of bytes of e4m3, none of which is NaN, times 2^-8, which is what they are as bits of a half."""
        s = s.to(tl.uint16)
        return (((s & 0x7F) << 7) | ((s & 0x80) << 8)).to(tl.float16, bitcast=True).to(tl.float32)

    @triton.jit
    def scale_of(s, KIND: tl.constexpr):
        """What values of codes (of e2m1 as of `two_values` and `fp4`) are to be multiplied by, of a stored scale."""
        if KIND == 3:
            return fp4_scale(s)
        elif KIND == 6:
            return e4m3(s) * 4194304.0  # 2^8 and 2^14
        elif KIND == -3:
            return (s.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        else:
            return s.to(tl.float32)

    @triton.jit
    def head(s_at, mask):
        """What the scales of rows in nvfp4, which begin at s_at, are to be multiplied and divided by (see `HEAD`)."""
        at = s_at.to(tl.pointer_type(tl.float32))
        if mask is None:
            return tl.load(at), tl.load(at + 1)
        else:
            return tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=1.0)

    @triton.jit
    def scale_column(group, unit, columns, KIND: tl.constexpr):
        """Where the scale of a group of `unit` columns is in its row. (Of pairs the offset is behind it.)"""
        if KIND == 3:
            return group
        elif KIND == 6:
            return 16 + group * unit // 16  # HEAD
        elif KIND == 1 or KIND == -1:
            return group * 0
        elif KIND == 5 or KIND == -2:
            return group * unit // columns * 2
        else:
            return group * unit // columns

    @triton.jit
    def scale_row(rows_ptr, n, n_mask, KIND: tl.constexpr):
        """The row of scales that rows n of a matrix use."""
        if KIND <= 0 or KIND >= 3:
            return n
        elif rows_ptr is None:
            return n // 128  # SCALE_ROWS
        else:
            return tl.load(rows_ptr + n, mask=n_mask, other=0).to(n.dtype)

    @triton.jit
    def of_fp8(w):
        """Words of four e4m3 codes -> the values of the first, second, third and fourth, in fp32."""
        if ASM:  # codes that are converted one by one are taken out of their word and put into another first
            return tl.inline_asm_elementwise(
                """{
                .reg .b16 a, b, c, d, e, f;
                .reg .b32 low, high;
                mov.b32 {a, b}, $4;
                cvt.rn.f16x2.e4m3x2 low, a;
                cvt.rn.f16x2.e4m3x2 high, b;
                mov.b32 {c, d}, low;
                mov.b32 {e, f}, high;
                cvt.f32.f16 $0, c;
                cvt.f32.f16 $1, d;
                cvt.f32.f16 $2, e;
                cvt.f32.f16 $3, f;
                }""",
                "=f,=f,=f,=f,r",
                [w],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
        else:
            return one_fp8(w), one_fp8(w >> 8), one_fp8(w >> 16), one_fp8(w >> 24)

    @triton.jit
    def one_fp8(w):
        """Words whose last byte is an e4m3 code -> its value in fp32."""
        return w.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)

    @triton.jit
    def of_bytes(w, KIND: tl.constexpr):
        """Words of four codes of eight bits -> the values of the first, second, third and fourth, in fp32."""
        if KIND == -1:
            w = w.to(tl.int32, bitcast=True)
            return (
                (w << 24 >> 24).to(tl.float32),
                (w << 16 >> 24).to(tl.float32),
                (w << 8 >> 24).to(tl.float32),
                (w >> 24).to(tl.float32),
            )
        elif KIND == -2:
            return (
                (w & 255).to(tl.float32),
                ((w >> 8) & 255).to(tl.float32),
                ((w >> 16) & 255).to(tl.float32),
                (w >> 24).to(tl.float32),
            )
        else:
            return of_fp8(w)

    @triton.jit
    def fourths(low, high):
        """The first and the last 8 of 16 channels, [R, J, 8] each -> of every four of the 16 the first, second, ..: [R, J, 4] each."""
        R: tl.constexpr = low.shape[0]
        J: tl.constexpr = low.shape[1]
        x = tl.permute(tl.join(low, high), (0, 1, 3, 2))  # [R, J, 2, 8]
        even, odd = tl.split(tl.reshape(x, (R, J, 4, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d

    @triton.jit
    def rows_times(
        x_ptr, x_row, w_ptr, s_ptr, s_row, n, n_mask, K, s_columns, columns,
        KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OWN_X: tl.constexpr,
        OVERLAP: tl.constexpr, WAIT: tl.constexpr,
    ):  # fmt: skip
        """W[n, :] . x for the rows n [ROWS] of a row-major W with K columns and rows s_row [ROWS] of its scales: fp32
        [ROWS]. `OWN_X`: each row has an x of its own, x_row [ROWS] behind x_ptr.
        `WAIT`: x is not there yet; the first tile of W is fetched before waiting for it."""
        n = n.to(tl.int64)
        s_row = s_row.to(tl.int64)
        if KIND == 0:
            k = tl.arange(0, BLOCK)
            at = w_ptr + n[:, None] * K + k[None, :]
            w = tl.load(at, mask=n_mask[:, None] & (k < K)[None, :], other=0.0)
            if WAIT:
                after_previous(OVERLAP)
            if OWN_X:
                x_ptr += x_row[:, None]
            total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
            for start in range(0, K, BLOCK):
                x = tl.load(x_ptr + (start + k)[None, :], mask=(start + k < K)[None, :], other=0.0)
                ahead = start + BLOCK
                w_next = tl.load(at + ahead, mask=n_mask[:, None] & (ahead + k < K)[None, :], other=0.0)
                total += w.to(tl.float32) * x.to(tl.float32)
                w = w_next
            return tl.sum(total, 1)
        elif KIND <= 2:
            # A thread fetches four words of four codes at once, and what they multiply of x in two halves: then nothing moves
            # between threads.
            J: tl.constexpr = BLOCK // 16
            j, i = tl.arange(0, J), tl.arange(0, 4)
            word, groups = j[:, None] * 4 + i[None, :], K // 16  # and plainly a multiple of 16 bytes
            at = w_ptr.to(tl.pointer_type(tl.uint32)) + n[:, None, None] * (groups * 4) + word[None, :, :]
            s_ptr += s_row[:, None] * s_columns
            w = tl.load(at, mask=n_mask[:, None, None] & (j < groups)[None, :, None], other=0)
            SHARED: tl.constexpr = KIND == 1 or KIND == -1  # a row has one scale
            if SHARED:
                s = tl.load(s_ptr, mask=n_mask[:, None], other=0.0)
            else:
                s_at, there = (
                    s_ptr + scale_column(j, 16, columns, KIND)[None, :],
                    n_mask[:, None] & (j < groups)[None, :],
                )
                s = tl.load(s_at, mask=there, other=0)
            o = s
            if KIND == -2:
                o = tl.load(s_at + 1, mask=there, other=0)
            if WAIT:
                after_previous(OVERLAP)
            x_at = x_ptr + (j[:, None] * 16 + tl.arange(0, 8)[None, :])[None, :, :]
            if OWN_X:
                x_at += x_row[:, None, None]
            total = tl.zeros([ROWS, J, 4], dtype=tl.float32)
            for start in range(0, groups, J):
                inside = (start + j < groups)[None, :, None]
                low = tl.load(x_at + start * 16, mask=inside, other=0.0)
                high = tl.load(x_at + start * 16 + 8, mask=inside, other=0.0)
                ahead = start + J
                there = n_mask[:, None] & (ahead + j < groups)[None, :]
                w_next = tl.load(at + ahead * 4, mask=there[:, :, None], other=0)
                s_next, o_next = s, o
                if not SHARED:
                    s_at = s_ptr + scale_column(ahead + j, 16, columns, KIND)[None, :]
                    s_next = tl.load(s_at, mask=there, other=0)
                if KIND == -2:
                    o_next = tl.load(s_at + 1, mask=there, other=0)
                a, b, c, d = of_bytes(w, KIND)
                xa, xb, xc, xd = fourths(low.to(tl.float32), high.to(tl.float32))
                if not SHARED:
                    total += (a * xa + b * xb + c * xc + d * xd) * scale_of(s, KIND)[:, :, None]
                    if KIND == -2:
                        total += (xa + xb + xc + xd) * o[:, :, None]
                else:
                    total += a * xa
                    total += b * xb
                    total += c * xc
                    total += d * xd
                w, s, o = w_next, s_next, o_next
            y = tl.sum(tl.sum(total, 2), 1)
            if SHARED:
                y *= tl.sum(s.to(tl.float32), 1)  # of one column
            return y
        else:
            # Words of eight codes; two of them at a time, four apart, become a pair of halves.
            G: tl.constexpr = BLOCK // 32
            g, i = tl.arange(0, G), tl.arange(0, 4)
            word = g[:, None] * 4 + i[None, :]
            groups = K // 32
            words = groups * 4  # and plainly a multiple of 16 bytes
            at = w_ptr.to(tl.pointer_type(tl.uint32)) + n[:, None, None] * words + word[None, :, :]
            w = tl.load(at, mask=n_mask[:, None, None] & (word < words)[None, :, :], other=0)
            s_ptr += s_row[:, None] * s_columns
            there = n_mask[:, None] & (g < groups)[None, :]
            s = scales_of_32(s_ptr, g, there, columns, KIND)
            o = s
            if KIND == 5:
                o = tl.load(s_ptr + scale_column(g, 32, columns, KIND)[None, :] + 1, mask=there, other=0)
            if WAIT:
                after_previous(OVERLAP)
            if OWN_X:
                x_ptr += x_row[:, None, None]
            total = tl.zeros([ROWS, G], dtype=tl.float32)
            for start in range(0, words, BLOCK // 8):
                ahead = start + BLOCK // 8
                w_next = tl.load(
                    at + ahead, mask=n_mask[:, None, None] & (ahead + word < words)[None, :, :], other=0
                )
                g_next = ahead // 4 + g
                there = n_mask[:, None] & (g_next < groups)[None, :]
                s_next = scales_of_32(s_ptr, g_next, there, columns, KIND)
                o_next = o
                if KIND == 5:
                    o_next = tl.load(
                        s_ptr + scale_column(g_next, 32, columns, KIND)[None, :] + 1, mask=there, other=0
                    )
                part, x_sum = (
                    tl.zeros([ROWS, G, 4], dtype=tl.float32),
                    tl.zeros([ROWS, G, 4], dtype=tl.float32),
                )
                for c in tl.static_range(4):
                    low, high = two_values(w, c, KIND)
                    x_at = x_ptr + (8 * (start + word) + c)[None, :, :]
                    inside = (start + word < words)[None, :, :]
                    x_low = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
                    x_high = tl.load(x_at + 4, mask=inside, other=0.0).to(tl.float32)
                    part += low * x_low
                    part += high * x_high
                    if KIND == 5:
                        x_sum += x_low + x_high
                if KIND == 6:
                    total += tl.sum(part * scale_of(s, KIND), 2)
                else:
                    total += tl.sum(part, 2) * scale_of(s, KIND)
                if KIND == 5:
                    total += tl.sum(x_sum, 2) * o
                w, s, o = w_next, s_next, o_next
            y = tl.sum(total, 1)
            if KIND == 6:
                times, over = head(s_ptr, n_mask[:, None])
                y *= tl.sum(times / over, 1)  # of one column
            return y

    @triton.jit
    def scales_of_32(s_ptr, g, there, columns, KIND: tl.constexpr):
        """The scales of groups g [G] of 32 columns of four-bit codes, of rows whose own begin at s_ptr [ROWS, 1]: [ROWS, G], or, where
        there are two to a group, those of its four words, [ROWS, G, 4]."""
        if KIND == 6:
            of_word = 16 + g[:, None] * 2 + tl.arange(0, 4)[None, :] // 2  # HEAD
            return tl.load(s_ptr[:, :, None] + of_word[None, :, :], mask=there[:, :, None], other=0)
        else:
            return tl.load(s_ptr + scale_column(g, 32, columns, KIND)[None, :], mask=there, other=0)

    @triton.jit
    def weight_tile(
        w_ptr, s_ptr, rows_ptr, n, n_mask, start, K, s_columns, columns,
        KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, TINY: tl.constexpr = False,
    ):  # fmt: skip
        """W[n, start : start + BLOCK_K] in `DTYPE`, [BLOCK_N, BLOCK_K]; times 2^-60 (`TINY`, of mxfp4 in bf16)."""
        n = n.to(tl.int64)
        if KIND >= 3:
            g, i = tl.arange(0, BLOCK_K // 32), tl.arange(0, 16)
            byte = start // 2 + g[:, None] * 16 + i[None, :]
            at = w_ptr + n[:, None, None] * (K // 2) + byte[None, :, :]
            w = tl.load(at, mask=n_mask[:, None, None] & (byte < K // 2)[None, :, :], other=0)
            UNIT: tl.constexpr = 16 if KIND == 6 else 32
            group = start // UNIT + tl.arange(0, BLOCK_K // UNIT)
            s_at = s_ptr + n[:, None] * s_columns + scale_column(group, UNIT, columns, KIND)[None, :]
            s = tl.load(s_at, mask=n_mask[:, None] & (group < K // UNIT)[None, :], other=0)[:, :, None]
            if TINY:
                low, high = tiny_fp4(w, s)
            elif KIND == 4:
                s = s.to(tl.float32)
                low = (((w & 15).to(tl.float32) - 8.0) * s).to(DTYPE)
                high = (((w >> 4).to(tl.float32) - 8.0) * s).to(DTYPE)
            elif KIND == 5:
                o = tl.load(s_at + 1, mask=n_mask[:, None] & (group < K // 32)[None, :], other=0)[:, :, None]
                low, high = (
                    ((w & 15).to(tl.float32) * s + o).to(DTYPE),
                    ((w >> 4).to(tl.float32) * s + o).to(DTYPE),
                )
            else:
                factor = scale_of(s, KIND)
                if KIND == 6:
                    times, over = head(s_ptr + n[:, None, None] * s_columns, n_mask[:, None, None])
                    factor = tl.div_rn(factor * times, over)  # one of them is 1
                    factor = tl.reshape(
                        tl.broadcast_to(factor, (BLOCK_N, BLOCK_K // 16, 8)), (BLOCK_N, BLOCK_K // 32, 16)
                    )
                low, high = fp4(w) * factor, fp4(w >> 4) * factor
                if KIND == 3:
                    low, high = low.to(DTYPE), high.to(DTYPE)
            pair = tl.join(low, high)
            # (Of nvfp4 rounded last: Triton 3.6 has no way from what is reshaped to its tensor cores' shared memory.)
            return tl.reshape(pair, (BLOCK_N, BLOCK_K)).to(DTYPE)
        elif KIND < 0:
            g = tl.arange(0, BLOCK_K // 32)
            k, group = start + g[:, None] * 32 + tl.arange(0, 32)[None, :], start // 32 + g
            at, there = (
                w_ptr + n[:, None, None] * K + k[None, :, :],
                n_mask[:, None, None] & (k < K)[None, :, :],
            )
            if KIND == -3:
                w = tl.load(at, mask=there, other=0.0).to(tl.float32)
            else:
                w = tl.load(at, mask=there, other=0).to(tl.float32)
            s_at = s_ptr + n[:, None] * s_columns + scale_column(group, 32, columns, KIND)[None, :]
            there = n_mask[:, None] & (group * 32 < K)[None, :]
            w *= scale_of(tl.load(s_at, mask=there, other=0), KIND)[:, :, None]
            if KIND == -2:
                w += tl.load(s_at + 1, mask=there, other=0)[:, :, None]
            return tl.reshape(w.to(DTYPE), (BLOCK_N, BLOCK_K))
        else:
            k = start + tl.arange(0, BLOCK_K)
            at = w_ptr + n[:, None] * K + k[None, :]
            w = tl.load(at, mask=n_mask[:, None] & (k < K)[None, :], other=0.0)
            if KIND != 0:
                row = scale_row(rows_ptr, n, n_mask, KIND)
                s = tl.load(s_ptr + row * s_columns + start // columns, mask=n_mask, other=0.0).to(tl.float32)
                w = (w.to(tl.float32) * s[:, None]).to(DTYPE)
            return w

    @Kernel
    def _ordered(x_ptr, order_ptr, out_ptr, K, BLOCK: tl.constexpr):
        row, k = tl.program_id(0).to(tl.int64) * K, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = tl.load(order_ptr + k, mask=k < K, other=0)
        tl.store(out_ptr + row + k, tl.load(x_ptr + row + at, mask=k < K), mask=k < K)

    @Kernel
    def _expanded(
        w_ptr, s_ptr, rows_ptr, out_ptr, N, K, s_rows, s_columns, columns,
        KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        e = tl.program_id(2).to(tl.int64)
        start = tl.program_id(0) * BLOCK_K
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        bytes_: tl.constexpr = 2 if KIND >= 3 else 1
        w_ptr += e * N * (K // bytes_)
        if KIND != 0:
            s_ptr += e * s_rows * s_columns
        dtype = out_ptr.dtype.element_ty
        w = weight_tile(
            w_ptr, s_ptr, rows_ptr, n, n < N, start, K, s_columns, columns, KIND, BLOCK_N, BLOCK_K, dtype
        )
        k = start + tl.arange(0, BLOCK_K)
        at = out_ptr + (e * N + n.to(tl.int64))[:, None] * K + k[None, :]
        tl.store(at, w, mask=(n < N)[:, None] & (k < K)[None, :])

    @Kernel
    def _looked_up(
        w_ptr, s_ptr, rows_ptr, ids_ptr, out_ptr, T, N, K, s_columns, columns,
        KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        start = tl.program_id(0) * BLOCK_K
        t = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        n = tl.load(ids_ptr + t, mask=t < T, other=0)
        there = (t < T) & (n >= 0) & (n < N)
        w = weight_tile(
            w_ptr, s_ptr, rows_ptr, n, there, start, K, s_columns, columns, KIND, BLOCK_N, BLOCK_K, out_ptr.dtype.element_ty
        )  # fmt: skip
        k = start + tl.arange(0, BLOCK_K)
        at = out_ptr + t.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(at, w, mask=(t < T)[:, None] & (k < K)[None, :])
