"""What requests do to the runs of an experiment, on a real SQLite store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_train.artifacts import Artifact, Record
from dpo_train.config import RunConfig
from dpo_train.tracking import Tracking, TrackingError
from tests.tiny import tiny_config

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("experiment"))


@pytest.fixture
def tracking(config: RunConfig) -> Tracking:
    return Tracking(config)


def test_end_that_is_told_late_does_not_undo_a_later_one(tracking: Tracking) -> None:
    """A failure at 1000 ms that waited in a journal comes after the success at 2000 ms of the next attempt."""
    run_id = tracking.start_run("train")
    tracking.end(run_id, "FINISHED", milliseconds=2000)
    tracking.end(run_id, "FAILED", "away", milliseconds=1000)
    run = tracking.client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", 2000)
    assert "dpo.error" not in run.data.tags


def test_success_of_a_second_attempt_takes_the_error_away(tracking: Tracking) -> None:
    """What stands beside a finished run is no reason for anything."""
    run_id = tracking.start_run("pipeline")
    tracking.end(run_id, "FAILED", "no space left", milliseconds=1000)
    assert tracking.client.get_run(run_id).data.tags["dpo.error"] == "no space left"
    tracking.end(run_id, "FINISHED", milliseconds=2000)
    run = tracking.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "dpo.error" not in run.data.tags


def test_attempt_that_was_lost_is_ended_by_the_next(tracking: Tracking) -> None:
    """Of the same stage below the same pipeline; other stages' runs, and other pipelines', stay open."""
    pipeline, other = tracking.start_run("pipeline"), tracking.start_run("pipeline")
    lost, evaluate = (
        tracking.start_run(stage, parent=pipeline, tags={"dpo.stage": stage}) for stage in ("train", "evaluate")
    )
    theirs = tracking.start_run("train", parent=other, tags={"dpo.stage": "train"})
    again = tracking.start_run("train", parent=pipeline, tags={"dpo.stage": "train"})

    tracking.end_lost(pipeline, "train", again)

    run = tracking.client.get_run(lost)
    assert run.info.status == "KILLED"
    assert again in run.data.tags["dpo.error"]
    assert {tracking.client.get_run(one).info.status for one in (evaluate, theirs, again)} == {"RUNNING"}


def test_secrets_of_a_config_are_recorded_nowhere(config: RunConfig, tmp_path: Path) -> None:
    """Neither in parameters, nor in files, nor in the reason of a failure."""
    judge = {"kind": "endpoint", "url": "https://me:hunter2@judge.example/v1", "model": "m"}
    here = tiny_config(Path(config.store).parent, evaluate__judge=judge)
    here = replace(here, storage=replace(here.storage, endpoint="http://me:hunter2@s3.example"))
    tracking = Tracking(here)
    run_id = tracking.start_pipeline("secrets")
    record = Record(stage="evaluate", digest="x", config={"judge": judge}, inputs={}, code_version="x")
    stage = tracking.start_run("evaluate", parent=run_id)
    tracking.log_artifact(stage, Artifact(home=str(tmp_path / "x"), record=record))
    tracking.end(stage, "FAILED", "https://me:hunter2@judge.example/v1 does not answer")

    for one in (run_id, stage):
        run = tracking.client.get_run(one)
        told = [*run.data.params.values(), *run.data.tags.values()]
        files = Path(tracking.client.download_artifacts(one, "", str(tmp_path))).rglob("*.json")
        told += [file.read_text() for file in files]
        assert any("judge.example" in text for text in told)
        assert not any("hunter2" in text for text in told)


def test_plugin_that_names_no_experiment_is_asked_for_its_runs(
    config: RunConfig, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run below another must lie in the same experiment, or no page shows it there."""
    other = Tracking(replace(config, tracking=replace(config.tracking, experiment="plugin")))
    run_id = other.start_run("from the plugin")
    expected = other.experiment_id()
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    child = tracking.start_run("train", parent=run_id)
    assert tracking.client.get_run(child).info.experiment_id == expected


def test_pipeline_is_the_plugins_run_and_not_that_of_the_task(
    config: RunConfig, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin opens a run for each task below the pipeline's, and ends the task's with the task."""
    pipeline = tracking.start_run("from the plugin")
    tasks = [tracking.start_run("resolve", parent=pipeline), tracking.start_run("notify", parent=pipeline)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", tasks[0])

    assert tracking.start_pipeline("dpo", kubeflow_run="k-1") == pipeline
    monkeypatch.setenv("MLFLOW_RUN_ID", tasks[1])
    assert Tracking(config).plugin_run() == pipeline
    assert tracking.find_child(None, "dpo.kubeflow_run", "k-1") == pipeline


def test_plugins_run_that_was_deleted_is_told_before_anything_starts(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id, with what to do; one that there never was as well."""
    run_id = tracking.start_run("from the plugin")
    tracking.client.delete_run(run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with pytest.raises(TrackingError, match=rf"{run_id} was deleted.*unset MLFLOW_RUN_ID"):
        tracking.check()
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match=r"not found"):
        tracking.check()
