"""Ranks that share a model: its logits, to the bit the same on all of them; a rank reads its part of the files alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny
import torch
import verified
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.cli import cli
from zoo.cli._common import run as run_here
from zoo.errors import ZooError
from zoo.formats import canonical, open_checkpoint
from zoo.formats.base import TensorRef
from zoo.kernels.product import unrounded
from zoo.mapping.plan import make_plan
from zoo.model import upload
from zoo.model.upload import GAP, SPARED, Mapped, _vectored, read_rows
from zoo.quant import dequantise
from zoo.quant.base import grid
from zoo.quant.schemes import scheme
from zoo.spec import (
    MLP,
    Alibi,
    Attention,
    DeltaNet,
    Indexer,
    LatentAttention,
    Layer,
    Mamba,
    MoE,
    Norm,
    PerLayerEmbedding,
    QKNorm,
    Rope,
    Router,
    ShortConv,
    Spec,
)
from zoo.split import Cut, allowed, component_cut, pieces, split, uneven
from zoo.testing.built import checkpoint
from zoo.verify.compare import rounding
from zoo.verify.inputs import Batch, Inputs
from zoo.verify.oracle import CannotRun
from zoo.verify.ranks import Following, Leading, Task
from zoo.verify.tolerance import FACTOR, logit_bound

ROOT = Path(__file__).parents[1]
RMS, LAYER = Norm(1e-6), Norm(1e-5, kind="layer")
HEAD = Rope(10_000.0, 8)


def attention(heads: int = 8, kv: int = 4, **how: Any) -> Attention:
    return Attention(heads, kv, 8, scale=8**-0.5, **how)


def latent(**how: Any) -> LatentAttention:
    return LatentAttention(4, 16, 8, 8, 8, 0.25, RMS, rope=HEAD, **how)


# One layer for every way to cut a part, and one norm for every way to take its mean over ranks. Of an indexer with few heads
# many keys score 0 in all of them, and which of the tied ones are taken depends on how many there are: read token by token the text
# would be another (with 2 heads by up to 6 in a logit).
PATCHWORK = Spec(
    family="llama",
    d_model=32,
    vocab_size=64,
    norm=RMS,
    tied=False,
    head_bias=True,
    context_length=64,
    positions=64,
    positions_offset=2,
    per_layer_embedding=PerLayerEmbedding(48, 8, RMS),
    layers=tuple(
        Layer(mixer, ffn, attn_norm=RMS, ffn_norm=RMS, **how)
        for mixer, ffn, how in (
            (attention(rope=HEAD, window=9, sinks=True, qkv_bias=True, out_bias=True), MLP(24, bias=True), {}),
            (attention(kv=1, alibi=Alibi()), MLP(16, act="xielu", gated=False), {"parallel": True}),
            (
                attention(kv=2, qk_norm=QKNorm(RMS, "all_heads"), gate=True, v_head_dim=4, rope=HEAD),
                MoE(8, MLP(8, bias=True), Router(2, "softmax", bias=True), MLP(8, bias=True), shared_gate=True),
                {},
            ),
            (
                attention(qk_norm=QKNorm(LAYER, "each_head"), softcap=20.0, gate=True, gate_over="head"),
                MoE(
                    8,
                    MLP(8),
                    Router(2, "sigmoid", selection_bias=True, n_groups=2, top_groups=1, normalize=True),
                    latent=16,
                    weight_input=True,
                    routed_scale=1.5,
                    scale=0.5,
                ),
                {},
            ),
            (
                latent(q_rank=16, qkv_bias=True, out_bias=True, indexer=Indexer(8, 8, 12, HEAD, LAYER)),
                MoE(
                    4, MLP(8), Router(1, "softmax"), MLP(8), norm=RMS, post_norm=RMS, shared_post_norm=RMS
                ),
                {},
            ),
            (latent(indexer_from=4), MLP(16), {"residual_scale": 0.5}),
            (DeltaNet(2, 8, 8, 4, 4, "head", "silu", RMS), MLP(16), {}),
            (DeltaNet(4, 4, 8, 8, 4, "channel", "sigmoid", RMS), None, {}),
            (Mamba(8, 4, 2, 8, 4, RMS, norm_first=True), None, {}),
            (
                attention(rope=HEAD),
                MLP(16, sparsity=0.5),
                {"beside": Mamba(8, 4, 4, 8, 4, None, parts_scales=(1.5, 0.5, 2.0, 1.0, 1.5), out_scale=0.5)},
            ),
            (ShortConv(3, bias=True), MLP(16), {"adds": "in_turn", "parallel": True}),
            (attention(kv_from=3), MLP(16), {"attn_post_norm": RMS, "ffn_post_norm": RMS}),
        )
    ),
)  # fmt: skip
# Ids that no number of ranks divides; the head is the embedding.
PLAIN = dataclasses.replace(
    PATCHWORK,
    vocab_size=61,
    tied=True,
    head_bias=False,
    layers=PATCHWORK.layers[:1],
    per_layer_embedding=None,
)
# What passes by rows go through: a matrix that is cut, and the next; the head is of its own.
BY_ROWS = dataclasses.replace(
    PLAIN,
    vocab_size=64,
    tied=False,
    head_bias=True,
    layers=(
        *PATCHWORK.layers[:2],
        Layer(
            attention(kv=2, qk_norm=QKNorm(RMS, "all_heads"), gate=True, v_head_dim=4, rope=HEAD),
            MLP(16, out_scale=0.5),
            attn_norm=RMS, ffn_norm=LAYER, attn_post_norm=RMS, ffn_post_norm=RMS, residual_scale=0.5, scalar=True,
        ),
    ),
)  # fmt: skip
SPECS = {"patchwork": PATCHWORK, "plain": PLAIN, "by rows": BY_ROWS}


def run(work: Path, *jobs: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ranks.py"), str(work), *jobs], env=env, timeout=1200
    )
    assert done.returncode == 0


@dataclasses.dataclass
class Shared:
    """What ranks said of folders: `of[ranks][rank][folder]`, what one process does: `one[folder]`, and `ranks.nudged` of
    the patchwork."""

    work: Path
    of: dict[int, list[dict[str, Any]]]
    one: dict[str, dict[str, Tensor]]
    nudged: dict[str, float]


def shared_by(work: Path, specs: dict[str, Spec], *jobs: str) -> Shared:
    """Those models, run by one process, by 4 ranks, and twice by 2; and other jobs that the ranks have."""
    one = {}
    for name, spec in specs.items():
        one[name] = ranks.answers(zoo.load(ranks.written(spec, work / name)))
    nudged = {}
    if "patchwork" in specs:
        nudged["patchwork"] = ranks.nudged(zoo.load(work / "patchwork"))
        torn(work / "patchwork", work / "torn", 4)
    run(work, "4", *jobs)
    of = {n: [torch.load(work / f"answers-{n}-{r}.pt") for r in range(4)] for n in (2, 4)}
    return Shared(work, of, one, nudged)


def torn(folder: Path, copy: Path, n: int) -> None:
    """A copy for each rank, in which all that is another's is NaN."""
    for r in range(n):
        own = shutil.copytree(folder, copy / f"{n}-{r}")
        of = canonical.read(own)
        for file in {ref.file for ref in of.tensors.values()}:
            data = (own / file).read_bytes()
            header = 8 + int.from_bytes(data[:8], "little")
            left = bytearray(data[:header]) + b"\xff" * (len(data) - header)
            for at, end in read_by(of, n, r):
                left[at:end] = data[at:end]
            (own / file).write_bytes(left)


