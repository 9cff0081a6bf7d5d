"""An HTTP proxy on 127.0.0.1 that stands before the API server, counts what it sees and does harm by rules.

    proxy.fault("GET", r"/rayjobs\\?watch", "cut", times=2)    the next two such requests; times=None: all of them
    proxy.logs["pod"].append("a line")                        what the pod prints

The test cluster has no kubelet, which is who serves a pod's log: **the endpoint pods/NAME/log is this proxy's own**,
with ``follow``, ``timestamps`` and ``sinceTime`` as Kubernetes documents them. Everything else goes to the real API
server, with the caller's token if it has one, else with the login of KUBECONFIG.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import parse_qs, urlsplit

import kubernetes
import urllib3
import yaml

Kind = Literal[
    "throttled",  # 429 with Retry-After: 3
    "internal_error",  # 500
    "unauthorized",  # 401, as for a token that has expired
    "forbidden",  # 403
    "conflict",  # 409
    "expired",  # 410, as a status
    "expired_event",  # 200 and an event that says 410, as a watch has it
    "refuse",  # the connection is closed before anything is answered
    "cut",  # the answer's headers and first event, then the connection is reset
    "lost_answer",  # the server does what was asked, the answer never comes
]
_STATUS = {
    "throttled": 429,
    "internal_error": 500,
    "unauthorized": 401,
    "forbidden": 403,
    "conflict": 409,
    "expired": 410,
}
_LOG = re.compile(r"/api/v1/namespaces/[^/]+/pods/([^/]+)/log$")
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "accept-encoding"}
START = datetime(2026, 1, 1, tzinfo=UTC)


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
    kind: str
    """What was done to it; "" if it was only passed on."""


class Log:
    """What one pod prints. Every line has its time; three lines share one, and eight fall into a second."""

    def __init__(self) -> None:
        self.lines: list[tuple[datetime, str]] = []
        self.ended = False
        self.cut_after: list[int] = []
        """The next streams are reset after so many lines."""
        self.last_word = ""
        """What the kubelet itself says at the end of such a stream: a line without a time."""
        self.changed = threading.Condition()

    def append(self, *texts: str) -> None:
        with self.changed:
            for text in texts:
                number = len(self.lines)
                self.lines.append((START + timedelta(milliseconds=125 * (number // 3 * 3)), text))
            self.changed.notify_all()

    def end(self) -> None:
        """The container has ended: who follows gets what there is, and the end."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()


class Proxy:
    """Starts with the ``with`` block and ends with it; its rules may change meanwhile."""

    def __init__(self) -> None:
        configuration = kubernetes.client.Configuration()
        kubernetes.config.load_kube_config(os.environ["KUBECONFIG"], client_configuration=configuration)
        self.upstream = configuration.host
        self.login = {item["key"]: item["value"] for item in configuration.auth_settings().values()}
        self.with_login = kubernetes.client.ApiClient(configuration).rest_client.pool_manager
        self.without = urllib3.PoolManager(ca_certs=configuration.ssl_ca_cert, maxsize=16)
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self.seen: list[Seen] = []
        self.logs: defaultdict[str, Log] = defaultdict(Log)
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler, self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for log in list(self.logs.values()):
            log.end()
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path, *, namespace: str, token: str | None = None) -> Path:
        """Writes a kubeconfig that leads through this proxy."""
        user = {} if token is None else {"token": token}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "proxy", "cluster": {"server": self.endpoint}}],
            "users": [{"name": "user", "user": user}],
            "contexts": [
                {"name": "proxy", "context": {"cluster": "proxy", "user": "user", "namespace": namespace}},
            ],
            "current-context": "proxy",
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def fault(self, method: str, path: str, kind: Kind, times: int | None = None, *, skip: int = 0) -> None:
        """Adds a rule; the first that fits a request is used."""
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

    def treat(self, method: str, path: str) -> str:
        """Which harm this request gets; "" for none."""
        with self._lock:
            kind = next((rule.kind for rule in self._rules if rule.strikes(method, path)), "")
            self.seen.append(Seen(method, path, kind))
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
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _pass_on(self) -> None:
        proxy = self.server.proxy
        kind = proxy.treat(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if kind == "refuse":
            self.close_connection = True
        elif kind in _STATUS:
            self._status(_STATUS[kind], f"{kind}, by the proxy")
        elif kind == "expired_event":
            event = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old resource version"}}
            self._begin({})
            self._chunk(json.dumps(event).encode() + b"\n")
            self._chunk(b"")
        elif found := _LOG.search(urlsplit(self.path).path):
            self._log(proxy.logs[found[1]])
        else:
            self._forward(body, kind)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _pass_on

    def _forward(self, body: bytes, kind: str) -> None:
        proxy = self.server.proxy
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        token = "Authorization" in headers or "authorization" in headers
        pool = proxy.without if token else proxy.with_login
        answer = pool.request(
            self.command,
            proxy.upstream + self.path,
            body=body or None,
            headers=headers if token else {**headers, **proxy.login},
            preload_content=False,
            retries=False,
        )
        try:
            if kind == "lost_answer":
                answer.drain_conn()
                self._reset()
                return
            self._begin({"Content-Type": answer.headers.get("Content-Type", "")}, answer.status)
            for block in answer.stream(2**16, decode_content=False):
                self._chunk(block)
                if kind == "cut":
                    self._reset()
                    return
            self._chunk(b"")
        finally:
            answer.close()

    def _log(self, log: Log) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        assert query["timestamps"] == "true"
        since = datetime.fromisoformat(query["sinceTime"]) if "sinceTime" in query else START
        self._begin({"Content-Type": "text/plain"})
        cut = log.cut_after.pop(0) if log.cut_after else None
        position = sent = 0
        while True:
            with log.changed:
                if position == len(log.lines):
                    if log.ended or "follow" not in query:
                        break
                    log.changed.wait(0.2)
                    continue
                time, text = log.lines[position]
            position += 1
            if time < since:
                continue
            fraction = f"{time.microsecond:06d}".rstrip("0")
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S") + (f".{fraction}" if fraction else "") + "Z"
            self._chunk(f"{stamp} {text}\n".encode())
            sent += 1
            if sent == cut:
                if log.last_word:
                    self._chunk(f"{log.last_word}\n".encode())
                self._reset()
                return
        self._chunk(b"")

    def _status(self, status: int, message: str) -> None:
        content = json.dumps({"kind": "Status", "status": "Failure", "message": message, "code": status}).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "3")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _begin(self, headers: Mapping[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def _reset(self) -> None:
        """Ends the connection with a reset and not with an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
