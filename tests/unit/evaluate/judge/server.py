"""A real HTTP server that speaks the judge's protocol, over keep-alive connections, and misbehaves on demand."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the server sends."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    is_cut: bool = False
    """Closes the connection in the middle of the body."""
    is_held: bool = False
    """Says nothing until the server ends."""


@dataclass
class Server:
    """``play`` gets the number of the request, from 0, and its payload."""

    url: str
    play: Callable[[int, Json], Answer]
    payloads: list[Json] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    end: threading.Event = field(default_factory=threading.Event)

    def take(self, handler: BaseHTTPRequestHandler, payload: Json) -> Answer:
        """Counts a request, and says what becomes of it."""
        with self.lock:
            number = len(self.payloads)
            self.payloads.append(payload)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.connections.add(handler.client_address)
        return self.play(number, payload)


def completion(reply: str | None, usage: Json | None = None) -> Answer:
    """A chat completion."""
    content: Json = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
    return Answer(body=json.dumps(content | ({"usage": usage} if usage else {})).encode())


def honest(payload: Json) -> str:
    """A judge that counts the word "good" in the answers that it is shown."""
    question = payload["messages"][0]["content"]
    _, a, b = re.split("^Answer [AB]:$", question, flags=re.MULTILINE)
    quoted = ["".join(line for line in part.splitlines() if line.startswith("> ")) for part in (a, b)]
    counts = [text.count("good") for text in quoted]
    verdict = "tie" if counts[0] == counts[1] else "A" if counts[0] > counts[1] else "B"
    return f"The better one is better.\nPreferred: {verdict}"


@contextmanager
def serving(play: Callable[[int, Json], Answer]) -> Iterator[Server]:
    """A server on a free port, ended with the block."""
    server: Server

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            answer = server.take(self, payload)
            if answer.is_held:
                server.end.wait()
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body) + answer.is_cut))
            self.end_headers()
            self.wfile.write(answer.body)
            self.close_connection |= answer.is_cut

        def log_message(self, *args: Any) -> None:
            del args

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away is part of some tests."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server = Server(url=f"http://127.0.0.1:{http.server_port}/v1", play=play)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.end.set()
            http.shutdown()
            thread.join()
