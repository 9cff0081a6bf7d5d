"""The way to MLflow: its address, its client, how long it is waited for, and what its refusals mean."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
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

Point = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step."""

# Up to the last @ of the host's part; a password of SQLAlchemy's may hold a slash as well.
_LOGIN = re.compile(r"//(?:[^/\s]*|[^/:@\s]*:[^@\s]*)@")
_SECRET = re.compile(r"([?&][\w-]*(?:password|passwd|secret|token|key)[\w-]*=)[^&\s'\")]+", re.IGNORECASE)
_ADDRESS = re.compile(r"[\w+.-]+://\S+")
_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}


class TrackingError(UserError):
    """MLflow cannot be reached, or refuses."""


class AwayError(TrackingError):
    """MLflow does not answer, or answers that it cannot just now; the same request may do later."""


class RefusedError(TrackingError):
    """MLflow understands the request and will never do it: the run was deleted, a name holds signs that it forbids."""


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


def redacted(text: str) -> str:
    """An address, or words with addresses in them, without logins and keys: to show and to record."""
    return _SECRET.sub(r"\1***", _LOGIN.sub("//***@", text))


def redacted_addresses(tree: Any) -> Any:
    """JSON types in which every text that is an address as a whole is redacted; other texts stay as they are."""
    if isinstance(tree, Mapping):
        return {key: redacted_addresses(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted_addresses(value) for value in tree]
    return redacted(tree) if isinstance(tree, str) and _ADDRESS.fullmatch(tree) else tree


def connect(uri: str) -> Any:
    """MLflow's client for tracking and registry."""
    # Usage reports leave the machine; nobody was asked.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # At the end of every run, each trial's too, MLflow prints its address with the password that may be in it.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
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


def log_points(client: Any, run_id: str, points: Sequence[Point], *, quick: bool = False) -> None:
    """At most 1000 points in one request; a quick one gives up after ``QUICK_SECONDS``.

    MLflow's client takes its time-outs from the process's environment alone, which the stage's own requests share.
    """
    from mlflow.store.tracking.rest_store import RestStore

    finite = [point for point in points if math.isfinite(point[1])]
    if not isinstance(client._tracking_client.store, RestStore):
        from mlflow.entities import Metric

        client.log_batch(run_id, metrics=[Metric(*point) for point in finite])
        return
    from mlflow.protos.service_pb2 import LogBatch

    # Not MLflow's way over Metric, protobuf and JSON and back: of 250 points it took this process 8 ms, and this 3.
    keys = ("key", "value", "timestamp", "step")
    body = {"run_id": run_id, "metrics": [dict(zip(keys, point, strict=True)) for point in finite]}
    _request(client, LogBatch, body, **({"timeout": QUICK_SECONDS, "max_retries": 0} if quick else {}))


def create_run(client: Any, experiment_id: str, name: str, tags: Mapping[str, str], milliseconds: int) -> str:
    """Asks once for a new run and returns its id: asked again after a lost answer, a server would make two."""
    from mlflow.store.tracking.rest_store import RestStore

    if not isinstance(client._tracking_client.store, RestStore):
        run = client.create_run(experiment_id, start_time=milliseconds, tags=dict(tags), run_name=name)
        return str(run.info.run_id)
    from mlflow.protos.service_pb2 import CreateRun

    body = {
        "experiment_id": experiment_id,
        "run_name": name,
        "start_time": milliseconds,
        "tags": [{"key": key, "value": value} for key, value in tags.items()],
    }
    return str(_request(client, CreateRun, body, max_retries=0)["run"]["info"]["run_id"])


def _request(client: Any, message: type, body: Mapping[str, Any], **limits: float) -> dict[str, Any]:
    """One call of MLflow's REST interface, within ``http_request``'s ``timeout`` and ``max_retries`` if given."""
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    store = client._tracking_client.store
    endpoint, method = store._METHOD_TO_INFO[message]
    answer = http_request(store.get_host_creds(), endpoint, method, json=body, raise_on_status=False, **limits)
    content: dict[str, Any] = verify_rest_response(answer, endpoint).json()
    return content


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
    fix = "check tracking.uri, the server and your rights there"
    if status in {408, 429} or status >= 500:
        return AwayError, fix
    # A gateway that answers for the server, or a page that is not MLflow's, has other codes.
    return (RefusedError if getattr(error, "error_code", "") in _REFUSALS else TrackingError), fix
