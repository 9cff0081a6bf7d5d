"""A real MLflow server behind a real proxy that refuses, stalls, fails or loses answers: no metric is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from dpo_train import launch
from dpo_train.config import RunConfig
from dpo_train.stages.executor import InProcess
from dpo_train.stages.prepare import prepare
from dpo_train.stages.register import register
from dpo_train.stages.score_reference import score_reference
from dpo_train.tracking import AwayError, RunLog, Tracking, TrackingError, run_log, send_left_behind
from dpo_train.tracking.journal import FOLDER
from tests.mlflow.made import made_policy, made_report
from tests.s3.proxy import Kind, Proxy
from tests.tiny import tiny_config

LOG, CREATE = r"runs/log-batch", r"runs/create"


@pytest.fixture
def config(proxy: Proxy, tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path, tracking__uri=proxy.endpoint, tracking__experiment="outages")


def steps(*numbers: int) -> list[dict[str, float]]:
    return [{"step": n, "loss": 1 / (n + 1)} for n in numbers]


def points(tracking: Tracking, run_id: str | None, name: str = "loss") -> list[tuple[int, float, int]]:
    """Step, value and time of a curve, as the server has it."""
    return [(p.step, p.value, p.timestamp) for p in tracking.client.get_metric_history(run_id, name)]


def journals(folder: Path) -> list[Path]:
    return list((folder / FOLDER).glob("*.jsonl"))


@pytest.mark.parametrize("kind", ["internal_error", "slow_down", "refuse", "stall", "lost_answer", "truncate"])
def test_points_of_an_outage_arrive_later_in_order_once(
    kind: Kind, config: RunConfig, proxy: Proxy, tmp_path: Path
) -> None:
    """Steps 0 and 1 before it, 2 and 3 in it, 4 after it: five points with the times at which they were made."""
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    run.steps(steps(0, 1), 1000)
    assert run.send_points()
    proxy.fault("POST", LOG, kind)
    run.steps(steps(2, 3), 2000)
    assert not run.send_points()
    assert isinstance(run.problem, AwayError)
    proxy.clear()
    run.steps(steps(4), 3000)
    run.end("FINISHED")
    assert run.close() is None

    expected = [(1, 1.0, 1000), (2, 0.5, 1000), (3, 1 / 3, 2000), (4, 0.25, 2000), (5, 0.2, 3000)]
    assert points(tracking, run.run_id) == expected
    assert journals(tmp_path) == []


def test_server_that_never_comes_back_leaves_a_journal_that_is_sent_on_request(
    config: RunConfig, proxy: Proxy, tmp_path: Path
) -> None:
    """The note names the file and the command; sent later, the run ended when it ended. A second time sends nothing."""
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    proxy.fault("*", ".", "refuse")
    run.steps(steps(0), 1000)
    run.tags({"dpo.beta": "0.1"})
    run.end("FAILED", ValueError("no"))
    note = run.close()
    [journal] = journals(tmp_path)
    assert note is not None
    assert str(journal) in note
    assert "dpo runs CONFIG --send" in note
    [(name, problem)] = send_left_behind(tracking, tmp_path)
    assert (name, type(problem)) == ("train", AwayError)

    proxy.clear()
    assert send_left_behind(tracking, tmp_path) == [("train", None)]
    assert send_left_behind(tracking, tmp_path) == []
    found = tracking.client.get_run(run.run_id)
    assert points(tracking, run.run_id) == [(1, 1.0, 1000)]
    assert (found.info.status, found.data.tags["dpo.error"]) == ("FAILED", "ValueError: no")
    assert found.data.tags["dpo.beta"] == "0.1"


def children(tracking: Tracking, parent: str | None) -> list[Any]:
    below = f"tags.`mlflow.parentRunId` = '{parent}'"
    return list(tracking.client.search_runs([tracking.experiment_id()], below))


def test_run_that_could_not_be_created_is_created_later(config: RunConfig, proxy: Proxy, tmp_path: Path) -> None:
    """Below a pipeline's run the stage goes on."""
    tracking = Tracking(config)
    parent = tracking.start_run("pipeline")
    proxy.fault("POST", CREATE, "refuse")
    run = RunLog.start(tracking, tmp_path, "train", parent=parent, tags={})
    assert run.run_id is None
    run.steps(steps(0), 1000)
    proxy.clear()
    assert run.close() is None

    [child] = children(tracking, parent)
    assert child.info.run_id == run.run_id
    assert points(tracking, run.run_id) == [(1, 1.0, 1000)]


