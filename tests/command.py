"""Runs the ``dpo`` command as a person does: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cli import main
from dpo_train.config import RunConfig, to_dict

DPO = (str(Path(sys.executable).with_name("dpo")),)


@dataclass(frozen=True)
class Finished:
    """What a command left behind. Its run's folder is looked up at once: a later command makes a newer one."""

    code: int
    output: str
    store: Path
    run_folder: Path = field(init=False)

    def __post_init__(self) -> None:
        folders = [path for path in (self.store / "runs").glob("*") if path.is_dir()]
        newest = max(folders, key=lambda path: path.stat().st_mtime_ns, default=self.store)
        object.__setattr__(self, "run_folder", newest)

    @property
    def log(self) -> str:
        return (self.run_folder / "run.log").read_text(encoding="utf-8", errors="replace")

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_folder / "events.jsonl").read_text().splitlines()]

    def ends(self) -> dict[str, dict[str, Any]]:
        """By stage, its last "end" event."""
        return {event["stage"]: event for event in self.events if event["kind"] == "end"}

    def record(self, stage: str) -> dict[str, Any]:
        return dict(json.loads((Path(self.ends()[stage]["path"]) / "record.json").read_text()))


def write_config(config: RunConfig, path: Path) -> Path:
    """The config as a file for the command line."""
    path.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    return path


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Starts ``dpo`` with arguments, its output in one pipe."""
    return subprocess.Popen(
        [*DPO, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A group of its own, as a shell gives it: signals to it do not reach the test.
        start_new_session=True,
        env={**os.environ, "RAY_ADDRESS": "", "MLFLOW_TRACKING_URI": "", "PYTHONUNBUFFERED": "", **environment},
    )


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What ``dpo`` says, in this process, to a user's mistake: exit code 2 and no traceback."""
    capfd.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse's way
        code = int(end.code or 0)
    said = capfd.readouterr()
    text = " ".join((said.out + said.err).split())  # wherever the terminal breaks its lines
    assert code == 2, text
    assert "Traceback" not in text
    return text


def dpo(*arguments: str, store: Path | None = None, **environment: str) -> Finished:
    """Runs ``dpo`` to its end."""
    process = start(*arguments, **environment)
    output, _ = process.communicate(timeout=580)
    return Finished(process.returncode, output, store or Path())
