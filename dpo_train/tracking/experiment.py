"""The runs of one experiment, each request at once: what does not arrive is raised."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import RECORD_FILE, Artifact
from dpo_train.config import RunConfig, to_dict
from dpo_train.identity import code_version, library_versions
from dpo_train.tracking import wording
from dpo_train.tracking.client import (
    PLUGIN_EXPERIMENT,
    PLUGIN_RUN,
    AwayError,
    Point,
    TrackingError,
    connect,
    create_run,
    log_points,
    mlflow_errors,
    patience,
    redacted,
    redacted_addresses,
    tracking_uri,
)

BATCH = 1000
"""MLflow's limit of metrics in one request."""
_PARAMETERS = 100  # and of parameters
_PARAMETER_LENGTH = 6000  # and of a parameter's text

_TRAINING = "custom_model_development"
"""Without it MLflow's pages show an experiment as one about prompts and traces."""

_CREATIONS = 3
"""How often a run's creation is tried."""

CONFIG_FILE = "config.json"
ERROR_TAG = "dpo.error"
ATTACHED_TAG = "dpo.attached"
"""Of a run that somebody else, such as a Kubeflow plugin, has opened and will end."""
JOURNAL_TAG = "dpo.journal"
"""Tells a run from all others, so that one whose creation was not answered is found and not made again."""

FILES = ("report.html", "report.json", "trials.json", "frontier.html", "frontier.png", "rejections.jsonl")
"""Small files of an output that people want to see beside the run."""
MOST_BYTES = 32 << 20
"""A larger one stays in the store: a list of a million rejections is not for a browser."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run read."""

    name: str
    place: str
    digest: str
    context: str
    """What for: "preferences", "training", "evaluation"."""
    profile: Mapping[str, int]


