"""A fake of Ray's Jobs REST interface: a real HTTP server that plays jobs by a script, and misbehaves on demand.

The real thing is in tests/ray/test_launch.py. It does not break its answers off, and cannot be told when to fail.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dpo_train.cluster import job as jobs
from dpo_train.cluster.job import Ended, Job
from dpo_train.cluster.ray_api import RayApiLauncher
from dpo_train.config import RunConfig, parse_config

Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the server sends instead of its own answer."""

    status: int = 500
    body: str = "a fault"
    headers: Mapping[str, str] = field(default_factory=dict)
    is_cut: bool = False
    """Does what was asked, and closes the connection in the middle of the answer."""


@dataclass
class Played:
    """A job. Each look at its state takes the next of ``turns``: a status, and what is printed before the look."""

    turns: list[tuple[str, str]]
    spec: Json = field(default_factory=dict)
    log: str = ""
    status: str = "PENDING"
    more: Json = field(default_factory=dict)
    """Further fields of its state."""

    def look(self) -> Json:
        if self.turns:
            self.status, printed = self.turns.pop(0)
            self.log += printed
        state = {"status": self.status, "message": "as played", "metadata": self.spec.get("metadata")}
        return {**state, "start_time": int(time.time() * 1000), **self.more}


@dataclass
class FakeRay:
    """``jobs`` by name; what is submitted plays ``turns``."""

    url: str = ""
    turns: list[tuple[str, str]] = field(default_factory=lambda: [("RUNNING", "hello\n"), ("SUCCEEDED", "bye\n")])
    jobs: dict[str, Played] = field(default_factory=dict)
    fault: Callable[[str, str, int], Answer | None] = lambda method, path, number: None
    """Gets method, path and the number of such requests before."""
    requests: list[str] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)

    def answer(self, method: str, path: str, payload: Json) -> tuple[int, str]:
        """As Ray 2.60 answers."""
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": "2.60.0"})
        if method == "POST" and path == "/api/jobs/":
            return self._submit(payload)
        name, _, rest = path.removeprefix("/api/jobs/").partition("/")
        job = self.jobs.get(name)
        if job is None:
            return 404, f"Job {name} does not exist"
        if rest == "logs":
            return 200, json.dumps({"logs": job.log})
        if rest == "stop":
            job.turns = [("RUNNING", ""), ("STOPPED", "")]
            return 200, json.dumps({"stopped": True})
        return 200, json.dumps(job.look())

    def _submit(self, payload: Json) -> tuple[int, str]:
        name = payload["submission_id"]
        if name in self.jobs:
            return 500, f"Traceback ...\nRuntimeError: ... ValueError: Job with submission_id {name} already exists."
        self.jobs[name] = Played(turns=list(self.turns), spec=payload)
        return 200, json.dumps({"job_id": name, "submission_id": name})

    def count(self, request: str) -> int:
        return sum(each.startswith(request) for each in self.requests)


@contextmanager
def fake_ray() -> Iterator[FakeRay]:
    """A server on a free port, ended with the block."""
    ray = FakeRay()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            fault = ray.fault(self.command, self.path, ray.count(f"{self.command} {self.path}"))
            ray.requests.append(f"{self.command} {self.path}")
            ray.headers.append({name.lower(): value for name, value in self.headers.items()})
            is_own = fault is None or fault.is_cut
            status, text = ray.answer(self.command, self.path, payload) if is_own else (fault.status, fault.body)  # type: ignore[union-attr]
            body = text.encode()
            self.send_response(status)
            for name, value in (fault.headers if fault else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) + bool(fault and fault.is_cut)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection |= bool(fault and fault.is_cut)

        do_GET = do_POST = handle_any

        def log_message(self, *args: Any) -> None:
            del args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        ray.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield ray
        finally:
            http.shutdown()
            thread.join()


@dataclass
class Call:
    """One caller, whose time passes by waiting alone."""

    config: RunConfig
    job: Job
    told: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    waited_s: float = 0.0
    interrupt_after: int | None = None

    def wait(self, seconds: float) -> None:
        self.waited_s += seconds
        if self.interrupt_after is not None:
            self.interrupt_after -= 1
            if self.interrupt_after < 0:
                self.interrupt_after = None
                raise KeyboardInterrupt

    def run(self) -> Ended:
        launcher = RayApiLauncher(self.config, wait=self.wait, clock=lambda: self.waited_s)
        return launcher.run(self.job, tell=self.told.append, line=self.lines.append)


def call(folder: Path, ray: FakeRay, *overrides: str, run_id: str | None = "a-run") -> Call:
    tree = {
        "store": str(folder / "store"),
        "model": {"path": str(folder)},
        "prepare": {"path": str(folder)},
        "cluster": {"launcher": "ray", "address": ray.url},
    }
    config = parse_config(json.dumps(tree), overrides, origin="the test")
    return Call(config, jobs.job_for("prepare", config, {}, run_id=run_id))
