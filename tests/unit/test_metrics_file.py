"""``metrics.jsonl``: a training's numbers, one line per step."""

from __future__ import annotations

import json
from pathlib import Path

from dpo_train.metrics_file import METRICS_FILE, History, read_history


def test_lines_are_read_back(tmp_path: Path) -> None:
    """What was appended, in order."""
    file = tmp_path / METRICS_FILE
    history = History(file, 0)
    history.append(0, {"loss": 0.5})
    history.append(1, {"loss": 0.25, "grad_norm": 3.0})
    assert read_history(file) == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25, "grad_norm": 3.0}]


def test_last_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    """What is whole is read; a missing file has no lines."""
    file = tmp_path / METRICS_FILE
    file.write_text(json.dumps({"step": 0, "loss": 0.5}) + '\n{"step": 1, "lo')
    assert read_history(file) == [{"step": 0, "loss": 0.5}]
    assert read_history(tmp_path / "absent.jsonl") == []


def test_resume_drops_the_lines_that_are_done_again(tmp_path: Path) -> None:
    """From step 2 on each step stands there once, and a cut line does not spoil the next."""
    file = tmp_path / METRICS_FILE
    file.write_text("".join(json.dumps({"step": step, "loss": 9.0}) + "\n" for step in range(4)) + '{"st')
    History(file, 2).append(2, {"loss": 1.0})
    assert [(line["step"], line["loss"]) for line in read_history(file)] == [(0, 9.0), (1, 9.0), (2, 1.0)]
