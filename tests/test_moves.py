"""Elements rearranged in memory, against numpy's own copy; files mapped and read."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.mapping import decode, moves, ways

SIZES = [1, 2, 3, 4, 8, 16, 17, 31, 64, 96, 100, 128, 130, 200, 260]


def views(n: int) -> list[np.ndarray]:
    """Permuted axes of random arrays of 2 to 4 axes, of 1 to 8 bytes an element."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(n):
        shape = [int(k) for k in rng.choice(SIZES, rng.integers(2, 5))]
        while np.prod(shape) > 200_000:
            shape[int(rng.integers(len(shape)))] = 2
        dtype = (np.uint8, np.uint16, np.uint32, np.uint64)[rng.integers(4)]
        x = rng.integers(0, 250, int(np.prod(shape))).astype(dtype).reshape(shape)
        out.append(x.transpose(rng.permutation(len(shape))))
    # what the families hold: transposed, with rows of gate and up in turn, and back
    x = rng.integers(0, 60_000, (3, 130, 2 * 200)).astype(np.uint16).reshape(3, 130, 200, 2)
    out += [x.transpose(0, 3, 2, 1), x.transpose(0, 3, 2, 1).copy().transpose(0, 3, 2, 1)]
    return out


@pytest.mark.parametrize("stripe", [1 << 10, 1 << 14, 1 << 20])
def test_any_view_is_written_as_numpy_copies_it(
    stripe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "STRIPE", stripe)
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    for view in views(400):
        os.ftruncate(fd, 0)
        os.ftruncate(fd, view.nbytes + 9)
        moves._stripes(fd, view, 5)
        raw = os.pread(fd, view.nbytes + 9, 0)
        assert raw[5:-4] == view.tobytes(), (view.shape, view.strides)
        assert not any(raw[:5]) and not any(raw[-4:])
    os.close(fd)


