"""``metrics.jsonl``: a training's numbers, one line per step. Free of torch, so that reading it is quick."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dpo_train.errors import StoreError

METRICS_FILE = "metrics.jsonl"


class History:
    """``metrics.jsonl``: one line per step."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        kept = [line for line in read_history(path) if line["step"] < start]
        if [line["step"] for line in kept] != list(range(start)):
            raise StoreError(
                f"{path} lacks steps that its checkpoint has",
                got=f"{len(kept)} lines",
                expected=f"{start}",
                fix=f"remove {path.parent} and run again",
            )
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")

    def sync(self) -> None:
        """Before a checkpoint is: after a power cut the history must not lack steps that the checkpoint has."""
        with self._path.open("a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())


def read_history(path: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl``; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
