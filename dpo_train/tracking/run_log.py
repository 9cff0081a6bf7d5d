"""One run as the stage that it is about sees it: whatever is told is kept on this disk until MLflow has it.

    stage -> RunLog.<what> -> journal -> send -> experiment.Tracking -> MLflow
                              (a thread sends points meanwhile: following.py)

MLflow being away, slow or failing costs no metric and stops no stage. What is still unsent when a stage ends stays in
its journal and is sent by the next stage of this store, or by ``dpo runs CONFIG --send``.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from dpo_train.artifacts import Artifact, open_artifact
from dpo_train.errors import DpoError, StoreError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.storage import StorageUnavailableError
from dpo_train.tracking import wording
from dpo_train.tracking.client import AwayError, Point, RefusedError, TrackingError, patience
from dpo_train.tracking.experiment import BATCH, JOURNAL_TAG, Data, Tracking, step_points
from dpo_train.tracking.journal import POINTS, Journal, Mark

TRIAL_TAG = "dpo.trial"
CLOSE_SECONDS = 120.0
"""How long a stage that has ended waits for a slow server to take the rest. What is left goes out later."""


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
        curve: tuple[str, str] | None = None,
        span: tuple[int, int] | None = None,
        tags: Mapping[str, str] | None = None,
        failure: str | None = None,
    ) -> None:
        """A finished, stopped or failed trial of a sweep, as a run of its own below this one.

        Args:
            curve: an output and the file in it that holds the trial's steps; they are sent from where they lie.
            span: when it began and ended, in milliseconds since 1970; None: not known.
        """
        began, ended = span or (_now(),) * 2
        self._tell(
            "trial",
            name=name,
            parameters=dict(parameters),
            metrics=dict(metrics),
            curve=curve,
            tags=dict(tags or {}),
            failure=failure,
            span=(began, ended),
        )

    def end(self, status: str, error: BaseException | None = None) -> None:
        """FINISHED, FAILED or KILLED, with the reason."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        self._tell("end", status=status, error=text, milliseconds=_now())
        self._journal.update(ended=True)

    def send_points(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Sends what waits at the head of the journal if it is points, soon given up; for the thread beside a stage.

        Args:
            is_over: asked before each request; whoever ends the stage sends the rest.

        Returns:
            whether nothing waits any more.
        """
        with self._sending:
            try:
                if self.run_id is None:
                    with patience():
                        self._create()
                while batch := self._next():
                    if is_over() or batch[0][0]["op"] != POINTS:
                        return False
                    self._send_points(batch, quick=True)
            except TrackingError as error:
                self.problem = error
                return False
        self.problem = None
        return True

    def send(self, *, seconds: float = math.inf) -> bool:
        """Sends everything that waits, in order; returns whether that went well, and otherwise keeps the rest.

        What MLflow will never take, or is not there any more, is left out: ``refused`` says so.

        Args:
            seconds: after which nothing more is begun.
        """
        deadline = time.monotonic() + seconds
        try:
            with self._sending, patience():
                self._create()
                while batch := self._next():
                    if time.monotonic() > deadline:
                        raise AwayError(f"MLflow was too slow to take everything within {seconds:.0f} s")
                    self._send_batch(batch)
                self._tell_losses()
        except (TrackingError, StoreError, StorageUnavailableError) as error:
            self.problem = error
            return False
        self.problem = None
        return True

    @property
    def refused(self) -> list[str]:
        """What was left out, and why; the first few of it."""
        return list(self._journal.header.get("refused", ()))

    def close(self) -> str | None:
        """Sends the rest; returns None, or what a person should know: what waits and where, or what was left out."""
        arrived = self.send(seconds=CLOSE_SECONDS)
        name, dropped = self._journal.header["name"], self._journal.dropped
        self._journal.close(remove=arrived)
        notes = []
        if not arrived:
            notes.append(
                f"MLflow has not got all of the run {name!r} ({self.problem}) The rest waits in {self._journal.path} "
                "and goes out with the next stage, or by `dpo runs CONFIG --send`"
            )
        if dropped:
            notes.append(f"{dropped} points of {name} were dropped: {_FULL}")
        notes += [f"MLflow did not take all of the run {name!r}: {reason}" for reason in self.refused]
        return "; ".join(notes) or None

    def _next(self) -> list[tuple[dict[str, Any], Mark]]:
        """Points that go into one request, or one operation of another kind; empty: nothing waits."""
        found: list[tuple[dict[str, Any], Mark]] = []
        room = BATCH
        for operation, mark in self._journal.waiting():
            room -= len(operation.get("points", ()))
            if found and (operation["op"] != POINTS or room < 0):
                break
            found.append((operation, mark))
            if operation["op"] != POINTS:
                break
        return found

    def _send_points(self, batch: Sequence[tuple[Mapping[str, Any], Mark]], *, quick: bool) -> None:
        points = [point for operation, _ in batch for point in operation["points"]]
        self._tracking.log_points(cast(str, self.run_id), points, quick=quick)
        self._journal.sent(batch[-1][1])

    def _send_batch(self, batch: Sequence[tuple[Mapping[str, Any], Mark]]) -> None:
        try:
            if batch[0][0]["op"] == POINTS:
                self._send_points(batch, quick=False)
            else:
                self._deliver(batch[0][0])
                self._journal.sent(batch[0][1])
        except (RefusedError, StoreError) as error:
            if len(batch) == 1:
                self._leave_out(batch[0], error)
                return
            for each in batch:  # one bad line must not take its neighbours with it
                self._send_batch([each])

    def _leave_out(self, one: tuple[Mapping[str, Any], Mark], error: DpoError) -> None:
        self._journal.sent(one[1])
        reasons, reason = self.refused, f"{one[0]['op']}: {error}"
        if reason not in reasons and len(reasons) < _MOST_REASONS:
            self._journal.update(refused=[*reasons, reason])

    def _tell_losses(self) -> None:
        """As tags of the run, so that whoever looks at its curves knows what they lack."""
        tags = {"dpo.dropped_points": str(dropped)} if (dropped := self._journal.dropped) else {}
        tags |= {"dpo.refused": "; ".join(reasons)} if (reasons := self.refused) else {}
        if tags:
            with contextlib.suppress(RefusedError):  # of a run that was deleted
                self._tracking.set_tags(cast(str, self.run_id), tags)

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
                if operation.get("if_running") and not tracking.is_running(run_id):
                    return
                tracking.end(run_id, operation["status"], operation["error"], milliseconds=operation["milliseconds"])

    def _deliver_trial(self, run_id: str, trial: Mapping[str, Any]) -> None:
        tracking, name = self._tracking, trial["name"]
        began, ended = trial["span"]
        made = tracking.find_child(run_id, TRIAL_TAG, name)
        if made is None:
            tags = {"dpo.kind": "trial", TRIAL_TAG: name, "mlflow.note.content": wording.TRIAL, **trial["tags"]}
            made = tracking.start_run(name, parent=run_id, tags=tags, milliseconds=began)
        tracking.log_parameters(made, trial["parameters"])
        points: list[Point] = [(key, value, ended, 0) for key, value in trial["metrics"].items()]
        if trial["curve"] is not None:
            home, file = trial["curve"]
            history = read_history(open_artifact(home).file(file))
            for number, line in enumerate(history, start=1):
                points += step_points([line], began + (ended - began) * number // len(history))
        tracking.log_points(made, points)
        tracking.end(made, "FAILED" if trial["failure"] else "FINISHED", trial["failure"], milliseconds=ended)


_MOST_REASONS = 3
_FULL = "the journal was full. The output's metrics.jsonl has every step"


def _now() -> int:
    return int(time.time() * 1000)
