"""What is fuzzed: one function of bytes for each reader of strangers' files and answers.

A target may raise ZooError (`zoo.hub`'s own refusals included) and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx2

from zoo import bounded, families
from zoo.errors import ZooError
from zoo.formats import canonical, gguf, pickle, safetensors
from zoo.hub import http, repo
from zoo.hub.errors import About, Damaged, Transient
from zoo.verify import certificate

FOLDER = Path(tempfile.mkdtemp(prefix="zoo-fuzz-"))
Target = Callable[[bytes], object]


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def header(data: bytes) -> None:
    """The JSON header of a safetensors file."""
    safetensors.parse_header(data, "x.safetensors", 8 + len(data) + 64, "x.safetensors")


def index(data: bytes) -> None:
    """model.safetensors.index.json."""
    safetensors.index_files(safetensors.read_json(_file("index.json", data), "an index"), "index.json")


def config(data: bytes) -> None:
    """config.json, up to the Spec."""
    found = safetensors.read_json(_file("config.json", data), "a config")
    families.spec_of(found)


def gguf_header(data: bytes) -> None:
    gguf.read_header(_file("x.gguf", data), "x.gguf")


def pickled(data: bytes) -> None:
    (FOLDER / "pickled").mkdir(exist_ok=True)
    pickle.open(_file("pickled/pytorch_model.bin", data))


def zoo_json(data: bytes) -> None:
    root = FOLDER / "canon"
    root.mkdir(exist_ok=True)
    (root / "zoo.json").write_bytes(data)
    (root / "model.safetensors").write_bytes(bytes(1 << 16))
    canonical.read(root)


def parity(data: bytes) -> None:
    """parity.json."""
    root = FOLDER / "parity"
    root.mkdir(exist_ok=True)
    (root / "parity.json").write_bytes(data)
    certificate.check(root)
    certificate.standing(root)


def files(data: bytes) -> None:
    """A file list of the Hub."""
    try:
        entries = bounded.parse_json(data)
    except ValueError:
        return
    repo.get_json = lambda *_: (entries, None)  # type: ignore[assignment]
    repo._files(repo._tree("http://hub/tree", About("org/name", "main"), http.Watch()), "org/name")


def headers(data: bytes) -> None:
    """The headers of the Hub's answers."""
    text = data.decode("latin-1").split("\n")
    names = ("Content-Range", "Content-Length", "Retry-After", "RateLimit", "Content-Encoding", "Link")
    given = {n: v.replace("\r", "").replace("\0", "") for n, v in zip(names, text)}
    answer = httpx2.Response(206, headers=[(n.encode(), v.encode("latin-1")) for n, v in given.items()])
    http._retry_after(answer)
    http._next_page(answer)
    with contextlib.suppress(Damaged, Transient):
        http._skip(answer, 0, 10, 10)


TARGETS: dict[str, Target] = {
    "header": header, "index": index, "config": config, "gguf": gguf_header, "pickle": pickled, "zoo.json": zoo_json,
    "parity.json": parity, "files": files, "headers": headers,
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Where the mutations begin: a valid input of each kind, or nearly."""
    tensor = {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    llama = {
        "model_type": "llama", "hidden_act": "silu", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 512,
    }  # fmt: skip
    spec = families.spec_of(llama).to_dict()
    described = {
        "layout_version": 1,
        "spec": spec,
        "quant": {},
        "source": {"family": "llama", "files": {}},
        "layers": None,
    }
    check = {
        "name": "x",
        "value": 0.0,
        "bound": 1.0,
        "relation": "<=",
        "passed": True,
        "margin": None,
        "why": "y",
    }
    level = {"verdict": "passed", "checks": [check], "notes": [], "figures": {}}
    proof = {
        "schema": certificate.SCHEMA, "verdict": "passed", "levels": {"logits": level}, "created": "2026-01-01T00:00:00",
        "canonical": {"path": "x", "files": {"a": {"bytes": 1, "sha256": "0" * 64}}}, "source": None, "rules": None,
        "oracle": {"kind": "golden"}, "dtype": "fp32", "not_checked": [], "faults": None,
    }  # fmt: skip
    entry = {"type": "file", "path": "a/b", "size": 1, "oid": "0" * 40, "lfs": {"oid": "0" * 64, "size": 5}}
    field = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
    info = struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, 4, 0, 0)
    ggufs = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + field + info
    return {
        "header": [json.dumps(tensor).encode()],
        "index": [json.dumps({"weight_map": {"w": "a.safetensors"}}).encode()],
        "config": [json.dumps(llama).encode()],
        "gguf": [ggufs + bytes(-len(ggufs) % 32 + 32)],
        "pickle": [b"\x80\x02}q\x00.", b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01.", b"PK\x03\x04"],
        "zoo.json": [json.dumps(described).encode()],
        "parity.json": [json.dumps(proof).encode()],
        "files": [json.dumps([entry]).encode()],
        "headers": [b"bytes 0-9/10\n10\n30\nr=0;t=5\ngzip\n<https://x/y?cursor=1>; rel=\"next\""],
    }[name]  # fmt: skip


def judged(name: str, data: bytes) -> None:
    """Run a target; whatever is no ZooError of a printable, short message is an error of zoo."""
    try:
        TARGETS[name](data)
    except ZooError as error:
        assert len(str(error)) <= 2000, name
