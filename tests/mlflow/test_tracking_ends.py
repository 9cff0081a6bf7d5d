"""How runs end: trials with times of their own, what MLflow will never take, and processes that were killed."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from dpo_train import launch
from dpo_train.artifacts import Artifact, Output, Record, Summary, produce
from dpo_train.config import RunConfig
from dpo_train.progress import Reporter
from dpo_train.stages.executor import InProcess
from dpo_train.stages.prepare import prepare
from dpo_train.stages.score_reference import score_reference
from dpo_train.tracking import RunLog, Tracking, send_left_behind
from dpo_train.tracking.journal import FOLDER
from dpo_train.tracking.stage import tracked
from tests.mlflow.test_outage import children, journals, points, steps
from tests.mlflow.test_promote import SPAWN, received
from tests.tiny import tiny_config

RECORD = Record(stage="train", digest="x", config={}, inputs={}, code_version="x")


@pytest.fixture
def config(server: str, tmp_path: Path, request: pytest.FixtureRequest) -> RunConfig:
    """An experiment for each test."""
    return tiny_config(tmp_path, tracking__uri=server, tracking__experiment=request.node.name)


def test_trial_has_its_own_times_and_its_curve(config: RunConfig, tmp_path: Path) -> None:
    """Two steps between 1000 and 3000 ms; a curve that was removed meanwhile costs the others nothing."""
    tracking = Tracking(config)
    home = tmp_path / "sweep" / "x"

    def body(out: Output) -> Summary:
        (out.path / "curve").mkdir()
        lines = "".join(json.dumps(line) + "\n" for line in steps(0, 1))
        (out.path / "curve" / "metrics.jsonl").write_text(lines)
        return Summary()

    produce("sweep", {}, {}, home, body)
    run = RunLog.start(tracking, tmp_path, "sweep", parent=None, tags={})
    for name, place in (("beta=1", home), ("beta=2", tmp_path / "gone")):
        curve = (str(place), "curve/metrics.jsonl")
        run.trial(name, parameters={}, metrics={"samples/kl": 2.0}, curve=curve, span=(1000, 3000))
    run.end("FINISHED")
    note = run.close()

    assert note is not None
    assert "trial: " in note
    assert "gone holds no output" in note
    trial = next(child for child in children(tracking, run.run_id) if child.info.run_name == "beta=1")
    assert (trial.info.start_time, trial.info.end_time) == (1000, 3000)
    assert points(tracking, trial.info.run_id) == [(1, 1.0, 2000), (2, 0.5, 3000)]
    assert tracking.client.get_run(run.run_id).info.status == "FINISHED"


def test_what_mlflow_will_never_take_does_not_hold_up_the_rest(config: RunConfig, tmp_path: Path) -> None:
    """One line of three has a name that MLflow forbids: it is left out and told, the run ends, and nothing waits."""
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    run.steps(steps(0), 1000)
    run.points([("what?", 1.0, 1000, 1)])
    run.steps(steps(1), 2000)
    run.output(Artifact(home=str(tmp_path / "gone"), record=RECORD))
    run.end("FINISHED")
    note = run.close()

    assert note is not None
    assert "MLflow did not take all of the run 'train': points: " in note
    assert "what?" in note
    assert "gone holds no output" in note
    found = tracking.client.get_run(run.run_id)
    assert points(tracking, run.run_id) == [(1, 1.0, 1000), (2, 0.5, 2000)]
    assert found.info.status == "FINISHED"
    assert "what?" in found.data.tags["dpo.refused"]
    assert journals(tmp_path) == []


def test_run_that_was_deleted_meanwhile_leaves_nothing_to_be_sent_for_ever(config: RunConfig, tmp_path: Path) -> None:
    """Whoever deletes it on MLflow's page does not want its rest."""
    tracking = Tracking(config)
    run = RunLog.start(tracking, tmp_path, "train", parent=None, tags={})
    run.steps(steps(0, 1, 2), 1000)
    tracking.client.delete_run(run.run_id)
    run.end("FINISHED")
    note = run.close()
    assert note is not None
    assert "did not take" in note
    assert journals(tmp_path) == []


def _die_at_work(config: RunConfig, folder: Path) -> None:
    run = RunLog.start(Tracking(config), folder, "train", parent=None, tags={})
    run.steps(steps(0), 1000)
    os.kill(os.getpid(), signal.SIGKILL)