def read_by(folder: canonical.Canonical, n: int, r: int, names: Any = None) -> Iterator[tuple[int, int]]:
    """The byte ranges of the folder's one file that a rank reads."""
    cuts = split(folder.spec, n, r).cuts
    for name, ref in folder.tensors.items():
        if names is None or name in names:
            for p in pieces(ref, cuts.get(name)):
                for row in range(p.rows):
                    yield p.offset + row * p.stride, p.offset + row * p.stride + p.nbytes


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """`SPECS`, and the lines of `commands_of`."""
    work = tmp_path_factory.mktemp("mesh")
    (work / "commands.json").write_text(json.dumps([*commands_of(work).values()]))
    ranks.written(ODD, work / "aside" / "odd")
    for r in (0, 1):
        ranks.written(PLAIN, work / f"of-{r}" / "local")
    (work / "of-1" / "local" / "zoo.json").write_text("{}")  # as on a machine of its own
    return shared_by(work, SPECS, "commands")


def departures(shared: Shared) -> dict[str, str]:
    """Where ranks are not what one process is: folder -> what differs. The bound is verification's: twice what one process
    differs from itself by, here a text read at once and token by token, or by rounding at the scale of the logits. Of the patchwork
    also with each layer's output off by two units in the last place: norms over few channels that nearly vanish (a delta rule's head of
    8, a Mamba group, at the first tokens) make 1e-4 of one unit. Over 60 texts four ranks were off by more than the other two in 15."""
    found = {}
    ways = itertools.product(shared.of.items(), shared.one.items(), ("", ", by rows"))
    for (n, by_rank), (name, one), way in ways:
        said = [rank[name + way] for rank in by_rank if name + way in rank]
        if not said:
            continue
        largest = float(one["logits"].abs().max())
        by_scale = logit_bound("fp32", "max", rounding("fp32", largest, "logits of one process"), largest)
        itself = max(float((one["cached"] - one["logits"]).abs().max()), shared.nudged.get(name, 0.0))
        bound = max(by_scale.value, FACTOR * itself)
        errors = {k: float((said[0][k] - one[k]).abs().max()) for k in ("logits", "cached")}
        if not max(errors.values()) <= bound:
            found[f"{name}{way}, {n} ranks"] = f"{errors}, at most {bound:.1e}"
        elif not all(torch.equal(said[0][k], s[k]) for s in said[1:] for k in one):
            found[f"{name}{way}, {n} ranks"] = "ranks, or runs, differ"
    return found


