"""Each Triton kernel computes what its plain twin computes, also where shapes are no multiples of its tiles.

The kernels run in Triton's interpreter, on the CPU and in fp32 (it truncates where bf16 rounds); and, where there
is a GPU, compiled for it. Whole models on a GPU are held to transformers by benchmarks/gpu_parity.py, in fp32
and bf16; benchmarks/gpu_shapes.py looks for shapes that nobody thought of.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = not INTERPRETED and torch.cuda.is_available()

if not INTERPRETED:  # the switch must be set before Triton is imported

    @pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
    @pytest.mark.parametrize("which", ["not proof", pytest.param("proof", marks=pytest.mark.proof)])
    @pytest.mark.parametrize("part", ["experts", "not experts"])  # about as long as each other
    def test_kernels_agree_with_their_plain_twins(part: str, which: str) -> None:
        pytest.importorskip("triton")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", which, "-k", part, __file__],
            env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        )  # fmt: skip
        if "only 0-dimensional arrays can be converted" in run.stdout:
            pytest.skip("the interpreter of this Triton (3.6) does not know this numpy (2.5)")
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
        assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-300:]


if INTERPRETED or COMPILED:
    import triton
    import triton.language as tl
    from test_cpu_codes import components

    from zoo.kernels import (
        attention,
        best,
        codes,
        conv,
        delta,
        experts,
        gated,
        latent,
        launch,
        linear,
        near,
        norm,
        rope,
        route,
        weights,
    )
    from zoo.quant import dequantise
    from zoo.quant.schemes import block_size
    from zoo.quant.schemes import scheme as named
    from zoo.spec import MLP, Norm, Router

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    def close(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
        assert a.shape == b.shape
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= 2e-5 * scale * max(1.0, float(b.abs().max()))

    @pytest.fixture(autouse=True)
    def seeded_on_the_device() -> Iterator[None]:
        torch.manual_seed(0)
        with torch.device("cuda" if COMPILED else "cpu"):
            yield

    def test_the_kernels_are_what_runs_here() -> None:
        assert launch.has_triton(rand(1))

    def test_a_kernel_launched_again_also_with_arguments_of_another_kind() -> None:
        plain = Norm(1e-5, weight="none")
        for start, rows, columns in [(0, 3, 40), (1, 3, 40), (0, 3, 40), (1, 3, 40), (0, 1, 16), (0, 4, 1)]:
            x = rand(200)[start:][: rows * columns].view(rows, columns)  # at 1 not aligned to 16 bytes
            for _ in range(2):
                close(norm.rms_norm(x, None, plain), norm.rms_norm_reference(x, None, plain))

    ACTIVATIONS = [
        MLP(37), MLP(37, "gelu"), MLP(37, "gelu_tanh"), MLP(37, "relu2", gated=False), MLP(37, "relu", gated=False),
        MLP(37, "relu"), MLP(37, "quick_gelu"), MLP(37, "silu_clamped", limit=1.5, alpha=1.3), MLP(37, limit=0.7),
        MLP(37, limit=0.7, limit_after=True),
    ]  # fmt: skip

    @pytest.mark.parametrize("spec", ACTIVATIONS)
    def test_gated_activations(spec: MLP) -> None:
        h = rand(3, 2, 74) * 3
        close(gated.gated(h, spec), gated.gated_reference(h, spec))

    NORMS = [
        Norm(1e-6), Norm(1e-2, rounding="last"), Norm(1e-6, weight="plus_one", rounding="last"), Norm(1e-6, weight="none")
    ]  # fmt: skip

    @pytest.mark.parametrize("spec", NORMS)
    def test_norms_also_of_a_slice_and_with_the_residual(spec: Norm) -> None:
        x, onto = rand(2, 3, 70), rand(2, 3, 70)
        w = None if spec.weight == "none" else rand(70)
        close(norm.rms_norm(x, w, spec), norm.rms_norm_reference(x, w, spec))
        close(norm.rms_norm_add(onto, x, w, spec), norm.rms_norm_add_reference(onto, x, w, spec))
        y, total = norm.add_rms_norm(onto, x, w, spec)
        expected = norm.add_rms_norm_reference(onto, x, w, spec)
        close(y, expected[0])
        assert torch.equal(total, expected[1])
        part, w = x[..., 3:40], None if w is None else w[3:40]
        close(norm.rms_norm(part, w, spec), norm.rms_norm_reference(part, w, spec))
        padded = rand(1, 1, 5, 37)[:, :, :4].transpose(1, 2)  # heads, of which there is one, have any stride
        close(norm.rms_norm(padded, w, spec), norm.rms_norm_reference(padded, w, spec))
        turned = rand(2, 37, 3).transpose(1, 2)
        close(norm.rms_norm(turned, w, spec), norm.rms_norm_reference(turned, w, spec))

    MIXES = [  # B, T, key heads, heads, K, V
        (2, 1, 2, 4, 8, 20), (1, 7, 1, 3, 20, 16), (2, 16, 2, 2, 16, 5),
        (1, 17, 2, 4, 33, 40), (2, 64, 1, 2, 16, 8), (1, 200, 1, 2, 24, 36),
    ]  # fmt: skip

    @pytest.mark.parametrize("case", MIXES)
    @pytest.mark.parametrize("kind", ["by head", "by channel", "uncorrected"])
    # 60: e^-G alone would overflow within a chunk
    @pytest.mark.parametrize(
        "strength", [*(pytest.param(s, marks=pytest.mark.proof) for s in (0.01, 1.0)), 60.0]
    )
    def test_delta_rule(case: tuple[int, ...], kind: str, strength: float) -> None:
        B, T, G, H, K, V = case
        q, k, v = rand(B, T, 2 * G * K + H * V).split([G * K, G * K, H * V], -1)
        q, k, v = q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (H, V))
        decay = -strength * rand(B, T, H, K if kind == "by channel" else 1).abs()
        decay[:, ::5] *= 1e-3  # the small ones between large ones
        beta, corrected = torch.sigmoid(rand(B, T, H)), kind != "uncorrected"
        start = rand(B, H, K, V)
        states = [start.clone(), start.clone()]
        y = delta.mix(q, k, v, decay, beta, states[0], corrected)
        close(y, delta.mix_reference(q, k, v, decay, beta, states[1], corrected), 2.0)
        close(states[0], states[1], 2.0)

    @pytest.mark.parametrize(
        "kind", ["by head", pytest.param("by channel", marks=pytest.mark.proof), "uncorrected"]
    )
    @pytest.mark.parametrize(
        "dtype", [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
    )
    def test_delta_rule_of_a_release_and_in_segments(
        kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        T, G, H, N = 210, 1, 2, 128
        monkeypatch.setattr(delta, "SEGMENT", 128)
        q, k, v = rand(1, T, (2 * G + H) * N).to(dtype).split([G * N, G * N, H * N], -1)
        q, k, v = (x.unflatten(-1, (-1, N)) for x in (q, k, v))
        decay, beta = -rand(1, T, H, N if kind == "by channel" else 1).abs(), torch.sigmoid(rand(1, T, H))
        states, corrected = [torch.zeros(1, H, N, N) for _ in range(2)], kind != "uncorrected"
        y = delta.mix(q, k, v, decay, beta, states[0], corrected)
        expected = delta.mix_reference(q, k, v, decay, beta, states[1], corrected)
        assert y.dtype == expected.dtype
        error = (
            y - expected
        ).float().norm() / expected.float().norm()  # of bf16: one in a hundred rounds otherwise
        assert error <= (1e-6 if y.dtype == torch.float32 and dtype != torch.bfloat16 else 5e-4)
        close(states[0], states[1], 10.0 if dtype == torch.bfloat16 else 2.0)

    def test_delta_rule_of_the_same_key_again_and_again() -> None:
        """The system of a chunk is then all ones, and what is left after a correction is small."""
        q, k, v = rand(1, 150, 1, 16), rand(1, 1, 1, 16).expand(1, 150, 1, 16), rand(1, 150, 2, 16)
        decay, beta = torch.zeros(1, 150, 2, 1), torch.full((1, 150, 2), 0.999)
        states = [torch.zeros(1, 2, 16, 16) for _ in range(2)]
        y = delta.mix(q, k, v, decay, beta, states[0])
        close(y, delta.mix_reference(q, k, v, decay, beta, states[1]), 2.0)
        close(states[0], states[1], 2.0)

    @pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ranks", [2, 3])
    def test_ranks_that_write_into_each_others_memory(ranks: int, dtype: torch.dtype) -> None:
        """This is rank 0; what the others write is there before it looks, in the last call after it has begun to."""
        most = 3 * near.BLOCK
        memory = [torch.zeros(near.room(ranks, most), dtype=torch.int64) for _ in range(ranks)]
        buffers = torch.tensor([m.data_ptr() for m in memory])
        calls = torch.zeros(most // near.BLOCK, dtype=torch.int32)
        for shape, add in [((1, 600), True), ((2, 3, 6), False), ((1, 1, 40), True), ((700,), False)]:
            parts = rand(ranks, *shape).to(dtype)
            at = torch.arange(parts[0].nbytes // 4)
            call = calls.long()[at // near.BLOCK] + 1  # a program counts the calls that have words for it
            there = (call & 1) * ranks * most + at

            def others_write(parts: torch.Tensor, call: torch.Tensor, there: torch.Tensor) -> None:
                for r in range(1, ranks):
                    memory[0][there + r * most] = words(parts[r]) | call << 32

            late = INTERPRETED and shape == (700,)
            written = threading.Timer(0.02 if late else 0, others_write, (parts, call, there))
            written.start()
            if not late:
                written.join()
            onto = rand(*shape).to(dtype) if shape[-1] == 40 else None
            made = near.near(parts[0].contiguous(), buffers, calls, 0, ranks, most, add, onto)
            expected = near.near_sum_reference(parts) if add else near.near_gather_reference(parts)
            assert torch.equal(made, expected if onto is None else onto + expected)
            assert all(torch.equal(m[there], words(parts[0]) | call << 32) for m in memory[1:])
        assert calls.tolist() == ([4, 2, 2] if dtype == torch.float32 else [4, 2, 0])

    @pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16])
    def test_what_came_from_ranks_is_waited_for_and_added_up(dtype: torch.dtype) -> None:
        flags = torch.tensor(
            [0, 1, 0], dtype=torch.int32
        )  # of rank 0 itself, one that is up, one that will be
        late = threading.Timer(0.02 if INTERPRETED else 0, flags[2:].fill_, (1,))
        late.start()
        if not INTERPRETED:
            late.join()
        near.arrive(flags, 0)
        assert flags.tolist() == [0, 0, 0]
        for ranks, n in ((2, 700), (3, 5)):
            parts = rand(ranks, n + 1, 8).to(dtype)[:, :n]
            onto = rand(n, 8).to(dtype)
            assert torch.equal(near.add_up(parts), near.near_sum_reference(parts))
            assert torch.equal(near.add_up(parts, onto), onto + near.near_sum_reference(parts))

    @pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("spec", NORMS)
    def test_a_sum_over_ranks_and_the_norm_of_it_are_one_kernel_that_waits(
        spec: Norm, dtype: torch.dtype
    ) -> None:
        for ranks, rank, n, d in ((2, 0, 9, 70), (3, 1, 2, 33)):
            flags, seen = torch.zeros(ranks, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            parts, onto = rand(ranks, n + 1, d).to(dtype)[:, :n], rand(n, d).to(dtype)
            w, normed = None if spec.weight == "none" else rand(d).to(dtype), rand(n, d).to(dtype)
            came, places = parts.clone(), [r for r in range(ranks) if r != rank]
            parts[places] = torch.nan

            def others_write(parts: Any, came: Any, flags: Any, places: Any) -> None:
                parts[places], flags[places] = came[places], 1

            late = threading.Timer(0.02 if INTERPRETED else 0, others_write, (parts, came, flags, places))
            late.start()
            if not INTERPRETED:
                late.join()
            assert near.norms_sum(parts, w, spec)
            total = near.add_up_norm(parts, onto, w, spec, normed, flags, seen, rank)
            expected = near.add_up_norm_reference(came, onto, w, spec)
            assert torch.equal(total, expected[0]) and torch.equal(total, near.add_up(came, onto))
            assert torch.equal(normed, norm.rms_norm(total, w, spec))
            close(normed, expected[1])
            assert not flags.any() and not seen.any()

    def test_rows_of_a_table_of_which_others_have_the_rest() -> None:
        weight, ids = rand(5, 1030), torch.tensor([[0, 4, 5, 9], [10, 3, 7, 14]])
        whole = torch.zeros(15, 1030)
        whole[5:10] = weight
        assert torch.equal(near.some_rows(weight, ids, 5), whole[ids])
        assert torch.equal(near.some_rows_reference(weight, ids, 5), whole[ids])

    def words(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().view(torch.int32).flatten().to(torch.int64) & 0xFFFFFFFF

    @pytest.mark.parametrize(("width", "least"), [(1, None), (8, None), (1, 0.0), (1, 1e-3)])
    def test_gates_of_linear_mixers(width: int, least: float | None) -> None:
        fused = rand(2, 5, 3 * width + 3) * 12
        dt, beta = fused.split([3 * width, 3], -1)
        dt, second = dt.unflatten(-1, (3, width)), beta if least is None else None
        args = (dt, second, rand(3), rand(3 * width), least or 0.0)
        for a, b in zip(delta.gates(*args), delta.gates_reference(*args), strict=True):
            close(a, b)
            assert ((a - b).abs() <= 1e-5 * b.abs()).all()  # also of what is close to 0

    @pytest.mark.parametrize("T", [1, 2, 3, 16, 17, 50])
    @pytest.mark.parametrize("width", [2, 4])
    @pytest.mark.parametrize("more", [False, True])
    def test_short_convolution_and_its_tail(T: int, width: int, more: bool) -> None:
        x, w = rand(2, T, 150)[..., 10:], rand(140, width)
        bias, tail = (rand(140), rand(2, width - 1, 140)) if more else (None, None)
        for silu in (True, False):
            tails = [None if tail is None else tail.clone() for _ in range(2)]
            close(conv.conv(x, w, bias, tails[0], silu), conv.conv_reference(x, w, bias, tails[1], silu))
            if tails[0] is not None and tails[1] is not None:
                assert torch.equal(tails[0], tails[1])

    @pytest.mark.parametrize("spec", NORMS[:3])
    @pytest.mark.parametrize("act", ["silu", "sigmoid"])
    @pytest.mark.parametrize("first", [False, True])
    def test_gated_norm(spec: Norm, act: str, first: bool) -> None:
        y, z = rand(2, 3, 4, 20), rand(2, 3, 90)[..., 5:85].view(2, 3, 4, 20)
        w = rand(4, 20) if first else rand(20)
        args = (y, z, w, spec, act, first)
        close(norm.gated_norm(*args), norm.gated_norm_reference(*args))  # type: ignore[arg-type]

    PLACES = [  # B, T, H, K, D, V, slots, rotated pairs, interleaved, norm, after
        (2, 3, 4, 2, 20, 20, 40, 10, False, NORMS[0], False),
        (1, 1, 6, 3, 24, 12, 16, 6, True, NORMS[2], False),
        (1, 30, 2, 1, 16, 16, 20, 8, False, None, False),  # more tokens than slots
        (2, 1, 5, 5, 18, 18, 16, 9, True, NORMS[3], True),
    ]

    @pytest.mark.parametrize("case", PLACES)
    @pytest.mark.parametrize("rotated", [True, False])
    def test_norm_rope_and_the_write_to_the_cache(case: tuple[int, ...], rotated: bool) -> None:
        B, T, H, K, D, V, slots, half, interleaved, spec, after = case
        fused = rand(B, T, (H + K) * D + K * V)
        q, k, v = fused.split([H * D, K * D, K * V], -1)
        q, k, v = q.unflatten(-1, (H, D)), k.unflatten(-1, (K, D)), v.unflatten(-1, (K, V))
        table = (rand(T, half), rand(T, half)) if rotated else None
        weighted = isinstance(spec, Norm) and spec.weight != "none"
        qn, kn = (rand(D), rand(D)) if weighted else (None, None)
        position = torch.tensor(13)
        stores = [[torch.zeros(B, K, slots, n).transpose(1, 2) for n in (D, V)] for _ in range(2)]
        args = (position, table, interleaved, qn, kn, spec, after)
        assert rope.place_fits(spec, q, k, v, *stores[0])  # type: ignore[arg-type]
        a = rope.place(q, k, v, *stores[0], *args)  # type: ignore[arg-type]
        b = rope.place_reference(q, k, v, *stores[1], *args)  # type: ignore[arg-type]
        close(a, b)
        for x, y in zip(*stores, strict=True):
            close(x, y)
        # Where nothing is stored, queries and keys change where they are, and values do not.
        whole = [torch.zeros(B, T, K, n) for n in (D, V)]
        b = rope.place_reference(q, k, v, *whole, torch.tensor(0), *args[1:])  # type: ignore[arg-type]
        a = rope.place(q, k, v, None, None, *args)  # type: ignore[arg-type]
        assert a is q
        close(q, b)
        close(k, whole[0])
        assert torch.equal(v, whole[1])

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_rope_in_place(interleaved: bool) -> None:
        whole, angle = rand(2, 7, 11, 20), rand(7, 6)
        before, x = whole.clone(), whole[..., 8:]
        y = rope.rotate(x, angle.cos(), angle.sin(), interleaved, reuse=True)
        assert y is x
        close(x, rope.rotate_reference(before[..., 8:], angle.cos(), angle.sin(), interleaved))
        assert torch.equal(whole[..., :8], before[..., :8])

    @pytest.mark.parametrize("interleaved", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rope_has_the_bits_of_the_expression(dtype: torch.dtype, interleaved: bool) -> None:
        x = rand(1, 33, 5, 64).to(dtype)
        for tables in {dtype, torch.float32}:
            cos, sin = rand(33, 32).to(tables), rand(33, 32).to(tables)
            found = rope.rotate(x, cos, sin, interleaved)
            expected = rope.rotate_reference(x, cos, sin, interleaved)
            if INTERPRETED and dtype == torch.bfloat16:  # the interpreter rounds to it otherwise
                close(found.float(), expected.float(), 400)
            else:
                assert torch.equal(found, expected)

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_rope_leaves_the_channels_after_the_first(interleaved: bool) -> None:
        x, cos, sin = rand(2, 5, 3, 14), rand(5, 4), rand(5, 4)
        close(rope.rotate(x, cos, sin, interleaved), rope.rotate_reference(x, cos, sin, interleaved))

    EXTRAS = [
        {},
        {"window": 9},
        {"chunk": 16},
        {"sinks": True},
        {"softcap": 5.0},
        {"window": 9, "sinks": True},
    ]

    def extras(x: dict[str, object], heads: int) -> dict[str, object]:
        return x | ({"sinks": rand(heads)} if "sinks" in x else {})

    @pytest.mark.parametrize("extra", EXTRAS)
    @pytest.mark.parametrize("shape", [(35, 0, 4, 2, 20, 12), (5, 30, 4, 4, 24, 24)])
    def test_attention_of_a_prompt(shape: tuple[int, ...], extra: dict[str, object]) -> None:
        T, start, H, K, D, V = shape
        q, k, v = rand(1, T, H, D), rand(1, start + T, K, D), rand(1, start + T, K, V)
        kw = {"scale": 0.3, "start": start, **extras(extra, H)}
        close(attention.flash(q, k, v, **kw), attention.attention_reference(q, k, v, **kw))  # type: ignore[arg-type]

    @pytest.mark.parametrize("extra", EXTRAS)
    @pytest.mark.parametrize(
        "shape", [(40, 64, 4, 2, 20, 20), (100, 33, 6, 2, 24, 12), (0, 50, 4, 4, 16, 16)]
    )
    def test_attention_of_one_query_also_when_the_slots_are_a_ring(
        shape: tuple[int, ...], extra: dict[str, object]
    ) -> None:
        position, slots, H, K, D, V = shape
        q, k, v = rand(2, H, D), rand(2, slots, K, D), rand(2, slots, K, V)
        kw = {"scale": 0.3, **extras(extra, H)}
        at = torch.tensor([position])
        expected = attention.decode_reference(q, k, v, at, **kw)  # type: ignore[arg-type]
        for placed in (True, False) if position == 40 else (True,):
            close(attention.decode(q, k, v, at, placed=placed, **kw), expected)  # type: ignore[arg-type]

    def test_latent_attention_with_a_rotary_key_of_its_own() -> None:
        q, q2, k, k2, v = (
            rand(1, 20, 3, 16),
            rand(1, 20, 3, 8),
            rand(1, 20, 3, 16),
            rand(1, 20, 8),
            rand(1, 20, 3, 12),
        )
        whole = torch.cat((k, k2[:, :, None].expand(-1, -1, 3, -1)), -1)
        expected = attention.attention_reference(torch.cat((q, q2), -1), whole, v, scale=0.1)
        close(attention.flash(q, k, v, scale=0.1, q2=q2, k2=k2), expected)
        q, q2, k, k2, at = (
            rand(2, 20, 64),
            rand(2, 20, 8),
            rand(2, 50, 1, 64),
            rand(2, 50, 8),
            torch.tensor(44),
        )
        expected = attention.decode_reference(
            torch.cat((q, q2), -1), torch.cat((k, k2[:, :, None]), -1), k, at, scale=0.1
        )
        close(attention.decode(q, k, k, at, scale=0.1, q2=q2, k2=k2), expected)

    def test_keys_of_a_part_of_their_own_and_one_that_heads_share() -> None:
        stored, up = rand(2, 9, 40 + 16), rand(5 * 28, 40).view(5, 28, 40)
        x = stored[..., :40], stored[..., 40:], up, 20
        for found, expected in zip(
            latent.keys_and_values(*x), latent.keys_and_values_reference(*x), strict=True
        ):
            close(found, expected)

    @pytest.mark.parametrize("shape", [(3, best.PIECE + 7), (1, 40)])
    def test_the_likeliest_is_the_first_of_the_greatest(shape: tuple[int, int]) -> None:
        logits = rand(*shape)
        assert torch.equal(best.likeliest(logits), logits.argmax(-1))
        assert torch.equal(best.likeliest_reference(logits), logits.argmax(-1))
        logits[:, [5, shape[1] - 1]] = 100.0
        assert best.likeliest(logits).tolist() == [5] * shape[0]
        assert (
            best.likeliest(logits[:, 6:]).tolist() == [shape[1] - 7] * shape[0]
        )  # a slice, of rows that lie apart

    def test_projection_out_of_the_latent() -> None:
        up, y = rand(5 * 20, 40).view(5, 20, 40), rand(2, 5, 40)
        close(latent.out_of_latent(y, up[:, 12:]), latent.out_of_latent_reference(y, up[:, 12:]))

    ROUTERS = [
        (37, Router(4, "softmax", normalize=True)),
        (32, Router(3, "softmax", over="chosen")),
        (24, Router(4, "sigmoid", selection_bias=True, n_groups=4, top_groups=2, normalize=True, scale=2.5)),
        (24, Router(4, "softmax", n_groups=4, top_groups=2, masked_groups="zero")),
        (16, Router(1, "sigmoid", over="chosen")),
        (8, Router(2, "softmax", softcap=3.0)),
        (24, Router(4, "softmax", n_groups=4, top_groups=2, group_top=1, masked_groups="zero")),
        (16, Router(3, "sigmoid", over="chosen", normalize=True)),
        (16, Router(3, "softmax", selection_bias=True, normalize=True, normalize_floor=0.3)),
    ]

    @pytest.mark.parametrize(("n_experts", "spec"), ROUTERS)
    def test_routing(n_experts: int, spec: Router) -> None:
        logits, bias = rand(9, n_experts), rand(n_experts) if spec.selection_bias else None
        chosen, shares = route.route(logits, bias, spec)
        expected, expected_shares = route.route_reference(logits, bias, spec)
        assert torch.equal(chosen.long(), expected)
        close(shares, expected_shares)

    @pytest.mark.parametrize("shape", [(5, 2, 7), (130, 3, 10), (1, 1, 4), (50, 6, 1000)])
    @pytest.mark.parametrize("rows", [4, 32])
    def test_pairs_sorted_by_expert(shape: tuple[int, int, int], rows: int) -> None:
        tokens, top_k, n_experts = shape
        chosen = torch.stack([torch.randperm(n_experts)[:top_k] for _ in range(tokens)]).int()
        order, tiles = experts.sort_by_expert(chosen, n_experts, rows)
        expected, real = experts.sort_by_expert_reference(chosen, n_experts, rows)
        assert torch.equal(order, expected)
        there = real.shape[1]
        assert torch.equal(tiles[:, :there], real.to(tiles.device))
        assert (tiles[2, there:] == 0).all()

    def stored(
        scheme: str, parts: tuple[int, ...], columns: int, *lead: int
    ) -> tuple[torch.Tensor, weights.Weight]:
        """A random weight of a scheme, expanded and as kernels read it."""
        n = sum(parts)
        if scheme == "plain":
            w = rand(*lead, n, columns) * 0.2
            return w, weights.plain(w)
        height, width = block_size(scheme)
        grid = sum(-(-p // (height or p)) for p in parts), -(-columns // (width or columns))
        if scheme == "mxfp4":
            codes = torch.randint(0, 256, (*lead, n, columns // 32, 16), dtype=torch.uint8)
            scale = torch.randint(122, 126, (*lead, *grid), dtype=torch.uint8)
        elif scheme.startswith("int4"):
            codes = torch.randint(-(2**31), 2**31, (*lead, n, columns // 8)).int()
            scale = (torch.rand(*lead, *grid) + 0.5).bfloat16() / 16
        elif scheme.startswith("mlx4"):
            codes = torch.randint(-(2**31), 2**31, (*lead, n, columns // 8)).int().view(torch.uint32)
            scale = (torch.rand(*lead, *grid) + 0.5).bfloat16() / 16
        else:
            codes = (rand(*lead, n, columns) * 0.3).to(torch.float8_e4m3fn)
            scale = torch.rand(*lead, *grid) + 0.5
        components = {"weight": codes, "scale": scale}
        if scheme.startswith("mlx4"):
            components["shift"] = (rand(*scale.shape) - 6).bfloat16() / 16
        packed = weights.quantised(scheme, components, parts)
        assert packed is not None
        return dequantise(scheme, components, parts, torch.float32), packed

    # Interpreted, a product takes seconds: one scheme of each kind of codes, the others in `make proofs`.
    SCHEMES = (
        "plain",
        "fp8-block",
        "fp8-channel",
        "fp8-tensor",
        "mxfp4",
        "int4-group32",
        "int4-group64",
        "mlx4-group32",
    )
    OF_EACH_KIND = ("plain", "fp8-block", "mxfp4", "int4-group32", "mlx4-group32")

    def proven(*values: object, now: bool) -> Any:
        return pytest.param(*values, marks=[] if now else pytest.mark.proof)

    @pytest.mark.parametrize("scheme", [proven(s, now=s in OF_EACH_KIND) for s in SCHEMES])
    @pytest.mark.parametrize("f", [23, 128])  # scales of rows that need a table, and of those that do not
    def test_a_row_times_a_weight(f: int, scheme: str) -> None:
        w, packed = stored(scheme, (f, f), 160)
        x, onto = rand(1, 1, 160), rand(1, 1, 2 * f)
        assert linear.one_row(x, packed)
        assert (packed.rows is None) == (not scheme.startswith("fp8") or (scheme == "fp8-block" and f == 128))
        close(linear.linear(x, packed, onto), linear.linear_reference(x, w, None, onto))
        close(linear.gated_linear(x, packed, MLP(f)), linear.gated_linear_reference(x, w, None, MLP(f)), 5)
        if scheme != "plain":
            close(weights.expanded(packed, torch.float32), w)
            ids = torch.randint(0, 2 * f, (3, 7))
            close(weights.looked_up(packed, ids, torch.float32), w[ids])

    def served(*shape: int) -> torch.Tensor:
        """Numbers of the dtype that `codes` multiplies: the interpreter multiplies no bf16."""
        return rand(*shape).to(torch.bfloat16 if COMPILED else torch.float32)

    def near_to(y: torch.Tensor, expected: torch.Tensor) -> None:
        if COMPILED:
            assert (y.float() - expected).norm() <= 0.015 * expected.norm()
        else:
            close(y, expected, 5)

    @pytest.mark.parametrize(
        "scheme", [proven(s, now=s in ("int4-group64", "mlx4-group32")) for s in SCHEMES[1:]]
    )
    @pytest.mark.parametrize("columns", [proven(256, now=False), 1024])  # the last shared by programs
    def test_several_rows_times_codes(columns: int, scheme: str) -> None:
        w, packed = stored(scheme, (40, 30), columns)
        x, onto, bias = served(5, columns), served(5, 70), served(70)
        packed = replace(packed, bias=bias)
        assert linear.few_rows(x, packed) and not linear.one_row(x, packed)
        near_to(
            linear.linear(x, packed, onto), linear.linear_reference(x.float(), w, bias.float(), onto.float())
        )

    @pytest.mark.parametrize("scheme", [proven(s, now=s in ("mxfp4", "mlx4-group32")) for s in SCHEMES[1:]])
    def test_codes_times_what_tensor_cores_do_not_multiply(
        scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(codes, "serves", lambda x, w: False)
        w, packed = stored(scheme, (32, 32), 160)
        x, onto = rand(1, 160), rand(1, 64)
        close(linear.linear(x, packed, onto), linear.linear_reference(x, w, None, onto))
        close(linear.gated_linear(x, packed, MLP(32)), linear.gated_linear_reference(x, w, None, MLP(32)), 5)
        assert not linear.few_rows(rand(2, 160), packed)

    @pytest.mark.parametrize(
        ("scheme", "eights", "in_order"),
        [
            ("gptq4-group64", 0x77777777, True),
            proven("gptq4-v2-group64", 0x88888888 - (1 << 32), True, now=False),
            proven("packed4-group64-zeros", 0x88888888 - (1 << 32), None, now=False),
            proven("packed4-channel", None, None, now=False),
        ],
    )
    def test_four_bits_of_other_kinds_are_int4_where_zero_points_are_its_own(
        scheme: str, eights: int | None, in_order: bool | None
    ) -> None:
        n, k = 24, 128
        groups = 1 if scheme.endswith("channel") else 2
        c = {
            "weight": torch.randint(-(2**31), 2**31, (n, k // 8)).int(),
            "scale": torch.rand(n, groups).half(),
        }
        if eights is not None:
            c["zero"] = torch.full((n // 8, groups), eights).int()
        if in_order:
            c["order"] = (torch.arange(k) // 64).int()
        packed, w = weights.quantised(scheme, c, (n,)), dequantise(scheme, c, (n,), torch.float32)
        assert packed is not None
        x = rand(1, k)
        close(linear.linear(x, packed), linear.linear_reference(x, w), 5)
        assert torch.equal(weights.expanded(packed, torch.float32), w)
        if (
            in_order
        ):  # of groups that are not of one size, and of experts, each of which has an order of its own, not
            odd = torch.where(torch.arange(k) == 0, 1, c["order"])
            assert weights.quantised(scheme, c | {"order": odd}, (n,)) is None
            stacked = {name: x[None].expand(2, *x.shape).contiguous() for name, x in c.items()}
            assert weights.quantised(scheme, stacked, (n,)) is not None
            assert weights.quantised(scheme, stacked | {"order": stacked["order"].flip(-1)}, (n,)) is None

    @pytest.mark.parametrize("lead", [(), (3,)])
    @pytest.mark.parametrize(
        "scheme",
        ["gptq4-group64", "gptq4-v2-channel", "awq4-group64", "packed4-group64-zeros", "mlx4-group64"],
    )
    def test_integers_with_zero_points_or_biases_have_offsets(scheme: str, lead: tuple[int, ...]) -> None:
        parts, k = (16, 9) if scheme.startswith(("packed", "mlx")) else (16, 8), 128
        n, groups = sum(parts), 1 if scheme.endswith("channel") else 2
        words = [-(-p // 8) for p in parts]

        def codes_of(*shape: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31, (*lead, *shape)).int()

        c = {"weight": codes_of(n, k // 8), "scale": (torch.rand(*lead, n, groups) + 0.5).half()}
        if scheme.startswith("mlx"):
            c = {
                "weight": c["weight"].view(torch.uint32),
                "scale": c["scale"],
                "shift": rand(*lead, n, groups).half(),
            }
        else:
            c["zero"] = codes_of(sum(words), groups)
        if scheme.startswith("awq"):
            c["weight"] = codes_of(n // 8, k)
        packed = weights.quantised(scheme, c, parts)
        assert packed is not None and packed.kind == weights.AFFINE4 and packed.lead == lead
        each = [{name: t[i] for name, t in c.items()} for i in range(*lead)] if lead else [c]
        w = torch.stack([dequantise(scheme, one, parts, torch.float32) for one in each])
        assert torch.equal(weights.expanded(packed, torch.float32), w.view(*lead, n, k))
        if not lead:
            x = rand(1, k)
            close(linear.linear(x, packed), linear.linear_reference(x, w[0]), 5)

    # Forms of codes beside those of `SCHEMES`; with a star columns are in groups of an order of their own.
    FORMS = {
        "nvfp4": weights.NVFP4, "nvfp4-packed": weights.NVFP4, "mlx-nvfp4": weights.NVFP4, "mlx-mxfp4": weights.MXFP4,
        "fp8-block-1x32": weights.MXFP8, "mlx-mxfp8": weights.MXFP8,
        "int8-channel": weights.INT8, "int8-tensor": weights.INT8, "bnb8": weights.INT8,
        "int8-group64": weights.AFFINE8, "int8-channel-zeros": weights.AFFINE8, "int8-tensor-zeros": weights.AFFINE8,
        "gptq8-group64": weights.AFFINE8, "gptq8-v2-channel": weights.AFFINE8, "packed8-channel": weights.AFFINE8,
        "packed8-group32-zeros": weights.AFFINE8, "mlx8-group64": weights.AFFINE8,
        "gptq8-group64*": weights.AFFINE8, "gptq4-group64*": weights.AFFINE4, "packed4-group64*": weights.INT4,
    }  # fmt: skip
    ONE_OF_EACH = ("nvfp4", "fp8-block-1x32", "int8-channel", "gptq8-group64")

    def of_form(form: str, parts: tuple[int, ...], k: int, *lead: int) -> tuple[torch.Tensor, weights.Weight]:
        """As `stored`."""
        scheme = form.rstrip("*")
        c = components(scheme, parts, k, *lead)
        if form.endswith("*"):
            c["order"] = (torch.randperm(k) // named(scheme).group).int().repeat(len(parts), 1)
        packed = weights.quantised(scheme, c, parts)
        assert packed is not None and packed.kind == FORMS[form] and packed.lead == lead and packed.words
        assert (packed.order is not None) == form.endswith("*")
        return dequantise(scheme, c, parts, torch.float32), packed

    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_of_codes_has_the_values_of_its_formula(form: str) -> None:
        for lead in [()] if form.endswith("*") else [(), (3,)]:
            w, packed = of_form(form, (16, 8), 192, *lead)
            # Two products are rounded, and where a scale is of fp32 that with its zero point.
            near = {"rtol": 2**-23 * (form == "bnb8"), "atol": 2**-15 * (form == "int8-tensor-zeros")}
            torch.testing.assert_close(weights.expanded(packed, torch.float32), w, **near)
            if not lead:
                ids = torch.randint(0, 24, (3, 7))
                torch.testing.assert_close(weights.looked_up(packed, ids, torch.float32), w[ids], **near)

    @pytest.mark.parametrize("form", [proven(f, now=f in (*ONE_OF_EACH, "gptq4-group64*")) for f in FORMS])
    def test_rows_times_every_form_of_codes(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        w, packed = of_form(form, (40, 40), 192)
        bias, onto = served(80), served(5, 80)
        packed = replace(packed, bias=bias)
        for rows in (1, 5):
            x = served(rows, 192) / 1024
            assert linear.few_rows(x, packed)
            expected = linear.linear_reference(x.float(), w, bias.float(), onto[:rows].float())
            near_to(linear.linear(x, packed, onto[:rows]), expected)
        x = x[:1]
        near_to(
            linear.gated_linear(x, packed, MLP(40)),
            linear.gated_linear_reference(x.float(), w, bias.float(), MLP(40)),
        )
        # And of dtypes that tensor cores do not multiply.
        monkeypatch.setattr(codes, "serves", lambda x, w: False)
        y = linear.linear(x.float(), replace(packed, bias=bias.float()), onto[:1].float())
        close(y, linear.linear_reference(x.float(), w, bias.float(), onto[:1].float()), 5)

    @pytest.mark.parametrize("form", [proven(f, now=f in ONE_OF_EACH) for f in FORMS if "*" not in f])
    @pytest.mark.parametrize("tokens", [proven(1, now=False), 9])
    def test_experts_of_every_form_of_codes(form: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(codes, "grouped_tile", lambda *_: (16, 128, 64, 4, 3))
        (up, a), (down, b) = of_form(form, (64, 64), 128, 3), of_form(form, (128,), 64, 3)
        x, shares = served(tokens, 128) / 1024, torch.rand(tokens, 2)
        chosen = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)]).int()
        expected = experts.experts_reference(x.float(), chosen, shares, (up, None), (down, None), MLP(64))
        near_to(experts.experts(x, chosen, shares, a, b, MLP(64)), expected)
        monkeypatch.setattr(codes, "serves", lambda x, w: False)
        close(experts.experts(x.float(), chosen, shares, a, b, MLP(64)), expected, 5)

    @triton.jit
    def write_factors(scales, products, KIND: tl.constexpr, WORD: tl.constexpr):
        s = tl.load(scales + tl.arange(0, 256))
        f = codes.factors(s, KIND)
        w = tl.full((256,), WORD, tl.uint32)
        if KIND == 6:
            pair = codes.fp4(w, f, 0, tl.float32)
        else:
            pair = codes.mxfp8(w, f, 1, tl.float32)
        tl.store(products + tl.arange(0, 256)[:, None] * 2 + tl.arange(0, 2)[None, :], pair)

    @pytest.mark.parametrize(
        ("kind", "word", "values"), [(6, 0x000C0007, (6.0, -2.0)), (-3, 0xFE000100, (2**-9, -448.0))]
    )
    def test_what_codes_are_multiplied_by_is_exact_for_every_scale(
        kind: int, word: int, values: tuple[float, float]
    ) -> None:
        scales = torch.arange(256, dtype=torch.uint8)
        products = torch.empty(256, 2)
        write_factors[(1,)](scales, products, KIND=kind, WORD=word)
        if kind == 6:
            exact, good = scales.view(torch.float8_e4m3fn).double() / 2**8, scales & 127 < 127
        else:
            exact, good = torch.exp2(scales.double() - 127 - 60), (scales >= 72) & (scales < 180)
        want = exact[:, None] * torch.tensor(values).double()
        assert torch.equal(products[good].double(), want[good])
        assert kind == 6 or not products[scales >= 195].isfinite().any()

    def test_a_code_of_fp8_that_is_no_number_gives_none() -> None:
        _, packed = stored("fp8-channel", (16,), 64)
        assert packed.words
        damaged = packed.codes.clone()
        damaged.view(torch.uint8)[3, 5] = 0xFF
        assert packed.scale is not None
        packed = weights.quantised("fp8-channel", {"weight": damaged, "scale": packed.scale}, (16,))
        assert packed is not None and not packed.words
        if COMPILED:  # the interpreter takes it for 480
            assert linear.linear(rand(1, 64), packed).isnan().nonzero().tolist() == [[0, 3]]

    @pytest.mark.parametrize(
        "scheme", [proven(s, now=s.endswith("-group64")) for s in (*SCHEMES[1:], "mlx4-group64")]
    )
    @pytest.mark.parametrize("gated", [True, proven(False, now=False)])
    def test_experts_whose_rows_are_whole_tiles_of_codes(
        gated: bool, scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(codes, "grouped_tile", lambda *_: (16, 128, 64, 4, 3))
        spec = MLP(128, act="silu" if gated else "relu2", gated=gated)
        (up, a), (down, b) = (
            stored(scheme, (128, 128) if gated else (128,), 64, 2),
            stored(scheme, (64,), 128, 2),
        )
        biased = [served(2, up.shape[1]), served(2, 64)]
        a, b = replace(a, bias=biased[0]), replace(b, bias=biased[1])
        x, shares = served(17, 64), torch.rand(17, 1)
        chosen = torch.tensor([[0]] * 3 + [[1]] * 14)[torch.randperm(17)].int()
        wide = [t.float() for t in biased]
        expected = experts.experts_reference(x.float(), chosen, shares, (up, wide[0]), (down, wide[1]), spec)
        near_to(experts.experts(x, chosen, shares, a, b, spec), expected)

    @pytest.mark.parametrize("scales", [(1,), (3, 1, 1), (3, 2, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_one_scale_for_all_experts_for_each_or_for_each_part(
        scales: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        codes = (rand(3, 2 * 40, 72) * 0.3).to(torch.float8_e4m3fn)
        components = {"weight": codes, "scale": (torch.rand(scales) + 0.5).to(dtype)}
        packed = weights.quantised("fp8-tensor", components, (40, 40))
        assert packed is not None
        exact = dequantise("fp8-tensor", components, (40, 40), torch.float32)
        close(weights.expanded(packed, torch.float32), exact)

    ACTS = (
        MLP(64, act="silu_clamped", limit=1.0),
        MLP(64, act="relu2", gated=False),
        MLP(64, limit=0.5, limit_after=True),
    )
    # How codes are widened, what is done with the sums and how tokens are shared out do not meet: interpreted, not all are tried.
    CASES = [
        proven(s, a, n, now=s in OF_EACH_KIND and (a is ACTS[0] or s == "plain") and (n == 1 or (s, a) == ("plain", ACTS[0]) or s == "mxfp4"))
        for s in SCHEMES
        for a in ACTS
        for n in (1, 9)
        if COMPILED or a is ACTS[0] or s in ("plain", "mxfp4")
    ]  # fmt: skip

    @pytest.mark.parametrize(("scheme", "spec", "tokens"), CASES)
    def test_experts_for_few_tokens_and_for_many(tokens: int, scheme: str, spec: MLP) -> None:
        d, n, top_k = 96, 5, 3
        (up, a), (down, b) = (
            stored(scheme, (64, 64) if spec.gated else (64,), d, n),
            stored(scheme, (d,), 64, n),
        )
        x, shares = rand(tokens, d), torch.rand(tokens, top_k)
        chosen = torch.stack([torch.randperm(n)[:top_k] for _ in range(tokens)]).int()
        shared, residual = rand(tokens, d), rand(tokens, d)
        expected = experts.experts_reference(x, chosen, shares, (up, None), (down, None), spec)
        if COMPILED or (scheme, spec) == ("plain", ACTS[0]):  # nor does what is added to them
            close(experts.experts(x, chosen, shares, a, b, spec), expected, 5)
        y = experts.experts(x, chosen, shares, a, b, spec, shared=shared, residual=residual)
        close(y, residual + (shared + expected), 5)

    @pytest.mark.parametrize("rows", [64, 128])
    @pytest.mark.parametrize("scheme", [proven(s, now=s in ("plain", "mxfp4")) for s in SCHEMES])
    def test_experts_in_large_tiles(rows: int, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(experts, "grouped_tile", lambda *_, **__: (rows, 32, 32, 4, 3))
        (up, a), (down, b) = stored(scheme, (32, 32), 64, 3), stored(scheme, (64,), 32, 3)
        biased = [rand(3, 64), rand(3, 64)]
        a, b = replace(a, bias=biased[0]), replace(b, bias=biased[1])
        # Of experts that fill more than half of a large tile, and less.
        x, shares, chosen = rand(70, 64), torch.rand(70, 2), torch.tensor([[0, 1]] * 40 + [[0, 2]] * 30).int()
        expected = experts.experts_reference(x, chosen, shares, (up, biased[0]), (down, biased[1]), MLP(32))
        close(experts.experts(x, chosen, shares, a, b, MLP(32)), expected, 5)
        # In bf16 its tiles are 2^-60 of it; the interpreter multiplies no bf16.
        if scheme == "mxfp4" and COMPILED:
            narrow = [t.bfloat16() for t in (x, *biased)]
            a, b = replace(a, bias=narrow[1]), replace(b, bias=narrow[2])
            y = experts.experts(narrow[0], chosen, shares, a, b, MLP(32))
            assert (y.float() - expected).norm() <= 0.015 * expected.norm()

    def test_experts_of_more_tiles_than_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(experts, "grouped_tile", lambda *_, **__: (16, 32, 32, 4, 3))
        monkeypatch.setattr(experts, "GROUP", 2)
        (up, a), (down, b) = stored("plain", (40, 40), 64, 3), stored("plain", (64,), 40, 3)
        x, shares = rand(110, 64), torch.rand(110, 1)
        chosen = torch.tensor([0] * 75 + [1] * 3 + [2] * 32)[torch.randperm(110), None].int()
        expected = experts.experts_reference(x, chosen, shares, (up, None), (down, None), MLP(40))
        close(experts.experts(x, chosen, shares, a, b, MLP(40)), expected, 5)

    @triton.jit
    def write_tiny(codes, scales, bits, products, N: tl.constexpr, MULTIPLY: tl.constexpr):
        at = tl.program_id(0) * N + tl.arange(0, N)
        w, s = tl.load(codes + at), tl.load(scales + at)
        low, high, factor = weights.tiny_bits(w, s)
        tl.store(bits + 3 * at, low.to(tl.int16, bitcast=True))
        tl.store(bits + 3 * at + 1, high.to(tl.int16, bitcast=True))
        tl.store(bits + 3 * at + 2, factor.to(tl.int16, bitcast=True))
        if MULTIPLY:
            low, high = weights.tiny_fp4(w, s)
            tl.store(products + 2 * at, low)
            tl.store(products + 2 * at + 1, high)

    def test_mxfp4_in_bf16_is_exact_for_scales_over_40_orders_of_magnitude() -> None:
        codes = torch.arange(256, dtype=torch.uint8).repeat(256)
        scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(256)
        bits, products = torch.empty(65536, 3, dtype=torch.int16), torch.empty(65536, 2, dtype=torch.bfloat16)
        write_tiny[(64,)](codes, scales, bits, products, N=1024, MULTIPLY=COMPILED)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
        exact = values[torch.stack([codes & 15, codes >> 4], 1).int()]
        exact *= torch.exp2(scales.double() - 127 - 60)[:, None]
        low_high, factor = bits.view(torch.bfloat16).double().split((2, 1), 1)
        assert torch.equal((low_high * factor)[scales < 189], exact[scales < 189])
        assert factor[scales >= 189].isinf().all()
        if COMPILED:
            good = (scales >= 55) & (scales < 189)
            assert torch.equal(products[good].double(), exact[good])
            assert not products[scales >= 189].isfinite().any()
            assert ((products[scales < 55] - exact[scales < 55]).abs() <= 2.0**-133).all()

    @pytest.mark.parametrize(
        ("scheme", "tokens"),
        [proven(s, n, now=(s, n) in (("plain", 1), ("mxfp4", 9))) for s in SCHEMES for n in (1, 9)],
    )
    def test_experts_whose_input_is_weighted(scheme: str, tokens: int) -> None:
        (up, a), (down, b) = stored(scheme, (64, 64), 96, 4), stored(scheme, (96,), 64, 4)
        biased = [rand(4, 128), rand(4, 96)]
        a, b = replace(a, bias=biased[0]), replace(b, bias=biased[1])
        for top_k in (1, 3):
            x, shares = rand(tokens, 96), torch.rand(tokens, top_k)
            chosen = torch.stack([torch.randperm(4)[:top_k] for _ in range(tokens)]).int()
            y = experts.experts(x, chosen, shares, a, b, MLP(64), weight_input=True)
            expected = experts.experts_reference(
                x, chosen, shares, (up, biased[0]), (down, biased[1]), MLP(64), True
            )
            close(y, expected, 5)


if COMPILED:
    from zoo.kernels import product

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("t", [33, 200])
    @pytest.mark.parametrize(
        ("h", "kv", "d", "dv"),
        [(8, 1, 32, 8), (3, 1, 24, 8), (4, 2, 40, 24), (21, 3, 24, 4), (6, 2, 72, 12), (3, 1, 128, 8)],
    )
    def test_attention_whose_rows_begin_anywhere(
        h: int, kv: int, d: int, dv: int, t: int, dtype: torch.dtype
    ) -> None:
        """Queries, keys and values beside each other in one projection, as layers have them."""
        torch.manual_seed(0)
        parts = torch.randn(2, t, (h + kv) * d + kv * dv, device="cuda", dtype=dtype).split(
            (h * d, kv * d, kv * dv), -1
        )
        q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(parts, (h, kv, kv), strict=True))
        for extra in ({"softcap": 20.0}, {"window": 16}):
            exact = attention.attention_reference(q.double(), k.double(), v.double(), scale=d**-0.5, **extra)
            found = attention.flash(q, k, v, scale=d**-0.5, **extra)  # type: ignore[arg-type]
            assert (found.double() - exact).abs().max() <= 0.05

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("n", "m", "k"), [(2, 3, 17), (5, 64, 100), (300, 256, 7168)])
    def test_a_product_in_fp32_of_narrower_numbers(n: int, m: int, k: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        x, w = torch.randn(n, k, device="cuda").to(dtype), torch.randn(m, k, device="cuda").to(dtype)
        assert (
            product.wide_fits(x, w)
            and not product.wide_fits(x[:1], w)
            and not product.wide_fits(x, w.float())
        )
        exact = x.double() @ w.double().T
        found = product.wide_product(x, w)
        assert found.dtype == torch.float32
        assert (found - exact).norm() <= 3e-5 * exact.norm()
