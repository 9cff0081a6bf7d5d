"""A webhook: a real HTTP server that keeps what is posted to it and answers as a script says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET_PATH = "/hooks/T0/s3cret-part-of-the-address"


class Webhook(ThreadingHTTPServer):
    """Answers 200, or what ``answers`` holds, first to last: a status, or "hang"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[dict[str, Any]] = []
        self.requests = 0
        self.answers: list[int | str] = []
        self.ending = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{SECRET_PATH}"


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        hook = self.server
        hook.requests += 1
        answer = hook.answers.pop(0) if hook.answers else 200
        if answer == "hang":
            hook.ending.wait()
            return
        if answer == 200 and self.path == SECRET_PATH and self.headers["Content-Type"] == "application/json":
            hook.received.append(content)
        self.send_response(int(answer))
        if answer == 302:
            self.send_header("Location", f"http://127.0.0.1:{hook.server_address[1]}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the test's output."""


@contextlib.contextmanager
def webhook() -> Iterator[Webhook]:
    """A webhook for the length of the block."""
    with Webhook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join()
