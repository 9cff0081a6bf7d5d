"""MLflow runs and versions, on a real SQLite store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dpo_train.artifacts import Artifact, Record
from dpo_train.config import RunConfig
from dpo_train.describe import raw_data
from dpo_train.errors import GateRefusedError, NotLearnedError, StoreError
from dpo_train.progress import Reporter
from dpo_train.registry import check_verdict
from dpo_train.stages import register
from dpo_train.stages.executor import InProcess
from dpo_train.stages.prepare import prepare
from dpo_train.stages.score_reference import score_reference
from dpo_train.stages.train import train
from dpo_train.tracking import Tracking, TrackingError, flatten, redacted, tracking_uri
from tests.tiny import tiny_config

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("tracking"), train__max_steps=2, register__model_name="tiny")


@pytest.fixture(scope="module")
def policy(config: RunConfig) -> Artifact:
    local = InProcess()
    return train(config, score_reference(config, prepare(config, local), local), local)


def report(folder: Path, digest: str, policy_digest: str, *, learned: bool = True, passed: bool = True) -> Artifact:
    """A finished evaluation's artifact."""
    details = {"learned": learned, "passed": passed, "beta": 0.1}
    inputs = {"policy": policy_digest}
    record = Record(stage="evaluate", digest=digest, config={}, inputs=inputs, code_version="x", details=details)
    return Artifact(home=str(folder), record=record)


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
    run_id = tracking.start_run("train")
    events = tmp_path / "events.jsonl"
    reporter = Reporter(str(events), "train")
    reporter.progress(9, 10, "steps", loss=99.0)  # an earlier stage's
    with tracking.following(run_id, events, "train") as logged:
        reporter.progress(1, 3, "steps", loss=0.7)
        Reporter(reporter.path, "sweep").progress(2, 3, "steps", loss=5.0)
        reporter.progress(2, 3, "steps", loss=0.6)
    assert logged == {0, 1}

    history = [{"step": step, "loss": loss} for step, loss in enumerate((0.7, 0.6, 0.5))]
    tracking.log_history(run_id, [line for line in history if line["step"] not in logged], logged)

    points = tracking.client.get_metric_history(run_id, "loss")
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
    tracking.log_data(run_id, raw_data(config, Artifact(home=str(tmp_path), record=record)), counts)

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


@pytest.mark.parametrize(
    ("learned", "passed", "error"), [(False, False, NotLearnedError), (True, False, GateRefusedError)]
)
def test_only_a_passing_report_registers(learned: bool, passed: bool, error: type[Exception], tmp_path: Path) -> None:
    """Not learned is a failed run, refused is exit 3; each names the report."""
    with pytest.raises(error, match=r"report\.html"):
        check_verdict({"learned": learned, "passed": passed}, tmp_path / "report.html")


def test_same_result_is_registered_once_and_again_if_the_registry_lost_it(
    config: RunConfig, policy: Artifact, tmp_path: Path
) -> None:
    """One report, one version; another report, another; a record is believed only while the version exists."""
    tracking = Tracking(config)
    made = policy.record.digest

    first = register(config, policy, report(tmp_path, "d1", made), tracking)
    again = register(config, policy, report(tmp_path, "d1", made), tracking, output=tmp_path / "elsewhere")
    other = register(config, policy, report(tmp_path, "d2", made), tracking)

    assert [a.record.details["version"] for a in (first, again, other)] == ["1", "1", "2"]
    assert tracking.client.get_model_version_by_alias("tiny", "challenger").version == 2
    assert register(config, policy, report(tmp_path, "d1", made), tracking).reused
    tracking.client.delete_model_version("tiny", "1")
    made_again = register(config, policy, report(tmp_path, "d1", made), tracking)
    assert made_again.record.details["version"] == "3"
    assert json.loads((made_again.path / "version.json").read_text())["version"] == "3"


def test_report_about_another_policy_registers_nothing(config: RunConfig, policy: Artifact, tmp_path: Path) -> None:
    """A good report cannot be lent to another policy."""
    with pytest.raises(StoreError, match="was not made from"):
        register(config, policy, report(tmp_path, "d9", "another"), Tracking(config))


def test_password_in_the_uri_is_shown_and_recorded_nowhere() -> None:
    """Neither in messages nor in records."""
    assert redacted("postgresql://user:secret@host/db") == "postgresql://***@host/db"
    assert redacted("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_callers_mlflow_address_survives_a_registration(
    config: RunConfig, policy: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log_model knows only MLflow's global address; the next run of this process must not inherit ours."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    register(config, policy, report(tmp_path, "d3", policy.record.digest), Tracking(config))

    assert "MLFLOW_TRACKING_URI" not in os.environ
