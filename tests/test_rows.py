"""Products of few rows on a CPU: the compiled kernel against exact sums, and that models come to it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from built import built, decoder
from torch import Tensor

from zoo.kernels import cpu, product
from zoo.kernels.cpu import kernels
from zoo.kernels.product import kernel

pytest.importorskip("numba")
from zoo.kernels.cpu import rows

# One process of the tests compiles: another would wait for it, or compile for itself.
pytestmark = pytest.mark.xdist_group("compiled for the CPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(found: Tensor, exact: Tensor) -> None:
    """Within the rounding of sums in fp32, and of the result in its dtype."""
    assert found.shape == exact.shape
    scale = exact.abs().max().clamp(min=1.0)
    rounding = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps / 2
    assert ((found.double() - exact).abs() <= 3e-6 * scale + rounding * exact.abs()).all()


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither AMX nor AVX-512's bf16 here, which have tests of their own; afterwards as many threads as before, and
    kernels looked for anew."""
    before = torch.get_num_threads()
    monkeypatch.setattr(product, "_made_for_bf16", lambda: None)
    yield
    torch.set_num_threads(before)
    kernels.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (8, 64), (23, 130), (70, 257), (23, 2051)])
def test_every_result_is_its_sum_whatever_the_shape(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w = rand(m, k, dtype=dtype), rand(n, k, dtype=dtype)
    exact = x.double() @ w.double().T
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(rows.times(x, w))
    close(found[0], exact)
    assert found[0].dtype == dtype
    assert torch.equal(rows.times(x, torch.nn.Parameter(w)), found[0])
    assert torch.equal(*found)  # how many threads there are changes no bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_rows_meet_the_matrix_of_their_expert(dtype: torch.dtype) -> None:
    x, w = rand(9, 37, dtype=dtype), rand(6, 21, 37, dtype=dtype)
    experts, counts = torch.tensor([5, 0, 3]), torch.tensor([1, 6, 2])
    expert = experts.repeat_interleave(counts)
    exact = torch.einsum("mk,mnk->mn", x.double(), w.double()[expert])
    close(rows.times(x, w, None, experts, counts), exact)
    bias = rand(6, 21, dtype=dtype)
    found = rows.times(x, w, bias, experts, counts)
    close(found, exact + bias.double()[expert])
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    assert torch.equal(rows.times(x[order], w, bias, experts, counts, order.argsort()), found)


def test_what_is_not_finite_stays_so() -> None:
    x, w = rand(1, 40, dtype=torch.bfloat16), rand(20, 40, dtype=torch.bfloat16)
    w[3, 5], w[7, 6], w[19, 0] = torch.nan, torch.inf, -torch.inf
    for m in (1, 3):
        y = rows.times(x.expand(m, -1), w)
        assert y[:, 3].isnan().all() and y[:, [7, 19]].isinf().all()
        assert y[:, [i for i in range(20) if i not in (3, 7, 19)]].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "llama4_scout", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_model_says_the_same_by_either(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    b = built(name)
    model = decoder(b.spec, b.tensors)
    ids = torch.arange(3, 3 + tokens)[None]
    before = model(ids)
    calls = []
    times = rows.times
    monkeypatch.setattr(rows, "times", lambda x, *a, **how: calls.append(x.shape) or times(x, *a, **how))
    monkeypatch.setattr(product, "LARGE", dict.fromkeys(DTYPES, 0))
    after = model(ids)
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)
    assert len(calls) > 4 * b.spec.n_layers - 2 and not torch.equal(after, before)


def test_without_numba_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = rand(2, 40), rand(20, 40)
    monkeypatch.setattr(product, "LARGE", dict.fromkeys(DTYPES, 0))
    monkeypatch.setitem(sys.modules, "zoo.kernels.cpu.rows", None)
    kernels.cache_clear()
    assert kernel(x, w, 2) is None
    assert torch.equal(product.product(x, w), x @ w.T)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_leaves_the_products_to_torch() -> None:
    script = """if True:
        import os, torch
        from zoo.kernels.product import kernel, product
        x, w = torch.ones(1, 1024), torch.ones(1024, 1024)
        assert kernel(x, w, 1) and product(x, w)[0, 0] == 1024
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)  # with more, torch itself hangs after a fork
            os._exit(7 if not kernel(x, w, 1) and product(x, w)[0, 0] == 1024 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert kernel(x, w, 1)
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_one_process_at_a_time_compiles() -> None:
    """Of two, each would write numba's index as it has read it, and find the other's code under its own key."""
    fcntl = pytest.importorskip("fcntl")
    folder = os.open(Path(cpu.__file__).parent, os.O_RDONLY)
    try:
        with cpu.one_process():
            with cpu.one_process():  # what calls another kernel
                pass
            with pytest.raises(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(folder, fcntl.LOCK_EX)  # unless another test compiles
    finally:
        os.close(folder)


def test_a_kept_kernel_is_of_todays_sources_and_not_of_its_own_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel has in it what it calls, of other files."""
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    named = {"__name__": __name__}  # a kernel that is found again imports the module that it is of
    (tmp_path / "other.py").write_text("def other(x):\n    return x\n")
    exec(
        compile((tmp_path / "other.py").read_text(), str(tmp_path / "other.py"), "exec"),
        elsewhere := dict(named),
    )
    one = (here := Path(cpu.__file__).parent) / "norm.py"
    exec(compile("def f(x):\n    return x + 1\n", str(one), "exec"), made := dict(named))

    def found(function: Any) -> bool:
        again = numba.njit(function, cache=True)
        gc.collect()  # of the one before, nothing is left
        assert again(1) in (1, 2)
        return bool(again.stats.cache_hits)

    cpu.stamp_by_all_sources()
    assert [found(made["f"]), found(made["f"]), found(elsewhere["other"]), found(elsewhere["other"])] == [
        False,
        True,
        False,
        True,
    ]
    monkeypatch.setattr(cpu, "_sources", lambda: "of another day")
    assert [found(made["f"]), found(elsewhere["other"])] == [False, True]
    assert here.is_dir() and not list(here.glob("__pycache__/norm.f-*"))


@pytest.mark.parametrize("most", [1, 3])
def test_torch_keeps_its_threads(most: int) -> None:
    """numba, when it starts its threads by OpenMP, sets how many torch has too."""
    script = """if True:
        import threading, torch
        from zoo.kernels.product import product
        def run(threads):
            torch.set_num_threads(threads)
            x, w = torch.ones(1, 1024), torch.ones(1024, 1024)
            for _ in range(2):
                assert (product(x, w) == 1024).all()
                assert torch.get_num_threads() == threads, torch.get_num_threads()
            done.append(threads)
        done = []
        for threads in (2, 1, 2):
            run(threads)
        other = threading.Thread(target=run, args=[1])
        other.start()
        other.join()
        assert done == [2, 1, 2, 1] and torch.get_num_threads() == 2
    """
    env = os.environ | {"NUMBA_NUM_THREADS": str(most)}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=env)


def test_numba_may_be_told_to_compile_for_any_cpu() -> None:
    script = """if True:
        import torch
        from zoo.kernels.cpu import kernels
        from zoo.kernels.product import product
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows in (1, 8, 40):
                x, w = torch.ones(rows, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
                assert (product(x, w) == 1024).all()
        for name in ("tiles", "dots"):
            assert (module := kernels(name)) is None or not module.available()
    """
    env = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=env)


@pytest.mark.parametrize("native", [True, False])
def test_which_products_come_to_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_native", lambda _: native)
    w = torch.empty(1024, 1024, dtype=torch.bfloat16)
    most = 2 if native else 16
    assert kernel(w[:most], w, most)
    assert not kernel(w[: most + 1], w, most + 1)
    assert kernel(w[:16].float(), w.float(), 16)  # of fp32 whatever the CPU says of bf16
    assert not kernel(w[:1].double(), w.double(), 1)
    assert not kernel(w[:1].float(), w, 1)
    assert not kernel(w[:1], w[:1023], 1)  # small
    assert kernel(w[:1].float(), w[:300].float(), 1)
    assert not kernel(w[:1].float(), w[:200].float(), 1)
    assert not kernel(w[:1], w.T, 1)
    assert not kernel(w[:0], w, 0)
