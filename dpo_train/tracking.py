"""MLflow runs: one parent run per pipeline run, a nested run per stage, under the sweep one per trial.

Training never talks to MLflow. A rank appends events to a file (progress.py) and ``metrics.jsonl``; the process that
launched the stage follows them, so that curves move while it trains, and completes them at the end.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import RECORD_FILE, Artifact
from dpo_train.config import RunConfig, to_dict
from dpo_train.disk import is_disk_full
from dpo_train.errors import ConfigError, DiskFullError, DpoError, MissingPackageError, UserError, first_line
from dpo_train.progress import Follower

FOLLOW_SECONDS = 2.0
_BATCH = 1000  # MLflow's limit of metrics in one request
_PARAMETERS = 100  # and of parameters

TRAININGS = ("sft", "train")
"""Stages whose steps are a run's curve; a sweep's are those of its trials."""

FILES = ("report.html", "report.json", "trials.json", "rejections.jsonl")
"""Small files of an output that people want to see beside the run."""
MOST_BYTES = 32 << 20
"""A larger one stays in the store: a list of a million rejections is not for a browser."""


class TrackingError(UserError):
    """MLflow cannot be reached, or refuses."""


def tracking_uri(config: RunConfig) -> str:
    """``tracking.uri``, else MLFLOW_TRACKING_URI, else a SQLite file in the store: no server needed."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and storage.is_remote(config.store):
        raise ConfigError(
            f"MLflow needs an address of its own: the store {config.store} cannot hold its database",
            fix="set tracking.uri or MLFLOW_TRACKING_URI to a server, or to sqlite:////a/path/mlflow.db",
        )
    return uri or f"sqlite:///{config.store}/mlflow.db"


