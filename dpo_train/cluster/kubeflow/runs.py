"""Runs of Kubeflow Pipelines: found by what people call them, and shown by their steps."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_train.cluster.kubeflow.client import Kubeflow, KubeflowError, NotThereError, equals
from dpo_train.cluster.kubeflow.package import Package, Step, package_of
from dpo_train.cluster.kubeflow.submission import find_experiment
from dpo_train.errors import ConfigError, UserError

ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
LOOKED_THROUGH = 1000
"""The newest runs among which the beginning of an id is looked for."""
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NEWEST_FIRST = "created_at desc"


@dataclass(frozen=True, kw_only=True)
class StepView:
    """How a step stands."""

    name: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED, SKIPPED or CANCELED."""
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunView:
    """How a run stands."""

    run_id: str
    name: str
    state: str
    """In Kubeflow's words: PENDING, RUNNING, SUCCEEDED, SKIPPED, FAILED, CANCELING, CANCELED, PAUSED."""
    created: datetime.datetime | None
    ended: datetime.datetime | None
    error: str | None
    version_id: str | None
    steps: tuple[StepView, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.state in ENDED


def view(run: Any, steps: Sequence[Step] = ()) -> RunView:
    """A run as the server tells it, with what it tells of these steps."""
    details = (run.run_details and run.run_details.task_details) or []
    state = run.state or "PENDING"
    reference = run.pipeline_version_reference
    return RunView(
        run_id=run.run_id,
        name=run.display_name or "",
        state=state,
        created=_moment(run.created_at),
        ended=_moment(run.finished_at),
        error=_error(run),
        version_id=reference.pipeline_version_id if reference else run.pipeline_version_id,
        steps=tuple(_step(step, details, has_ended=state in ENDED) for step in steps),
    )


def get(kubeflow: Kubeflow, run_id: str) -> Any:
    """The run of this id, as the server tells it."""
    return kubeflow.ask(kubeflow.runs.run_service_get_run, run_id)


def find(kubeflow: Kubeflow, text: str) -> Any:
    """The run that a person means by its id, the beginning of its id, or its name.

    Raises:
        UserError: there is none, or several.
    """
    if _ID.fullmatch(text):
        try:
            return get(kubeflow, text)
        except NotThereError:
            raise _no_run(text) from None
    # Every id begins with nothing, which an unset variable of a shell is.
    found = (_named(kubeflow, text) or _beginning(kubeflow, text)) if text.strip() else []
    if not found:
        raise _no_run(text)
    if len(found) > 1:
        lines = [f"{run.run_id} ({run.display_name}, {run.state})" for run in found[:5]]
        raise UserError(
            f"{text!r} means {len(found)} runs", got="; ".join(lines), fix="give enough of the id to mean one"
        )
    return get(kubeflow, found[0].run_id)


def newest(kubeflow: Kubeflow, experiment: str, limit: int) -> list[RunView]:
    """The newest runs of an experiment.

    Raises:
        UserError: there is no such experiment.
    """
    found = find_experiment(kubeflow, experiment)
    if found is None:
        raise UserError(f"Kubeflow has no experiment {experiment!r}", fix="submit a run, or check kubeflow.experiment")
    listing = kubeflow.all(
        kubeflow.runs.run_service_list_runs, "runs", experiment_id=found.experiment_id, sort_by=_NEWEST_FIRST
    )
    return [view(run) for run in itertools.islice(listing, limit)]


def package_of_run(kubeflow: Kubeflow, run: Any) -> Package:
    """The pipeline that a run runs.

    Raises:
        KubeflowError: the server has it no more.
    """
    content, reference = run.pipeline_spec, run.pipeline_version_reference
    if reference is not None:
        version = kubeflow.ask(
            kubeflow.pipelines.pipeline_service_get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
        content = version.pipeline_spec
    package = package_of(content)
    if package is None:
        raise KubeflowError(f"Kubeflow does not tell which pipeline the run {run.run_id} runs")
    return package


def cancel(kubeflow: Kubeflow, run: Any) -> RunView | None:
    """Ends a run. None: it is being ended; otherwise how it had ended before."""
    if view(run).has_ended:
        return view(run)
    if run.state == "CANCELING":  # Kubeflow refuses to end it twice
        return None
    try:
        kubeflow.tell(kubeflow.runs.run_service_terminate_run, run.run_id)
    except KubeflowError:
        # It may have ended in between, and then the server has nothing to end.
        now = view(get(kubeflow, run.run_id))
        if now.has_ended:
            return now
        raise
    return None


def find_step(steps: Sequence[Step], name: str) -> Step:
    """The step that a person means.

    Raises:
        ConfigError: there is none.
    """
    for step in steps:
        if name.replace("_", "-") in {step.name, "/".join(step.path)}:
            return step
    raise ConfigError(f"The pipeline has no step {name!r}", expected=", ".join(step.name for step in steps))


def _named(kubeflow: Kubeflow, name: str) -> list[Any]:
    named = kubeflow.all(
        kubeflow.runs.run_service_list_runs, "runs", filter=equals("display_name", name), **kubeflow.scope
    )
    return list(itertools.islice(named, LOOKED_THROUGH))


def _beginning(kubeflow: Kubeflow, text: str) -> list[Any]:
    listing = kubeflow.all(kubeflow.runs.run_service_list_runs, "runs", sort_by=_NEWEST_FIRST, **kubeflow.scope)
    looked = itertools.islice(listing, LOOKED_THROUGH)
    return [run for run in looked if run.run_id.startswith(text.lower())]


def _no_run(text: str) -> UserError:
    return UserError(
        f"Kubeflow has no run {text!r}",
        expected="an id, the beginning of the id of a newer run, or a name",
        fix="`dpo runs CONFIG --kfp` lists them",
    )


def _step(step: Step, details: Sequence[Any], *, has_ended: bool) -> StepView:
    """A step is a node of its own below which its container runs; a driver comes before it and may fail by itself."""
    own, driver = _latest(details, step.name), _latest(details, f"{step.name}-driver")
    if own is None and driver is not None and driver.state == "FAILED":
        return StepView(
            name=step.name,
            state="FAILED",
            started=_moment(driver.start_time),
            ended=_moment(driver.end_time),
            error=_error(driver) or "its container was never started: Kubeflow's driver failed",
        )
    waiting = "SKIPPED" if has_ended else "PENDING"
    if own is None:
        return StepView(name=step.name, state=waiting)
    return StepView(
        name=step.name,
        # What Argo calls Omitted has no word in Kubeflow.
        state=own.state if own.state not in {None, "RUNTIME_STATE_UNSPECIFIED"} else waiting,
        started=_moment(own.start_time),
        ended=_moment(own.end_time),
        error=_error(own),
    )


def _latest(details: Sequence[Any], name: str) -> Any | None:
    found = [detail for detail in details if detail.display_name == name]
    return max(found, key=lambda detail: detail.start_time or detail.create_time or _NEVER, default=None)


def _error(item: Any) -> str | None:
    return (item.error and item.error.message) or None


_NEVER = datetime.datetime.fromtimestamp(0, tz=datetime.UTC)


def _moment(time: datetime.datetime | None) -> datetime.datetime | None:
    """Kubeflow writes 1970 for what has not happened."""
    return None if time is None or time <= _NEVER else time
