"""Runs a stage elsewhere, as a RayJob or on a Ray cluster that is there; its lines and its end come back here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_train import storage
from dpo_train.artifacts import Artifact, open_artifact
from dpo_train.cluster import job as jobs
from dpo_train.config import RunConfig
from dpo_train.errors import ConfigError, DpoError, RunError
from dpo_train.preflight import use_storage
from dpo_train.progress import ENVIRONMENT_KEY, Reporter

if TYPE_CHECKING:
    from dpo_train.cluster.job import Ended, Job, Launcher


def is_launched(stage: str, config: RunConfig) -> bool:
    """Whether the config has this stage run elsewhere."""
    return config.cluster.launcher != "none" and stage in config.cluster.stages


def with_task(config: RunConfig, stage: str, task_config: Any) -> RunConfig:
    """The config with what a Kubeflow task sets for the job that it launches.

    Args:
        task_config: a ``kfp.dsl.TaskConfig``, empty in a component that works in its own pod.

    Raises:
        ConfigError: the config contradicts it, or has the stage run elsewhere than in a job of its own.
    """
    settings = {name: value for name, value in dataclasses.asdict(task_config).items() if value}
    if not settings:
        return config
    from dpo_train.cluster.task_settings import with_task_settings

    return with_task_settings(config, stage, settings)


def run_elsewhere(
    stage: str,
    config: RunConfig,
    inputs: Mapping[str, Artifact],
    *,
    run_id: str | None,
    output: Path | str | None,
    launcher: Launcher | None = None,
) -> Artifact:
    """The stage's output, made by a job.

    Args:
        launcher: default: the config's.

    Raises:
        DpoError: what the stage raised there, or why the job did not get so far.
    """
    use_storage(config)
    addresses = {name: artifact.address for name, artifact in inputs.items()}
    target = None if output is None else str(output)
    job = jobs.job_for(stage, config, addresses, run_id=run_id, output=target)
    launcher = launcher or launcher_of(config)
    reporter = Reporter.from_environment(stage)

    def tell(text: str) -> None:
        print(f"{job.name}: {text}", flush=True)
        reporter.message(text)

    try:
        with _terminable():
            ended = launcher.run(job, tell=tell, line=_printer(stage))
        return _answer(job, ended)
    except BaseException as error:
        try:
            _end_runs(config, stage, run_id, error)
        except DpoError as second:
            tell(f"its MLflow run stays open: {second}")
        raise


def launcher_of(config: RunConfig) -> Launcher:
    """The launcher that the config names.

    Raises:
        ConfigError: it lacks an address.
        UserError: the cluster cannot be reached from here.
    """
    if config.cluster.launcher == "rayjob":
        from dpo_train.cluster.launcher import RayJobLauncher

        return RayJobLauncher(config)
    if config.cluster.address is None:
        raise ConfigError(
            "cluster.launcher=ray needs the cluster's address", fix="set cluster.address, e.g. http://head:8265"
        )
    from dpo_train.cluster.ray_api import RayApiLauncher

    return RayApiLauncher(config)


def _answer(job: Job, ended: Ended) -> Artifact:
    """What the job has left. What the cluster says alone is no success, and no reason either."""
    result = jobs.read_result(job)
    if result is not None and result.error is not None:
        raise jobs.error_of(result)
    if result is not None and result.address is not None and ended.succeeded:
        return open_artifact(job.output or storage.join(job.config.store, result.address))
    raise RunError(
        f"The job {job.name} ended without a result",
        got=ended.reason,
        fix="look at the lines above; run again, the stage goes on from what is complete",
    )


def _printer(stage: str) -> Callable[[str], None]:
    """Prints what a job prints; its events go to this run's, so that they show as those of a stage that runs here."""
    path = os.environ.get(ENVIRONMENT_KEY)

    def line(text: str) -> None:
        # A library's progress bar, which ends no line, may stand before an event.
        before, mark, rest = text.partition(jobs.EVENT_MARK)
        event = _event(rest) if mark else None
        if event is None:
            print(text, flush=True)
            return
        if before.strip():
            print(before, flush=True)
        fields = {key: value for key, value in event.items() if key not in {"time", "stage"}}
        if path is None:
            print(f"{stage}: {json.dumps(fields)}", flush=True)
        else:
            Reporter(path, stage).event(**fields)

    return line


def _event(text: str) -> dict[str, Any] | None:
    """The event in a line; None: it only looks like one."""
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A termination counts as an interrupt, so that the launcher takes its job away: pods are ended by SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end_runs(config: RunConfig, stage: str, run_id: str | None, error: BaseException) -> None:
    """A job that was killed could not say so in MLflow."""
    if run_id is None:
        return
    from dpo_train.tracking import Tracking

    tracking = Tracking(config)
    status = "FAILED" if isinstance(error, Exception) else "KILLED"
    for run in (tracking.find_child(run_id, "dpo.stage", stage), run_id):
        if run is not None and tracking.is_running(run):
            tracking.end(run, status, f"{type(error).__name__}: {error}")
