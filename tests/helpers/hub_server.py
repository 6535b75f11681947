"""A Hub on this machine: what the client needs to publish and load models, in memory, with faults on demand.

Storage of large files is on a second port, as on the real Hub: the client must not send its token there. No Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, READ_ONLY = "hf_" + "w" * 34, "hf_" + "r" * 34

_LARGE = 10_000  # bytes; larger files go to storage

_STAGES = {
    r"/api/repos/create": "create", r"/api/validate-yaml": "yaml", r".*/preupload/": "preupload",
    r".*/info/lfs/objects/batch": "lfs", r"/store/": "storage", r".*/commit/": "commit", r".*/tree/": "tree",
    r".*/branch/": "branch", r".*/resolve/": "resolve", r"/api/models/": "info",
}  # fmt: skip


@dataclass
class Repo:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str) -> dict[str, bytes] | None:
        sha = self.branches.get(revision, revision)
        return next((files for commit, files in self.commits if commit == sha), None)

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, files))
        self.branches[revision] = sha
        return sha


@dataclass
class Fault:
    """Answer all requests of a stage with a status, or cut the connection: before the change, or after (`late`)."""

    stage: str
    status: int | None = None  # None cuts
    late: bool = False


class Hub:
    """State of the server. Tests look into it, and set a fault, or what happens before requests of a stage."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.fault: Fault | None = None
        self.before: dict[str, Callable[[], object]] = {}
        self.requests: list[tuple[str, str]] = []  # stage, token
        self.lock = threading.Lock()

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Run both listeners; yields the endpoint."""
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})) for _ in range(2)]
        self.store = f"http://localhost:{servers[1].server_port}"  # another host than the Hub's, as in reality
        for server in servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{servers[0].server_port}"
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


def _digest(content: bytes) -> str:
    """SHA-256 of a large file, git's hash of a small one."""
    if len(content) >= _LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _CutError(Exception):
    """The connection ends without an answer."""


class _RefusedError(Exception):
    """The answer is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _go(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        stage = next((stage for pattern, stage in _STAGES.items() if re.match(pattern, path)), "other")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        with self.hub.lock:
            self.hub.requests.append((stage, token))
            self.hub.before.pop(stage, lambda: None)()
        try:
            self._fail(stage, late=False)
            if token and token not in (TOKEN, READ_ONLY):
                raise _RefusedError(401, "Invalid credentials in Authorization header", "RepoNotFound")
            if stage == "yaml":
                self._json({"errors": [], "warnings": []})
            elif stage == "create":
                self._create(json.loads(body), token)
            elif stage == "storage":
                self._storage(path.rpartition("/")[2], body)
            else:
                self._repository(stage, path, body, token)
        except _RefusedError as error:
            self._send(error.status, b"{}", {"Content-Type": "application/json", **error.headers})
        except _CutError:
            self.close_connection = True
            self.connection.close()

    do_GET = do_POST = do_PUT = do_HEAD = _go

    def _fail(self, stage: str, late: bool) -> None:
        fault = self.hub.fault
        if fault is None or (fault.stage, fault.late) != (stage, late):
            return
        if fault.status is None:
            raise _CutError
        raise _RefusedError(fault.status, "storage limit reached" if fault.status == 402 else "injected")

    def _create(self, wanted: dict[str, Any], token: str) -> None:
        if not token:
            raise _RefusedError(401, "Invalid username or password.", "RepoNotFound")
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        new = name not in self.hub.repos
        if not name.startswith("user/") or (token == READ_ONLY and new):
            raise _RefusedError(403, "You don't have the rights to create a model under this namespace")
        if new:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.repos[name] = Repo(private)
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._fail("create", late=True)
        self._json({"url": f"http://127.0.0.1/{name}", "name": name}, 200 if new else 409)

    def _storage(self, oid: str, body: bytes) -> None:
        if self.command != "PUT":
            return self._send(200, self.hub.storage[oid], {"ETag": f'"{oid}"'})
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, "wrong content")
        self.hub.storage[oid] = body
        self._json({})

    def _repository(self, stage: str, path: str, body: bytes, token: str) -> None:
        """Answer what names a repository."""
        match = re.match(r"/(?:api/)?(?:models/)?([^/]+/[^/]+?)(?:\.git)?(/.*)?$", path)
        name, rest = (match.group(1), match.group(2) or "") if match else ("", "")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not token):
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        if stage in ("preupload", "lfs", "commit", "branch") and token != TOKEN:
            raise _RefusedError(403, "no right to write")
        if stage == "lfs":
            self._lfs(json.loads(body)["objects"])
        elif stage == "preupload":
            self._preupload(repo.files(rest.partition("/preupload/")[2]) or {}, json.loads(body)["files"])
        elif stage == "branch":
            branch = rest.partition("/branch/")[2]
            if branch in repo.branches:
                raise _RefusedError(409, "Reference already exists")
            repo.branches[branch] = repo.branches["main"]
            self._json({})
        elif stage == "commit":
            self._commit(repo, name, rest.partition("/commit/")[2], body)
        elif stage == "resolve":
            self._resolve(repo, *rest.removeprefix("/resolve/").split("/", 1))
        elif stage == "info":
            revision = rest.partition("/revision/")[2] or "main"
            files = repo.files(revision)
            if files is None:
                raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
            about = {"id": name, "sha": repo.branches.get(revision, revision), "private": repo.private, "tags": []}
            self._json({**about, "siblings": [{"rfilename": file} for file in files]})
        else:  # such as folders of further chat templates
            raise _RefusedError(404, "Entry not found", "EntryNotFound")

    def _preupload(self, present: dict[str, bytes], files: list[dict[str, Any]]) -> None:
        answers = []
        for file in files:
            answer = {"path": file["path"], "uploadMode": "lfs" if file["size"] >= _LARGE else "regular"}
            known = {"oid": _digest(present[file["path"]])} if file["path"] in present else {}
            answers.append({**answer, "shouldIgnore": False, **known})
        self._json({"files": answers})

    def _lfs(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for entry in objects:
            upload = {"actions": {"upload": {"href": f"{self.hub.store}/store/{entry['oid']}"}}}
            answers.append({**entry, **({} if entry["oid"] in self.hub.storage else upload)})
        self._json({"objects": answers})

    def _commit(self, repo: Repo, name: str, revision: str, body: bytes) -> None:
        files = dict(repo.files(revision) or {})
        for step in map(json.loads, body.splitlines()):
            value = step["value"]
            if step["key"] == "header" and value.get("parentCommit") not in (None, repo.branches.get(revision)):
                raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.hub.storage[value["oid"]]
            elif step["key"] == "deletedFile":
                files.pop(value["path"])
        sha = repo.commit(files, revision)
        self._fail("commit", late=True)
        self._json({"commitUrl": f"http://127.0.0.1/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def _resolve(self, repo: Repo, revision: str, file: str) -> None:
        files, sha = repo.files(revision), repo.branches.get(revision, revision)
        if files is None or file not in files:
            raise _RefusedError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        content, etag = files[file], f'"{_digest(files[file])}"'
        if len(content) < _LARGE:
            return self._send(200, content, {"ETag": etag, "X-Repo-Commit": sha})
        self.hub.storage[_digest(content)] = content
        location = {"Location": f"{self.hub.store}/store/{_digest(content)}", "X-Repo-Commit": sha}
        self._send(302, b"", {**location, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
