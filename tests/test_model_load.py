"""A canonical folder becomes a decoder: mapped, cast, in part, quantised."""

from __future__ import annotations

import json
import os
import re
import weakref
from pathlib import Path

import pytest
import tiny
import torch
import vendor
from built import built, decoder
from safetensors.torch import load_file, save_file

import zoo.quant
from zoo.errors import ZooError
from zoo.formats import canonical, open_checkpoint
from zoo.layout import Slot, layout
from zoo.mapping.execute import convert
from zoo.mapping.plan import make_plan
from zoo.model import load, upload
from zoo.model.linear import Linear
from zoo.spec import MLP, LatentAttention, Layer, MoE, Norm, Rope, Router, Spec
from zoo.testing.build import read_config, read_tensors, write_config, write_tensors
from zoo.verify.ours import Streamed, build, subject_of


def folder(name: str, tmp: Path, dtype: str = "float32", shard_size: int = 1 << 30) -> Path:
    source = tiny.make(name, tmp / "source", dtype=dtype)
    return convert(make_plan(open_checkpoint(source)), tmp / "canonical", shard_size=shard_size)


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "gemma3n", "deepseek_v3", "gpt_oss", "nemotron_h", "gpt2"]
)
def test_a_converted_folder_gives_upstreams_logits(name: str, tmp_path: Path) -> None:
    model = load(folder(name, tmp_path, shard_size=60_000))
    b = built(name)
    assert (model(b.ids) - b.upstream["eager"]).abs().max() < 5e-5


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = load(folder("llama_tied", tmp_path))
    assert "head.weight" not in dict(model.named_parameters())
    before = model(built("llama_tied").ids)
    model.embed.weight *= 2  # the map is private: the file does not change
    assert not torch.equal(model(built("llama_tied").ids), before)
    assert torch.equal(load(tmp_path / "canonical")(built("llama_tied").ids), before)


def test_weights_are_views_of_the_mapped_files(tmp_path: Path) -> None:
    path = folder("qwen3_moe", tmp_path)
    model = load(path)
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(path) in line:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            maps.append((low, high))
    for name, p in model.named_parameters():
        assert any(low <= p.data_ptr() < high for low, high in maps), name


def test_a_dtype_casts_all_but_the_selection_biases(tmp_path: Path) -> None:
    path = folder("deepseek_v3", tmp_path)
    model = load(path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.endswith("selection_bias") else torch.bfloat16), name
    assert {p.dtype for p in load(path).parameters()} == {torch.float32}


def test_what_deepseek_v4_keeps_in_fp32_stays_so(tmp_path: Path) -> None:
    """As its vendor's code and transformers do: hyper-connections, positions of compressors, sinks."""
    path = folder("deepseek_v4", tmp_path)
    stored, model = load(path), load(path, dtype=torch.bfloat16)
    wide = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    ends = ("hyper.weight", "hyper.bias", "hyper.factors", ".positions", ".sinks", ".selection_bias")
    assert wide == {n for n, _ in stored.named_parameters() if n.endswith(ends)}
    assert all(torch.equal(p, stored.get_parameter(n)) for n, p in model.named_parameters() if n in wide)
    streamed = Streamed(canonical.read(path), torch.bfloat16)
    for i in range(stored.spec.n_layers):
        here = model.layers[i].named_parameters()
        of_layer = {n: p.dtype for n, p in streamed.resident(i).named_parameters()}
        assert all(of_layer[n] == p.dtype for n, p in here if p.dim() < 3)  # experts are cast one by one
    held = subject_of(canonical.read(path), torch.bfloat16)
    assert all(held.tensors[n].dtype == p.dtype for n, p in model.named_parameters())
    ids = tiny.tokens("deepseek_v4")
    logits = model(ids)
    assert torch.equal(logits, build(held)(ids))
    apart = (logits.float() - stored(ids)).abs().amax(-1)
    # Of tokens whose experts are nearly tied others may be chosen.
    assert apart.median() < 0.05 * stored(ids).abs().max()


