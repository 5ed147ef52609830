"""A stand-in for the Hugging Face hub: the endpoints that its client uses, over real HTTP.

Repositories live in memory. It answers as the hub's public API does where we know it; what only the
real hub does (Xet storage, malware scans, quotas) is not here.
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

TOKEN = "hf_right"
_LARGE = 1000  # bytes from which a file goes through LFS


@dataclass
class Repo:
    """Commits, oldest first, each all files by path; revisions are indices into them."""

    private: bool = False
    gated: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    tags: dict[str, int] = field(default_factory=dict)

    def index(self, revision: str) -> int | None:
        if revision == "main":
            return len(self.commits) - 1
        shas = [self.sha(index) for index in range(len(self.commits))]
        return shas.index(revision) if revision in shas else self.tags.get(revision)

    def sha(self, index: int) -> str:
        listing = sorted((name, sha256(data)) for name, data in self.commits[index].items())
        return hashlib.sha1(repr((index, listing)).encode()).hexdigest()


@dataclass
class Hub:
    """All repositories, what is to go wrong, and the requests that came."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    cut: str = ""  # of this file half is sent, then the connection is closed
    short: str = ""  # of this file half is sent as if it were all, which no client tries again
    status: int = 0  # what every request is answered with
    requests: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, files: dict[str, bytes], **options: Any) -> Repo:
        repo = self.repos.setdefault(name, Repo(**options))
        repo.commits.append(files)
        return repo


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Yield a hub that answers on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Answer,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Answer(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if self.hub.status:
            self._send(self.hub.status, b"{}")
            return
        routes = {
            r"/api/repos/create": self._create,
            r"/api/validate-yaml": lambda _: self._json({}),
            r"/api/(?:models|datasets)/([\w-]+/[\w.-]+)(?:/revision/(.+))?": self._info,
            r"/api/(?:models|datasets)/([\w-]+/[\w.-]+)/tree/(\w+)": self._tree,
            r"/api/models/(\w+/[\w.-]+)/preupload/main": self._preupload,
            r"/api/models/(\w+/[\w.-]+)/commit/main": self._commit,
            r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch": self._batch,
            r"/lfs/(\w+)": self._store,
            r"(?:/datasets)?/([\w-]+/[\w.-]+)/resolve/(\w+)/(.+)": self._file,
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, path):
                answer(body, *found.groups())
                return
        self._send(404, b"{}")

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._signed_in()):
            code = 404 if self._signed_in() else 401
            self._send(code, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _info(self, _: bytes, name: str, revision: str | None) -> None:
        if (repo := self._repo(name)) is None:
            return
        index = repo.index(revision or "main")
        if index is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": path} for path in repo.commits[index]]
        known = {"id": name, "sha": repo.sha(index), "private": repo.private}
        self._json({**known, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, _: bytes, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        index = repo.index(revision)
        assert index is not None
        self._json([_entry(path, data) for path, data in repo.commits[index].items()])

    def _file(self, _: bytes, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        if repo.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        index = repo.index(revision)
        assert index is not None
        data = repo.commits[index][path]
        headers = {"X-Repo-Commit": repo.sha(index), "ETag": f'"{_etag(data)}"'}
        if path == self.hub.cut and self.command == "GET":
            self._send(200, data[: len(data) // 2], {**headers, "Content-Length": str(len(data))})
            self.close_connection = True
            return
        if path == self.hub.short and self.command == "GET":
            data = data[: len(data) // 2]
        self._send(200, data, headers)

    def _create(self, body: bytes) -> None:
        if not self._signed_in():
            self._send(401, b"{}")
            return
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if not name.startswith("me/"):
            self._send(403, b'{"error": "no right"}')
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        code = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, Repo(private=bool(private)))
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name}, code)

    def _preupload(self, body: bytes, _: str) -> None:
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["size"] >= _LARGE else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, body: bytes, _: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        assert sha256(body) == oid
        self.hub.stored[oid] = body
        self._send(200, b"")

    def _commit(self, body: bytes, name: str) -> None:
        repo = self.hub.repos[name]
        files = dict(repo.commits[-1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repo.commits.append(files)
        oid = repo.sha(len(repo.commits) - 1)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(data: bytes) -> str:
    return sha256(data) if len(data) >= _LARGE else hashlib.sha1(data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    known = {"type": "file", "path": path, "size": len(data), "oid": _etag(data)[:40]}
    if len(data) < _LARGE:
        return known
    return {**known, "lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}}