@pytest.mark.parametrize("mapped", [1, 1 << 40], ids=["mapped", "read"])
def test_a_range_of_a_file(mapped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_MAPPED", mapped)
    data = os.urandom(3 * mmap.PAGESIZE + 77)
    (tmp_path / "f").write_bytes(data)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    files = decode.Files(lambda file: fd)
    for at, n in ((0, len(data)), (1, 1), (4095, 2), (4096, 4096), (5000, 5000), (len(data) - 1, 1), (7, 0)):
        if n or mapped > 1:
            assert files("f", at, n).tobytes() == data[at : at + n]
    array = files("f", 0, len(data))
    array[:] = 0  # a copy of one's own
    assert (tmp_path / "f").read_bytes() == data
    with pytest.raises(ZooError, match=f"f: ends at byte {len(data)}, {len(data) + 1} were expected"):
        files("f", 5, len(data) - 4)
    os.close(fd)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Descriptors of a source and of an empty destination, and what the source holds."""
    data = os.urandom(3 * ways.BUFFER)
    (tmp_path / "f").write_bytes(data)
    src, dst = os.open(tmp_path / "f", os.O_RDWR), os.open(tmp_path / "g", os.O_RDWR | os.O_CREAT)
    yield src, dst, data
    os.close(src)
    os.close(dst)


@pytest.mark.parametrize("way", ways.WAYS)
def test_bytes_are_copied_from_any_place_to_any_place(
    way: str, pair: tuple[int, int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "WINDOW", ways.BUFFER + 8 * ways.PAGE)
    src, dst, data = pair
    n = 2 * ways.BUFFER + 100
    step = ways.WAYS[way]()
    for src_at in (0, 1, 63, 64, 4000, 4095, 4096, 5000):
        for dst_at in (0, 8, 31, 4095, 4097):
            os.ftruncate(dst, 0)
            ways.copy(step, src, src_at, dst, dst_at, n, "f")
            assert os.pread(dst, n + 9, dst_at) == data[src_at : src_at + n]


def test_while_one_thread_writes_into_a_file_another_reads(
    pair: tuple[int, int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst, data = pair
    lock, held, read, write = threading.Lock(), [], os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda *a: (held.append(("read", lock.locked())), read(*a))[1])
    monkeypatch.setattr(os, "pwrite", lambda *a: (held.append(("write", lock.locked())), write(*a))[1])
    ways.copy(ways.WAYS[ways.BUFFERED](), src, 3, dst, 7, 2 * ways.BUFFER, "f", lock)
    assert set(held) == {("read", False), ("write", True)} and not lock.locked()
    assert os.pread(dst, 2 * ways.BUFFER, 7) == data[3 : 3 + 2 * ways.BUFFER]


@pytest.mark.parametrize("way", ways.WAYS)
def test_a_source_that_is_cut_short_is_an_error_whichever_way_is_taken(
    way: str, pair: tuple[int, int, bytes]
) -> None:
    src, dst, data = pair
    step = ways.WAYS[way]()
    with pytest.raises(ZooError, match=f"f: ends at byte {len(data)}, 1 more were expected"):
        ways.copy(step, src, 5, dst, 9, len(data) - 4, "f")
    step = ways.WAYS[way]()
    assert step(src, 5, dst, 0, 10, ways.ALONE) == 10  # the source may be mapped now
    os.ftruncate(src, 100)
    with pytest.raises(ways.Unfit if way == ways.MAPPED else ZooError):
        ways.copy(step, src, 8192, dst, 9, 8192, "f")


def rates(chooser: ways.Chooser, gb: dict[tuple[str, int], float], steps: int) -> list[ways.Choice]:
    """What the chooser has copied by, where each choice takes the time that `gb` a second gives it."""
    found = []
    for _ in range(steps):
        choice, n = chooser.next()
        chooser.took(choice, n, n / (gb[choice] * 1e9))
        found.append(choice)
    return found


def test_the_fastest_way_is_found_and_several_threads_only_where_they_pay() -> None:
    gb = {("a", 1): 1.0, ("b", 1): 2.0, ("b", 2): 2.2, ("b", 4): 2.3, ("a", 4): 9.0}
    chosen = rates(ways.Chooser(["a", "b"], 4), gb, 11)
    assert chosen[:4] == [("a", 1), ("b", 1)] * 2
    assert chosen[4:8] == [("b", 2), ("b", 4)] * 2
    assert set(chosen[8:]) == {("b", 1)}
    assert rates(ways.Chooser(["a", "b"], 4), gb | {("b", 4): 2.5}, 9)[-1] == ("b", 4)
    assert rates(ways.Chooser(["a", "b"], 1), gb, 5)[-1] == ("b", 1)
    buffered = {(ways.BUFFERED, n): gb for n, gb in ((1, 0.9), (2, 3.0), (4, 1.0))}  # one reads, one writes
    assert rates(ways.Chooser(["b", ways.BUFFERED], 4), gb | buffered, 13)[-1] == (ways.BUFFERED, 2)


def test_what_is_cut_short_says_nothing_and_a_rate_that_falls_is_looked_into() -> None:
    chooser = ways.Chooser(["a", "b"], 1)
    chooser.took(chooser.next()[0], 1000, 1e-9)
    gb = {("a", 1): 2.0, ("b", 1): 1.0}
    assert rates(chooser, gb, 6)[-2:] == [("a", 1)] * 2
    assert rates(chooser, {("a", 1): 0.2, ("b", 1): 0.4}, 6) == [
        ("a", 1),
        *[("a", 1), ("b", 1)] * 2,
        ("b", 1),
    ]


def test_seconds_in_which_others_have_the_processor_do_not_count() -> None:
    clock, cpu = ways.Clock(), time.thread_time()
    while time.thread_time() - cpu < 0.01:
        pass
    time.sleep(0.02)  # waiting for a disk counts
    assert 0.03 <= clock.seconds


class Held:
    """A loader of what is in memory."""

    chunk = most = 1 << 20
    grain = 1

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def read(self, at: int, n: int) -> np.ndarray:
        assert at + n <= self.data.size
        return self.data.reshape(-1)[at : at + n]


@pytest.mark.parametrize("stripe", [1, 100, 1 << 20])
@pytest.mark.parametrize(
    ("rows", "widths"), [(1, (5, 5)), (7, (3, 3, 3)), (50, (8,) * 8), (13, (4, 5)), (6, (9,))]
)
def test_columns_of_several_ranks_are_written_as_one_matrix(
    rows: int, widths: tuple[int, ...], stripe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "STRIPE", stripe)
    whole = np.random.default_rng(0).integers(0, 60_000, (rows, sum(widths))).astype(np.uint16)
    edges = np.cumsum((0, *widths))
    parts = []
    for at, end in itertools.pairwise(edges):
        loop = ((rows, int(end - at), sum(widths)), (int(end - at), 1, 1))
        loader = Held(np.ascontiguousarray(whole[:, at:end]))
        parts.append(moves.Rearrange(loader, "f", 6, 2, loop, 0, int(at)))
    moved = moves.woven(parts[::-1])
    alike = len(set(widths)) == 1 and len(widths) > 1
    assert [type(m) for m in moved] == ([moves.Woven] if alike else [moves.Rearrange] * len(widths))
    assert sum(m.nbytes for m in moved) == whole.nbytes
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    for m in moved:
        chunks = list(m.chunks())
        assert sum(c.nbytes for c in chunks) == m.nbytes
        for c in chunks:
            c.run(fd)
    assert os.pread(fd, whole.nbytes + 99, 6) == whole.tobytes()
    os.close(fd)


def test_columns_with_others_between_them_stay_apart() -> None:
    loop = ((4, 3, 12), (3, 1, 1))  # of four ranks; the second is missing
    parts = [moves.Rearrange(Held(np.zeros((4, 3), np.uint16)), "f", 0, 2, loop, 0, 3 * k) for k in (0, 2, 3)]
    assert moves.woven(parts) == parts


def test_experts_below_one_another_are_woven_each_by_itself() -> None:
    loop = ((4, 3, 6), (3, 1, 1))  # two ranks of two experts of [4, 6]
    held = Held(np.zeros((4, 3), np.uint16))
    parts = [moves.Rearrange(held, "f", 0, 2, loop, 0, at) for at in (0, 3, 24, 27)]
    found = moves.woven(parts)
    assert [(type(m), m.at, m.nbytes) for m in found] == [(moves.Woven, 0, 48), (moves.Woven, 48, 48)]
