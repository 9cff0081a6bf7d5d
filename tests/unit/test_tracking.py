"""MLflow runs and versions, on a real SQLite store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dpo_train.artifacts import Artifact, Record
from dpo_train.config import RunConfig
from dpo_train.progress import Reporter
from dpo_train.registry.versions import default_uri
from dpo_train.tracking import RunLog, Tracking, TrackingError, flatten, following, redacted, tracking_uri
from dpo_train.tracking.stage import data_of
from tests.tiny import tiny_config

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("tracking"), train__max_steps=2, register__model_name="tiny")


def test_default_store_needs_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SQLite in the store, unless the config or the environment says otherwise."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = tiny_config(tmp_path, tracking__uri=None)
    assert tracking_uri(config) == f"sqlite:///{config.store}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking_uri(config) == "http://127.0.0.1:1"
    assert tracking_uri(tiny_config(tmp_path, tracking__uri="sqlite:///x.db")) == "sqlite:///x.db"


def test_flatten_gives_dotted_text() -> None:
    """Parameters are text; text stays as it is."""
    assert flatten({"a": {"b": 1e-6, "c": "x"}, "d": None, "e": [1]}) == {
        "a.b": "1e-06",
        "a.c": "x",
        "d": "null",
        "e": "[1]",
    }


def test_steps_appear_while_the_stage_runs_and_once_each(config: RunConfig, tmp_path: Path) -> None:
    """What was followed live is not logged again at the end."""
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    events = tmp_path / "events.jsonl"
    reporter = Reporter(str(events), "train")
    reporter.progress(9, 10, "steps", loss=99.0)  # an earlier stage's
    with following(run, events, "train") as logged:
        reporter.progress(1, 3, "steps", loss=0.7)
        Reporter(reporter.path, "sweep").progress(2, 3, "steps", loss=5.0)
        reporter.progress(2, 3, "steps", loss=0.6)
    assert logged == {0, 1}

    history = [{"step": step, "loss": loss} for step, loss in enumerate((0.7, 0.6, 0.5))]
    run.steps([line for line in history if line["step"] not in logged])
    assert run.close() is None

    points = tracking.client.get_metric_history(run.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(1, 0.7), (2, 0.6), (3, 0.5)]


def test_raw_data_are_inputs_of_the_run(tmp_path: Path) -> None:
    """Each source by its name, with its address, kind and digest; equal names are told apart."""
    sources = [{"path": "s3://bucket/a.jsonl"}, {"path": "hf://org/name"}, {"path": str(tmp_path / "a.jsonl")}]
    config = tiny_config(tmp_path, prepare__path=None, prepare__group_key=None, prepare__sources=sources)
    inputs = {"data/0": "d0", "data/1": "d1", "data/2": "d2", "tokenizer": "t"}
    counts = {"records": 5, "used": 4, "rejected": 1}
    record = Record(stage="prepare", digest="x", config={}, inputs=inputs, code_version="x", counts=counts)
    tracking = Tracking(config)
    run_id = tracking.start_run("prepare")
    tracking.log_data(run_id, data_of(config, Artifact(home=str(tmp_path), record=record)))

    found = [entry.dataset for entry in tracking.client.get_run(run_id).inputs.dataset_inputs]
    assert sorted((d.name, d.source_type, json.loads(d.source)["uri"], d.digest) for d in found) == [
        ("a.jsonl (0)", "s3", "s3://bucket/a.jsonl", "d0"),
        ("a.jsonl (2)", "local", str(tmp_path / "a.jsonl"), "d2"),
        ("name", "hugging_face", "hf://org/name", "d1"),
    ]
    assert json.loads(found[0].profile) == counts


def test_deleted_experiment_is_explained(config: RunConfig, tmp_path: Path) -> None:
    """MLflow keeps a deleted experiment's name; the message says so."""
    other = tiny_config(tmp_path, tracking__uri=f"sqlite:///{tmp_path}/x.db", tracking__experiment="gone")
    tracking = Tracking(other)
    tracking.start_run("first")
    experiment = tracking.client.get_experiment_by_name("gone")
    tracking.client.delete_experiment(experiment.experiment_id)

    with pytest.raises(TrackingError, match="was deleted"):
        tracking.start_run("second")


def test_uri_that_makes_no_sense_is_the_users_mistake(tmp_path: Path) -> None:
    """No traceback of SQLAlchemy's."""
    with pytest.raises(TrackingError, match=r"tracking\.uri"):
        Tracking(tiny_config(tmp_path, tracking__uri="sqlite:////proc/nowhere/x.db")).start_run("x")


def test_password_in_the_uri_is_shown_and_recorded_nowhere() -> None:
    """Neither in messages nor in records."""
    assert redacted("postgresql://user:secret@host/db") == "postgresql://***@host/db"
    assert redacted("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_callers_mlflow_address_survives_a_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """log_model knows only MLflow's global address; the next run of this process must not inherit ours."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with default_uri("http://127.0.0.1:1"):
        assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:1"

    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_long_setting_is_a_file_of_the_run(config: RunConfig, tmp_path: Path) -> None:
    """MLflow refuses parameters of more than 6000 characters; nothing of them is cut off."""
    tracking = Tracking(config)
    run_id = tracking.start_run("x")
    tracking.log_parameters(run_id, {"short": "a" * 6000, "long": "b" * 6001})

    parameters = tracking.client.get_run(run_id).data.params
    assert parameters == {"short": "a" * 6000, "long": "see the artifact parameters/long.txt"}
    file = tracking.client.download_artifacts(run_id, "parameters/long.txt", str(tmp_path))
    assert Path(file).read_text() == "b" * 6001


def test_run_of_a_kubeflow_plugin_is_the_pipelines_and_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server and experiment are used whatever the config says; it gets the config, and is the plugin's to end."""
    plugin = tiny_config(tmp_path, tracking__uri=f"sqlite:///{tmp_path}/plugin.db", tracking__experiment="kubeflow")
    theirs = Tracking(plugin)
    run_id = theirs.start_run("from the plugin")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs.uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", theirs.experiment_id())
    ours = Tracking(tiny_config(tmp_path, tracking__uri=f"sqlite:///{tmp_path}/ours.db"))

    assert ours.start_pipeline("ignored", kubeflow_run="k-1") == run_id
    child = ours.start_run("train", parent=run_id)
    ours.end(run_id, "FINISHED")
    ours.end(child, "FINISHED")

    run = theirs.client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["dpo.kubeflow_run"] == "k-1"
    assert run.data.params["train.beta"] == "0.1"
    assert theirs.client.get_run(child).info.experiment_id == theirs.experiment_id()
    assert theirs.client.get_run(child).info.status == "FINISHED"
