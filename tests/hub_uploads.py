"""The writing half of `hub_server`: what the real client calls to make a repository and to commit files to it.

`/api/repos/create`, `/api/models/{id}/branch/{name}`, `/api/validate-yaml`, `/preupload/{rev}`, `.git/info/lfs/objects/batch`,
and `/commit/{rev}`. LFS objects are PUT to the storage host, which refuses a token; an object that is there is not asked for
again. A commit that names an object that never arrived is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from hub_server import Repo, _Handler

LFS_FROM = 4096
"""Bytes from which a file that does not look like text is an LFS object here; weights always are."""


def post(self: _Handler, body: bytes) -> None:
    path = urlsplit(self.path).path
    if self.entry.token not in self.hub.tokens:
        return self.error(401, None, "Invalid username or password.")
    if path == "/api/validate-yaml":
        return _validate(self, json.loads(body)["content"])
    if path == "/api/repos/create":
        return _create(self, json.loads(body))
    if path == "/lfs-verify":
        return self.json({} if _stored(self, json.loads(body)["oid"]).is_file() else {"error": "not there"})
    found = re.fullmatch(
        r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path
    ) or re.fullmatch(r"/([^/]+/[^/]+)\.(git/info/lfs/objects/batch)()", path)
    if found is None:
        return self.error(404, None, "Not found")
    repo_id, what, revision = found[1], found[2], unquote(found[3])
    if self.misbehave("api", f"{repo_id}/{what}") or (repo := self.admit(repo_id)) is None:
        return None
    if what == "branch":
        if revision in repo.refs:
            return self.error(409, None, f"Reference {revision} already exists")
        repo.refs[revision] = repo.refs["main"]
        return self.json({})
    if what == "preupload":
        return _preupload(self, json.loads(body))
    if what == "commit":
        return _commit(self, repo, revision, [json.loads(line) for line in body.splitlines()])
    return _batch(self, json.loads(body))


def put(self: _Handler, body: bytes) -> None:
    """An LFS object, at the storage host."""
    if self.entry.token is not None:
        return self.error(400, None, "Only one auth mechanism allowed")
    self.entry.file = oid = self.path.rpartition("/")[2]
    if self.misbehave("cdn", oid):
        return None
    if hashlib.sha256(body).hexdigest() != oid:
        return self.error(400, None, "The content is not what was announced")
    _stored(self, oid).write_bytes(body)
    return self.begin(200, {"Content-Length": "0"})


def _stored(self: _Handler, oid: str) -> Path:
    return self.hub._store / oid


def _validate(self: _Handler, content: str) -> None:
    found = re.match(r"\s*---\n(.*?)\n---\s*\n", content, re.S)
    try:
        data = yaml.safe_load(found[1]) if found else {}
        wrong = [
            k for k in ("license", "library_name", "pipeline_tag") if not isinstance(data.get(k, ""), str)
        ]
    except yaml.YAMLError as e:
        wrong = [str(e)]
    self.json({"errors": [{"message": w} for w in wrong], "warnings": []}, status=400 if wrong else 200)


def _create(self: _Handler, told: dict[str, Any]) -> None:
    repo_id = f"{told['organization']}/{told['name']}"
    if self.misbehave("api", f"{repo_id}/create"):
        return None
    if repo_id in self.hub.repos:
        return self.error(409, None, "You already created this model repo")
    repo = self.hub.repo(repo_id, private=told.get("visibility") == "private")
    repo.commit({".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
    self.hub.tokens[self.entry.token or ""].add(repo_id)
    return self.json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0"})


def _preupload(self: _Handler, told: dict[str, Any]) -> None:
    def mode(file: dict[str, Any]) -> str:
        binary = b"\0" in base64.b64decode(file["sample"])
        return (
            "lfs"
            if file["path"].endswith(".safetensors") or binary and file["size"] >= LFS_FROM
            else "regular"
        )

    self.json(
        {"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in told["files"]]}
    )


def _batch(self: _Handler, told: dict[str, Any]) -> None:
    objects = []
    for o in told["objects"]:
        actions = {
            "upload": {"href": f"{self.hub.cdn_url}/upload/{o['oid']}"},
            "verify": {"href": f"{self.hub.url}/lfs-verify"},
        }
        objects.append(o if _stored(self, o["oid"]).is_file() else o | {"actions": actions})
    self.json({"transfer": "basic", "objects": objects})


def _commit(self: _Handler, repo: Repo, revision: str, lines: list[dict[str, Any]]) -> None:
    if revision not in repo.refs:
        return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    files: dict[str, bytes | str | Path] = {}
    gone = set()
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "deletedFile":
            gone.add(value["path"])
        elif line["key"] == "lfsFile":
            if not (stored := _stored(self, value["oid"])).is_file():
                return self.error(400, None, f"LFS pointer to {value['oid']}, which does not exist")
            files[value["path"]] = stored
    held = {n: f.source for n, f in repo.commits[repo.refs[revision]].items() if n not in gone}
    commit = repo.commit({**held, **files}, revision, keep=False)
    url = f"{self.hub.url}/{repo.id}/commit/{commit}"
    return self.json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
