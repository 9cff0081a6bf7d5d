"""Progress as a file of events: whoever works appends a line, whoever shows follows the file.

A pipeline step runs in a child process and a training rank in a Ray worker; a terminal's carriage returns do not
survive the way up. One JSON object per line does. Lines are short and written with one append, so writers need no lock.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT_KEY = "DPO_EVENTS"

_forward: Callable[[str, str], None] | None = None


def forward_to(send: Callable[[str, str], None] | None) -> None:
    """Has this process hand on its events, as (path, line), to one that can reach their file; None: writes them itself.

    A worker on another machine does not see the driver's files.
    """
    global _forward  # noqa: PLW0603 - all reporters of a process, wherever they came from
    _forward = send


def append(path: str, line: str) -> None:
    """Appends a line to a file of events."""
    try:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(line)
    except OSError as error:
        # Events are for show. On a full disk it is the output's own error that must come through.
        if error.errno != errno.ENOSPC:
            raise


@dataclass(frozen=True)
class Reporter:
    """Appends events; picklable. Without a path it is silent."""

    path: str | None = None
    stage: str = ""

    @classmethod
    def from_environment(cls, stage: str = "") -> Reporter:
        return cls(os.environ.get(ENVIRONMENT_KEY), stage)

    def event(self, kind: str, **fields: Any) -> None:
        if self.path is None:
            return
        line = json.dumps({"time": time.time(), "stage": self.stage, "kind": kind, **fields}) + "\n"
        (_forward or append)(self.path, line)

    def progress(self, done: float, total: float, unit: str = "pairs", **metrics: float) -> None:
        """``done`` of ``total`` units, and the numbers that move meanwhile (loss, margin)."""
        self.event("progress", done=done, total=total, unit=unit, metrics=metrics)

    def message(self, text: str) -> None:
        self.event("message", text=text)


class Follower:
    """Reads a growing file of JSON lines; each call of ``new`` returns the events added since the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            block = stream.read()
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]