def test_bf16_folders_load_as_stored_and_run(tmp_path: Path) -> None:
    model = load(folder("kimi_linear", tmp_path, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    b = built("kimi_linear", "bfloat16")
    assert torch.equal(model(b.ids), decoder(b.spec, b.tensors)(b.ids))


def test_some_layers_can_be_loaded_alone(tmp_path: Path) -> None:
    model = load(folder("llama", tmp_path), layers=[1])
    stored = {n for n, p in model.named_parameters() if not p.is_meta}
    assert {n.split(".")[1] for n in stored if n.startswith("layers.")} == {"1"}
    assert {"embed.weight", "norm.weight", "head.weight"} <= stored
    with pytest.raises(ZooError, match=r"only 1 of \d layers are here"):
        model(built("llama").ids)
    b = built("llama")
    whole = decoder(b.spec, b.tensors)
    x, ctx = whole.start(b.ids)
    assert torch.equal(model.layers[1](x, ctx), whole.layers[1](x, ctx))


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    path = folder("llama", tmp_path)
    j = json.loads((path / "zoo.json").read_text())
    j["spec"]["vocab_size"] += 1
    (path / "zoo.json").write_text(json.dumps(j))
    with pytest.raises(ZooError, match=re.escape("embed.weight has shape [131, 36]")):
        load(path)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_here_is_named(device: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=f"torch can't use the device '{device}' here: "):
        load(folder("llama", tmp_path), device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_gpu_is_given_the_same_tensors(
    name: str, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "RUN", 2048)
    monkeypatch.setattr(upload, "BUFFER", 256)
    path = folder(name, tmp_path, dtype="bfloat16", shard_size=60_000)
    here, there = load(path, dtype=dtype).state_dict(), load(path, device="cuda", dtype=dtype).state_dict()
    assert set(here) == set(there)
    for tensor, t in here.items():
        assert there[tensor].is_cuda and there[tensor].dtype == t.dtype
        assert torch.equal(there[tensor].cpu(), t), tensor


@pytest.mark.gpu
def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1000))
    with (
        pytest.raises(ZooError, match=re.escape(f"{file}: ends at byte 1000")),
        upload.Upload("cuda") as up,
    ):
        up(file, 600, (101,), torch.float32)


def test_a_thread_that_reads_hundreds_of_shards_keeps_few_open(tmp_path: Path) -> None:
    lane = upload._Lane(None, 16)  # type: ignore[arg-type]  # a stream is for what it copies
    files = [tmp_path / str(i) for i in range(3 * upload.FILES)]
    for file in files:
        file.write_bytes(file.name.encode())
    for file in files + files[:1]:
        assert os.pread(lane._opened(file), 9, 0) == file.name.encode()
        assert len(lane.files) <= upload.FILES
    held = list(lane.files.values())
    lane.close()
    for handle in held:
        with pytest.raises(OSError):
            os.fstat(handle)


# --- quantised ----------------------------------------------------------------------------------------------


def quantised(shape: tuple[int, ...], parts: tuple[int, ...], scheme: str) -> dict[str, torch.Tensor]:
    """Random codes and scales of a weight [..., out, in]."""
    g = torch.Generator().manual_seed(sum(shape))
    *lead, rows, columns = shape
    if scheme == "mxfp4":
        codes = torch.randint(256, (*lead, rows, columns // 32, 16), generator=g, dtype=torch.uint8)
        scale = torch.randint(122, 126, (*lead, rows, columns // 32), generator=g, dtype=torch.uint8)
        return {"weight": codes, "scale": scale}
    unit = {"fp8-block": (128, 128), "fp8-channel": (1, 0), "fp8-tensor": (0, 0)}[scheme]
    height, width = (
        sum(-(-p // unit[0]) if unit[0] else 1 for p in parts),
        -(-columns // unit[1]) if unit[1] else 1,
    )
    codes = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
    return {"weight": codes, "scale": torch.rand((*lead, height, width), generator=g) * 0.3 + 0.1}


LATENT = LatentAttention(2, 32, 16, 8, 16, 0.2, Norm(1e-5), rope=Rope(100.0, 8))
MIXTURE = MoE(
    5, MLP(32, bias=True), Router(2, "sigmoid", rounding="last", weights_rounding="last"), shared=MLP(96)
)
LAYER = Layer(LATENT, MIXTURE, attn_norm=Norm(1e-5), ffn_norm=Norm(1e-5))
BLOCKS_OF_32 = Spec("test", 160, 50, (LAYER, LAYER), Norm(1e-5), tied=False, context_length=64)


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-channel", "fp8-tensor", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_give_the_logits_of_weights_expanded_beforehand(
    scheme: str, dtype: torch.dtype
) -> None:
    slots = layout(BLOCKS_OF_32)
    g = torch.Generator().manual_seed(0)
    tensors = {
        n: (torch.randn(s.shape, generator=g) / s.shape[-1] ** 0.5).to(dtype) for n, s in slots.items()
    }
    kept, expanded = decoder(BLOCKS_OF_32, tensors), dict(tensors)
    for name, m in kept.matrices():
        slot = slots[f"{name}.weight"]
        if "router" not in name:
            components = quantised(slot.shape, slot.parts, scheme)
            m.quantise(scheme, components)
            expanded[slot.name] = zoo.quant.dequantise(scheme, components, slot.parts, dtype)
    plain = decoder(BLOCKS_OF_32, expanded)
    ids = torch.arange(22).view(2, 11)
    assert torch.equal(kept(ids), plain(ids))
    cache, other = kept.cache(2, 11), plain.cache(2, 11)
    for t in range(11):  # the absorbed form of attention too
        assert torch.equal(kept(ids[:, t : t + 1], cache), plain(ids[:, t : t + 1], other))


def test_an_fp8_release_is_loaded_as_it_is_and_computes_what_its_expansion_does(tmp_path: Path) -> None:
    source = tiny.make("deepseek_v3", tmp_path / "source", dtype="bfloat16")
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name, w in list(tensors.items()):
        if re.search(r"(_proj|_proj_with_mqa)\.weight$", name):
            scale = w.float().abs().max() / 448
            tensors[name] = (w.float() / scale).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale.view(1, 1)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    ckpt = open_checkpoint(source)
    kept = load(convert(make_plan(ckpt), tmp_path / "kept"))
    expanded = load(convert(make_plan(ckpt, dtype="bf16"), tmp_path / "expanded"))
    codes = [n for n, p in kept.named_buffers() if p.dtype == torch.float8_e4m3fn]
    assert len(codes) > 20 and not list(expanded.named_buffers())
    ids = built("deepseek_v3").ids
    assert torch.equal(kept(ids), expanded(ids))


def quantised_at(name: str, weight: str, tmp: Path, **settings: int) -> Path:
    """A release of which the matrices called `weight` are fp8 in blocks, converted as it is."""
    source = vendor.make(tmp / "source", name, **settings)
    tensors = read_tensors(source)
    for key in [k for k in tensors if k.endswith(weight)]:
        tensors[key], tensors[key + "_scale_inv"] = vendor.fp8_block(tensors[key], (4, 4))
    write_tensors(source, tensors)
    quantisation = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    write_config(source, read_config(source) | {"quantization_config": quantisation})
    return convert(make_plan(open_checkpoint(source)), tmp / "canonical")


def test_an_embedding_whose_rows_share_scales_is_refused_not_run_without_its_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan refuses it too; a folder may come from elsewhere."""
    monkeypatch.setattr(Slot, "multiplies", True)
    path = quantised_at("llama", "embed_tokens.weight", tmp_path)
    why = "embed is quantised (fp8-block-4x4), and only linear maps and tables of tokens can be run quantised"
    with pytest.raises(ZooError, match=re.escape(why)):
        load(path)
    with pytest.raises(ZooError, match=re.escape(why)):
        Streamed(canonical.read(path), torch.float32)


def test_a_quantised_router_keeps_its_selection_bias(tmp_path: Path) -> None:
    path = quantised_at("deepseek_v3", "mlp.gate.weight", tmp_path)
    folder = canonical.read(path)
    assert any(slot.endswith("moe.router") for slot in folder.quant)
    ids = tiny.tokens("deepseek_v3")
    plain = convert(make_plan(open_checkpoint(tmp_path / "source"), dtype="fp32"), tmp_path / "plain")
    expected = load(plain)(ids)
    assert torch.equal(load(path, dtype=torch.float32)(ids), expected)
    assert torch.equal(build(subject_of(folder, torch.float32))(ids), expected)


def test_a_model_that_is_moved_keeps_nothing_where_it_was() -> None:
    m = Linear(128, 8)
    codes = {"weight": torch.zeros(8, 128, dtype=torch.float8_e4m3fn), "scale": torch.ones(8, 1)}
    m.quantise("fp8-channel", codes)
    del codes
    before = weakref.ref(m.weight)
    assert m.packed() is not None and before() is not None
    m.to("meta")
    assert before() is None
