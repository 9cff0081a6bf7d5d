"""An HTTP proxy before the API server, which does harm by rules (tests/harm.py) and serves what pods print.

    proxy.fault("GET", r"/rayjobs\\?watch", "cut", times=2)
    proxy.logs["pod"].append("a line")

The test cluster has no kubelet, which is who serves a pod's log: **the endpoint pods/NAME/log is this proxy's own**,
with ``follow``, ``timestamps`` and ``sinceTime`` as Kubernetes documents them. Everything else goes to the real API
server, with the caller's token if it has one, else with the login of KUBECONFIG.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import parse_qs, urlsplit

import kubernetes
import urllib3
import yaml

from tests.harm import Handler, Harmful

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


class Proxy(Harmful):
    """Stands before the API server that KUBECONFIG names."""

    def __init__(self) -> None:
        configuration = kubernetes.client.Configuration()
        kubernetes.config.load_kube_config(os.environ["KUBECONFIG"], client_configuration=configuration)
        self.upstream = configuration.host
        self.login = {item["key"]: item["value"] for item in configuration.auth_settings().values()}
        self.with_login = kubernetes.client.ApiClient(configuration).rest_client.pool_manager
        self.without = urllib3.PoolManager(ca_certs=configuration.ssl_ca_cert, maxsize=16)
        self.logs: defaultdict[str, Log] = defaultdict(Log)
        super().__init__(_Handler, get_args(Kind))

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        for log in list(self.logs.values()):
            log.end()
        super().__exit__(*error)

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


class _Handler(Handler):
    def _pass_on(self) -> None:
        proxy = self.server.proxy
        kind = self._treat()
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
