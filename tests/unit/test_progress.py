"""Progress as a file of events."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_train.progress import ENVIRONMENT_KEY, Follower, Reporter


def test_events_are_followed_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call returns what was added since the last; the order stays."""
    file = tmp_path / "events.jsonl"
    reporter, follower = Reporter(str(file), "train"), Follower(file)
    assert follower.new() == []
    monkeypatch.setattr(time, "time", lambda: 1234.5)
    reporter.progress(1, 10, "steps", loss=0.5)
    reporter.message("hello\nworld")
    first, second = follower.new()
    assert follower.new() == []
    assert first == {
        "time": 1234.5,
        "stage": "train",
        "kind": "progress",
        "done": 1,
        "total": 10,
        "unit": "steps",
        "metrics": {"loss": 0.5},
    }
    assert (second["kind"], second["text"]) == ("message", "hello\nworld")
    Reporter(reporter.path, "evaluate").message("next")
    assert [(event["stage"], event["text"]) for event in follower.new()] == [("evaluate", "next")]


def test_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    """A reader between two writes sees whole lines only, also when a character of several bytes is cut."""
    file = tmp_path / "events.jsonl"
    follower = Follower(file)
    line = '{"kind": "message", "text": "ö"}\n'.encode()
    with file.open("ab") as stream:
        for part in (line[:28], line[28:29], line[29:-1]):
            stream.write(part)
            stream.flush()
            assert follower.new() == []
        stream.write(line[-1:])
    assert [event["text"] for event in follower.new()] == ["ö"]


def test_reporter_without_a_file_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Library use leaves no trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENVIRONMENT_KEY, raising=False)
    Reporter.from_environment("train").progress(1, 2)
    assert list(tmp_path.iterdir()) == []


def test_reporter_crosses_process_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, and by pickling."""
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "events.jsonl"))
    reporter = Reporter.from_environment("train")
    assert reporter == Reporter(str(tmp_path / "events.jsonl"), "train")
    assert pickle.loads(pickle.dumps(reporter)) == reporter


def test_writers_in_several_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    """Three processes with 100 events each: 300 whole lines, each writer's in its order."""
    file = tmp_path / "events.jsonl"
    code = (
        "import sys; from dpo_train.progress import Reporter\n"
        "for i in range(100): Reporter(sys.argv[1], sys.argv[2]).progress(i, 100, text='x' * 300)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), name]) for name in "abc"]
    follower, events = Follower(file), []
    while any(writer.poll() is None for writer in writers):
        events += follower.new()
    events += follower.new()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    for name in "abc":
        assert [event["done"] for event in events if event["stage"] == name] == list(range(100))