def test_ranks_have_the_logits_of_one_process_at_once_and_cached_and_all_and_every_run_the_same_bits(
    shared: Shared,
) -> None:
    assert departures(shared) == {}
    assert float(shared.one["patchwork"]["logits"].std()) > 0.3
    # No choice hangs by a hair, which would make of a logit another: the bound says something. Over 20 texts this was 4e-5 to 6e-4 with
    # torch's norms, 4e-5 to 8e-4 with ours.
    for name, one in shared.one.items():
        assert max(float((one["cached"] - one["logits"]).abs().max()), shared.nudged.get(name, 0.0)) < 2e-3, (
            name
        )
    by_rows = {
        name for said in shared.of.values() for rank in said for name in rank if name.endswith(", by rows")
    }
    assert by_rows == {"plain, by rows", "by rows, by rows"}


def test_a_rank_reads_nothing_of_the_files_but_its_part(shared: Shared) -> None:
    for rank in shared.of[4]:
        assert torch.equal(rank["torn"]["logits"], rank["patchwork"]["logits"])


def test_a_rank_reads_its_share_of_what_is_split(shared: Shared) -> None:
    folder = canonical.read(shared.work / "patchwork")
    for n in (2, 4):
        cuts = [split(PATCHWORK, n, r).cuts for r in range(n)]
        ends = {x for x in cuts[1] if not cuts[1][x].ranges}
        names = set(cuts[1]) - ends
        whole = sum(folder.tensors[x].nbytes for x in names)
        for r in range(n):
            read = sum(end - at for at, end in read_by(folder, n, r, names))
            # more than its n-th: of few key/value heads or groups several ranks have the same one
            assert whole / n <= read <= whole * 1.06 / n
            held = shared.of[n][r]["patchwork"]["held"]
            assert read == sum(b for x, b in held.items() if x in names)
        for name in names | ends:
            covered = sorted({x for r in range(n) for x in read_by(folder, n, r, {name})})
            assert sum(end - at for at, end in covered) == folder.tensors[name].nbytes, name
    split_up = sum(folder.tensors[x].nbytes for x in names)
    assert split_up > 0.75 * sum(t.nbytes for t in folder.tensors.values())


