"""What can be seen before anything is started: data, model, store, tracking server."""

from __future__ import annotations

import dataclasses
import os

from dpo_train import storage
from dpo_train.config import RunConfig
from dpo_train.config.evaluation import NO_CHAMPION
from dpo_train.config.places import is_lost, lost_paths
from dpo_train.errors import ConfigError


def use_storage(config: RunConfig) -> None:
    """Makes the config's section on object storage this process's."""
    storage.use(storage.Options(**dataclasses.asdict(config.storage)))


def check_tracking(config: RunConfig) -> None:
    """Asks a tracking server once whether it is there; a local file needs no question.

    Raises:
        TrackingError: it does not answer, or refuses.
        UserError: ``evaluate.champion`` names a version that does not exist.
    """
    from dpo_train.tracking import Tracking, tracking_uri

    if not tracking_uri(config).startswith("http"):
        _check_champion(config)
        return
    # MLflow would try again for four minutes, with nothing to see meanwhile.
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
    added = {key: value for key, value in patience.items() if key not in os.environ}
    os.environ.update(added)
    try:
        Tracking(config).check()
        _check_champion(config)
    finally:
        for key in added:
            del os.environ[key]


def _check_champion(config: RunConfig) -> None:
    """A champion that was asked for by name must be there; by default there may be none."""
    if config.evaluate.champion in {None, NO_CHAMPION, "champion"}:
        return
    from dpo_train import registry
    from dpo_train.tracking import Tracking

    tracking = Tracking(config)
    with tracking.errors():
        registry.champion(tracking.client, config.register.model_name, str(config.evaluate.champion))


def check_store(config: RunConfig, output: str | None = None) -> None:
    """Tries whether the store, and the output's own place if one is named, can be written.

    Raises:
        StoreError: it cannot.
    """
    from dpo_train.artifacts import check_writable

    use_storage(config)
    check_writable(config.store)
    if output is not None and storage.is_remote(output):
        check_writable(output)


def check_inputs(config: RunConfig) -> str:
    """Looks for data, model and judge.

    Returns:
        digest of the raw data.

    Raises:
        UserError: one of them is missing, unreadable, or the store cannot be written; or jobs would not see it.
    """
    check_reach(config)
    check_data(config)
    check_models(config)
    return data_digest(config)


def check_reach(config: RunConfig) -> None:
    """Whether the pods of jobs see all that the config names: at s3://, on a hub, or on a volume that they mount.

    Raises:
        ConfigError: they do not.
    """
    if config.cluster.launcher != "rayjob":
        return
    lost = lost_paths(config)
    database = (config.tracking.uri or "").removeprefix("sqlite:///")
    if database != config.tracking.uri and is_lost(database, config):
        lost["tracking.uri"] = database
    if lost:
        where = ", ".join(config.cluster.volumes) or "nothing is mounted"
        raise ConfigError(
            "Jobs on the cluster would not see what lies on this machine",
            got="; ".join(f"{key}={path}" for key, path in lost.items()),
            expected=f"addresses (s3://, a hub name), or paths on a volume of cluster.volumes ({where})",
            fix="put them at s3://, or mount a volume that holds them: cluster.volumes={/data: name-of-the-claim}",
        )


def check_data(config: RunConfig) -> None:
    """Looks for the raw data, and tries the store.

    Raises:
        UserError: a source is missing or unreadable, or the store cannot be written.
    """
    from dpo_train.data.sources import plan
    from dpo_train.stages.prepare_inputs import check_apart

    check_apart(config)
    check_store(config)
    for index, source in enumerate(config.prepare.all_sources):
        plan(source, index)


def check_models(config: RunConfig) -> None:
    """Looks for the model and the judge.

    Raises:
        UserError: one of them is missing.
    """
    from dpo_train.data.adapter import adapter_folder
    from dpo_train.data.folder import model_folder
    from dpo_train.evaluate import judge

    model_folder(config.model.path)
    if config.model.adapter is not None:
        adapter_folder(config.model.adapter)
    if config.evaluate.judge is not None:
        judge.check(config.evaluate.judge)


def data_digest(config: RunConfig) -> str:
    """Digest of the raw data, as the MLflow run of a pipeline has it in its tag ``dpo.data``."""
    from dpo_train.stages.prepare_inputs import data_digests

    return "-".join(data_digests(config.prepare.all_sources).values())
