"""``dpo ui`` serves the runs of a config's store."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dpo_train.tracking import Tracking
from tests.command import start, write_config
from tests.tiny import tiny_config

pytest.importorskip("mlflow")
pytestmark = pytest.mark.slow


def test_ui_serves_the_experiment_of_the_store(tmp_path: Path) -> None:
    """The printed address answers, and its API finds the run."""
    config = tiny_config(tmp_path, tracking__uri=None)
    run_id = Tracking(config).start_pipeline("a run to look at")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    process = start("ui", str(write_config(config, tmp_path / "config.yaml")), "--port", str(port))
    try:
        page = fetch(f"http://127.0.0.1:{port}/")
        found = json.loads(fetch(f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={run_id}"))
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)

    assert "<title>MLflow</title>" in page
    assert found["run"]["info"]["run_name"] == "a run to look at"
    assert f"http://127.0.0.1:{port} shows sqlite:///" in output


def fetch(address: str, *, timeout: float = 120) -> str:
    """The page, as soon as the server answers."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with urllib.request.urlopen(address, timeout=30) as response:
                return str(response.read().decode())
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)  # a server's start sends no event to a client
