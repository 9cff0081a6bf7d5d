"""Tracking with what stands behind real servers: SQLite with files, PostgreSQL with S3; and with logins."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from dpo_train import launch
from dpo_train.config import RunConfig
from dpo_train.errors import UserError
from dpo_train.tracking import RunLog, Tracking, TrackingError
from tests.mlflow.postgres import postgres
from tests.mlflow.server import guarding, serving
from tests.s3.server import serve
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

ADMIN, READER = ("admin", "a-long-password-of-the-admin"), ("reader", "a-long-password-of-the-reader")


@pytest.fixture(scope="module", params=["SQLite and files", "PostgreSQL and S3"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    folder = tmp_path_factory.mktemp("backend")
    if request.param == "SQLite and files":
        with serving(folder) as url:
            yield url
        return
    with postgres() as database, serve(folder / "s3.log") as s3:
        bucket = s3.bucket("mlflow-files")
        arguments = ("--backend-store-uri", database, "--artifacts-destination", f"{bucket}/artifacts")
        variables = {**s3.environment(), "MLFLOW_S3_ENDPOINT_URL": s3.endpoint}
        with serving(folder, *arguments, variables=variables) as url:
            yield url
            assert any(key.endswith("/config.json") for key in s3.keys("mlflow-files"))


@pytest.fixture(scope="module")
def config(backend: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("store"), tracking__uri=backend, tracking__experiment="backends")


def test_stage_is_told_whole(config: RunConfig, tmp_path: Path) -> None:
    """Config, record, counts, data with its digest, versions, description: all of it can be read back."""
    parent = launch.open_run(config, "pipeline", kubeflow_run="k-1")
    prepared = launch.run_stage("prepare", config, {}, run_id=parent)

    tracking = Tracking(config)
    client, experiment = tracking.client, tracking.experiment_id()
    pipeline = client.get_run(parent)
    assert pipeline.data.params["prepare.group_key"] == "conversation"
    assert pipeline.data.tags["dpo.kubeflow_run"] == "k-1"
    assert pipeline.data.tags["dpo.data"] == prepared.record.inputs["data"]
    assert [each.dataset.name for each in pipeline.inputs.dataset_inputs] == ["pairs.jsonl"]
    [stage] = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert stage.info.status == "FINISHED"
    assert stage.data.metrics["count/records"] == 200
    assert stage.data.tags["dpo.digest"] == prepared.record.digest
    assert stage.data.tags["dpo.code_version"] == prepared.record.code_version
    assert {"dpo.seed", "dpo.version.torch", "mlflow.note.content"} <= stage.data.tags.keys()
    record = client.download_artifacts(stage.info.run_id, "record.json", str(tmp_path))
    assert json.loads(Path(record).read_text())["digest"] == prepared.record.digest


def test_point_sent_twice_is_stored_once(config: RunConfig, tmp_path: Path) -> None:
    """2500 points in requests of at most 1000, all again together with a new one: 2501."""
    tracking = Tracking(config)
    run_id = tracking.start_run("twice")
    points = [("loss", 1 / (step + 1), 1000 + step, step) for step in range(2500)]
    tracking.log_points(run_id, points)
    tracking.log_points(run_id, [*points, ("loss", 0.0, 9000, 2500)])

    found = tracking.client.get_metric_history(run_id, "loss")
    assert [point.step for point in found] == list(range(2501))


def test_run_can_be_told_more_after_its_end(config: RunConfig, tmp_path: Path) -> None:
    """What arrives late belongs to it as well, and it stays as it ended."""
    tracking = Tracking(config)
    run_id = tracking.start_run("late")
    tracking.end(run_id, "FAILED", "why", milliseconds=5000)
    late = RunLog.existing(tracking, tmp_path, run_id)
    late.numbers({"loss": 0.5})
    assert late.close() is None

    run = tracking.client.get_run(run_id)
    assert (run.info.status, run.info.end_time, run.data.metrics) == ("FAILED", 5000, {"loss": 0.5})


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks who one is, with an administrator and someone who may only read."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    from mlflow.server.auth.client import AuthServiceClient

    folder = tmp_path_factory.mktemp("guarded")
    variables = guarding(folder, ADMIN)
    with serving(folder, "--app-name", "basic-auth", variables=variables) as url:
        with pytest.MonkeyPatch.context() as patch:
            log_in(patch, ADMIN)
            AuthServiceClient(url).create_user(*READER)
            Tracking(tiny_config(folder, tracking__uri=url)).start_run("of the administrator")
        yield url


def log_in(patch: pytest.MonkeyPatch, who: tuple[str, str]) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", who[0])
    patch.setenv("MLFLOW_TRACKING_PASSWORD", who[1])


@pytest.mark.parametrize("who", [None, (READER[0], "not-the-password-of-the-reader")])
def test_missing_or_wrong_password_is_told_before_anything_starts(
    who: tuple[str, str] | None, guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the variables that would help; the password itself is in no message."""
    if who:
        log_in(monkeypatch, who)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as caught:
        launch.check_tracking(tiny_config(tmp_path, tracking__uri=guarded))
    assert "not-the-password" not in str(caught.value)


def test_who_may_only_read_is_told_before_the_stage_computes(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No output is begun, alone or below a pipeline's run, and no journal is left of what can never be sent."""
    log_in(monkeypatch, READER)
    config = tiny_config(tmp_path, tracking__uri=guarded)
    for parent in (None, "0" * 32):
        with pytest.raises(TrackingError, match=r"(?i)permission denied|403.*your rights there"):
            launch.run_stage("prepare", config, {}, run_id=parent)
    assert not (Path(config.store) / "prepare").exists()
    assert list((Path(config.store) / "unsent").glob("*.jsonl")) == []


def test_deleted_experiment_is_told_before_anything_starts(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with what to do."""
    log_in(monkeypatch, ADMIN)
    config = tiny_config(tmp_path, tracking__uri=guarded, tracking__experiment="gone")
    tracking = Tracking(config)
    tracking.client.delete_experiment(tracking.experiment_id())
    with pytest.raises(UserError, match=r"experiment 'gone' was deleted\. What to do: restore it"):
        launch.check_tracking(config)
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
