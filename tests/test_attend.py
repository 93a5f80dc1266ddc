"""The kernel in CUDA C++ that attends for one token (`zoo.kernels.attend`): how keys are shared, everywhere; what it computes, on a GPU of
Hopper's kind or later, against `place_reference` and `decode_reference`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import attend, cuda
from zoo.kernels.attention import decode_reference
from zoo.kernels.rope import place_reference
from zoo.spec import Norm

on_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.serves(torch.empty(1, device="cuda"))),
    reason="no GPU of Hopper's kind",
)


@pytest.mark.parametrize("multiprocessors", [78, 132, 148])
@pytest.mark.parametrize("key_heads", [1, 2, 5, 8, 32, 200])
def test_programs_are_no_more_than_fit_or_find_work(key_heads: int, multiprocessors: int) -> None:
    for keys in (1, 16, 128, 4096, 1 << 20):
        splits = attend._splits(key_heads, keys, multiprocessors)
        assert splits in (1, 2, 4, 8, 16) and splits <= attend.MOST
        assert splits == 1 or splits * key_heads <= multiprocessors
        assert splits == 1 or splits * attend.TILE <= keys


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def table(half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.rand(1, half, device="cuda") * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


FACTOR = Norm(1e-6), Norm(1e-5, weight="plus_one", rounding="last")
SHAPES: list[tuple[int, int, int, int, dict[str, Any]]] = [  # heads, key heads, channels, position, what else
    (32, 8, 128, 0, {}),
    (32, 8, 128, 1, {}),
    (32, 8, 128, 15, {"batch": 3}),
    (32, 8, 128, 16, {"table": torch.float32}),
    (32, 8, 128, 2047, {}),
    (32, 8, 128, 5000, {"half": 0}),
    (32, 4, 128, 300, {"norm": FACTOR[0], "batch": 16}),
    (64, 8, 64, 77, {"sinks": torch.bfloat16, "window": 128, "slots": 128}),
    (64, 8, 64, 1000, {"sinks": torch.float32, "window": 128, "slots": 128}),
    (64, 8, 64, 1000, {"sinks": torch.bfloat16}),
    (16, 1, 128, 700, {"norm": FACTOR[0], "wide": True}),
    (12, 2, 96, 700, {"half": 24, "interleaved": True}),
    (28, 4, 128, 700, {"norm": Norm(1e-5, weight="none"), "after": True}),
    (8, 4, 256, 900, {"norm": FACTOR[1], "softcap": 30.0, "window": 512}),
    (4, 1, 256, 4000, {"norm": FACTOR[1], "wide": True, "half": 64}),
    (40, 8, 128, 9000, {"chunk": 8192, "interleaved": True, "norm": Norm(1e-5, weight="none")}),
    (32, 32, 64, 100, {"half": 16}),
    (7, 1, 32, 3000, {"slots": 2100}),
    (16, 8, 160, 500, {}),
]


@on_hopper
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token(shape: tuple[int, int, int, int, dict[str, Any]]) -> None:
    h, kv, d, position, how = shape
    torch.manual_seed(position)
    batch, slots, half = how.get("batch", 1), how.get("slots", position + 40), how.get("half", d // 2)
    fused = rand(batch, 1, (h + 2 * kv) * d)
    q, k, v = (x.view(batch, 1, -1, d) for x in fused.split((h * d, kv * d, kv * d), -1))
    keys, values = (rand(batch, kv, slots, d).transpose(1, 2) for _ in range(2))
    norm, weights = how.get("norm"), (None, None)
    if norm is not None and norm.weight != "none":
        wide = torch.float32 if how.get("wide") else torch.bfloat16
        weights = tuple(rand(d).to(wide) for _ in range(2))  # type: ignore[assignment]
    turn = attend.Turn(
        norm, weights, how.get("after", False), table(half, how.get("table", torch.bfloat16)) if half else None,
        how.get("interleaved", False),
    )  # fmt: skip
    sinks = rand(h).to(how["sinks"]) if "sinks" in how else None
    where = torch.tensor([position], device="cuda")
    kw = {
        "scale": d**-0.5, "sinks": sinks, "window": how.get("window"), "chunk": how.get("chunk"), "softcap": how.get("softcap"),
    }  # fmt: skip
    assert attend.serves(q, k, v, keys, values, turn, kw["window"], kw["chunk"], sinks)
    own = keys.clone(), values.clone()
    turned = place_reference(
        q, k, v, *own, where, turn.table, turn.interleaved, *turn.weights, turn.norm, turn.after
    )
    expected = decode_reference(turned[:, 0].float(), *(x.float() for x in own), where, **kw)
    before = keys.clone(), values.clone()
    y = attend.attend(q, k, v, keys, values, where, turn, **kw)
    assert bool(torch.isfinite(y).all())
    assert (y.float() - expected).norm() <= 0.006 * expected.norm()
    slot = position % slots
    assert torch.equal(values[:, slot], own[1][:, slot])
    assert (keys[:, slot].float() - own[0][:, slot].float()).norm() <= 0.004 * own[0][:, slot].float().norm()
    for now, was in zip((keys, values), before, strict=True):  # and nothing else was written
        now[:, slot] = was[:, slot]
        assert torch.equal(now, was)
    again = attend.attend(q, k, v, keys, values, where, turn, **kw)
    assert torch.equal(y, again)


@on_hopper
def test_what_it_does_not_serve() -> None:
    def serves(
        h: int, kv: int, d: int, t: int = 1, dtype: torch.dtype = torch.bfloat16, slots: int = 64
    ) -> bool:
        q, k, v = (rand(1, t, n, d).to(dtype) for n in (h, kv, kv))
        keys, values = (rand(1, kv, slots, d).to(dtype).transpose(1, 2) for _ in range(2))
        return attend.serves(q, k, v, keys, values, attend.Turn(None, (None, None), False, None, False))

    assert serves(8, 2, 64)
    assert not serves(8, 2, 80) and not serves(8, 2, 288) and not serves(34, 2, 64) and not serves(16, 1, 256)
    assert (
        serves(8, 2, 128, slots=8192)
        and not serves(8, 2, 128, slots=8193)
        and not serves(32, 16, 128, slots=8192)
    )
    assert not serves(8, 2, 64, t=2) and not serves(8, 2, 64, dtype=torch.float16)
