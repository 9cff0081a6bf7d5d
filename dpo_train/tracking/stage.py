"""A stage within its MLflow run: from its start to what its output says, whatever happens to MLflow meanwhile."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_train.artifacts import Artifact, local_copy
from dpo_train.config import RunConfig
from dpo_train.describe import raw_data, refusal
from dpo_train.errors import DpoError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.tracking import wording
from dpo_train.tracking.client import TrackingError, patience
from dpo_train.tracking.experiment import Data, Tracking
from dpo_train.tracking.following import following
from dpo_train.tracking.left_behind import send_left_behind
from dpo_train.tracking.run_log import CLOSE_SECONDS, RunLog
from dpo_train.tracking.trials import tell_trials

_HEADLINES = ("heldout/", "samples/kl", "samples/length_ratio", "judge/")
"""What of an evaluation is a metric of the pipeline's run too, so that pipelines can be compared in a table."""


@dataclass
class StageRun:
    """What the body of a ``tracked`` stage gets, and what it leaves."""

    run_id: str | None
    """None where MLflow is away."""
    artifact: Artifact | None = None
    """To be set to the stage's output."""


@contextmanager
def tracked(config: RunConfig, tracking: Tracking, stage: str, parent: str | None, events: Path) -> Iterator[StageRun]:
    """Opens the stage's run, follows the stage, and says in MLflow how it ended and what it made.

    Raises:
        TrackingError: MLflow refuses the run; or it is away and there is no pipeline's run yet.
    """
    store, reporter = local_copy(config.store), Reporter(str(events), stage)
    note = {"mlflow.note.content": wording.STAGES[stage]}
    run = RunLog.start(tracking, store, stage, parent=parent, tags={"dpo.kind": "stage", "dpo.stage": stage, **note})
    body = StageRun(run_id=run.run_id)
    try:
        with _termination_as_interrupt():
            if parent is None and run.run_id is not None:
                tracking.log_config(run.run_id)
            if run.problem is None:
                _clear_up(tracking, store, reporter, stage, parent, run.run_id)
            with following(run, events, stage) as logged:
                yield body
            artifact = body.artifact
            assert artifact is not None, f"{stage} left no artifact"
            _tell_output(config, run, artifact, logged, events)
            run.end("FINISHED")
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            for log in (run, *([RunLog.existing(tracking, store, parent)] if parent else [])):
                log.end(status, error)
                _close(log, reporter)
        except DpoError as second:
            print(second)  # the stage's own error is the one to tell
        raise
    _close(run, reporter)
    if parent:
        log = RunLog.existing(tracking, store, parent)
        _tell_headline(config, log, artifact)
        _close(log, reporter)


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM, by which Kubernetes ends a task, raises as Ctrl-C does: else nobody could say that the run has ended.

    Where somebody listens to it already, such as Ray or the command line, it is theirs.
    """
    is_free = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_free:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if is_free and signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _clear_up(
    tracking: Tracking, store: Path, reporter: Reporter, stage: str, parent: str | None, run_id: str | None
) -> None:
    """What earlier stages could not say: what they have left unsent here, and that they are no more."""
    for name, problem in send_left_behind(tracking, store, seconds=CLOSE_SECONDS):
        reporter.message(f"sent to MLflow what the run {name!r} had not" if problem is None else f"note: {problem}")
    if parent is None or run_id is None:
        return
    try:
        with patience():
            tracking.end_lost(parent, stage, run_id)
    except TrackingError as error:
        reporter.message(f"note: {error}")


def _close(run: RunLog, reporter: Reporter) -> None:
    if note := run.close():
        print(note)
        reporter.message(f"note: {note}")


def _tell_output(config: RunConfig, run: RunLog, artifact: Artifact, logged: set[int], events: Path) -> None:
    """What the stage made, the steps that were not seen while it ran, and what it read."""
    history = read_history(artifact.file(METRICS_FILE)) if METRICS_FILE in artifact.record.files else []
    run.steps([line for line in history if int(line["step"]) not in logged])
    run.output(artifact)
    run.data(data_of(config, artifact))
    if artifact.record.stage == "sweep" and not artifact.reused:
        tell_trials(run, artifact, events, batch_pairs=config.train.batch_pairs)


def data_of(config: RunConfig, artifact: Artifact) -> list[Data]:
    """The raw data of ``prepare``; of the others the prepared or scored pairs, by their digest."""
    record = artifact.record
    if record.stage == "prepare":
        profile = {name: record.counts[name] for name in ("records", "used", "rejected") if name in record.counts}
        return [
            Data(name=name, place=place, digest=digest, context="preferences", profile=profile)
            for name, (place, digest) in raw_data(config, artifact).items()
        ]
    context = "evaluation" if record.stage == "evaluate" else "training"
    stages = {"scored": "score_reference", "pairs": "prepare"}
    return [
        Data(
            name=f"{name} pairs",
            place=f"{config.store}/{stages[key]}/{digest}",
            digest=digest,
            context=context,
            profile={},
        )
        for key, name in (("scored", "scored"), ("pairs", "prepared"))
        if (digest := record.inputs.get(key)) is not None
    ]


def _tell_headline(config: RunConfig, run: RunLog, artifact: Artifact) -> None:
    """What of a stage people look for in the list of pipelines."""
    record, details = artifact.record, artifact.record.details
    if record.stage == "prepare":
        run.data(data_of(config, artifact))
        run.tags({"dpo.data": "-".join(digest for _, digest in raw_data(config, artifact).values())})
    elif record.stage == "score_reference":
        run.tags({"dpo.reference": record.digest})
    elif record.stage == "train":
        run.numbers({"chosen/beta": float(details["beta"]), "train/loss": record.metrics["loss"]})
        run.tags({"dpo.beta": f"{details['beta']:g}", "dpo.policy": record.digest})
    elif record.stage == "evaluate":
        run.numbers({name: value for name, value in record.metrics.items() if name.startswith(_HEADLINES)})
    elif record.stage == "register":
        refused = refusal(artifact)
        run.tags(
            {"dpo.registered": "false", "dpo.refusal": refused}
            if refused
            else {"dpo.registered": "true", "dpo.version": f"{details['model_name']}/{details['version']}"}
        )
        # A run whose gate refused the model is a finished one; the tag says which it is.
        run.end("FINISHED")
