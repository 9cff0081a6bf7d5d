"""The command line against the test's server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_train import cli
from dpo_train.cli import kubeflow, parser
from tests.kubeflow.server import Server

CONFIG: dict[str, Any] = {
    "store": "s3://bucket/store",
    "model": {"path": "org/model"},
    "prepare": {"path": "s3://bucket/pairs.jsonl"},
    "tracking": {"uri": "http://mlflow.example.com"},
}

COMMANDS = {
    "submit": (kubeflow.SUBMIT_HELP, kubeflow.submit, kubeflow.add_submit_arguments),
    "cancel": (kubeflow.CANCEL_HELP, kubeflow.cancel, kubeflow.add_cancel_arguments),
    "logs": (kubeflow.LOGS_HELP, kubeflow.logs, kubeflow.add_logs_arguments),
}


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


def register() -> None:
    """Makes the commands known to ``dpo`` where it does not know them yet."""
    known = parser.build_parser

    def build() -> argparse.ArgumentParser:
        built = known()
        subparsers = next(action for action in built._actions if isinstance(action, argparse._SubParsersAction))
        for name in COMMANDS.keys() - subparsers.choices.keys():
            text, command, add_arguments = COMMANDS[name]
            parser._with_config(subparsers, name, text, command, add_arguments)
        return built

    cli.build_parser = build


if __name__ == "__main__":
    register()
    sys.exit(cli.main())
