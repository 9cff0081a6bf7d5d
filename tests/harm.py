"""A server on 127.0.0.1 that counts what it sees and does harm by rules; proxies before real servers are made of it.

    server.fault("GET", r"/bucket/data", "reset", times=2)   the next two such requests; times=None: all of them
    server.seen                                              every request with what became of it
    server.count("GET", r"/bucket/data")

A rule's expression is searched in the path with its query ("/bucket/key?partNumber=1&uploadId=...").
"""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

Itself = TypeVar("Itself", bound="Harmful")


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


class Harmful:
    """Starts with the ``with`` block and ends with it; its rules may change meanwhile."""

    def __init__(self, handler: type[Handler], kinds: Collection[str]) -> None:
        self._kinds = kinds
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self.seen: list[Seen] = []
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), handler, self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self: Itself) -> Itself:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, path: str, kind: str, times: int | None = None, *, skip: int = 0) -> None:
        """Adds a rule; the first that fits a request is used.

        Args:
            method: "GET", "PUT", ..., or "*".
            times: how many requests it strikes; None: all.
            skip: how many it lets pass before.
        """
        assert kind in self._kinds, kind
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

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], proxy: Harmful) -> None:
        super().__init__(address, handler)
        self.proxy: Any = proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each small answer waits 40 ms
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _treat(self) -> str:
        """Which harm this request gets; "" for none."""
        return str(self.server.proxy.treat(self.command, self.path, dict(self.headers)))

    def _reset(self) -> None:
        """Ends the connection with a reset and not with an orderly end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # every other way shuts the connection down in order first
