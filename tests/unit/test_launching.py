"""A stage that runs elsewhere, as its caller sees it. The cluster is a launcher of the test's own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dpo_train.artifacts import Artifact
from dpo_train.cluster import job as jobs
from dpo_train.cluster.job import EVENT_MARK, Ended, Job
from dpo_train.config import RunConfig
from dpo_train.errors import ConfigError, DataError, RunError
from dpo_train.launch import run_stage
from dpo_train.launching import is_launched, launcher_of, run_elsewhere
from dpo_train.progress import ENVIRONMENT_KEY, Follower
from dpo_train.tracking import Tracking
from tests.tiny import tiny_config


@dataclass
class FakeLauncher:
    """Plays a cluster: prints lines, leaves a result, and says how it ended."""

    ended: Ended = field(default_factory=lambda: Ended(succeeded=True, reason="SUCCEEDED"))
    result: str | BaseException | None = None
    lines: tuple[str, ...] = ()
    during: Callable[[], None] = lambda: None
    job: Job | None = None

    def run(self, job: Job, *, tell: Callable[[str], None], line: Callable[[str], None]) -> Ended:
        self.job = job
        jobs.drop_result(job)
        tell("submitted")
        for each in self.lines:
            line(each)
        self.during()
        if self.result is not None:
            jobs.write_result(job, self.result)
        return self.ended


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An output that a job might have made."""
    return run_stage("prepare", tiny_config(tmp_path_factory.mktemp("made")), {})


def config(folder: Path) -> RunConfig:
    return tiny_config(folder, cluster__launcher="rayjob")


def folder_of(made: Artifact) -> Path:
    return Path(made.home).parents[2]


def elsewhere(one: RunConfig, launcher: FakeLauncher, *, run_id: str | None = None) -> Artifact:
    return run_elsewhere("prepare", one, {}, run_id=run_id, output=None, launcher=launcher)


def test_stages_are_launched_as_the_config_says(tmp_path: Path) -> None:
    """Registration never is."""
    assert is_launched("train", config(tmp_path))
    assert not is_launched("register", config(tmp_path))
    assert not is_launched("train", tiny_config(tmp_path))
    assert not is_launched("train", tiny_config(tmp_path, cluster__launcher="ray", cluster__stages=["evaluate"]))


def test_ray_without_an_address_is_a_mistake(tmp_path: Path) -> None:
    """It has no default."""
    with pytest.raises(ConfigError, match=r"needs the cluster's address.*cluster\.address"):
        launcher_of(tiny_config(tmp_path, cluster__launcher="ray"))


def test_output_is_what_the_job_says(made: Artifact) -> None:
    """By its address in the store."""
    found = elsewhere(config(folder_of(made)), FakeLauncher(result=made.address))

    assert found.home == made.home


def test_error_of_the_job_is_the_error_here(tmp_path: Path) -> None:
    """Whatever the cluster says of its end."""
    launcher = FakeLauncher(result=DataError("No pairs"), ended=Ended(succeeded=False, reason="FAILED"))

    with pytest.raises(DataError, match="No pairs"):
        elsewhere(config(tmp_path), launcher)


@pytest.mark.parametrize(
    ("result", "succeeded", "reason"),
    [(None, True, "SUCCEEDED"), (None, False, "OOMKilled"), ("prepare/0123456789abcdef", False, "STOPPED")],
)
def test_end_without_a_word_of_the_stage_is_a_failed_run(
    tmp_path: Path, result: str | None, succeeded: bool, reason: str
) -> None:
    """Success takes both: the cluster's word and the stage's."""
    launcher = FakeLauncher(result=result, ended=Ended(succeeded=succeeded, reason=reason))

    with pytest.raises(RunError, match=f"ended without a result. Got: {reason}"):
        elsewhere(config(tmp_path), launcher)


def test_events_of_the_job_are_events_here_and_the_rest_is_printed(
    made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also behind a progress bar that ended no line; what only looks like an event is a line."""
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "events.jsonl"))
    event = {"time": 1.0, "stage": "prepare", "kind": "progress", "done": 3, "total": 9, "unit": "MB", "metrics": {}}
    marked = EVENT_MARK + json.dumps(event)
    lines = ("a line", marked, f"50% |###{marked}", f"{EVENT_MARK}{{broken", f"{EVENT_MARK}[1]", "")

    elsewhere(config(folder_of(made)), FakeLauncher(result=made.address, lines=lines))

    shown = Follower(tmp_path / "events.jsonl").new()
    assert [found["kind"] for found in shown] == ["message", "progress", "progress"]
    assert shown[0]["text"] == "submitted"
    assert {key: shown[1][key] for key in ("stage", "done", "total")} == {"stage": "prepare", "done": 3, "total": 9}
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == ["a line", "50% |###", f"{EVENT_MARK}{{broken", f"{EVENT_MARK}[1]", ""]


def test_events_without_a_file_for_them_are_printed(
    made: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a notebook."""
    monkeypatch.delenv(ENVIRONMENT_KEY, raising=False)
    line = EVENT_MARK + json.dumps({"time": 1.0, "stage": "prepare", "kind": "message", "text": "half way"})

    elsewhere(config(folder_of(made)), FakeLauncher(result=made.address, lines=(line,)))

    assert 'prepare: {"kind": "message", "text": "half way"}' in capsys.readouterr().out.splitlines()


def test_termination_is_an_interrupt_while_a_job_is_waited_for(tmp_path: Path) -> None:
    """A task's pod is ended by SIGTERM, and its job must not go on alone; afterwards the handler is as before."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            elsewhere(config(tmp_path), FakeLauncher(during=lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_mlflow_does_not_show_a_lost_job_as_running(tmp_path: Path) -> None:
    """The job was killed and could not say so."""
    one = config(tmp_path)
    tracking = Tracking(one)
    run = tracking.start_pipeline("a run")

    with pytest.raises(RunError):
        elsewhere(one, FakeLauncher(ended=Ended(succeeded=False, reason="OOMKilled")), run_id=run)
    assert not tracking.is_running(run)
