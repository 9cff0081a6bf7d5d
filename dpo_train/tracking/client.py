"""The way to MLflow: its address, its client, how long it is waited for, and what its refusals mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.config import RunConfig
from dpo_train.disk import is_disk_full
from dpo_train.errors import ConfigError, DiskFullError, DpoError, MissingPackageError, UserError, first_line

PLUGIN_RUN = "MLFLOW_RUN_ID"
PLUGIN_EXPERIMENT = "MLFLOW_EXPERIMENT_ID"
URI = "MLFLOW_TRACKING_URI"

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
"""Between stages. MLflow itself would try for four minutes, with nothing to see meanwhile."""
QUICK_SECONDS = 5
"""For one request while a stage works: points that do not get through wait for the next beat."""


class TrackingError(UserError):
    """MLflow cannot be reached, or refuses."""


class AwayError(TrackingError):
    """MLflow does not answer, or answers that it cannot just now; the same request may do later."""


def tracking_uri(config: RunConfig) -> str:
    """``tracking.uri``, else MLFLOW_TRACKING_URI, else a SQLite file in the store: no server needed.

    Where a Kubeflow plugin has opened the run, that run's server is the one.
    """
    plugin = os.environ.get(URI) if os.environ.get(PLUGIN_RUN) else None
    uri = plugin or config.tracking.uri or os.environ.get(URI)
    if uri is None and storage.is_remote(config.store):
        raise ConfigError(
            f"MLflow needs an address of its own: the store {config.store} cannot hold its database",
            fix="set tracking.uri or MLFLOW_TRACKING_URI to a server, or to sqlite:////a/path/mlflow.db",
        )
    return uri or f"sqlite:///{config.store}/mlflow.db"


def redacted(uri: str) -> str:
    """The URI without a password, to show and to record."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def connect(uri: str) -> Any:
    """MLflow's client for tracking and registry."""
    # Usage reports leave the machine; nobody was asked.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise MissingPackageError("MLflow is not installed", fix="pip install 'dpo-train[mlflow]'") from None
    with mlflow_errors(uri):
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def patience() -> Iterator[None]:
    """Inside, requests of this process give up soon, unless the user's environment says how long to wait."""
    added = {key: value for key, value in PATIENCE.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def log_points(client: Any, run_id: str, metrics: Sequence[Any]) -> None:
    """At most 1000 ``mlflow.entities.Metric`` in one request that gives up after ``QUICK_SECONDS``.

    MLflow's client takes its time-outs from the process's environment alone, which the stage's own requests share.
    """
    from mlflow.store.tracking.rest_store import RestStore

    store = client._tracking_client.store
    if not isinstance(store, RestStore):
        client.log_batch(run_id, metrics=metrics)
        return
    from mlflow.protos.service_pb2 import LogBatch
    from mlflow.utils.proto_json_utils import message_to_json
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    endpoint, method = store._METHOD_TO_INFO[LogBatch]
    body = json.loads(message_to_json(LogBatch(run_id=run_id, metrics=[metric.to_proto() for metric in metrics])))
    answer = http_request(
        store.get_host_creds(), endpoint, method, json=body, timeout=QUICK_SECONDS, max_retries=0, raise_on_status=False
    )
    verify_rest_response(answer, endpoint)


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """MLflow's own failures as one line with the address and what to look at."""
    try:
        yield
    except DpoError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(f"The disk of MLflow at {redacted(uri)} is full", fix="free some space") from error
        first = redacted(first_line(error))
        kind, fix = _meaning(error)
        raise kind(f"MLflow at {redacted(uri)} does not do what was asked: {first[:300]}", fix=fix) from error


def _meaning(error: Exception) -> tuple[type[TrackingError], str]:
    """What MLflow's failure is to us, and what to do about it."""
    status = error.get_http_status_code() if hasattr(error, "get_http_status_code") else 500
    if status == 401 or "error code 401" in first_line(error):
        return TrackingError, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
    if status in {408, 429} or status >= 500:
        return AwayError, "check tracking.uri, the server and your rights there"
    return TrackingError, "check tracking.uri, the server and your rights there"
