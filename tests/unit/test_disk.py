"""Folders on a disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpo_train.disk import write_atomically


def test_writers_of_two_machines_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared disk their processes may have the same number; the names tell them apart, and nothing is left."""
    seen: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend(file.name for file in tmp_path.iterdir()))

    write_atomically(tmp_path / "record.json", "text")

    assert seen == [f".record.json.{os.uname().nodename}.{os.getpid()}"]
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("record.json", "text")]
