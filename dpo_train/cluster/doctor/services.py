"""What a run talks to besides Kubernetes: object storage, MLflow, Kubeflow Pipelines, a Ray cluster that is there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import secrets
import time
from typing import TYPE_CHECKING

from dpo_train import storage
from dpo_train.cluster.doctor.answers import Answer, answer_of, failed, passed, unchecked
from dpo_train.cluster.kubeflow.login import HOST
from dpo_train.config import RunConfig
from dpo_train.errors import ConfigError, DpoError, MissingPackageError, first_line
from dpo_train.tracking import redacted, tracking_uri

if TYPE_CHECKING:
    from dpo_train.cluster.kubeflow.client import Kubeflow
    from dpo_train.cluster.kubeflow.package import Package

ATTEMPTS = 2
"""Of a request to object storage; a run is more patient."""


def uses_kubeflow(config: RunConfig) -> bool:
    """Whether the config, or the environment, names Kubeflow Pipelines."""
    return bool(config.kubeflow.host or os.environ.get(HOST))


def use_storage(config: RunConfig) -> None:
    """The config's section on object storage, with little patience."""
    options = storage.Options(**dataclasses.asdict(config.storage))
    storage.use(dataclasses.replace(options, attempts=min(ATTEMPTS, options.attempts)))


def store(config: RunConfig) -> Answer:
    """Writes an object into the store, reads it, and deletes it."""
    address = storage.join(config.store, f"doctor-{secrets.token_hex(8)}")
    content = secrets.token_bytes(16)
    try:
        storage.write_bytes(address, content)
        try:
            if storage.read_bytes(address) != content:
                return failed(
                    f"{config.store} gave back other bytes than were written", "look at the server, or its proxy"
                )
        finally:
            storage.delete([address])
    except MissingPackageError:
        raise
    except DpoError as error:
        return answer_of(error)
    return passed(f"{config.store}: written, read and deleted{_from_here(config)}")


def remote_inputs(config: RunConfig) -> tuple[str, ...]:
    """What is read from s3:// that is not the store."""
    places = (config.model.path, config.model.adapter, *(source.path for source in config.prepare.all_sources))
    return tuple(dict.fromkeys(place for place in places if place is not None and storage.is_remote(place)))


def inputs(config: RunConfig) -> Answer:
    """Whether they may be read."""
    for place in remote_inputs(config):
        storage.check_access(place, write=False)
    return passed(f"{', '.join(remote_inputs(config))}: may be read{_from_here(config)}")


def mlflow(config: RunConfig) -> Answer:
    """Logs in to MLflow and asks for the experiment; none is made."""
    try:
        uri = tracking_uri(config)
    except ConfigError as error:
        if config.cluster.launcher == "none" and uses_kubeflow(config):
            return unchecked(
                "tracking.uri is not set: Kubeflow's MLflow plugin, or MLFLOW_TRACKING_URI there, has to name it",
                "set tracking.uri, if there is no such plugin",
            )
        return answer_of(error)
    if not uri.startswith("http"):
        return passed(f"{redacted(uri)}: a database of its own, no server needed")
    from dpo_train.tracking import Tracking
    from dpo_train.tracking.client import patience

    tracking = Tracking(config)
    name = config.tracking.experiment
    with patience(), tracking.errors():
        found = tracking.client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        return failed(f"the MLflow experiment {name} was deleted", "restore it, or set another tracking.experiment")
    there = "is there" if found is not None else "will be made by the first run"
    client = importlib.metadata.version("mlflow")
    return passed(f"{tracking.uri_shown} answers to client {client}; experiment {name} {there}{_from_here(config)}")


class KubeflowAccess:
    """Kubeflow Pipelines, for two checks that run at the same time."""

    def __init__(self, config: RunConfig, package: Package | None) -> None:
        self._config, self._package = config, package

    def login(self) -> Answer:
        """Whether it answers, is Kubeflow Pipelines, knows who asks and lets them use the experiment."""
        from dpo_train.cluster.kubeflow.submission import find_experiment

        kubeflow, name = self._connect(), self._config.kubeflow.experiment
        experiment = find_experiment(kubeflow, name)
        if experiment is not None and experiment.storage_state == "ARCHIVED":
            return failed(f"the experiment {name} is archived", "restore it in Kubeflow, or set kubeflow.experiment")
        users = f"namespace {kubeflow.namespace}" if kubeflow.namespace else "one user"
        client = importlib.metadata.version("kfp")
        return passed(f"{kubeflow.address.api} answers to client {client} ({users})")

    def pipeline(self) -> Answer:
        """Whether this version of the pipeline has been uploaded; if not, `dpo submit` does it."""
        from dpo_train.cluster.kubeflow.submission import prepare

        if self._package is None:
            return unchecked("this installation holds no compiled pipeline", "write one with `dpo compile`")
        try:
            version = prepare(self._config, self._package, name="doctor").package.version
        except ConfigError as error:
            return unchecked(f"the config cannot be submitted as it is: {first_line(error)}")
        kubeflow, name = self._connect(), self._config.kubeflow.pipeline
        pipelines = kubeflow.pipelines.pipeline_service_list_pipelines
        found = kubeflow.named(pipelines, "pipelines", name, **kubeflow.scope)
        if found is None:
            return passed(f"{name} is not there yet; `dpo submit` uploads it")
        listing = kubeflow.pipelines.pipeline_service_list_pipeline_versions
        there = kubeflow.named(listing, "pipeline_versions", version, pipeline_id=found.pipeline_id)
        state = "is there" if there is not None else "is not there yet; `dpo submit` uploads it"
        return passed(f"{name} is there; its version {version} {state}")

    def _connect(self) -> Kubeflow:
        from dpo_train.cluster.kubeflow.client import connect
        from dpo_train.cluster.kubeflow.login import address

        return connect(address(self._config.kubeflow), self._config.kubeflow)


def ray(config: RunConfig) -> Answer:
    """Whether a Ray's dashboard answers at ``cluster.address``, and listens to us."""
    from dpo_train.cluster.ray_rest import RayRest

    if config.cluster.address is None:
        return failed("cluster.launcher=ray needs the cluster's address", "set cluster.address, e.g. http://head:8265")
    with contextlib.closing(RayRest(config.cluster.address, tell=lambda _: None, wait=_shortly)) as found:
        found.check()
    return passed(f"Ray at {redacted(config.cluster.address)} answers, and takes this login")


def _shortly(seconds: float) -> None:
    time.sleep(min(seconds, 1.0))


def _from_here(config: RunConfig) -> str:
    return "" if config.cluster.launcher == "none" else " (from here; pods may see it otherwise)"