def test_run_of_a_process_that_was_killed_is_ended_by_the_next_stage(config: RunConfig, tmp_path: Path) -> None:
    """KILLED when it was last heard of, with its last points and the reason; a damaged journal is told beside it."""
    process = SPAWN.Process(target=_die_at_work, args=(config, tmp_path))
    process.start()
    process.join()
    [journal] = journals(tmp_path)
    last = int(journal.stat().st_mtime * 1000)
    (tmp_path / FOLDER / "damaged.jsonl").write_bytes(b"\0" * 9)
    tracking = Tracking(config)
    [run] = tracking.client.search_runs([tracking.experiment_id()])
    assert run.info.status == "RUNNING"

    told = dict(send_left_behind(tracking, tmp_path))

    assert told["train"] is None
    assert "damaged.jsonl is damaged" in str(told["damaged"])
    run = tracking.client.get_run(run.info.run_id)
    assert (run.info.status, run.info.end_time) == ("KILLED", last)
    assert "ended without a word" in run.data.tags["dpo.error"]
    assert points(tracking, run.info.run_id) == [(1, 1.0, 1000)]


def _wait_at_work(config: RunConfig, events: Path, told: Connection) -> None:
    with tracked(config, Tracking(config), "train", None, events):
        Reporter(str(events), "train").message("at work")
        told.send("at work")
        signal.pause()


@pytest.mark.slow
def test_stage_that_is_terminated_says_so(config: RunConfig, tmp_path: Path) -> None:
    """SIGTERM, by which Kubernetes ends a task, is noted in MLflow before the process goes."""
    events = tmp_path / "events.jsonl"
    pipe = SPAWN.Pipe()
    process = SPAWN.Process(target=_wait_at_work, args=(config, events, pipe[1]))
    process.start()
    assert received(pipe[0]) == "at work"
    process.terminate()
    process.join()

    tracking = Tracking(config)
    [run] = tracking.client.search_runs([tracking.experiment_id()])
    assert run.info.status == "KILLED"
    assert run.data.tags["dpo.error"].startswith("KeyboardInterrupt")
    assert journals(Path(config.store)) == []


def test_password_of_the_address_gets_nowhere(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not to the terminal (MLflow would print it at the end of a run), the events, or what MLflow is told."""
    uri = str(config.tracking.uri).replace("//", "//me:hunter2@")
    config = replace(config, tracking=replace(config.tracking, uri=uri))
    events = tmp_path / "events.jsonl"
    monkeypatch.setenv("DPO_EVENTS", str(events))
    parent = launch.open_run(config, "secret")
    launch.run_stage("prepare", config, {}, run_id=parent)

    tracking = Tracking(config)
    [stage] = children(tracking, parent)
    said = capfd.readouterr()
    told = [said.out, said.err, events.read_text()]
    for run in (tracking.client.get_run(parent), stage):
        told += [*run.data.params.values(), *run.data.tags.values()]
        files = Path(tracking.client.download_artifacts(run.info.run_id, "", str(tmp_path))).rglob("*.json")
        told += [file.read_text() for file in files]
    assert not any("hunter2" in text for text in told)
    assert stage.info.status == "FINISHED"


@pytest.mark.slow
def test_trials_of_a_real_sweep_run_one_after_the_other(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: each takes some time, none begins before the sweep or before the one before it has ended."""
    config = replace(config, sweep=replace(config.sweep, betas=(0.1, 0.5, 1.0), max_steps=3, num_prompts=0))
    monkeypatch.setenv("DPO_EVENTS", str(tmp_path / "events.jsonl"))
    local = InProcess()
    scored = score_reference(config, prepare(config, local), local)
    parent = launch.open_run(config, "sweep")
    launch.run_stage("sweep", config, {"score_reference": scored}, run_id=parent)

    tracking = Tracking(config)
    [sweep] = children(tracking, parent)
    trials = [run.info for run in children(tracking, sweep.info.run_id)]
    spans = sorted((run.start_time, run.end_time) for run in trials)
    assert len(spans) == 3
    assert all(began < ended for began, ended in spans)
    times = [sweep.info.start_time, *(time for span in spans for time in span), sweep.info.end_time]
    assert times == sorted(times)
    assert {len(points(tracking, run.run_id)) for run in trials} == {3}
