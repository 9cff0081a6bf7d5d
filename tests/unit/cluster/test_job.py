"""A stage that runs elsewhere: what its folder holds, and the command that works by it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dpo_train import launch
from dpo_train.cli import job as command
from dpo_train.cluster import job as jobs
from dpo_train.cluster.job import EVENT_MARK, Job, job_for, may_stand, read_job, read_result, write_job, write_result
from dpo_train.config import RunConfig, parse_config
from dpo_train.errors import ConfigError, DataError, StoreError, WorkerError
from dpo_train.progress import ENVIRONMENT_KEY
from tests.tiny import tiny_config


def config(folder: Path, *overrides: str) -> RunConfig:
    tree = {"store": str(folder / "store"), "model": {"path": str(folder)}, "prepare": {"path": str(folder)}}
    return parse_config(json.dumps(tree), ["cluster.launcher=rayjob", *overrides], origin="the test")


def test_same_question_has_the_same_name_and_another_has_another(tmp_path: Path) -> None:
    """By stage, config, inputs and run: a caller that was restarted finds its job."""
    one = config(tmp_path)
    named = [
        job_for("score_reference", one, {"prepare": "prepare/a"}, run_id="r"),
        job_for("score_reference", one, {"prepare": "prepare/b"}, run_id="r"),
        job_for("score_reference", one, {"prepare": "prepare/a"}, run_id="s"),
        job_for("score_reference", config(tmp_path, "seed=1"), {"prepare": "prepare/a"}, run_id="r"),
        job_for("train", one, {"prepare": "prepare/a"}, run_id="r"),
    ]

    again = job_for("score_reference", config(tmp_path), {"prepare": "prepare/a"}, run_id="r")

    assert again == named[0]
    assert len({job.name for job in named}) == 5
    assert named[0].name.startswith("dpo-score-reference-")


def test_job_reads_back_as_it_was_written(tmp_path: Path) -> None:
    """It launches nothing itself, and works on the Ray that it stands on."""
    job = job_for("train", config(tmp_path), {"prepare": "prepare/a"}, run_id="r", output="/elsewhere")
    write_job(job)

    found = read_job(job.folder)

    assert found == job
    assert found.config.cluster.launcher == "none"
    assert found.config.compute.executor == "ray"


def test_folder_without_a_job_says_what_is_missing(tmp_path: Path) -> None:
    """Most likely, this machine does not see the store of the other."""
    with pytest.raises(StoreError, match=r"There is no job.json.*every node has at the same path"):
        read_job(str(tmp_path / "store" / "jobs" / "dpo-train-0"))


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (2, "cuda")])
def test_device_of_a_rayjob_is_that_of_its_workers(tmp_path: Path, gpus: int, device: str) -> None:
    """The head drives the job and has no GPU: looked for there, training would be on CPUs."""
    job = job_for("train", config(tmp_path, f"cluster.workers.gpus={gpus}"), {})

    assert job.config.compute.device == device
    assert job_for("train", config(tmp_path, "compute.device=cpu"), {}).config.compute.device == "cpu"


def test_job_speaks_to_the_mlflow_of_its_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment's address as well; a login in it stays where it is."""
    assert job_for("train", config(tmp_path), {}).config.tracking.uri == f"sqlite:///{tmp_path}/store/mlflow.db"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert job_for("train", config(tmp_path), {}).config.tracking.uri == "http://mlflow:5000"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    assert job_for("train", config(tmp_path), {}).config.tracking.uri is None


def test_login_in_the_configs_mlflow_address_is_refused(tmp_path: Path) -> None:
    """The job's file lies in the store."""
    with pytest.raises(ConfigError, match=r"tracking.uri holds a login") as caught:
        job_for("train", config(tmp_path, "tracking.uri=http://me:hunter2@mlflow:5000"), {})
    assert "hunter2" not in str(caught.value)


def test_result_stands_within_its_run_alone(tmp_path: Path) -> None:
    """Outside of a run nobody knows whether the raw data are the same."""
    alone, in_run = (job_for("prepare", config(tmp_path), {}, run_id=run) for run in (None, "r"))
    assert not may_stand(in_run)
    for job in (alone, in_run):
        write_result(job, "prepare/a")

    assert may_stand(in_run)
    assert not may_stand(alone)
    write_result(in_run, DataError("no pairs"))
    assert not may_stand(in_run)


def test_error_comes_back_as_it_was_raised(tmp_path: Path) -> None:
    """An error of ours with its kind and words, another as a WorkerError that names it."""
    job = job_for("prepare", config(tmp_path), {})
    for raised, kind, words in (
        (DataError("No pairs", fix="bring some"), DataError, "No pairs. What to do: bring some."),
        (KeyError("x"), WorkerError, "KeyError: 'x'."),
    ):
        write_result(job, raised)
        result = read_result(job)
        assert result is not None
        error = jobs.error_of(result)
        assert type(error) is kind
        assert str(error) == words

    jobs.drop_result(job)
    jobs.drop_result(job)
    assert read_result(job) is None


def local_job(folder: Path, stage: str = "prepare", **overrides: Any) -> Job:
    """A job that works in this process: Ray's part is in tests/ray/test_launch.py."""
    job = job_for(stage, tiny_config(folder, **overrides), {})
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, compute=tiny_config(folder).compute))
    write_job(job)
    return job


def run(job: Job) -> int:
    return command.job(argparse.Namespace(folder=job.folder))


def test_command_makes_the_output_and_prints_its_events(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each event is a line with the mark; a second time the output is reused, and the result is the same."""
    job = local_job(tmp_path)

    assert run(job) == 0

    lines = capfd.readouterr().out.splitlines()
    events = [json.loads(line.removeprefix(EVENT_MARK)) for line in lines if line.startswith(EVENT_MARK)]
    assert [events[0]["kind"], events[-1]["kind"]] == ["start", "end"]
    first = read_result(job)
    assert first is not None
    assert first.address == events[-1]["address"]
    assert launch.stored(job.config, str(first.address)).record.stage == "prepare"
    assert ENVIRONMENT_KEY not in os.environ

    assert run(job) == 0
    assert read_result(job) == first
    assert '"reused": true' in capfd.readouterr().out


def test_mistake_of_the_user_is_the_result_and_the_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In the stage's own words, without a traceback."""
    job = local_job(tmp_path, prepare__path=str(tmp_path / "absent.jsonl"))

    assert run(job) == 2

    result = read_result(job)
    assert result is not None
    assert "absent.jsonl" in str(jobs.error_of(result))
    printed = capfd.readouterr()
    assert f"dpo: {jobs.error_of(result)}" in printed.out
    assert "Traceback" not in printed.out + printed.err


def test_unknown_error_is_the_result_and_shows_its_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a bug, and the job's log is where to look for it."""
    job = local_job(tmp_path)
    monkeypatch.setattr(launch, "run_stage", _broken)

    assert run(job) == 1

    result = read_result(job)
    assert result is not None
    assert str(jobs.error_of(result)) == "ZeroDivisionError: division by zero."
    assert "Traceback" in capfd.readouterr().err


def test_interrupt_leaves_no_result_and_drops_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster says that the job was stopped; a result would be the stage's own word."""
    job = local_job(tmp_path)
    write_result(job, DataError("of an attempt before"))
    monkeypatch.setattr(launch, "run_stage", _interrupted)

    assert run(job) == 130
    assert read_result(job) is None


def _broken(*args: Any, **more: Any) -> None:
    del args, more
    _ = 1 / 0


def _interrupted(*args: Any, **more: Any) -> None:
    del args, more
    raise KeyboardInterrupt