def test_run_whose_creation_was_not_answered_is_there_once(
    config: RunConfig, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client, which would send the request again as often as the environment says, must not."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    tracking = Tracking(config)
    parent = tracking.start_run("pipeline")
    proxy.fault("POST", CREATE, "lost_answer", times=1)
    run = RunLog.start(tracking, tmp_path, "train", parent=parent, tags={})
    run.trial("beta=1", parameters={}, metrics={})
    proxy.fault("POST", CREATE, "lost_answer", times=1)
    assert run.close() is None

    [child] = children(tracking, parent)
    assert child.info.run_id == run.run_id
    assert len(children(tracking, run.run_id)) == 1


def test_experiment_of_two_first_runs_is_one(config: RunConfig, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to create it is told that it is there, and takes it; so does one whose answer was lost."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    tracking = Tracking(replace(config, tracking=replace(config.tracking, experiment="of two")))
    proxy.fault("POST", r"experiments/create", "lost_answer", times=1)
    assert tracking.experiment_id() == tracking.client.get_experiment_by_name("of two").experiment_id
    assert proxy.count("POST", r"experiments/create", "lost_answer") == 1


def test_stage_that_stands_alone_does_not_begin_without_mlflow(config: RunConfig, proxy: Proxy, tmp_path: Path) -> None:
    """Before anything is computed, and without a journal of nothing."""
    tracking = Tracking(config)
    proxy.fault("POST", CREATE, "internal_error")
    with pytest.raises(AwayError, match=f"MLflow at {proxy.endpoint}"):
        RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    assert journals(tmp_path) == []


def test_trial_is_a_run_of_its_own_once(config: RunConfig, proxy: Proxy, tmp_path: Path) -> None:
    """Sent again after its end was lost, it is the same run; why it failed stands there."""
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "sweep", parent=None, tags={})
    proxy.fault("POST", r"runs/update", "lost_answer", times=1)
    run.trial("beta=1", parameters={"train.beta": "1"}, metrics={"samples/kl": 2.0}, failure="it diverged")
    assert not run.send()
    assert run.close() is None

    [trial] = tracking.client.search_runs([tracking.experiment_id()], f"tags.`mlflow.parentRunId` = '{run.run_id}'")
    assert (trial.info.run_name, trial.info.status) == ("beta=1", "FAILED")
    assert trial.data.params == {"train.beta": "1"}
    assert trial.data.metrics == {"samples/kl": 2.0}
    assert trial.data.tags["dpo.error"] == "it diverged"


def test_glitch_at_the_very_end_leaves_nothing_behind(
    config: RunConfig, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the last points any more, so that they are tried as often as everything else."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    run.steps(steps(0), 1000)
    proxy.fault("POST", LOG, "slow_down", times=1)
    assert run.close() is None
    assert proxy.count("POST", LOG, "slow_down") == 1
    assert points(tracking, run.run_id) == [(1, 1.0, 1000)]
    assert journals(tmp_path) == []


def test_slow_server_does_not_hold_up_the_end(
    config: RunConfig, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not gone out in time waits for the next stage."""
    monkeypatch.setattr(run_log, "CLOSE_SECONDS", 0.0)
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    run.steps(steps(0), 1000)
    run.end("FINISHED")
    note = run.close()
    assert note is not None
    assert "too slow to take everything within 0 s" in note

    assert send_left_behind(tracking, tmp_path) == [("train", None)]
    assert tracking.client.get_run(run.run_id).info.status == "FINISHED"


def test_outage_of_many_steps_is_made_up_in_few_requests(config: RunConfig, proxy: Proxy, tmp_path: Path) -> None:
    """120 steps of 20 points: requests of up to 50 lines, and of at most 1000 points."""
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    run.steps([{"step": step, **{f"m/{n}": 0.5 for n in range(20)}} for step in range(120)], 1000)
    assert run.close() is None
    assert proxy.count("POST", LOG) == 3
    assert [step for step, _, _ in points(tracking, run.run_id, "m/0")] == list(range(1, 121))


@pytest.mark.slow
def test_training_goes_on_through_an_outage_and_loses_no_step(
    config: RunConfig, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 from the first point to the end: the stage succeeds and says what waits; the next stage sends it."""
    events = tmp_path / "events.jsonl"
    monkeypatch.setenv("DPO_EVENTS", str(events))
    local = InProcess()
    scored = score_reference(config, prepare(config, local), local)
    parent = launch.open_run(config, "outage")
    proxy.fault("POST", LOG, "internal_error")
    policy = launch.run_stage("train", config, {"score_reference": scored}, run_id=parent)

    said = [event["text"] for event in map(json.loads, events.read_text().splitlines()) if event["kind"] == "message"]
    assert any("dpo runs CONFIG --send" in text for text in said), said
    tracking = Tracking(config)
    [run] = tracking.client.search_runs([tracking.experiment_id()], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert run.data.metrics == {}

    proxy.clear()
    launch.run_stage("prepare", config, {}, run_id=parent)
    history = [json.loads(line) for line in policy.file("metrics.jsonl").read_text().splitlines()]
    assert [(step, value) for step, value, _ in points(tracking, run.info.run_id)] == [
        (line["step"] + 1, line["loss"]) for line in history
    ]
    run = tracking.client.get_run(run.info.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["dpo.output"] == policy.home
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    assert tracking.client.get_run(parent).data.metrics["chosen/beta"] == 0.1


def test_version_that_was_made_twice_is_the_first(config: RunConfig, proxy: Proxy) -> None:
    """The answer to its creation was lost, and the request was sent again: alias and later calls mean version 1."""
    config = replace(config, register=replace(config.register, model_name="made-twice"))
    policy = made_policy(config)
    tracking = Tracking(config)
    tracking.check()  # makes the experiment, if it is not there yet
    proxy.fault("POST", r"model-versions/create", "lost_answer", times=1)

    made = register(config, policy, made_report(config, policy), tracking)

    versions = {v.version: v for v in tracking.client.search_model_versions("name = 'made-twice'")}
    assert versions.keys() == {"1", "2"}
    assert made.record.details["version"] == "1"
    assert versions["1"].description.startswith("held-out accuracy 0.900")
    assert tracking.client.get_registered_model("made-twice").aliases == {"challenger": "1"}


def test_registration_needs_the_server_and_says_so(config: RunConfig, proxy: Proxy) -> None:
    """Nothing is registered in silence: the stage fails, with the address."""
    config = replace(config, register=replace(config.register, model_name="away"))
    policy = made_policy(config)
    inputs = {"train": policy, "evaluate": made_report(config, policy)}
    parent = launch.open_run(config, "outage")
    proxy.fault("*", ".", "refuse")
    with pytest.raises(TrackingError, match=f"MLflow at {proxy.endpoint} does not do what was asked"):
        launch.run_stage("register", config, inputs, run_id=parent)

    proxy.clear()
    tracking: Any = Tracking(config)
    assert {problem for _, problem in send_left_behind(tracking, Path(config.store))} == {None}
    assert tracking.client.get_run(parent).info.status == "FAILED"
