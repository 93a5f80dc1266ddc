"""Products of bf16 by AMX and by AVX-512 against exact sums, where this CPU has them; and weighted rows added to tokens, on
every CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from built import decoder
from torch import Tensor

from zoo.families import spec_of
from zoo.kernels import product
from zoo.model import Decoder, moe

pytest.importorskip("numba")
from zoo.kernels.cpu import dots, scatter, tiles

# One process of the tests compiles: another would wait for it, or compile for itself.
pytestmark = pytest.mark.xdist_group("compiled for the CPU")

each = pytest.mark.parametrize("of", [
    pytest.param(tiles, id="tiles", marks=pytest.mark.skipif(not tiles.available(), reason="this CPU has no AMX")),
    pytest.param(dots, id="dots", marks=pytest.mark.skipif(not dots.available(), reason="this CPU has no AVX-512 bf16")),
])  # fmt: skip
BF16 = torch.bfloat16


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(found: Tensor, exact: Tensor) -> None:
    assert found.dtype == BF16 and found.shape == exact.shape
    error = (found.double() - exact).abs()
    assert (error <= exact.abs() / 256 + 3e-6 * exact.abs().max().clamp(min=1.0)).all()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@each
@pytest.mark.parametrize("m", [1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 47, 64, 113])
@pytest.mark.parametrize(("blocks", "k"), [(1, 32), (3, 64), (2, 736), (9, 96)])
def test_every_result_is_its_sum_whatever_the_shape(of: ModuleType, m: int, blocks: int, k: int) -> None:
    n = blocks * of.BLOCK
    x, w, bias = rand(m, k), rand(n, k), rand(n)
    exact = x.double() @ w.double().T
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(of.times(x, w))
    close(found[0], exact)
    assert torch.equal(*found)  # how many threads there are changes no bit
    close(of.times(x, torch.nn.Parameter(w), bias), exact + bias.double())
    # a weight mapped from a file begins anywhere, and x may be a part of something wider
    apart = torch.cat([rand(m, 8), x], 1)[:, 8:]
    shifted = torch.cat([rand(3), w.flatten()])[3:].view(n, k)
    assert torch.equal(of.times(apart, shifted), found[0])


@each
@pytest.mark.parametrize("bias", [False, True])
def test_groups_of_rows_meet_the_matrix_of_their_expert(of: ModuleType, bias: bool) -> None:
    x, w, b = rand(90, 64), rand(6, 96, 64), rand(6, 96)
    experts, counts = torch.tensor([5, 0, 3, 4]), torch.tensor([1, 40, 32, 17])
    expert = experts.repeat_interleave(counts)
    exact = torch.einsum("mk,mnk->mn", x.double(), w.double()[expert])
    found = of.times(x, w, b if bias else None, experts, counts)
    close(found, exact + b.double()[expert] if bias else exact)
    # the rows of a group know nothing of the others
    alone = of.times(x[1:41], w[0], b[0] if bias else None)
    assert torch.equal(found[1:41], alone)
    # and may be taken from where they lie
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    tokens = shuffled.argsort()
    assert torch.equal(of.times(x[shuffled], w, b if bias else None, experts, counts, tokens), found)


@each
@pytest.mark.parametrize("m", [1, 20])
def test_what_is_not_finite_stays_so(of: ModuleType, m: int) -> None:
    x, w = rand(m, 64), rand(64, 64)
    w[3, 5], w[40, 6], w[63, 0] = torch.nan, torch.inf, -torch.inf
    y = of.times(x, w)
    assert y[:, 3].isnan().all() and y[:, [40, 63]].isinf().all()
    assert y[:, [i for i in range(64) if i not in (3, 40, 63)]].isfinite().all()
    if m > 1:
        w, x = rand(64, 64), rand(m, 64)
        x[7, 9] = torch.nan
        y = of.times(x, w)
        assert y[7].isnan().all() and y[[i for i in range(m) if i != 7]].isfinite().all()
    assert of.times(torch.full((m, 32), 3e38).to(BF16), torch.ones(32, 32, dtype=BF16)).isinf().all()


@each
def test_results_are_rounded_to_the_nearest_even(of: ModuleType) -> None:
    x = torch.ones(1, 32, dtype=BF16)
    w = torch.zeros(32, 32, dtype=BF16)
    w[:, 0] = torch.arange(32) + 128  # 128 to 159: the last bit of bf16 is 1
    w[:, 1] = 0.5  # half way
    assert torch.equal(of.times(x, w)[0], (w[:, 0].float() + 0.5).to(BF16))


@pytest.mark.parametrize(("of", "n", "k", "m", "ours"), [
    (tiles, 1024, 1024, 256, True), (tiles, 1024, 1024, 257, False), (tiles, 1024, 4096, 128, True),
    (tiles, 1024, 4096, 129, False), (tiles, 1040, 1024, 20, False), (tiles, 1024, 1040, 20, False),
    (tiles, 512, 1024, 20, False), (tiles, 1024, 1024, 1, True), (tiles, 1024, 2048, 1, False), (tiles, 1024, 2048, 2, True),
    (dots, 1024, 1024, 128, True), (dots, 1024, 1024, 129, False), (dots, 1024, 4096, 64, True), (dots, 1024, 4096, 65, False),
    (dots, 1028, 1024, 20, True), (dots, 1026, 1024, 20, False), (dots, 1024, 1040, 20, False), (dots, 512, 1024, 20, False),
    (dots, 1024, 1024, 1, True), (dots, 1024, 2048, 1, False), (dots, 1024, 2048, 2, True),
])  # fmt: skip
def test_which_products_come_to_it(
    of: ModuleType, n: int, k: int, m: int, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "_made_for_bf16", lambda: of)
    x, w = torch.empty(m, k, dtype=BF16), torch.empty(n, k, dtype=BF16)
    assert (product.kernel(x, w, m) is of.times) is ours
    assert product.kernel(x.half(), w.half(), m) is not of.times


def test_tiles_come_before_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_tiles, has_dots, best in ((True, True, tiles), (False, True, dots), (False, False, None)):
        monkeypatch.setattr(tiles, "available", lambda has=has_tiles: has)
        monkeypatch.setattr(dots, "available", lambda has=has_dots: has)
        assert product._made_for_bf16.__wrapped__() is best


CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "vocab_size": 128, "head_dim": 32, "torch_dtype": "bfloat16", "max_position_embeddings": 64,
    "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@each
@pytest.mark.parametrize("tokens", [1, 23])
def test_a_model_says_the_same_by_either(
    of: ModuleType, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(CONFIG)
    tensors = {
        name: rand(*p.shape, i + 1)[..., 0] / 5 + (p.dim() == 1)
        for i, (name, p) in enumerate(Decoder(spec).named_parameters())
    }
    model, exact = decoder(spec, tensors), decoder(spec, {n: t.double() for n, t in tensors.items()})
    ids = torch.arange(3, 3 + tokens)[None]
    right, before = exact(ids), model(ids).double()
    calls = []
    times = of.times
    monkeypatch.setattr(product, "_made_for_bf16", lambda: of)
    monkeypatch.setattr(of, "times", lambda x, *a, **how: calls.append(x.shape) or times(x, *a, **how))
    monkeypatch.setattr(product, "LARGE", {BF16: 0})
    after = model(ids).double()
    assert len(calls) >= 2 * 4 + 1  # each layer: attention's two, the experts' two; the head
    assert (after - right).norm() <= 1.1 * (before - right).norm()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_added_where_they_belong(weighted: bool, dtype: torch.dtype) -> None:
    rows, at = rand(40, 37, dtype=dtype), torch.randint(0, 9, (40,))
    shares = torch.rand(40, 1).to(dtype) if weighted else None
    out = rand(9, 37, dtype=torch.float32)
    weighted_rows = rows.double() * (1 if shares is None else shares.double())
    exact = out.double().index_add(0, at, weighted_rows)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(out.clone())
        scatter.add_rows(found[-1], rows, at, shares)
    torch.testing.assert_close(found[0].double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(*found)


def test_experts_are_taken_together_while_they_fit() -> None:
    def parts(sizes: list[int], most: int) -> list[tuple[int, int, int]]:
        return [(p.start, p.stop, n) for p, n in moe._parts(sizes, lambda rows: rows <= most)]

    assert parts([], 9) == []
    assert parts([3, 4, 5], 9) == [(0, 3, 12)]
    assert parts([3, 4, 5], 0) == [(0, 1, 3), (1, 2, 4), (2, 3, 5)]
    assert parts([3, 10, 4, 5, 11], 9) == [(0, 1, 3), (1, 2, 10), (2, 4, 9), (4, 5, 11)]
    assert parts([500, 200, 68, 1], 600) == [(0, 3, 768), (3, 4, 1)]
    assert parts([769, 1], 900) == [(0, 1, 769), (1, 2, 1)]