def redacted(uri: str) -> str:
    """The URI without a password, to show and to record."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


class Tracking:
    """The runs of one experiment."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.uri = tracking_uri(config)
        self.client = _client(self.uri)

    def start_run(self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """Creates a run and returns its id."""
        with _mlflow_errors(self.uri):
            all_tags = {"mlflow.runName": name, **(tags or {})}
            if parent:
                all_tags["mlflow.parentRunId"] = parent
            run = self.client.create_run(self._experiment_id(), tags=all_tags, run_name=name)
        return str(run.info.run_id)

    def start_pipeline(self, name: str) -> str:
        """The parent run, with the whole config as parameters and as an artifact."""
        run_id = self.start_run(name, tags={"dpo.kind": "pipeline"})
        with _mlflow_errors(self.uri):
            config = to_dict(self._config)
            config["tracking"]["uri"] = redacted(self.uri)
            self._log_parameters(run_id, flatten(config))
            self.client.log_dict(run_id, config, "config.json")
        return run_id

    @contextmanager
    def following(self, run_id: str, events: Path, stage: str) -> Iterator[set[int]]:
        """Logs the training metrics that appear in the events file meanwhile; yields the set of steps logged."""
        logged: set[int] = set()
        stop = threading.Event()
        follower = Follower(events)
        follower.new()  # what is there already belongs to earlier stages

        def follow() -> None:
            while True:
                finished = stop.wait(FOLLOW_SECONDS)
                mine = [e for e in follower.new() if e["stage"] == stage in TRAININGS]
                lines = [e for e in mine if e.get("unit") == "steps"]
                self.log_history(run_id, [{"step": e["done"] - 1, **e["metrics"]} for e in lines], logged)
                if finished:
                    return

        thread = threading.Thread(target=follow, name="mlflow-metrics", daemon=True)
        thread.start()
        try:
            yield logged
        finally:
            stop.set()
            thread.join()

    def log_history(self, run_id: str, history: Sequence[Mapping[str, float]], logged: set[int]) -> None:
        """Logs the steps that are not in ``logged`` yet."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, int(line["step"]) + 1)
            for line in history
            if int(line["step"]) not in logged
            for name, value in line.items()
            if name != "step"
        ]
        with _mlflow_errors(self.uri):
            for start in range(0, len(metrics), _BATCH):
                self.client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
        logged.update(int(line["step"]) for line in history)

    def log_artifact(self, run_id: str, artifact: Artifact, history: Sequence[Mapping[str, float]] = ()) -> None:
        """What the record says: its config as parameters, its numbers as metrics, where the output lies as tags."""
        from mlflow.entities import Metric, RunTag

        record = artifact.record
        now = int(time.time() * 1000)
        # Metrics of the last training step are in the history already.
        skip = history[-1].keys() if history else {}
        numbers = {**{f"count/{name}": n for name, n in record.counts.items()}, **record.metrics}
        metrics = [Metric(name, value, now, 0) for name, value in numbers.items() if name not in skip]
        tags = {
            "dpo.stage": record.stage,
            "dpo.output": artifact.home,
            "dpo.digest": record.digest,
            "dpo.reused": str(artifact.reused).lower(),
            "dpo.code_version": record.code_version,
            **{f"dpo.input.{name}": digest for name, digest in record.inputs.items()},
        }
        with _mlflow_errors(self.uri):
            self._log_parameters(run_id, flatten(record.config))
            finite = [metric for metric in metrics if math.isfinite(metric.value)]
            self.client.log_batch(run_id, metrics=finite, tags=[RunTag(k, v) for k, v in tags.items()])
            self.client.log_dict(run_id, asdict(record), RECORD_FILE)
            for name in FILES:
                if record.files.get(name, MOST_BYTES) < MOST_BYTES:
                    self.client.log_artifact(run_id, str(artifact.file(name)))

    def log_data(self, run_id: str, sources: Mapping[str, tuple[str, str]], counts: Mapping[str, int]) -> None:
        """The raw data as inputs of the run: by name, where they lie and the digest of their content."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        shown = json.dumps({name: counts[name] for name in ("records", "used", "rejected") if name in counts})
        inputs = [
            DatasetInput(
                Dataset(
                    # MLflow's limits: 36 characters of digest, 500 of name.
                    name=name[:500],
                    digest=digest[:36],
                    source_type=_source_type(place),
                    source=json.dumps({"uri": place}),
                    profile=shown,
                ),
                tags=[InputTag("mlflow.data.context", "preferences")],
            )
            for name, (place, digest) in sources.items()
        ]
        with _mlflow_errors(self.uri):
            self.client.log_inputs(run_id, datasets=inputs)

    def end(self, run_id: str, status: str, error: BaseException | None = None) -> None:
        """FINISHED, FAILED or KILLED, with the reason as a tag."""
        with _mlflow_errors(self.uri):
            if error is not None:
                self.client.set_tag(run_id, "dpo.error", f"{type(error).__name__}: {error}"[:4000])
            self.client.set_terminated(run_id, status)

    def finish_pipeline(self, run_id: str, *, registered: bool) -> None:
        """A run whose gate refused the model is a finished one; the tag says which it is."""
        with _mlflow_errors(self.uri):
            self.client.set_tag(run_id, "dpo.registered", str(registered).lower())
        self.end(run_id, "FINISHED")

    def errors(self) -> AbstractContextManager[None]:
        """Turns MLflow's own failures inside into TrackingErrors."""
        return _mlflow_errors(self.uri)

    def check(self) -> None:
        """Asks the server once whether the experiment can be used.

        Raises:
            TrackingError: it cannot be reached, or the experiment was deleted.
        """
        with _mlflow_errors(self.uri):
            self._experiment_id()

    def is_running(self, run_id: str) -> bool:
        with _mlflow_errors(self.uri):
            return str(self.client.get_run(run_id).info.status) == "RUNNING"

    def _log_parameters(self, run_id: str, parameters: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value[:6000]) for key, value in parameters.items()]
        for start in range(0, len(items), _PARAMETERS):
            self.client.log_batch(run_id, params=items[start : start + _PARAMETERS])

    def _experiment_id(self) -> str:
        name = self._config.tracking.experiment
        found = self.client.get_experiment_by_name(name)
        if found is None:
            local = self.uri.startswith("sqlite:") and not storage.is_remote(self._config.store)
            location = (Path(self._config.store) / "mlartifacts").as_uri() if local else None
            if self.uri.startswith("sqlite:") and not local:
                location = (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
            return str(self.client.create_experiment(name, artifact_location=location))
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"The MLflow experiment {name!r} was deleted", fix="restore it, or set another tracking.experiment"
            )
        return str(found.experiment_id)


def _source_type(place: str) -> str:
    """As mlflow.data names the places that data come from."""
    if storage.is_remote(place):
        return "s3"
    return "hugging_face" if place.startswith("hf://") else "local"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config to dotted keys with text values."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _client(uri: str) -> Any:
    # Usage reports leave the machine; nobody was asked.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise MissingPackageError("MLflow is not installed", fix="pip install 'dpo-train[mlflow]'") from None
    with _mlflow_errors(uri):
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _mlflow_errors(uri: str) -> Iterator[None]:
    """MLflow's own failures as one line with the address and what to look at."""
    try:
        yield
    except DpoError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(f"The disk of MLflow at {redacted(uri)} is full", fix="free some space") from error
        first = redacted(first_line(error))
        raise TrackingError(
            f"MLflow at {redacted(uri)} does not do what was asked: {first[:300]}",
            fix="check tracking.uri, the server and your rights there",
        ) from error