def test_what_ranks_cannot_share_is_refused_by_name() -> None:
    def of(layer: Layer) -> Spec:
        return dataclasses.replace(PATCHWORK, layers=(PATCHWORK.layers[0], layer), d_model=30)

    wrong = {
        "layer 1 has 6 query heads": Layer(attention(6, 2), None),
        "layer 1 has 3 key/value heads": Layer(attention(12, 3), None),
        "layer 1 has 3 groups": Layer(Mamba(12, 4, 3, 8, 4, RMS), None),
        "layer 1 has 6 value heads": Layer(DeltaNet(2, 6, 8, 8, 4, "head", "silu", RMS), None),
        "layer 1 has 30 channels": Layer(ShortConv(3), None),
        "layer 1 has 18 inner channels": Layer(None, MLP(18)),
        "layer 1 has 6 experts": Layer(None, MoE(6, MLP(8), Router(1, "softmax"))),
        "inner channels in its shared MLP": Layer(None, MoE(8, MLP(8), Router(1, "softmax"), MLP(6))),
        "all gates decide": Layer(None, MoE(8, MLP(8), Router(1, "softmax"), MLP(8, sparsity=0.5))),
        "weighted by their input": Layer(
            None, MoE(8, MLP(8, bias=True), Router(1, "softmax"), weight_input=True)
        ),
    }
    for says, layer in wrong.items():
        with pytest.raises(ZooError, match=says):
            split(of(layer), 4, 0)
    assert allowed(PATCHWORK) == [1, 2, 4]
    with pytest.raises(ZooError, match="numbers of ranks that would do: 1, 2, 4"):
        split(PATCHWORK, 3, 0)


def test_columns_are_read_many_rows_to_a_call_and_to_the_last_byte_of_the_file(tmp_path: Path) -> None:
    path, data = tmp_path / "file", bytes(i * i % 251 for i in range(1 << 18))
    path.write_bytes(data)
    with path.open("rb") as f:
        for row, gap, n in ((64, 36, 1300), (100, GAP, 3), (100, GAP + 1, 3), (64, 0, 9)):
            start, into = len(data) - n * row - (n - 1) * gap, bytearray(n * row)
            read_rows(path, f.fileno(), start, memoryview(into), row, row + gap)
            assert into == b"".join(data[start + i * (row + gap) :][:row] for i in range(n))
            with pytest.raises(ZooError, match=f"file: ends at byte {len(data)}"):
                read_rows(path, f.fileno(), start + 1, memoryview(into), row, row + gap)


@pytest.mark.skipif(_vectored() is None, reason="no process_vm_readv here")
def test_rows_of_a_file_in_memory_are_read_without_what_lies_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, row, gap, n = tmp_path / "file", 3000, SPARED, 1100
    data, cut = os.urandom(n * (row + gap) + 7), 7 + 500 * (row + gap) + row // 2
    path.write_bytes(data)
    along = upload._read_along
    monkeypatch.setattr(upload, "_read_along", None)
    with path.open("r+b") as f:
        mapped, into = Mapped(f.fileno()), bytearray(n * row)
        read_rows(path, f.fileno(), 7, memoryview(into), row, row + gap, mapped)
        assert into == b"".join(data[7 + i * (row + gap) :][:row] for i in range(n))
        monkeypatch.setattr(upload, "_read_along", along)
        f.truncate(cut)
        with pytest.raises(ZooError, match=f"file: ends at byte {cut}"):  # no signal
            read_rows(path, f.fileno(), 7, memoryview(into), row, row + gap, mapped)


def test_what_ranks_add_up_of_bf16_on_cpus_is_rounded_once() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=g).to(torch.bfloat16) for shape in ((70, 64), (90, 64), (90,)))
    exact = (x.double() @ w.double().T + b.double()).to(torch.bfloat16)
    parts = unrounded(x[:, :32], w[:, :32], b) + unrounded(x[:, 32:], w[:, 32:])
    rounded = parts.new_zeros(()) + F.linear(x[:, :32], w[:, :32], b) + F.linear(x[:, 32:], w[:, 32:])
    assert float((parts.to(torch.bfloat16) == exact).float().mean()) > 0.99
    assert float((rounded.to(torch.bfloat16) == exact).float().mean()) < 0.9


def narrowed(x: Tensor, cut: Cut | None) -> Tensor:
    if cut is None:
        return x
    return torch.cat([x.narrow(cut.axis, a, b - a) for a, b in cut.ranges], cut.axis)


