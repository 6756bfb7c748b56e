"""A small hub on this machine: the HTTP API of the Hugging Face hub as far as huggingface_hub calls it for a model.

Repositories with branches and commits, large files by git-lfs, tokens, downloads. Everything is in memory.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass
class Hub:
    """What the server has, and what it does wrong: `breaks` is a part of a path where it closes the connection."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    breaks: str | None = None
    failing: str | None = None

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]


@contextmanager
def serving() -> Iterator[Hub]:
    """A running hub on a free port of 127.0.0.1."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.state
        hub.calls.append(f"{method} {path}")
        if hub.breaks is not None and hub.breaks in path:
            self.connection.close()
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hub.failing is not None and hub.failing in path:
            return self._send(503, {"error": "out of order"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            return self._send(401, {"error": "Invalid credentials"})
        if method != "GET" and method != "HEAD" and not path.startswith("/large/") and token != WRITER:
            return self._send(403, {"error": "no right to write"})
        for pattern, name in ROUTES.items():
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return getattr(self, name)(*found.groups(), body=body, token=token)
        return self._send(404, {"error": f"no route for {method} {path}"})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, name: str, token: str) -> Repository | None:
        found = self.state.repositories.get(name)
        if found is None or (found.private and not token):
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _commit(self, repository: Repository, revision: str) -> str | None:
        sha = repository.branches.get(revision, revision)
        if sha in repository.commits:
            return sha
        self._send(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def create(self, *, body: bytes, token: str) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.repositories:
            error = {"error": "You already created this model repo", "url": f"{self.state.address}/{name}"}
            return self._send(409, error)
        made = self.state.repositories[name] = Repository(asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": b""})
        return self._send(200, {"url": f"{self.state.address}/{name}", "name": name})

    def card(self, *, body: bytes, token: str) -> None:
        is_valid = json.loads(body)["content"].startswith("---\n")
        self._send(
            200 if is_valid else 400, {"errors": [] if is_valid else [{"message": "no metadata"}], "warnings": []}
        )

    def branch(self, name: str, branch: str, *, body: bytes, token: str) -> None:
        if (repository := self._repository(name, token)) is None:
            return None
        if branch in repository.branches:
            return self._send(409, {"error": "Reference already exists"})
        repository.branches[branch] = repository.branches["main"]
        return self._send(200, {})

    def info(self, name: str, revision: str | None = None, *, body: bytes, token: str) -> None:
        repository = self._repository(name, token)
        sha = None if repository is None else self._commit(repository, revision or "main")
        if repository is None or sha is None:
            return
        files = [{"rfilename": path} for path in repository.commits[sha]]
        self._send(200, {"id": name, "sha": sha, "private": repository.private, "siblings": files, "tags": []})

    def tree(self, name: str, revision: str, *, body: bytes, token: str) -> None:
        repository = self._repository(name, token)
        sha = None if repository is None else self._commit(repository, revision)
        if repository is None or sha is None:
            return
        rows = [
            {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            for path, content in repository.commits[sha].items()
        ]
        self._send(200, rows)

    def preupload(self, name: str, revision: str, *, body: bytes, token: str) -> None:
        if (repository := self._repository(name, token)) is None or self._commit(repository, revision) is None:
            return
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".model")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": rows})

    def batch(self, name: str, *, body: bytes, token: str) -> None:
        rows = []
        for asked in json.loads(body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.state.large:
                row["actions"] = {"upload": {"href": f"{self.state.address}/large/{asked['oid']}"}}
            rows.append(row)
        self._send(200, {"transfer": "basic", "objects": rows})

    def upload(self, oid: str, *, body: bytes, token: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "another content"})
        self.state.large[oid] = body
        return self._send(200, {})

    def commit(self, name: str, revision: str, *, body: bytes, token: str) -> None:
        repository = self._repository(name, token)
        if repository is None or (before := self._commit(repository, revision)) is None:
            return
        files = dict(repository.commits[before])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
        sha = repository.commit(revision, files)
        self._send(200, {"commitUrl": f"{self.state.address}/{name}/commit/{sha}", "commitOid": sha})

    def file(self, name: str, revision: str, path: str, *, body: bytes, token: str) -> None:
        repository = self._repository(name, token)
        sha = None if repository is None else self._commit(repository, revision)
        if repository is None or sha is None:
            return
        content = repository.commits[sha].get(path)
        if content is None:
            return self._send(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            )
        return self._send(200, content, {"ETag": f'"{_git_oid(content)}"', "X-Repo-Commit": sha})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"([^/]+/[^/]+)"
ROUTES = {
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "card",
    rf"POST /api/models/{NAME}/branch/(.+)": "branch",
    rf"GET /api/models/{NAME}": "info",
    rf"GET /api/models/{NAME}/revision/(.+)": "info",
    rf"GET /api/models/{NAME}/tree/([^/]+)": "tree",
    rf"POST /api/models/{NAME}/preupload/(.+)": "preupload",
    rf"POST /api/models/{NAME}/commit/(.+)": "commit",
    rf"POST /{NAME}\.git/info/lfs/objects/batch": "batch",
    r"PUT /large/([0-9a-f]+)": "upload",
    rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)": "file",
}
