"""A Hub on this machine: what the client needs for publishing and loading, in memory, with faults on demand.

Storage of large files is on a second port, as on the real Hub: the client must not send its token there. Without Xet.
"""

from __future__ import annotations

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
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READ_ONLY = "hf_" + "w" * 34, "hf_" + "r" * 34


_LARGE = 10_000  # bytes from which on a file goes to storage


@dataclass
class Repo:
    kind: str
    private: bool
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
    """Answer requests of a stage with a status, or cut the connection: before anything happens, or after (`late`)."""

    stage: str
    status: int | None = None  # None cuts
    times: int = 10**6
    late: bool = False


class Hub:
    """State of the server; tests look into it and set `faults`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []  # stage, path, authorization
        self.lock = threading.Lock()

    def reset(self) -> None:
        with self.lock:
            self.repos.clear()
            self.storage.clear()
            self.faults.clear()
            self.requests.clear()

    def fault(self, stage: str, late: bool) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.stage == stage and fault.late == late and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Both listeners; gives the endpoint."""
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})) for _ in range(2)]
        self.store = f"http://127.0.0.1:{servers[1].server_port}"
        for server in servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{servers[0].server_port}"
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


def _git(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _row(path: str, content: bytes) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git(content)}
    if len(content) >= _LARGE:
        row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return row


class _CutError(Exception):
    """The connection ends without an answer."""


