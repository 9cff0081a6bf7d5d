"""One run as the stage that it is about sees it: whatever is told is kept on this disk until MLflow has it.

    stage -> RunLog.<what> -> journal -> send -> experiment.Tracking -> MLflow
                              (a thread sends points meanwhile: following.py)

MLflow being away, slow or failing costs no metric and stops no stage. What is still unsent when a stage ends stays in
its journal and is sent by the next stage of this store, or by ``dpo runs CONFIG --send``.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dpo_train.artifacts import Artifact, open_artifact
from dpo_train.errors import DpoError, StoreError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.tracking.client import AwayError, TrackingError, patience
from dpo_train.tracking.experiment import Data, Point, Tracking, step_points
from dpo_train.tracking.journal import POINTS, Journal, left_behind

JOURNAL_TAG = "dpo.journal"
TRIAL_TAG = "dpo.trial"


class RunLog:
    """A run whose story is written down first and sent then."""

    def __init__(self, tracking: Tracking, journal: Journal) -> None:
        self._tracking, self._journal = tracking, journal
        self._sending = threading.Lock()
        self.problem: DpoError | None = None
        """Why the last attempt to send failed; None: everything has arrived."""

    @classmethod
    def start(
        cls, tracking: Tracking, store: Path, name: str, *, parent: str | None, tags: Mapping[str, str]
    ) -> RunLog:
        """A new run; below a parent it is created later where MLflow is away just now.

        Raises:
            TrackingError: MLflow refuses; or it is away and there is no parent, so that nothing has begun yet.
        """
        header = {
            "run_id": None,
            "name": name,
            "parent": parent,
            "tags": {**tags, JOURNAL_TAG: uuid.uuid4().hex},
            "milliseconds": _now(),
            "uri": tracking.uri_shown,
        }
        run = cls(tracking, Journal.create(store, header))
        try:
            with patience():
                run._create(first=True)
        except AwayError as error:
            if parent is None:
                run._journal.close(remove=True)
                raise
            run.problem = error
        except BaseException:
            run._journal.close(remove=True)
            raise
        return run

    @classmethod
    def existing(cls, tracking: Tracking, store: Path, run_id: str) -> RunLog:
        """A run that is there."""
        header = {"run_id": run_id, "name": run_id, "uri": tracking.uri_shown}
        return cls(tracking, Journal.create(store, header))

    @property
    def run_id(self) -> str | None:
        """None where MLflow has been away since before the run was created."""
        return cast("str | None", self._journal.header["run_id"])

    def points(self, points: Sequence[Point]) -> None:
        """Points of curves."""
        if points:
            self._tell(POINTS, points=points)

    def steps(self, history: Sequence[Mapping[str, float]], milliseconds: int | None = None) -> None:
        """Lines of ``metrics.jsonl``, each an operation of its own, so that a full journal is thinned by steps."""
        now = _now() if milliseconds is None else milliseconds
        for line in history:
            self.points(step_points([line], now))

    def numbers(self, numbers: Mapping[str, float]) -> None:
        """Metrics that are no curve."""
        now = _now()
        self.points([(name, value, now, 0) for name, value in numbers.items()])

    def output(self, artifact: Artifact) -> None:
        """What the stage made: sent from where it lies."""
        self._tell("output", home=artifact.home, reused=artifact.reused, milliseconds=_now())

    def data(self, data: Sequence[Data]) -> None:
        """What was read."""
        self._tell("data", data=[asdict(each) for each in data])

    def tags(self, tags: Mapping[str, str]) -> None:
        """What to search by."""
        self._tell("tags", tags=dict(tags))

    def parameters(self, parameters: Mapping[str, str]) -> None:
        """Settings."""
        self._tell("parameters", parameters=dict(parameters))

    def trial(
        self,
        name: str,
        *,
        parameters: Mapping[str, str],
        metrics: Mapping[str, float],
        history: Sequence[Mapping[str, float]] = (),
        tags: Mapping[str, str] | None = None,
        failure: str | None = None,
    ) -> None:
        """A finished, stopped or failed trial of a sweep, as a run of its own below this one."""
        now = _now()
        points = [*step_points(history, now), *((name, value, now, 0) for name, value in metrics.items())]
        self._tell(
            "trial",
            name=name,
            parameters=dict(parameters),
            points=points,
            tags=dict(tags or {}),
            failure=failure,
            milliseconds=now,
        )

    def end(self, status: str, error: BaseException | None = None) -> None:
        """FINISHED, FAILED or KILLED, with the reason."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        self._tell("end", status=status, error=text, milliseconds=_now())

    def send_points(self) -> bool:
        """Sends what waits at the head of the journal if it is points, soon given up; for the thread beside a stage.

        Returns:
            whether nothing waits any more.
        """
        with self._sending:
            try:
                if self.run_id is None:
                    with patience():
                        self._create()
                while batch := self._journal.waiting():
                    if any(operation["op"] != POINTS for operation, _ in batch):
                        return False
                    points = [point for operation, _ in batch for point in operation["points"]]
                    self._tracking.log_points(cast(str, self.run_id), points)
                    self._journal.sent(batch[-1][1])
            except TrackingError as error:
                self.problem = error
                return False
        self.problem = None
        return True

    def send(self) -> bool:
        """Sends everything that waits, in order; returns whether that went well, and otherwise keeps the rest."""
        try:
            with self._sending, patience():
                self._create()
                while batch := self._journal.waiting():
                    for operation, mark in batch:
                        self._deliver(operation)
                        self._journal.sent(mark)
                if dropped := self._journal.dropped:
                    self._tracking.set_tags(cast(str, self.run_id), {"dpo.dropped_points": str(dropped)})
        except (TrackingError, StoreError) as error:
            self.problem = error
            return False
        self.problem = None
        return True

    def close(self) -> str | None:
        """Sends the rest; returns None, or where it waits and what to do."""
        arrived = self.send()
        dropped = self._journal.dropped
        self._journal.close(remove=arrived)
        if arrived:
            return f"{dropped} points of {self._journal.header['name']} were dropped: {_FULL}" if dropped else None
        more = f"; {dropped} points were dropped: {_FULL}" if dropped else ""
        return (
            f"MLflow has not got all of the run {self._journal.header['name']!r} ({self.problem}) The rest waits in "
            f"{self._journal.path} and goes out with the next stage, or by `dpo runs CONFIG --send`{more}"
        )

    def _tell(self, op: str, **fields: Any) -> None:
        # Points are written down once more, in the output's own metrics.jsonl; all else is only here.
        self._journal.append({"op": op, **fields}, durable=op != POINTS)

    def _create(self, *, first: bool = False) -> None:
        """The run itself, if it is not there yet; an answer may have been lost on its way to us."""
        header = self._journal.header
        if self.run_id is not None:
            return
        tags = header["tags"]
        found = None if first else self._tracking.find_child(header["parent"], JOURNAL_TAG, tags[JOURNAL_TAG])
        made = found or self._tracking.start_run(
            header["name"], parent=header["parent"], tags=tags, milliseconds=header["milliseconds"]
        )
        self._journal.update(run_id=made)

    def _deliver(self, operation: Mapping[str, Any]) -> None:
        run_id, tracking = cast(str, self.run_id), self._tracking
        match operation["op"]:
            case "points":
                tracking.log_points(run_id, operation["points"])
            case "output":
                artifact = open_artifact(operation["home"])
                known = METRICS_FILE in artifact.record.files
                history = read_history(artifact.file(METRICS_FILE)) if known else []
                reused = Artifact(home=artifact.home, record=artifact.record, reused=operation["reused"])
                tracking.log_artifact(run_id, reused, history, at=operation["milliseconds"])
            case "data":
                tracking.log_data(run_id, [Data(**each) for each in operation["data"]])
            case "tags":
                tracking.set_tags(run_id, operation["tags"])
            case "parameters":
                tracking.log_parameters(run_id, operation["parameters"])
            case "trial":
                self._deliver_trial(run_id, operation)
            case "end":
                tracking.end(run_id, operation["status"], operation["error"], milliseconds=operation["milliseconds"])

    def _deliver_trial(self, run_id: str, trial: Mapping[str, Any]) -> None:
        from dpo_train.tracking.wording import TRIAL

        tracking, name, at = self._tracking, trial["name"], trial["milliseconds"]
        made = tracking.find_child(run_id, TRIAL_TAG, name)
        if made is None:
            tags = {"dpo.kind": "trial", TRIAL_TAG: name, "mlflow.note.content": TRIAL, **trial["tags"]}
            made = tracking.start_run(name, parent=run_id, tags=tags, milliseconds=at)
        tracking.log_parameters(made, trial["parameters"])
        tracking.log_points(made, trial["points"])
        tracking.end(made, "FAILED" if trial["failure"] else "FINISHED", trial["failure"], milliseconds=at)


_FULL = "the journal was full. The output's metrics.jsonl has every step"


def send_left_behind(tracking: Tracking, store: Path) -> list[tuple[str, DpoError | None]]:
    """Sends what earlier stages of this store could not, the oldest first.

    Returns:
        by run name what is in the way; None where everything has arrived.
    """
    found: list[tuple[str, DpoError | None]] = []
    for path in left_behind(store):
        journal = Journal(path, {})
        if not journal.header:  # another process has sent it in this very moment
            journal.close(remove=True)
            continue
        run = RunLog(tracking, journal)
        if journal.header["uri"] != tracking.uri_shown:
            problem: DpoError | None = TrackingError(
                f"It belongs to MLflow at {journal.header['uri']}", fix="set tracking.uri to that"
            )
        else:
            problem = None if run.send() else run.problem
        found.append((str(journal.header["name"]), problem))
        journal.close(remove=problem is None)
        if isinstance(problem, AwayError):
            break
    return found


def _now() -> int:
    return int(time.time() * 1000)
