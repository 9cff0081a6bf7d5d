"""A pipeline's first task: from the config as it was given to the one that all later tasks share, and an MLflow run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dpo_train.config import RunConfig, parse_config, to_text
from dpo_train.errors import DpoError
from dpo_train.preflight import check_tracking, use_storage
from dpo_train.progress import Reporter


class Resolved(NamedTuple):
    """What the task ``resolve`` puts out, in this order."""

    decision: str
    """"train", or "unchanged": then no other task runs."""
    run_id: str
    """MLflow's parent run."""
    data_digest: str
    config: str
    """The config for all later tasks, as text."""


def resolve(text: str, name: str, *, overrides: Sequence[str] = (), kubeflow_run: str | None = None) -> Resolved:
    """Checks the inputs, decides whether there is anything to do, and opens the pipeline's MLflow run.

    Args:
        text: the config as YAML or JSON.
        name: of the MLflow run.
        overrides: ``section.key=value``.
        kubeflow_run: id of the pipeline's run in Kubeflow.

    Raises:
        UserError: the config or an input is wrong, or MLflow cannot be reached.
    """
    reporter = Reporter.from_environment("resolve")
    with told(reporter):
        from dpo_train import retrain
        from dpo_train.tracking import Tracking

        config = parse_config(text, overrides)
        use_storage(config)
        check_tracking(config)
        tracking = Tracking(config)
        try:
            found = retrain.resolve(config, tracking)
        except DpoError as error:
            _leave_failed_run(config, name, kubeflow_run, error)
            raise
        run_id = _start(found.config, name, kubeflow_run)
        if found.decision == "unchanged":
            retrain.ends_here(tracking, run_id, found.why)
            reporter.message(f"unchanged: {found.why}")
    reporter.event("run", run_id=run_id)
    if found.decision == "unchanged":
        print(outcome_line(found.decision, found.why))
    else:
        print(f"{found.decision}: {found.why}")
    return Resolved(found.decision, run_id, found.data_digest, to_text(found.config))


def outcome_line(outcome: str, why: str) -> str:
    """What came of a run, among the lines of the task that knows it: for whoever has the task's log and no MLflow."""
    return "dpo-outcome " + json.dumps({"outcome": outcome, "why": why})


def open_run(config: RunConfig, name: str, *, kubeflow_run: str | None = None) -> str:
    """Creates MLflow's parent run, or takes the one that a Kubeflow plugin has opened, and returns its id.

    Args:
        kubeflow_run: id of the pipeline's run in Kubeflow; default: KFP_RUN_ID.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    reporter = Reporter.from_environment("resolve")
    with told(reporter):
        run_id = _start(config, name, kubeflow_run)
    reporter.event("run", run_id=run_id)
    return run_id


def _start(config: RunConfig, name: str, kubeflow_run: str | None) -> str:
    from dpo_train.tracking import Tracking

    return Tracking(config).start_pipeline(name, kubeflow_run=kubeflow_run or os.environ.get("KFP_RUN_ID"))


def _leave_failed_run(config: RunConfig, name: str, kubeflow_run: str | None, error: DpoError) -> None:
    """A schedule that fails every night because its data are gone must show in MLflow as well."""
    try:
        close_run(config, _start(config, name, kubeflow_run), error)
    except DpoError as second:
        print(second)  # the task's own error is the one to tell


def close_run(config: RunConfig, run_id: str, error: BaseException) -> None:
    """Ends the parent run of a flow that was cut short, if no stage has done so."""
    from dpo_train.tracking import Tracking

    tracking = Tracking(config)
    if tracking.is_running(run_id):
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        tracking.end(run_id, status, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def told(reporter: Reporter) -> Iterator[None]:
    """Leaves an event about whatever is raised: kfp.local only knows that a task failed."""
    try:
        yield
    except BaseException as error:
        known = isinstance(error, DpoError)
        kind = type(error).__name__
        reporter.event("error", message=str(error), error=kind, exit_code=exit_code(error), known=known)
        raise


def exit_code(error: BaseException) -> int:
    """2 for the user's mistake, 3 for a refusing gate, 130 for Ctrl-C, 1 for everything else."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return 130
    return error.exit_code if isinstance(error, DpoError) else 1