class _AnsweredError(Exception):
    """A fault has answered already."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _go(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        stage = self._stage(path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        with self.hub.lock:
            self.hub.requests.append((stage, path, token))
        try:
            self._fail(stage, late=False)
            if token and token not in (TOKEN, READ_ONLY):
                return self._error(401, "Invalid credentials in Authorization header", "RepoNotFound")
            self._answer(stage, path, query, body, token)
        except _AnsweredError:
            pass
        except _CutError:
            self.close_connection = True
            self.connection.close()

    do_GET = do_POST = do_PUT = do_HEAD = _go

    def _fail(self, stage: str, late: bool) -> None:
        fault = self.hub.fault(stage, late)
        if fault is None:
            return
        if fault.status is not None:
            self._error(fault.status, "storage limit reached" if fault.status == 402 else "injected")
            raise _AnsweredError
        raise _CutError

    def _stage(self, path: str) -> str:
        for pattern, stage in (
            (r"/api/whoami-v2", "whoami"), (r"/api/repos/create", "create"), (r"/api/validate-yaml", "yaml"),
            (r".*/preupload/", "preupload"), (r".*/info/lfs/objects/batch", "lfs"), (r"/store/", "storage"),
            (r".*/commit/", "commit"), (r".*/tree/", "tree"), (r".*/branch/", "branch"), (r".*/paths-info/", "paths"),
            (r".*/resolve/", "resolve"), (r"/api/(models|datasets)/", "info"),
        ):  # fmt: skip
            if re.match(pattern, path):
                return stage
        return "other"

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _answer(self, stage: str, path: str, query: dict[str, list[str]], body: bytes, token: str) -> None:
        hub = self.hub
        if stage == "whoami":
            return self._json({"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if stage == "create":
            if not token:
                return self._error(401, "Invalid username or password.", "RepoNotFound")
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            kind = asked.get("type") or "model"
            if not name.startswith("user/") or (token == READ_ONLY and name not in hub.repos):
                return self._error(403, "You don't have the rights to create a model under this namespace")
            made = name not in hub.repos
            if made:
                hub.repos[name] = Repo(kind, asked.get("visibility") == "private" or bool(asked.get("private")))
                hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self._fail(stage, late=True)
            return self._json({"url": f"http://127.0.0.1/{name}", "name": name}, 200 if made else 409)
        if stage == "yaml":
            return self._json({"errors": [], "warnings": []})
        if stage == "storage":
            oid = path.rpartition("/")[2]
            if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != oid:
                    return self._error(400, "wrong content")
                hub.storage[oid] = body
                return self._json({})
            return self._bytes(hub.storage[oid], f'"{oid}"', "")
        match = re.match(r"/(?:api/)?(?:(models|datasets)/)?([^/]+/[^/]+?)(?:\.git)?(/.*)?$", path)
        if match is None:
            return self._error(404, "no such page")
        name, rest = match.group(2), match.group(3) or ""
        repo = hub.repos.get(name)
        if repo is None or (repo.private and not token):
            return self._error(404, "Repository not found", "RepoNotFound")
        if stage in ("preupload", "lfs", "commit", "branch") and token != TOKEN:
            return self._error(403 if token else 401, "no right to write", None if token else "RepoNotFound")
        if stage == "lfs":
            return self._lfs(json.loads(body))
        if stage == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= _LARGE else "regular", "shouldIgnore": False}
                for f in files
            ]
            return self._json({"files": modes})  # fmt: skip
        if stage == "branch":
            branch = rest.partition("/branch/")[2]
            if branch in repo.branches:
                return self._error(409, "Reference already exists")
            repo.branches[branch] = repo.branches["main"]
            return self._json({})
        if stage == "commit":
            return self._commit(repo, name, rest.partition("/commit/")[2], body)
        if stage == "resolve":
            revision, _, file = rest.removeprefix("/resolve/").partition("/")
            return self._resolve(repo, revision, file)
        revision = next(
            (part for key in ("/tree/", "/revision/", "/paths-info/") for part in [rest.partition(key)[2]] if part),
            "main",
        )
        revision, _, folder = revision.partition("/")
        files = repo.files(revision)
        if files is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        rows = [_row(p, c) for p, c in sorted(files.items())]
        if stage == "tree":
            inside = [r for r in rows if r["path"].startswith(f"{folder}/")] if folder else rows
            if folder and not inside:
                return self._error(404, "Entry not found", "EntryNotFound")
            if not (query.get("recursive") or ["false"])[0].lower().startswith("t"):
                start = len(folder) + 1 if folder else 0
                folders = {
                    r["path"][: start + r["path"][start:].index("/")] for r in inside if "/" in r["path"][start:]
                }
                inside = [r for r in inside if "/" not in r["path"][start:]] + [
                    {"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in sorted(folders)
                ]
            return self._json(inside)  # fmt: skip
        if stage == "paths":
            wanted = parse_qs(body.decode())["paths"]
            return self._json([r for r in rows if r["path"] in wanted])
        sha = repo.branches.get(revision, revision)
        siblings = [{"rfilename": r["path"], "size": r["size"], "blobId": r["oid"]} for r in rows]
        return self._json(
            {
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repo.private,
                "tags": [],
                "siblings": siblings,
                "gated": False,
            }
        )

    def _lfs(self, asked: dict[str, Any]) -> None:
        objects = []
        for entry in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.store}/store/{entry['oid']}"}}
            known = entry["oid"] in self.hub.storage
            objects.append({**entry, **({} if known else {"actions": upload})})
        self._json({"objects": objects})

    def _commit(self, repo: Repo, name: str, revision: str, body: bytes) -> None:
        files = dict(repo.files(revision) or {})
        for line in body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header" and value.get("parentCommit") not in (None, repo.branches.get(revision)):
                return self._error(412, "A commit has happened since. Please refresh and try again.")
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.hub.storage[value["oid"]]
            elif step["key"] == "deletedFile":
                files.pop(value["path"], None)
        with self.hub.lock:
            sha = repo.commit(files, revision)
        self._fail("commit", late=True)
        self._json({"commitUrl": f"http://127.0.0.1/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def _resolve(self, repo: Repo, revision: str, file: str) -> None:
        files, sha = repo.files(revision), repo.branches.get(revision, revision)
        if files is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        if file not in files:
            return self._error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        content = files[file]
        if len(content) < _LARGE:
            return self._bytes(content, f'"{_git(content)}"', sha)
        oid = hashlib.sha256(content).hexdigest()
        self.hub.storage[oid] = content
        headers = {
            "Location": f"{self.hub.store}/store/{oid}",
            "X-Repo-Commit": sha,
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(content)),
        }
        self._send(302, b"", headers)  # fmt: skip

    # ---- sending ----------------------------------------------------------------------------------------------------

    def _bytes(self, content: bytes, etag: str, sha: str) -> None:
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **({"X-Repo-Commit": sha} if sha else {})}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked.group(1)), int(asked.group(2) or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        self._send(200, content, headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        more = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        more |= {"Retry-After": "0"} if status == 429 else {}
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **more})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
