"""A local stand-in for the model hub: enough of its HTTP interface for create_repo, upload_folder and snapshot_download.

It keeps repositories in memory. Files always travel inside the commit (upload mode "regular"), never by LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class HubState:
    """Repositories: name → {path → bytes}; `requests` logs method and path of every call."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()

    def revision(self, repo: str) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(self.repos[repo].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: HubState
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", (headers or {}).get("X-Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, code: int = 200) -> None:
        self._answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _note(self) -> str:
        path = unquote(urlparse(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            self.state.tokens.add(token.removeprefix("Bearer "))
        return path

    def do_POST(self) -> None:
        path, body = self._note(), self._body()
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = "/".join(filter(None, (request.get("organization"), request["name"])))
            repo = repo if "/" in repo else f"tester/{repo}"
            self.state.repos.setdefault(repo, {})
            self.state.private[repo] = bool(request.get("private")) or request.get("visibility") == "private"
            return self._json({"url": f"http://{self.headers['Host']}/{repo}", "name": repo})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = json.loads(body)["files"]
            return self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files
                    ]
                }
            )
        if match := re.fullmatch(r"/api/models/(.+)/commit/.+", path):
            repo = match[1]
            for line in filter(None, body.decode().splitlines()):
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.state.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            revision = self.state.revision(repo)
            url = f"http://{self.headers['Host']}/{repo}/commit/{revision}"
            return self._json({"success": True, "commitOid": revision, "commitUrl": url, "hookOutput": ""})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        return self._json({"error": f"not part of the stand-in: {path}"}, 404)

    def do_GET(self) -> None:
        path = self._note()
        if path == "/api/whoami-v2":
            return self._json({"name": "tester", "type": "user", "orgs": [], "auth": {}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path):
            return self._info(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.+", path):
            return self._tree(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(match[1], match[2])
        return self._json({"error": f"not part of the stand-in: {path}"}, 404)

    do_HEAD = do_GET

    def _missing(self, code: str) -> None:
        self._answer(404, b"", {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _info(self, repo: str) -> None:
        if repo not in self.state.repos:
            return self._missing("RepoNotFound")
        siblings = [{"rfilename": path} for path in sorted(self.state.repos[repo])]
        return self._json(
            {"id": repo, "sha": self.state.revision(repo), "siblings": siblings, "private": False, "tags": []}
        )

    def _tree(self, repo: str) -> None:
        if repo not in self.state.repos:
            return self._missing("RepoNotFound")
        files = self.state.repos[repo].items()
        rows = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files]
        return self._json(rows)

    def _file(self, repo: str, path: str) -> None:
        if repo not in self.state.repos:
            return self._missing("RepoNotFound")
        content = self.state.repos[repo].get(path)
        if content is None:
            return self._missing("EntryNotFound")
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": self.state.revision(repo),
            "Content-Type": "application/octet-stream",
            "X-Length": str(len(content)),
        }
        return self._answer(200, content, headers)


@contextmanager
def hub_stand_in():
    """Yields (endpoint, HubState) of a hub on a free local port."""
    state = HubState()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
