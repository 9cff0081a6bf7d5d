"""Runs as rows: found, filtered and sorted by MLflow, told in the words of the command line."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_train.errors import UserError
from dpo_train.tracking.client import connect, mlflow_errors
from dpo_train.tracking.experiment import CONFIG_FILE

PARENT_TAG = "mlflow.parentRunId"

_NAME = re.compile(r"\b(metrics?|param(?:eter)?s?|tags?)\.([\w./:-]+)")
"""All the words that MLflow knows for them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run; what is not known of it is None."""

    run_id: str
    parent: str | None
    kind: str
    name: str
    status: str
    started: int
    """Milliseconds since 1970."""
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    beta: float | None
    kl: float | None
    version: str | None
    error: str | None
    tags: Mapping[str, str]


class Runs:
    """The runs behind an address, to read."""

    def __init__(self, uri: str) -> None:
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            raise UserError(f"There are no runs yet at {uri}", fix="start one (`dpo run`), or check tracking.uri")
        self._uri = uri
        self._client = connect(uri)

    def find(self, experiment: str, *, kind: str | None, where: str | None, sort: str | None, limit: int) -> list[Row]:
        """The newest runs of an experiment, or the first by ``sort``.

        Args:
            kind: "pipeline", "stage" or "trial"; None: all.
            where: MLflow's filter, e.g. ``metrics.heldout/accuracy > 0.7 and tags.dpo.beta = '0.1'``.
            sort: MLflow's order, e.g. ``metrics.samples/kl ASC``.

        Raises:
            UserError: there is no such experiment.
            TrackingError: MLflow cannot be reached, or does not understand.
        """
        wanted = [f"tags.`dpo.kind` = '{kind}'"] if kind else []
        wanted += [quoted(where)] if where else []
        order = [quoted(sort)] if sort else ["attributes.start_time DESC"]
        with mlflow_errors(self._uri):
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                raise UserError(
                    f"MLflow has no experiment {experiment!r} yet", fix="start a run, or check tracking.experiment"
                )
            runs = self._client.search_runs(
                [found.experiment_id], " and ".join(wanted), order_by=order, max_results=limit
            )
            return [_row(run) for run in runs]

    def get(self, run_id: str) -> Row:
        """One run.

        Raises:
            TrackingError: there is none with this id.
        """
        with mlflow_errors(self._uri):
            return _row(self._client.get_run(run_id))

    def children(self, run_id: str) -> list[Row]:
        """The runs below one, in the order in which they started."""
        with mlflow_errors(self._uri):
            experiment = self._client.get_run(run_id).info.experiment_id
            below = f"tags.`{PARENT_TAG}` = '{run_id}'"
            order = ["attributes.start_time ASC"]
            page = self._client.search_runs([experiment], below, order_by=order)
            found = [*page]
            while page.token:
                page = self._client.search_runs([experiment], below, order_by=order, page_token=page.token)
                found += page
            return [_row(run) for run in found]

    def config(self, run_id: str) -> dict[str, Any]:
        """The whole config of a run that nothing stands above.

        Raises:
            UserError: it has none.
        """
        with mlflow_errors(self._uri), tempfile.TemporaryDirectory() as folder:
            if CONFIG_FILE not in {file.path for file in self._client.list_artifacts(run_id)}:
                raise UserError(
                    f"The run {run_id} holds no {CONFIG_FILE}",
                    fix="name a run that `dpo` has made (`dpo runs` lists them)",
                )
            path = self._client.download_artifacts(run_id, CONFIG_FILE, folder)
            content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return content

    def parameters(self, run_id: str) -> dict[str, str]:
        """Settings by dotted name."""
        with mlflow_errors(self._uri):
            return dict(self._client.get_run(run_id).data.params)


def _row(run: Any) -> Row:
    info, tags, metrics = run.info, run.data.tags, run.data.metrics
    accuracy = next((name for name in ("heldout/accuracy", "validation/accuracy") if name in metrics), "")
    betas = (tags.get("dpo.beta"), run.data.params.get("train.beta"), run.data.params.get("beta"))
    return Row(
        run_id=info.run_id,
        parent=tags.get(PARENT_TAG),
        kind=tags.get("dpo.kind", ""),
        name=info.run_name or "",
        status=info.status,
        started=info.start_time,
        accuracy=metrics.get(accuracy),
        accuracy_low=metrics.get(f"{accuracy}_low"),
        accuracy_high=metrics.get(f"{accuracy}_high"),
        beta=next((beta for text in betas if text and (beta := _number(text)) is not None), None),
        kl=metrics.get("samples/kl"),
        version=tags.get("dpo.version"),
        error=tags.get("dpo.error"),
        tags=dict(tags),
    )


def _number(text: str) -> float | None:
    """Runs of others in the experiment may call anything by our names."""
    try:
        return float(text)
    except ValueError:
        return None


def quoted(text: str) -> str:
    """MLflow's filter language with its names in the quotation marks that a slash or a dot in them needs."""
    parts = text.split("'")
    # Every other part is text between quotation marks.
    parts[::2] = [_NAME.sub(r"\1.`\2`", part) for part in parts[::2]]
    return "'".join(parts)
