"""A stage that runs elsewhere. The two sides talk through a folder in the store:

    <store>/jobs/<name>/job.json       what is to be done: stage, config, inputs by address, MLflow's parent run
    <store>/jobs/<name>/result.json    written last by the job: the output's address, or the error in its own words

The name is a digest of what is to be done, so that whoever asks for the same finds the job that runs, or its result. A
job's process is ``dpo job FOLDER``, on Kubernetes as on any Ray cluster.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from dpo_train import storage
from dpo_train.config import RunConfig, parse_config, to_dict
from dpo_train.disk import write_atomically
from dpo_train.errors import ConfigError, DpoError, StoreError, WorkerError, decode, encode
from dpo_train.tracking import redacted, tracking_uri

JOBS = "jobs"
JOB_FILE, RESULT_FILE = "job.json", "result.json"
EVENT_MARK = "dpo-event "
"""Before the JSON of an event among the lines that a job prints."""

NAME_LENGTH = 47
"""KubeRay's limit for the name of a RayJob."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage that runs elsewhere."""

    name: str
    """At most 47 characters, fit for a Kubernetes object."""
    folder: str
    """In the store, here or at s3://."""
    stage: str
    config: RunConfig
    """As the job is to use it: it launches nothing itself."""
    inputs: Mapping[str, str]
    """Addresses in the store by the name of their stage."""
    run_id: str | None
    """MLflow's parent run."""
    output: str | None = None
    """A folder to use instead of the store's address."""

    @property
    def entrypoint(self) -> str:
        """The job's command line. It holds no config: arguments are public, and too short for it."""
        return shlex.join(["dpo", "job", self.folder])

    @property
    def environment(self) -> dict[str, str]:
        """What the command needs before it has read the config; no secrets."""
        options = {"AWS_ENDPOINT_URL": self.config.storage.endpoint, "AWS_REGION": self.config.storage.region}
        return {key: value for key, value in options.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the cluster says that a job ended; whether it did its work, its result says."""

    succeeded: bool
    reason: str
    """For people, e.g. "SUCCEEDED" or "DeadlineExceeded: it ran longer than 24 hours"."""


class Launcher(Protocol):
    """Where jobs run."""

    def run(self, job: Job, *, tell: Callable[[str], None], line: Callable[[str], None]) -> Ended:
        """Starts the job, or finds it, and comes back when it has ended.

        Args:
            tell: gets what a person who waits should know: queued, started, tried again.
            line: gets each line that the job prints, once and in order.

        Raises:
            UserError: the cluster refuses the job, or the caller.
            RunError: the cluster cannot be reached any more.
        """


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job has left."""

    address: str | None = None
    error: str | None = None
    """From ``errors.encode``."""


def job_for(
    stage: str,
    config: RunConfig,
    inputs: Mapping[str, str],
    *,
    run_id: str | None = None,
    output: str | None = None,
) -> Job:
    """The job of a stage. The same in the same run is the same job, also when its caller was restarted.

    Raises:
        ConfigError: the config holds a login, which would lie in the store for all to read.
    """
    there = dataclasses.replace(
        config,
        cluster=dataclasses.replace(config.cluster, launcher="none"),
        compute=dataclasses.replace(config.compute, executor="ray", device=_device(config)),
        tracking=dataclasses.replace(config.tracking, uri=_tracking_address(config)),
    )
    content = {"stage": stage, "config": to_dict(config), "inputs": dict(inputs), "run": run_id, "output": output}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    name = f"dpo-{stage.replace('_', '-')}-{digest}"
    assert len(name) <= NAME_LENGTH
    folder = storage.join(config.store, JOBS, name)
    return Job(name=name, folder=folder, stage=stage, config=there, inputs=inputs, run_id=run_id, output=output)


def _device(config: RunConfig) -> Literal["auto", "cpu", "cuda"]:
    """A RayJob's workers have what was asked for; on other clusters the job looks when it runs."""
    if config.compute.device != "auto" or config.cluster.launcher != "rayjob":
        return config.compute.device
    return "cuda" if config.cluster.workers.gpus else "cpu"


def _tracking_address(config: RunConfig) -> str | None:
    """MLflow as it is seen here, so that the job finds its parent's run; None: from the job's own environment."""
    address = tracking_uri(config)
    if redacted(address) == address:
        return address
    if config.tracking.uri is not None:
        raise ConfigError(
            "tracking.uri holds a login, and a job's config can be read by all who see the store",
            fix="take it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD here and on the cluster",
        )
    return None


def write_job(job: Job) -> None:
    """Lays the job's file where the job will look for it."""
    content = {
        "stage": job.stage,
        "config": to_dict(job.config),
        "inputs": dict(job.inputs),
        "run_id": job.run_id,
        "output": job.output,
    }
    _write(job.folder, JOB_FILE, content)


def read_job(folder: str) -> Job:
    """The job whose folder this is.

    Raises:
        StoreError: there is none, for example because this machine does not see the store.
    """
    content = _read(folder, JOB_FILE)
    if content is None:
        raise StoreError(
            f"There is no {JOB_FILE} in {folder}",
            fix="put the store at s3://, or on a volume that every node has at the same path",
        )
    config = parse_config(json.dumps(content.pop("config")), origin=storage.join(folder, JOB_FILE))
    return Job(name=storage.name_of(folder), folder=folder, config=config, **content)


def write_result(job: Job, outcome: str | BaseException) -> None:
    """Leaves the output's address, or the error that ended the job."""
    if isinstance(outcome, str):
        _write(job.folder, RESULT_FILE, {"address": outcome})
        return
    error = outcome if isinstance(outcome, DpoError) else WorkerError(f"{type(outcome).__name__}: {outcome}")
    _write(job.folder, RESULT_FILE, {"error": encode(error)})


def read_result(job: Job) -> Result | None:
    """What the job has left; None: nothing."""
    content = _read(job.folder, RESULT_FILE)
    return None if content is None else Result(**content)


def may_stand(job: Job) -> bool:
    """Whether the result of a job that has ended is the answer to the same question asked again.

    Within a run it is. Outside of one, the raw data that its config names may have changed since; the job then runs
    again and finds by itself what it can reuse.
    """
    result = read_result(job)
    return job.run_id is not None and result is not None and result.address is not None


def drop_result(job: Job) -> None:
    """Takes away what an earlier attempt has left."""
    if storage.is_remote(job.folder):
        storage.delete([storage.join(job.folder, RESULT_FILE)])
    else:
        (Path(job.folder) / RESULT_FILE).unlink(missing_ok=True)


def error_of(result: Result) -> DpoError:
    """The error that a job has left, as it was raised there."""
    assert result.error is not None
    return decode(result.error)


def _write(folder: str, name: str, content: Any) -> None:
    text = json.dumps(content, indent=1, sort_keys=True)
    if storage.is_remote(folder):
        storage.write_bytes(storage.join(folder, name), text.encode())
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(folder) / name, text)


def _read(folder: str, name: str) -> dict[str, Any] | None:
    if storage.is_remote(folder):
        found = storage.find_bytes(storage.join(folder, name))
        return None if found is None else dict(json.loads(found[0]))
    path = Path(folder) / name
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
