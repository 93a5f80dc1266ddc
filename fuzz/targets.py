"""What is fuzzed: one function of bytes for each reader of strangers' files and answers.

A target may raise ZooError (`zoo.hub`'s own refusals included) and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx2
import torch

from zoo import bounded, families
from zoo.errors import ZooError
from zoo.formats import canonical, gguf, open_checkpoint, pickle, safetensors
from zoo.hub import http, repo
from zoo.hub.errors import About, Damaged, HubError, Transient
from zoo.mapping.plan import make_plan
from zoo.text import Text, sampling
from zoo.verify import certificate
from zoo.verify.golden import Golden, is_golden

CONFIGS = Path(__file__).parents[1] / "manifests" / "configs"
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


def plan(data: bytes) -> None:
    """A Hugging Face folder whose safetensors header a stranger wrote, up to the plan."""
    root = FOLDER / "hf"
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(LLAMA))
    (root / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(1 << 12))
    make_plan(open_checkpoint(root))


def golden(data: bytes) -> None:
    """A recording of logits, whose header a stranger wrote."""
    path = _file("golden.safetensors", struct.pack("<Q", len(data)) + data + bytes(48))
    if is_golden(path):
        Golden(path)


def generation(data: bytes) -> None:
    """generation_config.json."""
    root = FOLDER / "generation"
    root.mkdir(exist_ok=True)
    (root / "generation_config.json").write_bytes(data)
    sampling.read(root)


def text(data: bytes) -> None:
    """tokenizer.json and the settings beside it, in the process that reads them (no coverage is seen there)."""
    root = FOLDER / "text"
    root.mkdir(exist_ok=True)
    halves = data.split(b"\n", 1)
    for name, half in zip(("tokenizer.json", "tokenizer_config.json"), halves):
        (root / name).write_bytes(half)
    read = Text(root)
    try:
        read.prompt("a b")
    finally:
        read.close()


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


def commit(data: bytes) -> None:
    """What the Hub says of a commit where it serves no file list."""
    try:
        answer = bounded.parse_json(data)
    except ValueError:
        return

    def said(url: str, *_: object) -> tuple[object, None]:
        if "/tree/" in url:
            raise HubError("no such route", "server", status=404)
        return answer, None

    repo.get_json = said  # type: ignore[assignment]
    repo._files(repo._listing("http://hub", "0" * 40, About("org/name", "main"), http.Watch()), "org/name")


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
    "header": header, "index": index, "config": config, "plan": plan, "gguf": gguf_header, "pickle": pickled,
    "zoo.json": zoo_json, "parity.json": parity, "golden": golden, "generation": generation, "text": text,
    "files": files, "commit": commit, "headers": headers,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 512,
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Where the mutations begin: a valid input of each kind, or nearly."""
    tensor = {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    spec = families.spec_of(LLAMA).to_dict()
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
    named = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [8, 64], "data_offsets": [0, 1024]}}
    named |= {
        "model.layers.0.mlp.up_proj.weight": {"dtype": "F32", "shape": [4, 64], "data_offsets": [1024, 2048]}
    }
    about = {"schema": "zoo-golden-1", "dtype": "fp32", "text": [[True]], "family": "llama"}
    rows = {
        "__metadata__": {"zoo": json.dumps(about)},
        "ids.0": {"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]},
        "logits.0": {"dtype": "F32", "shape": [2, 4], "data_offsets": [16, 48]},
    }
    words = {
        "version": "1.0", "added_tokens": [{"id": 2, "content": "<s>", "special": True}], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }  # fmt: skip
    told = {
        "bos_token": "<s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    sibling = {"rfilename": "a/b", "size": 1, "blobId": "0" * 40, "lfs": {"sha256": "0" * 64, "size": 5}}
    torch.save({"a.w": torch.zeros(2, 3), "n": 1}, saved := io.BytesIO())
    configs = [f.read_bytes() for f in sorted(CONFIGS.glob("*.json"))[::12]] if name == "config" else []
    return {
        "plan": [json.dumps(named).encode()],
        "golden": [json.dumps(rows).encode()],
        "generation": [json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}).encode()],
        "text": [json.dumps(words).encode() + b"\n" + json.dumps(told).encode()],
        "commit": [json.dumps({"sha": "0" * 40, "siblings": [sibling]}).encode()],
        "header": [json.dumps(tensor).encode()],
        "index": [json.dumps({"weight_map": {"w": "a.safetensors"}}).encode()],
        "config": [json.dumps(LLAMA).encode(), *configs],
        "gguf": [ggufs + bytes(-len(ggufs) % 32 + 32)],
        "pickle": [saved.getvalue(), b"\x80\x02}q\x00.", b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01.", b"PK\x03\x04"],
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
