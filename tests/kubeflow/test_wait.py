"""`dpo submit --wait`: the steps as they come, and an exit code that says what came of the run."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_train.cluster.kubeflow import following
from dpo_train.cluster.kubeflow.following import Patience
from tests.kubeflow.argo import Play
from tests.kubeflow.commands import PROCESS, dpo, write_config
from tests.kubeflow.scenes import STEPS, stage, whole
from tests.kubeflow.server import Server

Capture = pytest.CaptureFixture[str]


def test_steps_are_told_as_they_come(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """One line for each change, in order, and at the end what was registered."""
    stage(server, whole('dpo-outcome {"outcome": "registered", "why": "dpo version 7"}\n'))

    code, out, err = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert (code, err) == (0, "")
    told = [line.split()[1:3] for line in out.splitlines() if line[2:3] == ":"]
    steps = [pair for step in STEPS for pair in ([step, "running"], [step, "succeeded"])]
    assert [pair for pair in told if pair[0] in STEPS] == steps
    assert [pair for pair in told if pair[0] == "run"] == [["run", "running"], ["run", "succeeded"]]
    assert out.splitlines()[-1] == "dpo version 7"


def test_failed_step_shows_its_last_lines(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Exit code 1, with the step, Kubeflow's words and the end of the step's log."""

    def scene(play: Play) -> Iterator[None]:
        play.succeed("resolve")
        yield
        play.fail("prepare", "".join(f"line {number}\n" for number in range(100)), "exit code 1")
        play.end("FAILED")
        yield

    stage(server, scene)

    code, out, err = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 1
    assert "failed in prepare. Got: exit code 1." in err
    lines = out.splitlines()
    assert lines[lines.index("the last lines of prepare:") + 1] == "  line 80"
    assert lines[-1] == "  line 99"
    told = [line.split()[1:3] for line in lines if line[2:3] == ":"]
    assert ["train", "skipped"] in told


def test_failed_driver_is_the_steps_failure(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Kubeflow's own container before the step's: an image that cannot be pulled, a Secret that is missing."""

    def scene(play: Play) -> Iterator[None]:
        play.succeed("resolve")
        play.fail_driver("prepare", "driver: no such secret\n")
        play.end("FAILED")
        yield

    stage(server, scene)

    code, out, err = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 1
    assert "failed in prepare" in err
    assert "driver failed" in err
    assert "  driver: no such secret" in out.splitlines()


def test_canceled_run_is_exit_code_one(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Somebody ended it in Kubeflow's page."""

    def scene(play: Play) -> Iterator[None]:
        play.end("CANCELED")
        yield

    stage(server, scene)

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 1
    assert "without a result. Got: canceled." in err


def test_server_that_goes_away_is_waited_for(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Cut connections and a gateway's 502 are told once, and the end of it; the run is followed to its end."""
    server.fail("/runs/", "cut", times=4)
    server.fail("/runs/", "status", status=502, times=4)
    stage(server, whole('dpo-outcome {"outcome": "registered", "why": "dpo version 7"}\n'))

    code, out, _ = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 0
    assert out.count("The run does not depend on this; asking on.") == 1
    assert out.count("Kubeflow answers again") == 1


def test_server_that_stays_away(
    server: Server, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `away_seconds` the command ends, and says that the run may go on."""
    monkeypatch.setattr(following, "PATIENCE", Patience(first_seconds=0.01, last_seconds=0.01, away_seconds=0.05))
    server.fail("/runs/", "cut", times=10**6)

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 1
    assert "the run may go on" in err


def test_login_that_expires_meanwhile(
    server: Server, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No waiting helps: it is said at once, and that the run goes on, and how to wait on. Nothing given was wrong."""
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "valid")

    def scene(play: Play) -> Iterator[None]:
        play.start("resolve")
        yield
        server.state.token = "another"
        yield

    stage(server, scene)

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    (run_id,) = server.state.runs
    assert code == 1
    assert f"The run {run_id} goes on" in err
    assert "does not know who asks" in err
    assert f"`dpo submit CONFIG --attach {run_id}` waits on" in err
    assert f"{server.url}/#/runs/details/{run_id}" in err


def test_run_that_is_deleted_meanwhile(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """It was started, and nobody can wait for it any more."""

    def scene(play: Play) -> Iterator[None]:
        play.start("resolve")
        yield
        server.state.runs.clear()
        yield

    stage(server, scene)

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 1
    assert "was deleted in Kubeflow while it was waited for" in err


def test_waiting_for_a_run_that_is_there(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """--attach follows it by the steps of its own pipeline, and starts nothing."""
    config = write_config(tmp_path, server)
    dpo(capsys, "submit", config, "--name", "mine")
    before = server.changes()
    stage(server, whole('dpo-outcome {"outcome": "refused", "why": "accuracy 0.4 is below 0.5"}\n'))

    code, out, err = dpo(capsys, "submit", config, "--attach", "mine")

    assert (code, err) == (3, "")
    assert f"{server.url}/#/runs/details/{next(iter(server.state.runs))}" in out.splitlines()
    assert out.splitlines()[-1] == "Refused. accuracy 0.4 is below 0.5"
    assert server.changes() == before


@pytest.mark.parametrize("run", ["", "another"])
def test_waiting_for_a_run_that_is_not_there(run: str, server: Server, tmp_path: Path, capsys: Capture) -> None:
    """The one run that is there is not meant by a variable that is not set."""
    config = write_config(tmp_path, server)
    dpo(capsys, "submit", config)

    code, _, err = dpo(capsys, "submit", config, "--attach", run)

    assert code == 2
    assert f"Kubeflow has no run {run!r}" in err


def test_options_of_a_submission_mean_nothing_to_a_run_that_is_there(
    server: Server, tmp_path: Path, capsys: Capture
) -> None:
    """What has no effect is a mistake."""
    code, _, err = dpo(
        capsys, "submit", write_config(tmp_path, server), "--attach", "mine", "--name", "a", "--image", "dpo:1"
    )

    assert code == 2
    assert "--name, --image has no effect here" in err
    assert server.requests == []


def test_interrupt_leaves_the_run_alone(server: Server, tmp_path: Path) -> None:
    """Ctrl-C ends the waiting with 130, and the command that would end the run is shown."""

    def scene(play: Play) -> Iterator[None]:
        play.start("resolve")
        while True:
            yield

    stage(server, scene)
    config = write_config(tmp_path, server)
    process = subprocess.Popen(
        [*PROCESS, "submit", str(config), "--wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "resolve" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)

    (run_id,) = server.state.runs
    assert process.returncode == 130
    assert f"the run goes on, and `dpo cancel {config} {run_id}` ends it" in err
    assert f"`dpo submit {config} --attach {run_id}` waits on" in err
    assert server.state.runs[run_id]["state"] == "RUNNING"
    assert not any("terminate" in change for change in server.changes())


def test_terminal_shows_a_table(server: Server, tmp_path: Path) -> None:
    """Under a terminal the steps stand in one table that is drawn again."""

    def scene(play: Play) -> Iterator[None]:
        play.start("score-reference")
        yield
        play.succeed("register", 'dpo-outcome {"outcome": "registered", "why": "dpo version 7"}\n')
        play.end("SUCCEEDED")
        yield

    stage(server, scene)
    config = write_config(tmp_path, server)
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [*PROCESS, "submit", str(config), "--wait"],
        stdout=theirs,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)

    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert "\x1b[" in text
    assert "score-reference" in text
    assert "dpo version 7" in text
