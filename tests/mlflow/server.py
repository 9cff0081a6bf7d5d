"""MLflow's own server in a process of its own, over HTTP, with a SQLite file behind it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

READY_SECONDS = 120
"""How long a loaded machine may take to import MLflow and to make its tables."""


def environment(**more: str) -> dict[str, str]:
    """For a process that talks to a server; nothing of the developer's own takes part."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    # Without the jobs (scorers, traces) the server is one process and not ten.
    ours = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "HF_HUB_OFFLINE": "1"}
    return {**kept, **ours, **more}


@contextmanager
def serving(folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> Iterator[str]:
    """A tracking server with everything it keeps in the folder; yields its address."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
        *arguments,
    ]
    with running(command, f"http://127.0.0.1:{port}", "/health", folder / "server.log", environment(**variables or {})):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(command: list[str], url: str, path: str, log: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """A server's process, with its children, from when it answers until the end of the block."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=dict(variables), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(process, url + path, log)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no answer from {url}:\n{log.read_text()[-4000:]}") from None
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def guarding(folder: Path, admin: tuple[str, str]) -> dict[str, str]:
    """What a server with logins (``--app-name basic-auth``) needs in its environment: everyone may read."""
    settings = folder / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = {admin[0]}\nadmin_password = {admin[1]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test"}