CODES = {
    "fp8-block-64x32": torch.float32, "fp8-channel": torch.bfloat16, "fp8-tensor": torch.float32,
    "mxfp4": torch.uint8, "int4-group32": torch.float32, "gptq4-group32": torch.float32, "gptq3-channel": torch.float32,
    "awq4-group64": torch.float32,
}  # fmt: skip


@pytest.mark.parametrize("how", CODES)
def test_what_a_rank_has_of_codes_and_scales_stands_for_its_part_of_the_weight(how: str) -> None:
    g = torch.Generator().manual_seed(0)
    stored = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I32": torch.int32}
    for lead, axis in (((), 0), ((), 1), ((4,), 0)):
        parts, columns = (128, 256), 128
        whole, found, cuts = (*lead, sum(parts), columns), {}, {}
        sizes = parts if axis == len(lead) else (whole[axis],)
        at = list(itertools.accumulate((0, *sizes)))
        cut = Cut(axis, sizes, tuple((a + s // 2, a + s) for a, s in zip(at, sizes, strict=False)))
        for c in scheme(how).components:
            if c.optional:
                continue
            if c.unit is None:
                shape = (*lead, 2 * len(parts)) if c.name == "shape" else (*lead, len(parts), 1)
            else:
                rows, rest = grid(c, parts, columns)
                shape = (*lead, sum(rows), *rest)
            if c.name == "weight":
                x = torch.randint(0, 120, shape, generator=g).to(torch.uint8)
                x = x.to(torch.int32) * 7919 if c.dtypes[0] == "I32" else x
                x = x.view(stored[c.dtypes[0]]) if how.startswith("fp8") else x
            elif c.name == "shape":
                x = torch.tensor([(p, columns) for p in parts]).flatten().expand(shape)
            else:
                kind = torch.int32 if c.dtypes[0] == "I32" else CODES[how]
                x = torch.randint(118, 125, shape, generator=g).to(kind)
            found[c.name] = x
            ref = TensorRef(c.name, c.dtypes[0], shape, "file", 0, 0)
            cuts[c.name] = component_cut(cut, whole, c, ref, how)
        part = {n: narrowed(x, cuts[n]) for n, x in found.items() if cuts[n] is None or cuts[n].ranges}
        own = cut.sizes if axis == len(lead) else parts
        want = narrowed(dequantise(how, found, parts, torch.float32), cut)
        assert torch.equal(dequantise(how, part, own, torch.float32), want), (lead, axis)


def test_a_block_of_codes_that_two_ranks_would_share_is_refused_by_name() -> None:
    scale = scheme("fp8-block").component("scale")
    ref = TensorRef("layers.0.mlp.down.scale", "F32", (2, 3), "model-1.safetensors", 0, 0)
    says = "model-1.safetensors: layers.0.mlp.down.scale is of fp8-block, where 128 columns go together, and this rank would "
    with pytest.raises(ZooError, match=says + "have columns 192 to 384 of 384"):
        component_cut(Cut(1, (384,), ((192, 384),)), (256, 384), scale, ref, "fp8-block")


@pytest.mark.proof
def test_every_variant_of_every_family_with_even_counts_is_shared_to_the_same_logits(tmp_path: Path) -> None:
    specs = {}
    for name, variant in tiny.VARIANTS.items():
        released = checkpoint(tiny.CASES[variant.family], variant)
        specs[name] = ranks.evened(make_plan(open_checkpoint(released)).spec)
    alone = {
        name for name, spec in specs.items() if any("do not share yet" in why for why in uneven(spec, 2))
    }
    assert {tiny.VARIANTS[name].family for name in alone} == {"deepseek_v4"}
    specs = {name: spec for name, spec in specs.items() if name not in alone}
    assert departures(shared_by(tmp_path, specs)) == {}


# --- commands ------------------------------------------------------------------------------------------------

ODD = dataclasses.replace(
    PLAIN, layers=(Layer(attention(3, 3, rope=HEAD), MLP(12), attn_norm=RMS, ffn_norm=RMS),)
)


def commands_of(work: Path) -> dict[str, list[str]]:
    plain = ["generate", str(work / "plain")]
    given = ["--ids", "-n", "5"]
    return {
        "greedy": [*plain, "1 2 3", *given],
        "drawn": [*plain, "1 2 3", *given, "--temperature", "1", "--seed", "3"],
        "odd": ["generate", str(work / "aside" / "odd"), "1 2 3", *given],
        "damaged": ["generate", "local", "1 2 3", *given],
        "unknown": [*plain, "1 99", *given],
    }


def said(work: Path, n: int) -> tuple[list[str], list[str], list[int]]:
    """What each of the two ranks of a command wrote on stdout and on stderr, and its exit code."""
    out, err, code = (
        [(work / f"{n}-{r}.{kind}").read_text() for r in (0, 1)] for kind in ("out", "err", "code")
    )
    return out, err, [int(c) for c in code]


def test_of_the_ranks_of_a_command_the_first_speaks_and_one_that_fails_says_why_and_ends_all(
    shared: Shared, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = commands_of(shared.work)
    of = {name: said(shared.work, n) for n, name in enumerate(lines)}
    for name in ("greedy", "drawn"):
        out, err, codes = of[name]
        assert run_here(cli, lines[name]) == 0
        assert out == [capsys.readouterr().out, ""] and codes == [0, 0]
        assert err[0].startswith("5 tokens in ") and err[1] == ""
    assert of["greedy"][0] != of["drawn"][0]
    why = {
        "odd": "2 ranks cannot share this model: layer 0 has 3 query heads; numbers of ranks that would do: 1, 3\n",
        "damaged": "rank 1: local/zoo.json: ",
        "unknown": "token id 99 is outside the vocabulary of 61\n",
    }
    for name, says in why.items():
        out, err, codes = of[name]
        assert out == ["", ""] and all(codes)
        assert sorted(bool(text) for text in err) == [False, True] and says in "".join(err)
    assert of["damaged"][1][0] == ""


@pytest.mark.proof
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen3_5"])
def test_torchrun_verifies_as_one_process_does_and_generates_the_same(name: str, tmp_path: Path) -> None:
    canon = verified.canonical(name)

    def torchrun(*line: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        how = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "zoo", *line]
        done = subprocess.run([sys.executable, *how], env=env, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for dtype in ("fp32", "bf16"):
        text = torchrun("verify", str(canon), "--dtype", dtype, "--json", "-o", str(tmp_path / "parity.json"))
        cert = json.loads(text)
        assert cert["verdict"] == "passed" and cert["device"]["ranks"] == 2
        assert list(cert["levels"]) == ["plan", "bytes", "layers", "logits", "decode"]
    text = torchrun("verify", str(canon), "--stream", "--json", "-o", str(tmp_path / "parity.json"))
    cert = json.loads(text)
    assert cert["verdict"] == "passed" and cert["device"]["ranks"] == 2 and cert["oracle"]["streamed"]
    ids = ["1 2 3", "--ids", "-n", "12", "--json"]
    one = zoo.load(canon).generate(torch.tensor([[1, 2, 3]]), 12)[0, 3:].tolist()
    assert json.loads(torchrun("generate", str(canon), *ids))["tokens"] == one


def test_where_upstream_fails_every_rank_hears_of_it() -> None:
    """They wait for what it says."""
    words: SimpleQueue[Any] = SimpleQueue()

    def fails(*_: Any, **__: Any) -> Any:
        raise CannotRun("upstream's own code fails")

    first: Any = SimpleNamespace(said=lambda x=None: words.put(x))
    other: Any = SimpleNamespace(said=lambda: words.get_nowait())
    asked = Inputs([Batch(torch.zeros(1, 4).long(), (4,), ("",), (False,))], {}, {}, None)
    leading = Leading(SimpleNamespace(run=fails, greedy=fails, drive=fails), first)  # type: ignore[arg-type]
    following = Following(Task(asked, None, True, False, True), other)
    ids = asked.batches[0].ids
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("run", (ids, (4,))), ("greedy", (ids, 2)), ("drive", (asked.batches, fails, fails))
    ]  # fmt: skip
    for one in (leading, following):
        for name, given in calls:
            with pytest.raises(CannotRun, match="own code fails"):
                getattr(one, name)(*given)
    assert words.empty()
