"""The command line against the test's server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_train import cli
from tests.kubeflow.server import Server

CONFIG: dict[str, Any] = {
    "store": "s3://bucket/store",
    "model": {"path": "org/model"},
    "prepare": {"path": "s3://bucket/pairs.jsonl"},
    "tracking": {"uri": "http://mlflow.example.com"},
}

PROCESS = (sys.executable, "-c", "import sys; from dpo_train.cli import main; sys.exit(main())")
"""The command line as a process of its own."""


def write_config(folder: Path, server: Server | None = None, **sections: Any) -> Path:
    """A config that a cluster can see, for this server."""
    content = {**CONFIG, **sections}
    if server is not None:
        content["kubeflow"] = {"host": server.url, **content.get("kubeflow", {})}
    path = folder / "mine.yaml"
    path.write_text(json.dumps(content))
    return path


def dpo(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
