"""When the trials of a sweep ran, by what the sweep has reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_train.progress import Reporter
from dpo_train.tracking.trials import span_of, step_times


def line(step: int, loss: float, speed: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "pairs_per_second": speed}


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """Steps of two trials in turns, as Ray runs them, at 101, 102, ... s; and another stage's."""
    told = [("sweep", 0.7, 8.0), ("sweep", 0.6, 4.0), ("train", 0.1, 1.0), ("sweep", 0.5, 8.0), ("sweep", 0.4, 4.0)]
    file = tmp_path / "events.jsonl"
    with file.open("w") as stream:
        for second, (stage, loss, speed) in enumerate(told, start=101):
            event = {"time": float(second), "stage": stage, "kind": "progress", "done": 1, "unit": "steps"}
            stream.write(json.dumps({**event, "metrics": {"loss": loss, "pairs_per_second": speed}}) + "\n")
    Reporter(str(file), "sweep").message("trial 1 of 2")
    return file


def test_trial_runs_from_the_beginning_of_its_first_step_to_the_end_of_its_last(events: Path) -> None:
    """16 pairs at 8 pairs/s took 2 s before second 101, at 4 pairs/s 4 s before second 102."""
    times = step_times(events)
    assert span_of([line(0, 0.7, 8.0), line(1, 0.5, 8.0)], times, 16) == (99_000, 104_000)
    assert span_of([line(0, 0.6, 4.0), line(1, 0.4, 4.0)], times, 16) == (98_000, 105_000)


def test_trial_of_another_day_has_no_known_times(events: Path) -> None:
    """It was trained before this sweep, and is only measured."""
    assert span_of([line(0, 0.9, 8.0)], step_times(events), 16) is None
    assert span_of([], step_times(events), 16) is None


def test_interrupted_trial_is_known_since_it_went_on(events: Path) -> None:
    """Its first step was reported to another file."""
    assert span_of([line(0, 0.9, 2.0), line(1, 0.5, 8.0)], step_times(events), 16) == (102_000, 104_000)


def test_damaged_events_cost_times_and_nothing_else(events: Path) -> None:
    """Events are for show."""
    with events.open("a") as stream:
        stream.write('{"time": 1{"time": 2}\n')
    assert step_times(events) == {}
