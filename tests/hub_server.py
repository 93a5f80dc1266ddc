"""A Hub in one process: enough of the real one that the real client can't tell, with faults on demand.

    with HubServer() as hub:
        commit = hub.repo("org/model").commit({"config.json": b"{}", "model.safetensors": path})
        hub.fail("reset", "model.safetensors", after=1 << 20)        # the next transfer breaks after 1 MiB
        ...                                                          # run a client with HF_ENDPOINT=hub.url
        assert hub.body_bytes("model.safetensors") == ...

What it speaks: `/api/models/{id}[/revision/{rev}]`, `/tree/{rev}[/{folder}]` (paged by Link), `/resolve/{rev}/{file}` with
X-Repo-Commit, ETag / X-Linked-Etag / X-Linked-Size and Range, `/api/whoami-v2`, `/auth-check`, tokens, gated and
private repos with X-Error-Code; making repositories and committing to them (`hub_uploads`). LFS files answer 302 to a second origin, which refuses a token as storage hosts do.
Bodies go out by sendfile, so unthrottled it is as fast as loopback.

From a shell: `python tests/hub_server.py org/model=FOLDER [...]` prints the endpoint and serves until killed.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import hub_uploads

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pth", ".pt")


@dataclass(frozen=True)
class ServedFile:
    path: str
    source: Path
    size: int
    git_sha1: str
    sha256: str | None  # set for LFS files only

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_sha1


@dataclass
class Request:
    """One line of the log. `sent` counts body bytes that really left."""

    origin: str  # "hub" or "cdn"
    method: str
    target: str
    file: str | None
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """Something that goes wrong for the next `times` requests of files matching `file` (-1: for ever).

    kinds: `cut` (FIN) and `reset` (RST) after `after` body bytes · `stall` for `seconds` after `after` bytes ·
    `corrupt` the byte at offset `after` of the file · `status` with `code`, `error` and `retry_after` · `whole` (Range is
    ignored, 200) · `shift` (a range that starts `after` bytes later than asked) · `size` (the file is said to be,
    and is, `after` bytes long) · `redirect` to `location` · `cap` (403 for a body longer than `after` bytes) ·
    `answer` with `headers` and `body`, whatever they say of each other, and hang up.
    """

    kind: str
    file: str = "*"
    where: str = "*"  # api, resolve, cdn
    after: int = 0
    code: int = 503
    error: str | None = None  # X-Error-Code
    retry_after: str | None = None
    seconds: float = 3600.0
    location: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    times: int = 1


@dataclass
class Repo:
    """A repository: commits by id, and the branches and tags that name them."""

    id: str
    store: Path
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, ServedFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    extra_tree: list[dict[str, Any]] = field(default_factory=list)  # entries a hostile repository would list

    def commit(
        self, files: Mapping[str, bytes | str | Path] | Path, branch: str = "main", *, keep: bool = True
    ) -> str:
        """Add a commit with these files (a folder, or path -> contents or file on disk) and move the branch there.

        Files of the previous commit stay unless `keep` is false. Returns the commit id.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p for p in sorted(files.rglob("*")) if p.is_file()}
        parent = self.refs.get(branch, "")
        tree = dict(self.commits[parent]) if keep and parent else {}
        for path, content in files.items():
            if not isinstance(content, Path):
                data = content.encode() if isinstance(content, str) else content
                content = self.store / hashlib.sha256(data).hexdigest()
                if not content.exists():  # it may be being served
                    content.write_bytes(data)
            tree[path] = _describe(path, content)
        listing = "".join(f"{f.path}\0{f.etag}\n" for f in sorted(tree.values(), key=lambda f: f.path))
        commit = hashlib.sha1(f"{self.id} {parent}\n{listing}".encode()).hexdigest()
        self.commits[commit] = tree
        self.refs[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


def _describe(path: str, source: Path) -> ServedFile:
    size = source.stat().st_size
    lfs = path.endswith(LFS_SUFFIXES)
    digest = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % size)
    with open(source, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    pointer = hashlib.sha1(path.encode()).hexdigest()
    return ServedFile(
        path, source, size, pointer if lfs else digest.hexdigest(), digest.hexdigest() if lfs else None
    )


class HubServer:
    """The Hub (`url`) and its storage host (`cdn_url`), each on a port of 127.0.0.1. Use as a context manager.

    With `certificate`, a PEM file with key and certificate, both speak TLS.
    """

    def __init__(self, port: int = 0, certificate: Path | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.tokens: dict[str, set[str]] = {}  # token -> gated and private repos it may read ("*": all)
        self.page_size = 1000
        self.link_base = ""  # where the links from page to page lead, if not here
        self.rate: float | None = None  # bytes per second and connection
        self.signature_ttl: float = 3600.0  # seconds for which a storage address is good
        self.before: Callable[[Request], None] | None = None  # called with each request before it is answered
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._store = Path(tempfile.mkdtemp(prefix="hub-server-"))
        self._servers = [_Server(self, "hub", port), _Server(self, "cdn", 0)]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            for server in self._servers:
                server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https" if certificate else "http"
        self.url, self.cdn_url = (f"{scheme}://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        shutil.rmtree(self._store, ignore_errors=True)

    def repo(self, repo_id: str, *, gated: bool = False, private: bool = False) -> Repo:
        """Create an empty repository."""
        self.repos[repo_id] = Repo(repo_id, self._store, gated, private)
        return self.repos[repo_id]

    def fail(self, kind: str, file: str = "*", **how: Any) -> Fault:
        """Arrange for a `Fault`; see there for the kinds."""
        fault = Fault(kind, file, **how)
        with self.lock:
            self.faults.append(fault)
        return fault

    def forget(self) -> None:
        """Empty the log and the list of faults."""
        with self.lock:
            self.log.clear()
            self.faults.clear()

    def requests(
        self, file: str | None = None, method: str | None = None, origin: str | None = None
    ) -> list[Request]:
        """Logged requests, optionally of files matching `file`, with `method`, at `origin`."""
        with self.lock:
            return [
                r
                for r in self.log
                if (file is None or (r.file is not None and fnmatch.fnmatch(r.file, file)))
                and method in (None, r.method)
                and origin in (None, r.origin)
            ]

    def body_bytes(self, file: str = "*") -> int:
        """Body bytes sent so far for files matching `file`."""
        return sum(r.sent for r in self.requests(file))

    def leaked_tokens(self) -> int:
        """Requests to the storage host that carried a token: must stay 0."""
        return sum(r.token is not None for r in self.requests(origin="cdn"))

    def take(
        self, where: str, name: str, kinds: tuple[str, ...], covers: tuple[int, int] | None = None
    ) -> Fault | None:
        """The next fault of one of `kinds` for `name`, used up by this call."""
        with self.lock:
            for fault in self.faults:
                if fault.kind not in kinds or fault.times == 0:
                    continue
                if not (fnmatch.fnmatch(where, fault.where) and fnmatch.fnmatch(name, fault.file)):
                    continue
                if fault.kind == "corrupt" and covers and not covers[0] <= fault.after < covers[1]:
                    continue
                fault.times -= 1
                return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, hub: HubServer, origin: str, port: int) -> None:
        self.hub, self.origin = hub, origin
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that are killed or hang up are what this server is for


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.receive(hub_uploads.post)

    def do_PUT(self) -> None:
        self.receive(hub_uploads.put)

    def receive(self, answer: Callable[[_Handler, bytes], None]) -> None:
        """A request with a body; see `hub_uploads`."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.log_request_line()
        answer(self, body)

    def log_request_line(self) -> str | None:
        """Note the request in the log; its token."""
        self.hub = self.server.hub
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        url = urlsplit(self.path)
        self.query = {k: v[-1] for k, v in parse_qs(url.query).items()}
        self.entry = Request(
            self.server.origin, self.command, self.path, None, self.headers.get("Range"), token
        )
        with self.hub.lock:
            self.hub.log.append(self.entry)
        return token

    def answer(self) -> None:
        token, url = self.log_request_line(), urlsplit(self.path)
        if self.server.origin == "cdn":
            return self.answer_cdn(url.path)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            repo_id, revision, path = (unquote(g) for g in match.groups())
            self.entry.file = path
            self.call_before()
            return self.answer_resolve(repo_id, revision, path)
        self.call_before()
        if url.path == "/api/whoami-v2":
            if token not in self.hub.tokens:
                return self.error(401, None, "Invalid username or password.")
            return self.json({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})
        if match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree|auth-check)(?:/([^/]+)(/.+)?)?)?", url.path
        ):
            repo_id, what, revision = match[1], match[2] or "revision", unquote(match[3] or "main")
            return self.answer_api(repo_id, what, revision, unquote(match[4] or "").strip("/"))
        self.error(404, None, "Not found")

    def call_before(self) -> None:
        if self.hub.before:
            self.hub.before(self.entry)

    # ---- the API

    def answer_api(self, repo_id: str, what: str, revision: str, below: str = "") -> None:
        if self.misbehave("api", f"{repo_id}/{what}"):
            return
        repo = self.admit(repo_id, metadata=what != "auth-check")
        if repo is None:
            return
        if what == "auth-check":
            return self.json({})
        commit = repo.find(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = sorted(repo.commits[commit].values(), key=lambda f: f.path)
        if what == "revision":
            siblings: list[dict[str, Any]] = []
            for f in files:
                item: dict[str, Any] = {"rfilename": f.path}
                if self.query.get("blobs"):
                    item |= {"size": f.size, "blobId": f.git_sha1}
                    if f.sha256:
                        item["lfs"] = {"sha256": f.sha256, "size": f.size, "pointerSize": 134}
                siblings.append(item)
            gated = "manual" if repo.gated else False
            about = {"_id": "0", "id": repo.id, "modelId": repo.id, "sha": commit, "tags": [], "downloads": 0}
            return self.json(about | {"gated": gated, "private": repo.private, "siblings": siblings})
        entries: list[dict[str, Any]] = []
        folders = {str(p) for f in files for p in Path(f.path).parents if str(p) != "."}
        entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in sorted(folders)]
        for f in files:
            entry: dict[str, Any] = {"type": "file", "oid": f.git_sha1, "size": f.size, "path": f.path}
            if f.sha256:
                entry["lfs"] = {"oid": f.sha256, "size": f.size, "pointerSize": 134}
            entries.append(entry)
        entries += repo.extra_tree
        if below and not any(e["path"] == below for e in entries):
            return self.error(404, "EntryNotFound", f"{below} does not exist")
        if below:
            entries = [e for e in entries if e["path"].startswith(f"{below}/")]
        start = int(self.query.get("cursor", 0))
        stop = start + self.hub.page_size
        headers = {}
        if stop < len(entries):
            link = f"{self.hub.link_base or self.hub.url}/api/models/{repo_id}/tree/{quote(revision, safe='')}?recursive=true&cursor={stop}"
            headers["Link"] = f'<{link}>; rel="next"'
        self.json(entries[start:stop], headers)

    def admit(self, repo_id: str, *, metadata: bool = False) -> Repo | None:
        """The repository if this request may read it; else the answer is sent. Metadata of gated repos is public."""
        hub, token = self.hub, self.entry.token
        if token is not None and token not in hub.tokens:
            self.error(401, None, "Invalid credentials in Authorization header")
            return None
        if repo_id in hub.renamed:
            location = self.path.replace(repo_id, hub.renamed[repo_id], 1)
            self.begin(307, {"Location": location, "Content-Length": "0"})
            return None
        repo = hub.repos.get(repo_id)
        granted = hub.tokens.get(token or "", set())
        allowed = repo is not None and ("*" in granted or repo_id in granted)
        if repo is None or (repo.private and not allowed):
            self.error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and not allowed and not metadata:
            if token is None:
                self.error(401, "GatedRepo", f"Access to model {repo_id} is restricted. Please log in.")
            else:
                self.error(
                    403, "GatedRepo", f"Access to model {repo_id} is restricted, you are not authorized."
                )
            return None
        return repo

    # ---- files

    def answer_resolve(self, repo_id: str, revision: str, path: str) -> None:
        if self.misbehave("resolve", path):
            return
        repo = self.admit(repo_id)
        if repo is None:
            return
        commit = repo.find(revision)
        if commit is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        file = repo.commits[commit].get(path)
        if file is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'}
        if file.sha256 is None:
            return self.body("resolve", file, headers)
        expires = f"{time.time() + self.hub.signature_ttl:.3f}"
        headers |= {
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(file.size),
            "Location": f"{self.hub.cdn_url}/{repo_id}/{commit}/{quote(path)}?expires={expires}",
            "Content-Length": "0",
        }
        self.begin(302, headers)

    def answer_cdn(self, target: str) -> None:
        org, name, commit, path = unquote(target).lstrip("/").split("/", 3)
        self.entry.file = path
        self.call_before()
        if self.entry.token is not None:
            return self.error(400, None, "Only one auth mechanism allowed")
        if float(self.query["expires"]) < time.time():
            return self.error(403, None, "Request has expired")
        if self.misbehave("cdn", path):
            return
        file = self.hub.repos[f"{org}/{name}"].commits[commit][path]
        self.body("cdn", file, {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"})

    def body(self, where: str, file: ServedFile, headers: dict[str, str]) -> None:
        """Send a file, or the range asked for, with whatever fault is due."""
        hub, size, start = self.hub, file.size, 0
        if fault := hub.take(where, file.path, ("size",)):
            size = fault.after
        stop, status = size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not hub.take(where, file.path, ("whole",)):
            start, stop = int(asked[1]), min(size, int(asked[2]) + 1) if asked[2] else size
            if fault := hub.take(where, file.path, ("shift",)):
                start += fault.after
            if start >= size:
                return self.error(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{size}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if self.command == "GET":
            for cap in (f for f in hub.faults if f.kind == "cap" and stop - start > f.after):
                return self.error(403, None, f"Bodies over {cap.after} bytes are not served")
        self.begin(status, headers | {"Content-Length": str(stop - start)})
        if self.command == "HEAD":
            return
        fault = hub.take(where, file.path, ("cut", "reset", "stall", "corrupt"), covers=(start, stop))
        with open(file.source, "rb") as f:
            if fault is None:
                self.send(f, start, stop)
            elif fault.kind == "corrupt":
                self.send(f, start, fault.after)
                self.send_bytes(bytes([os.pread(f.fileno(), 1, fault.after)[0] ^ 0xFF]))
                self.send(f, fault.after + 1, stop)
            else:
                self.send(f, start, min(stop, start + fault.after))
                if fault.kind == "stall":
                    hub.stopping.wait(fault.seconds)
                    return self.send(f, min(stop, start + fault.after), stop)
                self.close_connection = True
                if fault.kind == "reset":
                    time.sleep(0.05)  # lets the client read what was sent: a reset discards what it hasn't
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())

    def send(self, f: Any, start: int, stop: int) -> None:
        rate, began, first = self.hub.rate, time.monotonic(), start
        while start < stop:
            count = stop - start if rate is None else min(stop - start, max(4096, int(rate / 50)))
            count, n = min(count, 8 << 20), 0
            self.entry.sent += count  # first, so that what a client has is never missing from the log
            try:
                if isinstance(self.connection, ssl.SSLSocket):
                    n = self.connection.send(os.pread(f.fileno(), min(count, 1 << 20), start))
                else:
                    n = os.sendfile(self.connection.fileno(), f.fileno(), start, count)
            finally:
                self.entry.sent -= count - n
            start += n
            if rate is not None and (ahead := (start - first) / rate - (time.monotonic() - began)) > 0:
                time.sleep(ahead)

    def send_bytes(self, data: bytes) -> None:
        self.entry.sent += len(data)
        self.wfile.write(data)

    # ---- answers

    def misbehave(self, where: str, name: str) -> bool:
        fault = self.hub.take(where, name, ("status", "redirect", "answer"))
        if fault is None:
            return False
        if fault.kind == "answer":
            self.begin(200, fault.headers)
            self.wfile.write(fault.body)
            self.close_connection = True
        elif fault.kind == "redirect":
            self.begin(302, {"Location": fault.location, "Content-Length": "0"})
        else:
            headers = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
            self.error(fault.code, fault.error, "Service is having a bad day", headers)
        return True

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def json(self, value: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.begin(
            status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        )
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(
        self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps({"error": message}).encode()
        about = {
            "X-Error-Message": message,
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
        }
        self.begin(status, about | ({"X-Error-Code": code} if code else {}) | dict(headers or {}))
        if self.command != "HEAD":
            self.wfile.write(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repos", nargs="+", metavar="ORG/NAME=FOLDER")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, help="bytes per second and connection")
    args = parser.parse_args()
    with HubServer(args.port) as hub:
        hub.rate = args.rate
        for item in args.repos:
            repo_id, _, folder = item.partition("=")
            hub.repo(repo_id).commit(Path(folder))
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
