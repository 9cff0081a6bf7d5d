"""What can be seen before anything is started: data, model, store, tracking server."""

from __future__ import annotations

import dataclasses
import os

from dpo_train import storage
from dpo_train.config import RunConfig


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
    if config.evaluate.champion in {None, "champion"}:
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
        UserError: one of them is missing, unreadable, or the store cannot be written.
    """
    from dpo_train.data.adapter import adapter_folder
    from dpo_train.data.folder import model_folder
    from dpo_train.data.sources import plan
    from dpo_train.evaluate import judge
    from dpo_train.stages.prepare_inputs import check_apart, data_digests

    check_apart(config)
    check_store(config)
    for index, source in enumerate(config.prepare.all_sources):
        plan(source, index)
    model_folder(config.model.path)
    if config.model.adapter is not None:
        adapter_folder(config.model.adapter)
    if config.evaluate.judge is not None:
        judge.check(config.evaluate.judge)
    digests = data_digests(config.prepare.all_sources)
    return "-".join(digests.values())
