"""The thread beside a stage: new events become points, the machine is measured, and what waits is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_train.progress import Follower
from dpo_train.tracking.experiment import step_points
from dpo_train.tracking.machine import SECONDS as MACHINE_SECONDS
from dpo_train.tracking.machine import Machine
from dpo_train.tracking.run_log import RunLog

FOLLOW_SECONDS = 2.0

TRAININGS = ("sft", "train")
"""Stages whose steps are a run's curve; a sweep's are those of its trials."""


@contextmanager
def following(run: RunLog, events: Path, stage: str) -> Iterator[set[int]]:
    """Logs the training metrics that appear in the events file meanwhile; yields the set of steps logged."""
    logged: set[int] = set()
    stop = threading.Event()
    follower = Follower(events)
    _new_events(follower)  # what is there already belongs to earlier stages
    machine = Machine()

    def follow() -> None:
        measured, samples = time.monotonic(), 0
        while True:
            finished = stop.wait(FOLLOW_SECONDS)
            _note_steps(run, follower, stage, logged)
            if finished or time.monotonic() - measured >= MACHINE_SECONDS:
                measured = time.monotonic()
                now = int(time.time() * 1000)
                run.points([(name, value, now, samples) for name, value in machine.sample().items()])
                samples += 1
            if finished:
                return  # whoever ends the stage sends the rest
            run.send_points(is_over=stop.is_set)

    thread = _Thread(follow)
    thread.start()
    try:
        yield logged
    finally:
        stop.set()
        thread.join()
    thread.raise_error()


def _note_steps(run: RunLog, follower: Follower, stage: str, logged: set[int]) -> None:
    if stage not in TRAININGS:
        return
    for event in _new_events(follower):
        if event["stage"] != stage or event.get("unit") != "steps" or event["done"] - 1 in logged:
            continue
        step = event["done"] - 1
        run.points(step_points([{"step": step, **event["metrics"]}], int(event["time"] * 1000)))
        logged.add(step)


def _new_events(follower: Follower) -> list[dict[str, Any]]:
    """None of a block with a line that is damaged: its steps come from ``metrics.jsonl`` when the stage ends."""
    try:
        return follower.new()
    except ValueError:
        return []


class _Thread(threading.Thread):
    """Keeps an error, such as a full disk, for whoever waits for its end."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="mlflow-metrics", daemon=True)
        self._work = work
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error
