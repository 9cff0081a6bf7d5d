"""A stage within its MLflow run: from its start to what its output says, whatever happens to MLflow meanwhile."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_train.artifacts import Artifact, local_copy
from dpo_train.config import RunConfig
from dpo_train.describe import raw_data, refusal
from dpo_train.errors import DpoError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.tracking import wording
from dpo_train.tracking.experiment import Data, Tracking
from dpo_train.tracking.following import following
from dpo_train.tracking.run_log import RunLog, send_left_behind

TRIALS_FILE = "trials.json"

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
    if run.problem is None:
        _send_left_behind(tracking, store, reporter)
        if parent is None and run.run_id is not None:
            tracking.log_config(run.run_id)
    body = StageRun(run_id=run.run_id)
    try:
        with following(run, events, stage) as logged:
            yield body
        artifact = body.artifact
        assert artifact is not None, f"{stage} left no artifact"
        _tell_output(config, run, artifact, logged)
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


def _close(run: RunLog, reporter: Reporter) -> None:
    if note := run.close():
        print(note)
        reporter.message(f"note: {note}")


def _send_left_behind(tracking: Tracking, store: Path, reporter: Reporter) -> None:
    for name, problem in send_left_behind(tracking, store):
        reporter.message(f"sent to MLflow what the run {name!r} had not" if problem is None else f"note: {problem}")


def _tell_output(config: RunConfig, run: RunLog, artifact: Artifact, logged: set[int]) -> None:
    """What the stage made, the steps that were not seen while it ran, and what it read."""
    history = read_history(artifact.file(METRICS_FILE)) if METRICS_FILE in artifact.record.files else []
    run.steps([line for line in history if int(line["step"]) not in logged])
    run.output(artifact)
    run.data(data_of(config, artifact))
    if artifact.record.stage == "sweep" and not artifact.reused:
        _tell_trials(run, artifact)


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


def _tell_trials(run: RunLog, artifact: Artifact) -> None:
    """A run for each trial, the failed ones as well."""
    if TRIALS_FILE not in artifact.record.files:
        return
    content = json.loads(artifact.file(TRIALS_FILE).read_text(encoding="utf-8"))
    # The sweep names a trial's folder by its name, with other signs for those that a path cannot hold.
    curves = {_plain(Path(file).parent.name): file for file in artifact.record.files if file.endswith(METRICS_FILE)}
    for trial in content["trials"]:
        name = trial["name"]
        curve = curves.get(_plain(name))
        is_winner = name not in content["why_not"]
        run.trial(
            name,
            parameters={f"train.{key}": str(value) for key, value in trial["parameters"].items()}
            | {"seed": str(trial["seed"])},
            metrics=_trial_numbers(trial),
            history=read_history(artifact.file(curve)) if curve else [],
            tags={
                "dpo.chosen": str(is_winner).lower(),
                "dpo.why_not": str(content["why_not"].get(name, "")),
                "dpo.stopped": str(trial["stopped"] or ""),
            },
            failure=trial["failure"],
        )


def _plain(name: str) -> str:
    return re.sub(r"[^\w.,]", "-", name)


def _trial_numbers(trial: Mapping[str, Any]) -> dict[str, float]:
    """A trial's estimates by the names that the evaluation has for them, with their bounds."""
    names = {
        "accuracy": "validation/accuracy",
        "margin": "validation/margin",
        "kl": "samples/kl",
        "length_ratio": "samples/length_ratio",
        "reward": "judge/reward",
        "win_rate": "judge/win_rate",
    }
    found: dict[str, float] = {"trained/steps": float(trial["steps"])}
    for key, name in names.items():
        if (estimate := trial.get(key)) is not None:
            found |= {name: estimate["value"], f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}
    return {name: value for name, value in found.items() if value is not None}
