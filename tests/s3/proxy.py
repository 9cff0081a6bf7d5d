"""An HTTP proxy on 127.0.0.1 that stands before a server, counts what it sees and does harm by rules.

    proxy.fault("GET", r"/bucket/data", "reset", times=2)   the next two such requests; times=None: all of them
    proxy.seen                                               every request with what became of it
    proxy.count("GET", r"/bucket/data")

A rule's expression is searched in the path with its query ("/bucket/key?partNumber=1&uploadId=...").
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import select
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, get_args

Kind = Literal[
    "slow_down",  # 503 SlowDown
    "internal_error",  # 500 InternalError
    "denied",  # 403 AccessDenied
    "expired",  # 400 ExpiredToken
    "no_such_upload",  # 404 NoSuchUpload
    "refuse",  # the connection is closed before anything is answered
    "reset",  # half of the answer's body, then the connection is reset
    "truncate",  # headers that promise all of the body, half of it, then an orderly end
    "stall",  # half of the body, then nothing until the client gives up
    "drip",  # the body byte by byte, ten in a second
    "cut_upload",  # half of the request's body is read, then the connection is reset; the server sees nothing
    "damage_upload",  # one bit of the request's body changes; the answer is S3's, which compares Content-MD5
    "lost_answer",  # the server does what was asked, the answer never comes
    "empty_listing",  # a listing that lags: nothing is there yet
]
_CODES = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "no_such_upload": (404, "NoSuchUpload", "The specified upload does not exist."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'
_EMPTY_LISTING = (
    '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><KeyCount>0</KeyCount>'
    "<IsTruncated>false</IsTruncated></ListBucketResult>"
)
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length", "server", "date"}


@dataclass
class _Rule:
    method: str
    path: re.Pattern[str]
    kind: str
    times: int | None
    skip: int

    def strikes(self, method: str, path: str) -> bool:
        if self.method not in {method, "*"} or not self.path.search(path) or self.times == 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass(frozen=True)
class Seen:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str]
    kind: str
    """What was done to it; "" if it was only passed on."""


class Proxy:
    """Starts with the ``with`` block and ends with it; its rules may change meanwhile."""

    def __init__(self, upstream: str, environment: dict[str, str]) -> None:
        self.upstream = upstream.removeprefix("http://")
        self._environment = environment
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self.seen: list[Seen] = []
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler, self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """The variables with which a process comes this way."""
        return {**self._environment, "AWS_ENDPOINT_URL": self.endpoint}

    def fault(self, method: str, path: str, kind: Kind, times: int | None = None, *, skip: int = 0) -> None:
        """Adds a rule; the first that fits a request is used.

        Args:
            method: "GET", "PUT", ..., or "*".
            times: how many requests it strikes; None: all.
            skip: how many it lets pass before.
        """
        assert kind in get_args(Kind), kind
        with self._lock:
            self._rules.append(_Rule(method, re.compile(path), kind, times, skip))

    def clear(self) -> None:
        """Forgets rules and requests."""
        with self._lock:
            self._rules.clear()
            self.seen.clear()

    def count(self, method: str, path: str, kind: str | None = None) -> int:
        """How many such requests were seen; with ``kind``, only those that were treated so."""
        with self._lock:
            return sum(
                method in {seen.method, "*"} and bool(re.search(path, seen.path)) and kind in {None, seen.kind}
                for seen in self.seen
            )

    def treat(self, method: str, path: str, headers: Mapping[str, str]) -> str:
        """Which harm this request gets; "" for none."""
        with self._lock:
            kind = next((rule.kind for rule in self._rules if rule.strikes(method, path)), "")
            self.seen.append(Seen(method, path, headers, kind))
            return kind


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], proxy: Proxy) -> None:
        super().__init__(address, handler)
        self.proxy = proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each small answer waits 40 ms
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _pass_on(self) -> None:
        kind = self.server.proxy.treat(self.command, self.path, dict(self.headers))
        size = int(self.headers.get("Content-Length") or 0)
        if kind == "refuse":
            self.close_connection = True
            return
        if kind == "cut_upload":
            self.rfile.read(size // 2)
            self._reset()
            return
        body = self.rfile.read(size)
        if kind in _CODES:
            status, code, message = _CODES[kind]
            self._answer(status, {"Content-Type": "application/xml"}, _ERROR.format(code, message).encode())
            return
        if kind == "empty_listing":
            self._answer(200, {"Content-Type": "application/xml"}, _EMPTY_LISTING.encode())
            return
        if kind == "damage_upload":
            body = body[: size // 2] + bytes([body[size // 2] ^ 1]) + body[size // 2 + 1 :]
            digest = base64.b64encode(hashlib.md5(body).digest()).decode()
            if self.headers.get("Content-MD5") not in {None, digest}:  # moto does not look
                self._answer(400, {"Content-Type": "application/xml"}, _ERROR.format("BadDigest", "Damaged.").encode())
                return
        status, headers, content = self._ask(body)
        if kind == "lost_answer":
            self._reset()
            return
        self._answer(status, headers, content, kind)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = _pass_on

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            answer = connection.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
            content = answer.read()
            if self.command == "HEAD":
                kept["Content-Length"] = answer.getheader("Content-Length") or "0"
            return answer.status, kept, content
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, kind: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "drip":
            for position in range(len(content)):
                self.wfile.write(content[position : position + 1])
                if self._is_over(0.1):
                    break
            return
        self.wfile.write(content[: len(content) // 2] if kind in {"reset", "truncate", "stall"} else content)
        if kind == "reset":
            self._reset()
        elif kind == "truncate":
            self.close_connection = True
        elif kind == "stall":
            while not self._is_over(0.1):
                pass
            self.close_connection = True

    def _is_over(self, seconds: float) -> bool:
        """Waits; whether the client has closed the connection, or the test has ended."""
        readable, _, _ = select.select([self.connection], [], [], seconds)
        return self.server.proxy.closing.is_set() or bool(readable and not self.connection.recv(1, socket.MSG_PEEK))

    def _reset(self) -> None:
        """Ends the connection with a reset and not with an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # every other way shuts the connection down in order first
