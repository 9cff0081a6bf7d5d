"""An HTTP proxy before an S3 server, which does the harm that networks and object storage do (tests/harm.py)."""

from __future__ import annotations

import base64
import hashlib
import http.client
import select
import socket
from typing import Literal, get_args

from tests.harm import Handler, Harmful

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


class Proxy(Harmful):
    """Stands before an S3 server."""

    def __init__(self, upstream: str, environment: dict[str, str]) -> None:
        self.upstream = upstream.removeprefix("http://")
        self._environment = environment
        super().__init__(_Handler, get_args(Kind))

    def environment(self) -> dict[str, str]:
        """The variables with which a process comes this way."""
        return {**self._environment, "AWS_ENDPOINT_URL": self.endpoint}


class _Handler(Handler):
    def _pass_on(self) -> None:
        kind = self._treat()
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
