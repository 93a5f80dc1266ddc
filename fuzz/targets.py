"""What is fuzzed: one function of bytes for each reader of strangers' files and answers.

A target may raise ZooError (`zoo.hub`'s own refusals included) and nothing else.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import httpx2
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from zoo import card, check, convert, draw, export, families, manifest, sign, url
from zoo.errors import ZooError
from zoo.formats import (
    canonical,
    dcp,
    dcp_metadata,
    gguf,
    gguf_vocab,
    open_checkpoint,
    pickle,
    safetensors,
    sets,
)
from zoo.formats.base import ITEMSIZE
from zoo.hub import http, repo
from zoo.hub.errors import About, Damaged, HubError, Transient
from zoo.mapping import execute, export_gguf, merge, parts
from zoo.mapping.plan import make_plan
from zoo.mapping.unmatched import PlanError
from zoo.model.load import Source
from zoo.pull import stored
from zoo.stores import Store
from zoo.text import Text, sampling
from zoo.untrusted import bounded
from zoo.verify import certificate, report
from zoo.verify.golden import Golden, is_golden

CARD = {
    "base_model", "base_model_relation", "language", "library_name", "license", "license_link", "license_name", "pipeline_tag", "tags",
}  # fmt: skip
"""The fields of a card's metadata."""
ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "manifests" / "configs"
MEMORY = Path("/dev/shm")  # where there is one: folders are written for each input, and a disk may be busy
FOLDER = Path(tempfile.mkdtemp(prefix="zoo-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))
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
    sets.weight_map(_file("index.json", data))


def config(data: bytes) -> None:
    """config.json, up to the Spec."""
    found = safetensors.read_json(_file("config.json", data), "a config")
    families.spec_of(found)


def plan(data: bytes) -> None:
    """A Hugging Face folder whose safetensors header a stranger wrote, up to the plan."""
    root = FOLDER / "hf"
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(LLAMA))
    (root / "model.safetensors").write_bytes(_sized(data))
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


class _Worker:
    """The process that reads a tokenizer, for one input after the other: `Text` starts one for each folder, which takes half a second. It
    has the worker's limits; another is started where they, or a panic, have ended it, and now and then, so that none is left of what
    inputs before took. `Text` knows it by what it asks of a Popen."""

    LOOP = """
import os, signal, socket, sys, tokenizers
from pathlib import Path
from zoo.text import template, tokenizer, worker
here = socket.socket(fileno=int(sys.argv[1]))
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for _ in range(300):
    root, pipes, *_ = socket.recv_fds(here, 1 << 16, 2)
    if not root:
        break
    with open(pipes[0], "rb") as asked, open(pipes[1], "wb") as out:
        worker.serve(Path(root.decode()), asked, out)
        signal.setitimer(signal.ITIMER_PROF, 0)
    here.sendall(b"0")
"""
    process: subprocess.Popen[bytes] | None = None
    here: socket.socket | None = None
    last: _Worker | None = None

    def __init__(self, text: Text) -> None:
        if _Worker.last is not None:  # one that was given up is still being served
            _Worker.last.end()
        _Worker.last = self
        (asked, into), (out, said) = os.pipe(), os.pipe()
        while not self._sent(text, asked, said):  # one that has ended is noticed when it is asked
            self._start()
        os.close(asked)
        os.close(said)
        self.stdin, self.stdout = open(into, "wb"), open(out, "rb")  # noqa: SIM115
        self.returncode: int | None = None

    @staticmethod
    def _sent(text: Text, asked: int, said: int) -> bool:
        if _Worker.here is None or _Worker.process is None or _Worker.process.poll() is not None:
            return False
        try:
            return bool(socket.send_fds(_Worker.here, [str(text.root).encode()], [asked, said]))
        except OSError:
            return False

    @staticmethod
    def _start() -> None:
        if _Worker.process is not None and _Worker.here is not None:
            _Worker.here.close()
            _Worker.process.wait()
        _Worker.here, theirs = socket.socketpair()
        quiet = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2", "RUST_BACKTRACE": "0"}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        _Worker.process = subprocess.Popen(
            [sys.executable, "-c", _Worker.LOOP, str(theirs.fileno())], env={**os.environ, **quiet, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            assert _Worker.here is not None and _Worker.process is not None
            if not select.select([_Worker.here], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            try:
                self.returncode = 0 if _Worker.here.recv(1) else _Worker.process.wait()
            except ConnectionError:
                self.returncode = _Worker.process.wait()
        return self.returncode

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.stdin.close()
        try:
            self.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()

    def kill(self) -> None:
        if self.poll() is None and _Worker.process is not None:
            _Worker.process.kill()


Text._start = lambda self: _Worker(self)  # type: ignore[method-assign,return-value,assignment]


def gguf_header(data: bytes) -> None:
    gguf.read_header(_file("x.gguf", data), "x.gguf")


def pickled(data: bytes) -> None:
    """pytorch_model.bin, and the folder that it lies in where it can be read."""
    if not (root := FOLDER / "pickled").exists():
        root.mkdir()
        (root / "config.json").write_text(json.dumps(LLAMA))
    pickle.read_pickle(file := _file("pickled/pytorch_model.bin", data), file.name)
    pickle.open(file)


def zoo_json(data: bytes) -> None:
    if not (root := FOLDER / "canon").exists():
        shutil.copytree(_llama(), root)
    (root / "zoo.json").write_bytes(data)
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
    http.retry_after(answer)
    http._next_page(answer)
    with contextlib.suppress(Damaged, Transient):
        http._skip(answer, 0, 10, 10)


class _Metadata:
    """The process that reads `.metadata`, for one input after the other; another where one has ended it. (zoo starts one for
    each.)"""

    LOOP = """
import importlib.util, json, resource, signal, struct, sys
spec = importlib.util.spec_from_file_location("reader", sys.argv[1])
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)
resource.setrlimit(resource.RLIMIT_AS, (reader.MEMORY, reader.MEMORY))
while head := sys.stdin.buffer.read(4):
    data = sys.stdin.buffer.read(*struct.unpack("<I", head))
    signal.setitimer(signal.ITIMER_PROF, 2)  # its signal ends the process
    try:
        said = reader.table(data)
    except reader.Refused as e:
        said = {"error": str(e)}
    except (MemoryError, RecursionError):
        said = {"error": "memory"}
    out = json.dumps(said).encode()
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(struct.pack("<I", len(out)) + out)
    sys.stdout.buffer.flush()
"""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, data: bytes) -> dict[str, object]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-I", "-c", self.LOOP, dcp_metadata.__file__]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        into, out = self.process.stdin, self.process.stdout
        assert into is not None and out is not None
        into.write(struct.pack("<I", len(data)) + data)
        into.flush()
        if len(head := out.read(4)) < 4:
            self.process.wait()
            return {"error": "the process has ended"}
        told: dict[str, object] = json.loads(out.read(*struct.unpack("<I", head)))
        return told


_metadata = _Metadata()


def metadata(data: bytes) -> None:
    """`.metadata` of a torch.distributed.checkpoint folder, up to its tensors."""
    root = FOLDER / "dcp"
    if not root.exists():
        dcp.write({"w": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, root)
    told = _metadata(data)
    if "error" in told:
        assert len(str(told["error"])) < 4000
        return
    dcp._told = lambda _: told  # type: ignore[assignment]
    saved = dcp.open_saved(root)
    for name in saved.tensors:
        saved.get(name)


def piece(data: bytes) -> None:
    """A tensor in a file of torch.distributed.checkpoint."""
    pickle.read_tensor(io.BytesIO(data), "x")


def _llama() -> Path:
    """A canonical folder of LLAMA."""
    if not (canon := FOLDER / "llama").exists():
        d, ffn, kv = 64, 128, 32
        each = {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (ffn, d), "mlp.up_proj": (ffn, d), "mlp.down_proj": (d, ffn),
            "input_layernorm": (d,), "post_attention_layernorm": (d,),
        }  # fmt: skip
        shapes = {f"model.layers.{i}.{n}.weight": shape for i in range(2) for n, shape in each.items()}
        shapes |= {
            "model.embed_tokens.weight": (256, d),
            "lm_head.weight": (256, d),
            "model.norm.weight": (d,),
        }
        (root := FOLDER / "llama-source").mkdir()
        (root / "config.json").write_text(json.dumps(LLAMA))
        save_file({n: torch.ones(shape) for n, shape in shapes.items()}, root / "model.safetensors")
        convert(root, canon)
    return canon


@functools.cache
def _folder() -> canonical.Canonical:
    return canonical.read(_llama())


def _sized(header: bytes) -> bytes:
    """A safetensors file with this header, whose data is as long as its last offset says; zeros."""
    try:
        ends = [t["data_offsets"][1] for t in json.loads(header).values()]
        n = max(e for e in ends if type(e) is int and e < 1 << 22)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        n = 64
    return struct.pack("<Q", len(header)) + header + bytes(max(n, 0))


def adapter(data: bytes) -> None:
    """A PEFT adapter: its config, and the header of its tensors, up to the merged values."""
    root, (told, _, header) = FOLDER / "adapter", data.partition(b"\n")
    root.mkdir(exist_ok=True)
    (root / merge.CONFIG).write_bytes(told)
    (root / merge.WEIGHTS).write_bytes(_sized(header))
    like = _folder()
    where = merge._find(like, merge.read_adapter(root))
    source = Source(like)
    for name in {o.name for changed in where.changed for o, _ in where.places.get(changed, ())}:
        merge._merged(where, name, source)


def quantised(data: bytes) -> None:
    """A quantization_config, and the header of a checkpoint whose first weight may be quantised so; up to its values."""
    root, (told, _, header) = FOLDER / "quantised", data.partition(b"\n")
    root.mkdir(exist_ok=True)
    try:
        found = bounded.parse_json(told)
    except ValueError:
        return
    (root / "config.json").write_text(
        json.dumps(LLAMA | {"quantization_config": found, "num_hidden_layers": 1})
    )
    (root / "model.safetensors").write_bytes(_sized(header))
    plan = make_plan(safetensors.open(root), dtype="bf16")
    shutil.rmtree(to := FOLDER / "dequantised", ignore_errors=True)
    execute.convert(plan, to, threads=1)


def vocabulary(data: bytes) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json, up to a GGUF's fields."""
    import gguf as package

    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    fields = gguf_vocab.fields(dict(zip(names, data.split(b"\n", 2))), 272, "x")
    writer = package.GGUFWriter(FOLDER / "x.gguf", "llama")
    for key, value in fields.items():
        export_gguf._add(writer, key, value)
    with contextlib.suppress(struct.error, OverflowError, UnicodeError):  # as export_gguf refuses them
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    writer.close()


_holds_no_model: list[str] = []


def listed(data: bytes) -> None:
    """A certificate's list of files, as `zoo check` takes it, and a note of huggingface-hub's."""
    root, (told, _, note) = FOLDER / "listed", data.partition(b"\n")
    (root / check.NOTES).mkdir(parents=True, exist_ok=True)
    (root / "a.json").write_text("{}")
    (root / check.NOTES / "a.json.metadata").write_bytes(note)
    if not _holds_no_model:  # which no list changes
        check._tensors(root, found := check.Report(root))
        _holds_no_model.extend(found.problems)
        check._tensors = lambda _, report: report.problems.extend(_holds_no_model)
    by = _file("by.json", told)
    assert check.check(root).problems
    assert check.check(root, by=by).problems


def drawing(data: bytes) -> None:
    """config.json, up to its picture, which must be XML and run nothing."""
    found = safetensors.read_json(_file("config.json", data), "a config")
    spec = families.spec_of(found)
    picture = draw.drawing(spec, draw.Facts("</text><script>", ["&\x1b"], draw.ahead(found, None)))
    tags = {e.tag.rpartition("}")[2] for e in ElementTree.fromstring(picture).iter()}
    assert "script" not in tags


def listing(data: bytes) -> None:
    """What an object store tells of its files, up to the plan of what lies there, and its hashes."""
    try:
        found = bounded.parse_json(data)
    except ValueError:
        return
    fs = Store("memory://zoo-fuzz").fs
    fs.find = lambda *_, **__: found
    fs.cat_file = lambda path, start, end: _released(path)[start:end]
    fs.call_s3 = lambda *_, **__: found  # so that its hashes are taken for S3's
    try:
        source = stored.at("memory://zoo-fuzz")[0]
        source.provenance()
        for file in source.files.values():
            with contextlib.suppress(ZooError):  # of another size
                source.store.agrees(file, source.store.chunks(file.name))
        with stored.described("memory://zoo-fuzz") as root:
            open_checkpoint(root)
    finally:
        for name in ("find", "cat_file", "call_s3"):
            delattr(fs, name)


def _released_file() -> Path:
    return _llama().with_name("llama-source") / "model.safetensors"


def _released_size() -> int:
    return _released_file().stat().st_size


def _released(path: str) -> bytes:
    """A file of a checkpoint; others are of zeros."""
    root = _llama().with_name("llama-source")
    return next(
        (f.read_bytes() for f in root.iterdir() if path.endswith(f"/{f.name}") or path == f.name), bytes(100)
    )


def store_url(data: bytes) -> None:
    """The address of a store, up to its client, and what of it is shown."""
    text = data.decode("utf-8", "replace")
    if "hidden" not in text:
        assert "hidden" not in url.without_secrets(f"s3://me:hidden@{text}")
    if url.is_url(text):
        name = text.partition("://")[0]
        made = Store(text if name in ("memory", "s3", "http", "file") else f"unknown{text}")
        made.path("a")


def signature(data: bytes) -> None:
    """model.sig, of a folder that is not as it says."""
    root = _signed()
    (root / sign.SIGNATURE).write_bytes(data)
    sign.check(root, root.with_name("public.pem"))


@functools.cache
def _signed() -> Path:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    (root := FOLDER / "signed").mkdir()
    (root / "a.json").write_text("{}")
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    _file("private.pem", private)
    _file("public.pem", public)
    sign.sign(root, FOLDER / "private.pem")
    return root


def params(data: bytes) -> None:
    """params.json of Meta's or Mistral's files, up to the plan."""
    if not (root := FOLDER / "meta").exists():
        root.mkdir()
        torch.save({"tok_embeddings.weight": torch.ones(16, 8)}, root / "consolidated.00.pth")
    (root / "params.json").write_bytes(data)
    ckpt = open_checkpoint(root)
    with contextlib.suppress(PlanError):  # most of its tensors are missing
        make_plan(ckpt)


def ranks(data: bytes) -> None:
    """tokenizer.model with a token and its rank in every line, in the process that reads it."""
    (root := FOLDER / "ranks").mkdir(exist_ok=True)
    (root / "tokenizer.model").write_bytes(data)
    read = Text(root)
    try:
        read.prompt("a b")
    finally:
        read.close()


def readme(data: bytes) -> None:
    """A source's README, whose metadata stand in a card; which must be one that says nothing else."""
    c = _folder()
    made = card._card(c, data, card._Export(), ()).decode()
    head, _, body = made.removeprefix("---\n").partition("\n---\n")
    assert set(yaml.safe_load(head)) <= CARD and "<script" not in body


def kept(data: bytes) -> None:
    """source.zip of a canonical folder: its entries come from lines of a name and a text, or it is no archive at all."""
    if not (root := FOLDER / "kept").exists():
        shutil.copytree(_llama(), root)
        _file("kept.json", (root / "zoo.json").read_bytes())
    told, _, rest = data.partition(b"\n")
    with contextlib.suppress(ValueError):
        source = json.loads((FOLDER / "kept.json").read_text())
        source["source"]["files"] = json.loads(told)
        (root / "zoo.json").write_text(json.dumps(source))
    (root / "source.zip").write_bytes(rest)
    if rest.startswith(b"{"):
        with zipfile.ZipFile(root / "source.zip", "w") as z:
            z.writestr("headers/model.safetensors", rest)
    shutil.rmtree(to := FOLDER / "exported", ignore_errors=True)
    export(root, to)


def page(data: bytes) -> None:
    """parity.json, up to its page, which must run nothing."""
    try:
        found = bounded.parse_json(data)
    except ValueError:
        return
    if isinstance(found, dict):
        with contextlib.suppress(
            LookupError, TypeError, ValueError, AttributeError
        ):  # as `zoo report` says in a sentence
            assert "<script" not in report.page(found).lower()


def release(data: bytes) -> None:
    """A manifest of another package, and what a listing says of it."""
    found = manifest.build("x-1b", manifest._parse("x-1b", data.decode("utf-8", "replace")))
    said = json.dumps(manifest.summary(found)) + manifest._text(found)
    assert found.name == "x-1b" and said
    assert re.fullmatch(r"[\w.+-]+", found.name)


def journal(data: bytes) -> None:
    """What is written of another process' part of a conversion."""
    root, (state, _, steps) = FOLDER / "out.partial", data.partition(b"\n")
    (root / "whole").mkdir(parents=True, exist_ok=True)
    (root / ".zoo-state.json").write_bytes(state)
    for k in (1, 2):
        (root / f".zoo-part-{k}-of-2.jsonl").write_bytes(steps)
    job = {"source": "x"}
    with parts.Shared(FOLDER / "out", {"a": 4}, [], job, parts.Part(1, 2), made=lambda _: False) as shared:
        assert not shared.done or all(isinstance(s, str) for s in shared.done)
        shared._all_finished()
        assert all(isinstance(text, str) for text in shared.said)


TARGETS: dict[str, Target] = {
    "header": header, "index": index, "config": config, "plan": plan, "gguf": gguf_header, "pickle": pickled,
    "zoo.json": zoo_json, "parity.json": parity, "golden": golden, "generation": generation, "text": text,
    "files": files, "commit": commit, "headers": headers, "metadata": metadata, "piece": piece, "adapter": adapter,
    "quantised": quantised, "vocabulary": vocabulary, "listed": listed, "drawing": drawing, "listing": listing,
    "store_url": store_url, "signature": signature, "params": params, "ranks": ranks, "readme": readme,
    "kept": kept, "page": page, "release": release, "journal": journal,
}  # fmt: skip
logging.disable()  # what inputs make zoo warn of
LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 512,
}  # fmt: skip


Shapes = dict[str, tuple[str, list[int]]]


def _header(tensors: Shapes) -> bytes:
    """The header of a safetensors file."""
    out, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        n = math.prod(shape) * ITEMSIZE[dtype]
        out[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}, at + n
    return json.dumps(out).encode()


def _saved() -> bytes:
    """`.metadata` of two small tensors."""
    with contextlib.suppress(ZooError):  # nothing to do with the mutations
        metadata(b"")
    return (FOLDER / "dcp" / dcp.METADATA).read_bytes()


def _quantised(stem: str) -> Iterator[tuple[dict[str, object], Shapes]]:
    """Configs and tensors of a llama's, the weight `stem` [64, 64] quantised in each of the ways."""
    with safe_open(_llama().with_name("llama-source") / "model.safetensors", "pt") as f:
        plain = {n: ("F32", f.get_slice(n).get_shape()) for n in f.keys() if "layers.1" not in n}  # noqa: SIM118
    plain.pop(f"{stem}.weight")
    w = f"{stem}.weight"
    words: Shapes = {
        f"{stem}.qweight": ("I32", [8, 64]),
        f"{stem}.qzeros": ("I32", [2, 8]),
        f"{stem}.scales": ("F16", [2, 64]),
    }
    packed: Shapes = {
        f"{w}_packed": ("I32", [64, 8]),
        f"{w}_scale": ("BF16", [64, 2]),
        f"{w}_shape": ("I64", [2]),
    }
    group = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    nf4: Shapes = {w: ("U8", [2048, 1]), f"{w}.absmax": ("F32", [64]), f"{w}.quant_map": ("F32", [16])}
    nf4 |= {f"{w}.quant_state.bitsandbytes__nf4": ("U8", [90])}
    yield (
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        plain | words | {f"{stem}.g_idx": ("I32", [64])},
    )
    yield {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, plain | {
        f"{stem}.qweight": ("I32", [64, 8]), f"{stem}.qzeros": ("I32", [2, 8]), f"{stem}.scales": ("F16", [2, 64])
    }  # fmt: skip
    tensors: dict[str, object] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": group}},
    }
    yield tensors, plain | packed
    yield {"quant_method": "compressed-tensors", "format": "int-quantized"}, plain | {
        w: ("I8", [64, 64]), f"{w}_scale": ("F32", [64, 1]), f"{w}_zero_point": ("I8", [64, 1])
    }  # fmt: skip
    yield {"quant_method": "modelopt", "quant_algo": "NVFP4"}, plain | {
        w: ("U8", [64, 32]), f"{w}_scale": ("F8_E4M3", [64, 4]), f"{w}_scale_2": ("F32", [])
    }  # fmt: skip
    yield {"quant_method": "bitsandbytes", "load_in_4bit": True}, plain | nf4
    yield (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        plain | {w: ("I8", [64, 64]), f"{stem}.SCB": ("F32", [64])},
    )
    yield {"bits": 4, "group_size": 32}, plain | {
        w: ("U32", [64, 8]), f"{stem}.scales": ("BF16", [64, 2]), f"{stem}.biases": ("BF16", [64, 2])
    }  # fmt: skip
    yield {"quant_method": "fp8", "weight_block_size": [32, 32]}, plain | {
        w: ("F8_E4M3", [64, 64]), f"{w}_scale_inv": ("F32", [2, 2])
    }  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Where the mutations begin: inputs of each kind, of which the first is valid."""
    tensor = {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
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
    recorded = {"schema": "zoo-golden-1", "dtype": "fp32", "text": [[True]], "family": "llama"}
    rows = {
        "__metadata__": {"zoo": json.dumps(recorded)},
        "ids.0": {"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]},
        "logits.0": {"dtype": "F32", "shape": [2, 4], "data_offsets": [16, 48]},
    }
    start = {"id": 2, "content": "<s>", "special": True}
    words = {
        "version": "1.0", "added_tokens": [dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | start], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }  # fmt: skip
    told = {
        "bos_token": "<s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    sibling = {"rfilename": "a/b", "size": 1, "blobId": "0" * 40, "lfs": {"sha256": "0" * 64, "size": 5}}
    torch.save({"a.w": torch.zeros(2, 3)}, saved := io.BytesIO())
    torch.save(torch.zeros(2, 3), one := io.BytesIO())
    weight = "model.layers.0.self_attn.o_proj"
    low = _header(
        {
            f"base_model.model.{weight}.lora_A.weight": ("F32", [2, 64]),
            f"base_model.model.{weight}.lora_B.weight": ("F32", [64, 2]),
        }
    )
    peft = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "alpha_pattern": {"o_proj": 1.5},
        "use_rslora": True,
    }
    generation = {"eos_token_id": [1, 2], "bos_token_id": 0}
    bpe = words | {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": [["a", "b"]]}}
    bpe["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    meta = {"dim": 8, "n_layers": 1, "n_heads": 2, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": 16}
    held: dict[str, dict[str, object]] = {
        f"/zoo-fuzz/{n}": {"size": len(raw), "ETag": f'"{hashlib.md5(raw).hexdigest()}"', "type": "file"}
        for n in ("config.json", "model.safetensors")
        if (raw := _released(n))
    }
    held["/zoo-fuzz/x.bin"] = {
        "size": 9,
        "md5Hash": "AAAA",
        "lfs": {"sha256": "0" * 64},
        "ETag": "0" * 32 + "-2",
    }
    about = b"---\nlicense: mit\nlicense_name: a-b\nlicense_link: LICENSE\nlanguage: [en, de]\nbase_model: a/b\n---\n# x\n"
    configs = [f.read_bytes() for f in sorted(CONFIGS.glob("*.json"))[::12]] if name == "config" else []
    return {
        "metadata": [_saved()] if name == "metadata" else [],
        "piece": [one.getvalue()],
        "adapter": [json.dumps(peft).encode() + b"\n" + low],
        "quantised": [json.dumps(q).encode() + b"\n" + _header(parts) for q, parts in _quantised(weight)] if name == "quantised" else [],
        "vocabulary": [b"\n".join(json.dumps(x).encode() for x in (bpe, told, generation))],
        "listed": [json.dumps(proof).encode() + b"\n" + b"0" * 40 + b"\n" + b"1" * 40 + b"\n1.5"],
        "listing": [json.dumps(held).encode()],
        "store_url": [b"memory://x/y?z=1", b"s3://user:key@bucket/a", b"http://a:1@b/c"],
        "signature": [(_signed() / sign.SIGNATURE).read_bytes()] if name == "signature" else [],
        "params": [json.dumps(meta).encode(), json.dumps({"model": meta | {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3}}).encode()],
        "ranks": [b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(256)) + b"aGU= 256\n"],
        "readme": [about],
        "kept": [b'{"model.safetensors": %d}\n' % (_released_size()) + safetensors.read_header(_released_file())] if name == "kept" else [],
        "page": [json.dumps(proof | {"versions": {}, "machine": {}, "timing": {}}).encode()],
        "release": [
            b'name = "x-1b"\nfamily = "llama"\nformats = ["safetensors"]\nlicence = "MIT"\nparams_total = 7\nreleased = "2026-01"\n'
            b'[[sources]]\nkind = "hub"\nrepo = "x/y"\nrevision = "main"\n'
        ],
        "journal": [
            json.dumps({"parts": {"source": "x", "parts": "2"}}).encode() + b'\n{"step": "a", "said": ["b"], "synced": true}\n'
            b'{"finished": true, "synced": true, "boot": "x"}\n'
        ],
        "drawing": [json.dumps(LLAMA).encode(), *(f.read_bytes() for f in sorted(CONFIGS.glob("*.json"))[::25])],
        "plan": [safetensors.read_header(_llama().with_name("llama-source") / "model.safetensors")],
        "golden": [json.dumps(rows).encode()],
        "generation": [json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]}).encode()],
        "text": [json.dumps(words).encode() + b"\n" + json.dumps(told).encode()],
        "commit": [json.dumps({"sha": "0" * 40, "siblings": [sibling]}).encode()],
        "header": [json.dumps(tensor).encode()],
        "index": [json.dumps({"weight_map": {"w": "a.safetensors"}}).encode()],
        "config": [json.dumps(LLAMA).encode(), *configs],
        "gguf": [ggufs + bytes(-len(ggufs) % 32 + 32)],
        "pickle": [saved.getvalue(), b"\x80\x02}q\x00.", b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01.", b"PK\x03\x04"],
        "zoo.json": [(_llama() / "zoo.json").read_bytes()],
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