class Tracking:
    """The runs of one experiment."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.uri = tracking_uri(config)
        self.uri_shown = redacted(self.uri)
        self.client = connect(self.uri)

    def start_run(
        self,
        name: str,
        *,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        milliseconds: int | None = None,
    ) -> str:
        """Creates a run and returns its id."""
        all_tags = {"mlflow.runName": name, **self._common_tags(), JOURNAL_TAG: uuid.uuid4().hex, **(tags or {})}
        if parent:
            all_tags["mlflow.parentRunId"] = parent
        start = _now() if milliseconds is None else milliseconds
        with self.errors():
            experiment = self.experiment_id()
            for left in reversed(range(_CREATIONS)):
                try:
                    return self._create_run(experiment, name, all_tags, start)
                except AwayError:
                    if not left:
                        raise
                    if found := self.find_child(parent, JOURNAL_TAG, all_tags[JOURNAL_TAG]):
                        return found
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _create_run(self, experiment: str, name: str, tags: Mapping[str, str], milliseconds: int) -> str:
        with self.errors():
            return create_run(self.client, experiment, name, tags, milliseconds)

    def start_pipeline(self, name: str, *, kubeflow_run: str | None = None) -> str:
        """The parent run, with the whole config as parameters and as an artifact.

        Where a Kubeflow plugin has opened a run, it is that one (``plugin_run``); the plugin will end it.
        """
        tags = {"dpo.kind": "pipeline", "mlflow.note.content": wording.PIPELINE}
        if kubeflow_run:
            tags["dpo.kubeflow_run"] = kubeflow_run
        with patience():
            if (run_id := self.plugin_run()) is not None:
                self.set_tags(run_id, {**self._common_tags(), **tags, ATTACHED_TAG: "true"})
            else:
                run_id = self.start_run(name, tags=tags)
            self.log_config(run_id)
        return run_id

    def plugin_run(self) -> str | None:
        """The pipeline's run that a Kubeflow plugin has opened; None: there is no plugin.

        MLFLOW_RUN_ID is that of the task (kfp 2.17), which the plugin ends with the task; its parent is the pipeline's.
        """
        task = os.environ.get(PLUGIN_RUN)
        if not task:
            return None
        with self.errors():
            tags = self.client.get_run(task).data.tags
        return str(tags.get("mlflow.parentRunId", task))

    def log_config(self, run_id: str) -> None:
        """The whole config as parameters and as the file that ``dpo reproduce`` reads."""
        config = redacted_addresses(to_dict(self._config))
        config["tracking"]["uri"] = self.uri_shown
        with patience(), self.errors():
            self.log_parameters(run_id, flatten(config))
            self.client.log_dict(run_id, config, CONFIG_FILE)

    def log_points(self, run_id: str, points: Sequence[Point], *, quick: bool = False) -> None:
        """Points of curves. Sent again, the same point is stored once.

        Args:
            quick: a request that is not answered soon is given up.
        """
        with self.errors():
            for start in range(0, len(points), BATCH):
                log_points(self.client, run_id, points[start : start + BATCH], quick=quick)

    def log_artifact(
        self, run_id: str, artifact: Artifact, history: Sequence[Mapping[str, float]] = (), *, at: int | None = None
    ) -> None:
        """What the record says: its config as parameters, its numbers as metrics, where the output lies as tags.

        Args:
            at: the time of the metrics, in milliseconds since 1970.
        """
        record = artifact.record
        # Metrics of the last training step are in the history already.
        skip = history[-1].keys() if history else {}
        numbers = {**{f"count/{name}": n for name, n in record.counts.items()}, **record.metrics}
        now = _now() if at is None else at
        self.log_points(run_id, [(name, value, now, 0) for name, value in numbers.items() if name not in skip])
        self.set_tags(
            run_id,
            {
                "dpo.stage": record.stage,
                "dpo.output": artifact.home,
                "dpo.digest": record.digest,
                "dpo.reused": str(artifact.reused).lower(),
                "dpo.code_version": record.code_version,
                **{f"dpo.version.{name}": version for name, version in record.versions.items()},
                **{f"dpo.input.{name}": digest for name, digest in record.inputs.items()},
            },
        )
        self.log_parameters(run_id, flatten(redacted_addresses(record.config)))
        with self.errors():
            self.client.log_dict(run_id, redacted_addresses(asdict(record)), RECORD_FILE)
            for name in FILES:
                if record.files.get(name, MOST_BYTES) < MOST_BYTES:
                    self.client.log_artifact(run_id, str(artifact.file(name)))

    def log_data(self, run_id: str, data: Sequence[Data]) -> None:
        """What the run read, as inputs of MLflow's: where it lies and the digest of its content."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    # MLflow's limits: 36 characters of digest, 500 of name.
                    name=each.name[:500],
                    digest=each.digest[:36],
                    source_type=_source_type(each.place),
                    source=json.dumps({"uri": each.place}),
                    profile=json.dumps(dict(each.profile)),
                ),
                tags=[InputTag("mlflow.data.context", each.context)],
            )
            for each in data
        ]
        with self.errors():
            self.client.log_inputs(run_id, datasets=inputs)

    def log_parameters(self, run_id: str, parameters: Mapping[str, str]) -> None:
        """Text by dotted name; what is too long for MLflow is a file of the run, and the parameter says where."""
        from mlflow.entities import Param

        long = {key: value for key, value in parameters.items() if len(value) > _PARAMETER_LENGTH}
        shown = {**parameters, **{key: f"see the artifact parameters/{key}.txt" for key in long}}
        items = [Param(key, value) for key, value in shown.items()]
        with self.errors():
            for key, value in long.items():
                self.client.log_text(run_id, value, f"parameters/{key}.txt")
            for start in range(0, len(items), _PARAMETERS):
                self.client.log_batch(run_id, params=items[start : start + _PARAMETERS])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags, in one request."""
        from mlflow.entities import RunTag

        with self.errors():
            self.client.log_batch(run_id, tags=[RunTag(key, value[:4000]) for key, value in tags.items()])

    def end(self, run_id: str, status: str, error: str | None = None, *, milliseconds: int | None = None) -> None:
        """FINISHED, FAILED or KILLED, with the reason as a tag. A run that somebody else opened is theirs to end.

        What is told late does not undo a later end.
        """
        with patience(), self.errors():
            run = self.client.get_run(run_id)
            if None not in (milliseconds, run.info.end_time) and run.info.end_time > milliseconds:
                return
            if error is not None:
                self.client.set_tag(run_id, ERROR_TAG, redacted(error)[:4000])
            elif ERROR_TAG in run.data.tags:  # of an attempt before this one
                self.client.delete_tag(run_id, ERROR_TAG)
            if ATTACHED_TAG not in run.data.tags:
                self.client.set_terminated(run_id, status, end_time=milliseconds)

    def end_lost(self, parent: str, stage: str, run_id: str) -> None:
        """Ends the runs of earlier attempts at this stage that are still open: whoever made them cannot any more."""
        wanted = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`dpo.stage` = '{stage}'"
        with self.errors():
            found = self.client.search_runs([self.experiment_id()], f"{wanted} and attributes.status = 'RUNNING'")
        for run in found:
            if run.info.run_id != run_id:
                self.end(run.info.run_id, "KILLED", f"another attempt, the run {run_id}, took its place")

    def errors(self) -> AbstractContextManager[None]:
        """Turns MLflow's own failures inside into TrackingErrors."""
        return mlflow_errors(self.uri)

    def check(self) -> None:
        """Asks the server once whether the experiment can be used.

        Raises:
            TrackingError: it cannot be reached, or the experiment, or the run that a plugin has opened, was deleted.
        """
        with patience(), self.errors():
            run_id = os.environ.get(PLUGIN_RUN)
            if run_id is None:
                self.experiment_id()
            elif self.client.get_run(run_id).info.lifecycle_stage == "deleted":
                raise TrackingError(f"The MLflow run {run_id} was deleted", fix=f"restore it, or unset {PLUGIN_RUN}")

    def is_running(self, run_id: str) -> bool:
        """Whether nobody has ended the run."""
        with patience(), self.errors():
            return str(self.client.get_run(run_id).info.status) == "RUNNING"

    def find_child(self, parent: str | None, tag: str, value: str) -> str | None:
        """The run below the parent, or anywhere in the experiment, whose tag has this value."""
        wanted = [f"tags.`{tag}` = '{value}'", *([f"tags.`mlflow.parentRunId` = '{parent}'"] if parent else [])]
        with self.errors():
            found = self.client.search_runs([self.experiment_id()], " and ".join(wanted), max_results=1)
        return str(found[0].info.run_id) if found else None

    def _common_tags(self) -> dict[str, str]:
        versions = {f"dpo.version.{name}": version for name, version in library_versions().items()}
        return {
            "dpo.code_version": code_version(),
            "dpo.seed": str(self._config.seed),
            "dpo.model": self._config.model.path,
            "dpo.folder": str(Path.cwd()),
            **versions,
        }

    def experiment_id(self) -> str:
        """Of the experiment, which is made if it is not there.

        Raises:
            TrackingError: it was deleted.
        """
        if plugin := os.environ.get(PLUGIN_RUN):
            return os.environ.get(PLUGIN_EXPERIMENT) or str(self.client.get_run(plugin).info.experiment_id)
        name = self._config.tracking.experiment
        found = self.client.get_experiment_by_name(name) or self._new_experiment(name)
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"The MLflow experiment {name!r} was deleted", fix="restore it, or set another tracking.experiment"
            )
        return str(found.experiment_id)

    def _new_experiment(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_experiment(
                name, artifact_location=self._artifact_location(), tags={"mlflow.experimentKind": _TRAINING}
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another first run was quicker, or the answer to our own request was lost.
        return self.client.get_experiment_by_name(name)

    def _artifact_location(self) -> str | None:
        """A server knows itself where its files go; beside a SQLite file they lie in a folder."""
        if not self.uri.startswith("sqlite:"):
            return None
        if storage.is_remote(self._config.store):
            return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        return (Path(self._config.store) / "mlartifacts").as_uri()


def step_points(history: Iterable[Mapping[str, float]], milliseconds: int) -> list[Point]:
    """Lines of ``metrics.jsonl`` as points; the first step is MLflow's step 1."""
    return [
        (name, value, milliseconds, int(line["step"]) + 1)
        for line in history
        for name, value in line.items()
        if name != "step"
    ]


def _now() -> int:
    return int(time.time() * 1000)


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
