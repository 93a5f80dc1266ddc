"""GGUF's blocks, carried: the file's bytes there and back, and what is computed with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import vendor
from test_cpu_codes import close
from test_formats_gguf import IDS, OF, SAMPLE

import zoo
from zoo.errors import ZooError
from zoo.formats import canonical, open_checkpoint
from zoo.formats.base import TensorRef
from zoo.formats.gguf import read_header
from zoo.kernels import cpu
from zoo.mapping.plan import make_plan
from zoo.model.linear import Linear
from zoo.model.load import load
from zoo.quant import blocks, dequantise, ggml, looked_up
from zoo.quant.schemes import scheme
from zoo.split import Cut, component_cut
from zoo.testing import build
from zoo.testing import gguf as testing_gguf

WIDE = {
    "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def released(
    at: Path, types: Callable[[str], str], case: Any = SAMPLE, of: Any = OF, **settings: Any
) -> Path:
    """A GGUF whose matrices are of these types, by their names."""
    folder, _ = testing_gguf.make(case, of, at, **WIDE | settings)
    return testing_gguf.write(folder, at / "w.gguf", of, types=types)


def q4_k_m(name: str) -> str:
    """As llama.cpp mixes them: more bits for some of the values and of the second matrices of MLPs."""
    more = name.endswith(("attn_v.weight", "ffn_down.weight")) and name.startswith("blk.0.")
    return "Q6_K" if more or name == "token_embd.weight" else "Q4_K"


def in_fp32(scheme_name: str, raw: torch.Tensor) -> torch.Tensor:
    return dequantise(scheme_name, {"weight": raw}, (len(raw),), torch.float32)


@pytest.mark.parametrize("kind", blocks.TYPES)
def test_values_are_those_of_the_gguf_package_to_the_bit(kind: str) -> None:
    raw = testing_gguf.some_blocks(kind, (70, 512))
    theirs = torch.from_numpy(ggml.dequantise(raw, kind.upper(), (70, 512)))
    assert torch.equal(in_fp32(f"gguf-{kind}", torch.from_numpy(raw)), theirs)
    ids = torch.tensor([[69, 0], [3, 3]])
    found = looked_up(f"gguf-{kind}", {"weight": torch.from_numpy(raw)}, ids, torch.float32)
    assert torch.equal(found, theirs[ids])


@pytest.mark.parametrize("kind", blocks.TYPES)
def test_a_file_of_blocks_is_carried_and_comes_back_to_the_byte(kind: str, tmp_path: Path) -> None:
    file = released(tmp_path, lambda _: kind.upper())
    made = zoo.convert(file, tmp_path / "canon")
    folder = canonical.read(made)
    assert set(folder.quant.values()) == {f"gguf-{kind}"} and "embed" in folder.quant
    # what was fp32 stays so, and headers and an index of JSON are all that is added
    assert sum(t.nbytes for t in folder.tensors.values()) <= file.stat().st_size
    out = zoo.export(made, tmp_path / "out", format="source")
    assert [p.name for p in out.iterdir()] == ["w.gguf"]
    assert (out / "w.gguf").read_bytes() == file.read_bytes()


def tensors_of(file: Path) -> set[tuple[Any, ...]]:
    data = file.read_bytes()
    return {
        (r.name, r.dtype, r.shape, data[r.offset : r.offset + r.nbytes]) for r in read_header(file, "")[1]
    }


def test_parts_of_several_types_are_carried_as_one_weight(tmp_path: Path) -> None:
    file = released(tmp_path, q4_k_m)
    folder = canonical.read(zoo.convert(file, tmp_path / "canon"))
    assert folder.quant["layers.0.attn.qkv"] == "gguf-q4_k+q4_k+q6_k"
    assert folder.quant["layers.1.attn.qkv"] == "gguf-q4_k"
    v = folder.tensors["layers.0.attn.qkv.q6_k"]
    assert v.dtype == "U8" and v.shape[1] == 210
    assert not folder.json.get("notes") or "dequantised" not in str(folder.json["notes"])
    out = zoo.export(folder.root, tmp_path / "out", format="source")
    assert (out / "w.gguf").read_bytes() == file.read_bytes()
    again = zoo.export(folder.root, tmp_path / "again.gguf", format="gguf")
    assert tensors_of(again) == tensors_of(file)
    certificate = zoo.verify(folder.root, level="bytes", write=False)
    (level,) = (x for x in certificate.levels if x.name == "bytes")
    assert certificate.passed and level.figures["dequantised"] == 0 and not level.figures["differing"]


@pytest.mark.parametrize("types", [q4_k_m, lambda _: "Q8_0", lambda _: "Q5_1"])
def test_logits_are_those_of_the_dequantised_model(types: Callable[[str], str], tmp_path: Path) -> None:
    file = released(tmp_path, types)
    carried = load(zoo.convert(file, tmp_path / "carried"))
    plain = load(zoo.convert(file, tmp_path / "plain", dtype="fp32"))
    with torch.inference_mode():
        want = plain(IDS)
        torch.testing.assert_close(carried(IDS), want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_text_is_generated_and_kernels_of_other_codes_leave_blocks_alone(tmp_path: Path) -> None:
    canon = zoo.convert(released(tmp_path, q4_k_m), tmp_path / "canon")
    model = load(canon)
    assert all(m.packed() is None for m in (model.embed, *(m for _, m in model.matrices())) if m.scheme)
    plain = load(zoo.convert(tmp_path / "w.gguf", tmp_path / "plain", dtype="fp32"))
    assert torch.equal(model.generate(IDS[:1], 20), plain.generate(IDS[:1], 20))


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_what_is_kept_aside_stays_the_bytes_of_its_blocks(dtype: str | None, tmp_path: Path) -> None:
    ckpt = open_checkpoint(released(tmp_path, q4_k_m))
    ref = next(r for r in ckpt.tensors.values() if r.dtype == "Q4_K")
    aside = replace(
        ref, name="rope_freqs.weight", dtype="Q3_K", shape=(256,), nbytes=110
    )  # a type that is not carried
    tensors = {**ckpt.tensors, aside.name: aside}
    plan = make_plan(replace(ckpt, tensors=tensors), dtype=dtype)
    planned = plan.checkpoint.tensors
    assert (
        planned[aside.name].dtype == "U8"
        and planned[aside.name].shape == (110,)
        and aside.name in plan.extras
    )
    assert blocks.as_planned(tensors, planned) == planned, "as a pull finds them when the files are here"


def test_in_memory_blocks_are_the_numbers_that_they_are(tmp_path: Path) -> None:
    canon = zoo.convert(released(tmp_path, q4_k_m), tmp_path / "canon")
    plain = zoo.convert(tmp_path / "w.gguf", tmp_path / "plain", dtype="fp32")
    for names in ("hf", "transformers"):
        found, want = zoo.state_dict(canon, names), zoo.state_dict(plain, names)
        assert found.keys() == want.keys()
        for name, x in want.items():
            assert torch.equal(found[name], x), name


def test_elsewhere_blocks_are_written_as_the_numbers_that_they_are(tmp_path: Path) -> None:
    file = released(tmp_path, q4_k_m)
    for dtype in (None, "bf16"):
        out = [
            build.read_tensors(
                zoo.export(zoo.convert(file, at, dtype=how), at.with_suffix(".hf"), dtype=dtype)
            )
            for how, at in ((None, tmp_path / f"carried-{dtype}"), ("fp32", tmp_path / f"plain-{dtype}"))
        ]
        vendor.same(*out)


def test_experts_are_carried_as_stacks(tmp_path: Path) -> None:
    case = tiny.CASES["qwen3_moe"]
    kinds = {"ffn_gate_exps.weight": "Q4_K", "ffn_up_exps.weight": "Q6_K", "ffn_down_exps.weight": "Q8_0"}

    def types(name: str) -> str:
        return next((t for end, t in kinds.items() if name.endswith(end)), "Q4_0")

    file = released(tmp_path, types, case, case.gguf[0], moe_intermediate_size=256)
    folder = canonical.read(zoo.convert(file, tmp_path / "carried"))
    assert folder.quant["layers.1.moe.gate_up"] == "gguf-q4_k+q6_k"
    assert folder.quant["layers.1.moe.down"] == "gguf-q8_0"
    out = zoo.export(folder.root, tmp_path / "out", format="source")
    assert (out / "w.gguf").read_bytes() == file.read_bytes()
    plain, ids = load(zoo.convert(file, tmp_path / "plain", dtype="fp32")), build.tokens(case.variants[0])
    with torch.inference_mode():
        want = plain(ids)
        torch.testing.assert_close(load(folder.root)(ids), want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_what_cannot_be_carried_is_dequantised_and_said(tmp_path: Path) -> None:
    def types(name: str) -> str:
        if name.endswith("ffn_down.weight"):
            return "IQ4_NL"
        return "F16" if name == "blk.1.attn_k.weight" else "Q8_0"

    monkey = {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    folder, _ = testing_gguf.make(SAMPLE, OF, tmp_path, **WIDE)
    file = testing_gguf.write(
        folder, tmp_path / "w.gguf", OF, types=lambda n: "Q4_0" if n in monkey else types(n)
    )
    raw = file.read_bytes()
    for name in monkey:  # which is as long, and which gguf-py can't make
        raw = raw.replace(head(name, 2), head(name, 20))
    file.write_bytes(raw)
    plan = make_plan(open_checkpoint(file))
    assert plan.outputs["layers.0.mlp.down.weight"].dtype == "F32" and "layers.0.mlp.down" not in plan.quant
    said = "\n".join(plan.notes)
    assert (
        "dequantised to fp32, which is exact: layers.{0-1}.mlp.down.weight (2 tensors): blocks of type IQ4_NL are not carried"
        in said
    )
    assert "dequantised to fp32, which is exact: layers.1.attn.qkv.weight: its parts are F16 and Q8_0" in said
    made = vendor.canonical(file, tmp_path / "canon")
    assert made["layers.1.attn.qkv.weight"].dtype == torch.float32
    with pytest.raises(ZooError, match=r"blocks of blk\.\d\.\S+, \S+, were dequantised to F32"):
        zoo.export(tmp_path / "canon", tmp_path / "out", format="source")


def head(name: str, number: int) -> bytes:
    """What a header says of a matrix of 256 by 256 and type `number`."""
    fields = (len(name).to_bytes(8, "little"), name.encode(), (2).to_bytes(4, "little"))
    return b"".join((*fields, *[(256).to_bytes(8, "little")] * 2, number.to_bytes(4, "little")))


def test_ranks_have_their_rows_of_each_type() -> None:
    how, whole = scheme("gguf-q4_k+q4_k+q6_k"), (512, 256)
    cut = Cut(0, (256, 128, 128), ((128, 256), (320, 384), (448, 512)))  # the second half of each part
    stored = {
        c.name: TensorRef(c.name, "U8", (384 if c.name == "weight" else 128, c.per[1]), "x", 0, 0)
        for c in how.components
    }
    cuts = {c.name: component_cut(cut, whole, c, stored[c.name], how.name) for c in how.components}
    assert {n: c.ranges for n, c in cuts.items() if c} == {
        "weight": ((128, 256), (320, 384)),
        "q6_k": ((64, 128),),
    }


def test_a_type_is_not_given_to_what_is_blocks_already(tmp_path: Path) -> None:
    made = zoo.convert(released(tmp_path, lambda _: "Q4_0"), tmp_path / "canon")
    with pytest.raises(
        ZooError, match=r"are in GGUF's blocks \(Q4_0\).*convert the source with --dtype fp32"
    ):
        zoo.export(made, tmp_path / "x.gguf", format="gguf", type="q8_0")


# --- the kernel of a CPU ------------------------------------------------------------------------------------


def some(*kinds: str) -> list[Any]:
    """Those that are compiled for proofs only."""
    return [pytest.param(k, marks=pytest.mark.proof) for k in kinds]


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    module = cpu.kernels("blocks")
    if module is None:
        pytest.skip("numba does not run here: torch multiplies")
    return module  # type: ignore[no-any-return]


def weight(
    kernel: ModuleType, name: str, parts: tuple[int, ...], k: int, *lead: int
) -> tuple[Any, dict[str, torch.Tensor]]:
    s, made = scheme(name), {}
    for c in s.components:
        rows = sum(p for i, p in enumerate(parts) if c.holds is None or i in c.holds)
        made[c.name] = torch.from_numpy(testing_gguf.some_blocks(blocks.type_of(s, c.name), (*lead, rows, k)))
    return kernel.carried(name, made, parts), made


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["q4_k+q4_k+q6_k", "q5_0+q8_0+q5_0", *some("q4_0", "q4_1", "q5_1", "q5_k")])
def test_a_few_rows_are_what_the_values_make_of_them(kind: str, threads: int, kernel: ModuleType) -> None:
    parts = (100, 30, 7)
    w, made = weight(kernel, f"gguf-{kind}", parts, 768)
    full = dequantise(f"gguf-{kind}", made, parts, torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 3):
            x, bias = torch.randn(rows, 768), torch.randn(137)
            close(kernel.times(x, w, bias), x.double() @ full.T + bias, x, full)
            narrow = x.bfloat16()
            close(kernel.times(narrow, w), narrow.double() @ full.T, x, full, rtol=2**-8)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["q8_0", "q4_k+q6_k"])
def test_rows_go_to_their_experts(kind: str, kernel: ModuleType) -> None:
    parts = (40, 24)
    w, made = weight(kernel, f"gguf-{kind}", parts, 512, 3)
    full = dequantise(f"gguf-{kind}", made, parts, torch.float64)
    x, tokens = torch.randn(5, 512), torch.tensor([4, 0, 2])
    experts, counts = torch.tensor([2, 0]), torch.tensor([1, 2])
    y = kernel.times(x, w, experts=experts, counts=counts, tokens=tokens)
    want = torch.cat([x[4:5].double() @ full[2].T, x[[0, 2]].double() @ full[0].T])
    close(y, want, x, full)


@pytest.mark.parametrize("kind", ["q4_k+q5_1", *some("q8_0+q4_0", "q5_0+q4_1", "q5_k+q6_k")])
def test_widened_they_are_the_values_to_the_bit(
    kind: str, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (33, 20)
    w, made = weight(kernel, f"gguf-{kind}", parts, 512, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        want = dequantise(f"gguf-{kind}", made, parts, dtype)
        assert torch.equal(kernel.expanded(w, dtype), want)
        assert torch.equal(kernel.expanded(w, dtype, 1), want[1])
    linear = Linear(512, *parts)
    linear.quantise(f"gguf-{kind}", {n: c[1] for n, c in made.items()})
    monkeypatch.setattr(kernel, "LARGE", 0)
    x = torch.randn(70, 512)
    close(
        linear(x), x.double() @ dequantise(f"gguf-{kind}", made, parts, torch.float64)[1].T, x, want.double()
    )
