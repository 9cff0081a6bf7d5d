"""HTTP: routes, logins, and faults that a test asks for."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.kubeflow import messages
from tests.kubeflow.state import RefusalError, State

LOGIN_PAGE = "<!doctype html><html><body><h1>Log in to dex</h1><form action=/dex/auth></form></body></html>"


@dataclass(frozen=True)
class Request:
    """What a route gets."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    content_type: str
    names: tuple[str, ...] = ()
    """What stands in the path's placeholders."""

    def json(self, kind: str) -> dict[str, Any]:
        """The body as a message of this kind."""
        try:
            content = json.loads(self.body)
            messages.check(kind, content, request=True)
        except ValueError as error:
            raise RefusalError(400, f"Invalid input error: {error}", code=3) from None
        return dict(content)

    def file(self, name: str) -> bytes:
        """A file of a form."""
        head = f"Content-Type: {self.content_type}\r\n\r\n".encode()
        form: Message = BytesParser().parsebytes(head + self.body)
        for part in form.walk():
            if part.get_param("name", header="content-disposition") == name:
                return bytes(part.get_payload(decode=True))
        raise RefusalError(400, "Failed to read pipeline from file", upload=True)


@dataclass(frozen=True)
class Text:
    """An answer that is no JSON."""

    text: str


Route = Callable[[State, Request], Any]
ROUTES: list[tuple[str, re.Pattern[str], str | None, Route]] = []
"""Method, path, kind of the answer, function. A module adds its own by ``route`` when it is imported."""


def route(method: str, path: str, answer: str | None) -> Callable[[Route], Route]:
    """Adds a route; ``{}`` in the path stands for anything without a slash.

    Args:
        answer: kind of the message that comes back; None: whatever the function returns.
    """
    pattern = re.compile(re.escape(path).replace(r"\{\}", "([^/:]+)"))

    def add(function: Route) -> Route:
        ROUTES.append((method, pattern, answer, function))
        return function

    return add


@dataclass
class Fault:
    """What goes wrong, and how often."""

    path: str
    """A regular expression that the path has to hold."""
    how: Literal["status", "html", "page", "redirect", "cut", "cut_after", "text", "slow"]
    """A status with Kubeflow's words; a login page; another page; a redirect to a login; nothing at all, before or
    after it was done; plain text; no answer before ``released``."""
    method: str = ""
    status: int = 500
    times: int = 1
    met: int = 0
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Server:
    """A running server."""

    url: str
    state: State
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    """All that came, in order."""
    headers: list[dict[str, str]] = field(default_factory=list)
    acts: list[tuple[str, str, Callable[[], object]]] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    """Tracebacks of the server's own."""

    def fail(self, path: str, how: Any, **more: Any) -> Fault:
        """Lets the next requests to a path go wrong."""
        fault = Fault(path, how, **more)
        self.faults.append(fault)
        return fault

    def before(self, path: str, act: Callable[[], object], method: str = "GET") -> None:
        """Lets something happen whenever a request to this path comes, before it is answered."""
        self.acts.append((method, path, act))

    def changes(self) -> list[str]:
        """What was asked for that changes something."""
        return [f"{request.method} {request.path}" for request in self.requests if request.method != "GET"]


@contextmanager
def serving(state: State | None = None, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server until the end of the block."""
    # Importing them adds their routes.
    from tests.kubeflow import pipelines, recurring, runs  # noqa: F401

    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    if tls is not None:
        http.socket = tls.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    scheme = "http" if tls is None else "https"
    server = Server(url=f"{scheme}://127.0.0.1:{http.server_address[1]}", state=state or State())
    http.served = server  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
        assert not server.bugs, server.bugs[0]
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_DELETE = do_GET

    def handle(self) -> None:
        # A client that does not trust the certificate goes away in the middle of the handshake.
        with suppress(ssl.SSLError, ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def _serve(self) -> None:
        server: Server = self.server.served  # type: ignore[attr-defined]
        parts = urlsplit(self.path)
        request = Request(
            method=self.command,
            path=unquote(parts.path),
            query=dict(parse_qsl(parts.query)),
            body=self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            content_type=self.headers.get("Content-Type", ""),
        )
        server.requests.append(request)
        server.headers.append(dict(self.headers.items()))
        fault = self._fault(server, request)
        if fault is not None and fault.how != "cut_after":
            self._go_wrong(fault)
            return
        try:
            for method, path, act in server.acts:
                if method == request.method and re.fullmatch(path, request.path):
                    act()
            answer = self._answer(server, request)
        except RefusalError as refusal:
            self._send(refusal.status, json.dumps(refusal.body))
            return
        except Exception:
            server.bugs.append(traceback.format_exc())
            self._send(500, json.dumps({"error": "a bug of the test's server", "code": 13, "message": "bug"}))
            return
        if fault is not None:
            self._go_wrong(fault)
        elif isinstance(answer, Text):
            self._send(200, answer.text, "text/plain")
        else:
            self._send(200, json.dumps(answer))

    def _answer(self, server: Server, request: Request) -> Any:
        state = server.state
        if state.token is not None and self.headers.get("Authorization") != f"Bearer {state.token}":
            raise RefusalError(401, "Unauthenticated: Request header error: there is no user identity header", code=16)
        if state.cookie is not None and self.headers.get("Cookie") != state.cookie:
            return Text(LOGIN_PAGE)
        for method, pattern, kind, function in ROUTES:
            found = pattern.fullmatch(request.path)
            if method == request.method and found:
                answer = function(state, Request(**{**vars(request), "names": found.groups()}))
                if kind is not None:
                    messages.check(kind, answer)
                return answer
        raise RefusalError(404, "", code=5)

    def _fault(self, server: Server, request: Request) -> Fault | None:
        for fault in server.faults:
            if fault.met < fault.times and fault.method in {"", request.method} and re.search(fault.path, request.path):
                fault.met += 1
                return fault
        return None

    def _go_wrong(self, fault: Fault) -> None:
        if fault.how == "status":
            words = "something is wrong, said the server of the test"
            self._send(fault.status, json.dumps({"error": words, "code": 13, "message": words, "details": []}))
        elif fault.how == "html":
            self._send(200, LOGIN_PAGE, "text/html; charset=utf-8")
        elif fault.how == "page":
            self._send(200, "<html><body>Welcome to the shop</body></html>", "text/html")
        elif fault.how == "text":
            self._send(200, "ok", "text/plain")
        elif fault.how == "redirect":
            self.send_response(302)
            self.send_header("Location", "/dex/auth?client_id=kubeflow&state=a-secret")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault.how == "slow":
            fault.released.wait(timeout=60)
            self.close_connection = True
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _send(self, status: int, text: str, kind: str = "application/json") -> None:
        kind = "text/html" if text == LOGIN_PAGE else kind
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
