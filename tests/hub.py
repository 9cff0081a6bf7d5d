"""A model hub of our own, spoken to over HTTP: as much of it as a push and a download need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest

TOKEN = "hf_writer"
SHA = "0" * 40


@dataclass
class Commit:
    """What one commit does to the files of a repository."""

    added: dict[str, bytes] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)


class HubServer(ThreadingHTTPServer):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        """What the repository holds already."""
        self.refuse_commits = False
        self.created: list[dict[str, Any]] = []
        self.commits: list[Commit] = []


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub of this process, with a token that may write there."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        files = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        if self.path.endswith("/whoami-v2"):
            known = self.headers["authorization"] == f"Bearer {TOKEN}"
            self._answer({"name": "writer", "orgs": []} if known else {"error": "Invalid token"}, 200 if known else 401)
        elif "/tree/" in self.path:
            files = self.server.files.items()
            self._answer([{"type": "file", "path": n, "size": len(b), "oid": _digest(b)} for n, b in files])
        elif "/revision/" in self.path:
            self._answer({"id": "org/name", "sha": SHA})
        elif "/resolve/" in self.path:
            self._send(self.server.files[self.path.rpartition("/")[2]])
        else:
            self._answer({})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            self.server.created.append(asked)
            self._answer({"url": f"http://{self.headers['host']}/{asked['organization']}/{asked['name']}"})
        elif "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": file["path"], **how} for file in json.loads(body)["files"]]})
        elif self.server.refuse_commits:
            self._answer({"error": "Forbidden"}, 403)
        else:
            self._commit([json.loads(line) for line in body.splitlines()])

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        commit = Commit()
        for line in lines:
            if line["key"] == "file":
                commit.added[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                commit.deleted.append(line["value"]["path"])
        self.server.commits.append(commit)
        self._answer({"commitUrl": "https://huggingface.co/org/name/commit/0", "commitOid": "0"})

    def _answer(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status)

    def _send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", _digest(content))
        self.send_header("x-repo-commit", SHA)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *unused: Any) -> None:
        """Says nothing."""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
