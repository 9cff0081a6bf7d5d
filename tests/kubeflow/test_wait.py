"""`dpo submit --wait`: the steps as they come, and an exit code that says what came of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_train.cluster.kubeflow import following
from dpo_train.cluster.kubeflow.following import Patience
from tests.kubeflow.argo import Play
from tests.kubeflow.commands import dpo, write_config
from tests.kubeflow.server import Server

Capture = pytest.CaptureFixture[str]
Scene = Callable[[Play], Iterator[None]]
STEPS = ("resolve", "prepare", "sft", "score-reference", "sweep", "train", "evaluate", "register")


def stage(server: Server, scene: Scene) -> None:
    """Lets the only run go on by one `yield` of the scene whenever it is asked for."""
    lock, scenes = threading.Lock(), []

    def act() -> None:
        with lock:
            if not scenes:
                (run_id,) = server.state.runs
                scenes.append(scene(Play(server.state, run_id)))
            next(scenes[0], None)

    server.before("/apis/v2beta1/runs/[^/:]+", act)


def whole(outcome: str) -> Scene:
    """Everything succeeds, and the last step prints what came of it."""

    def scene(play: Play) -> Iterator[None]:
        for step in STEPS:
            play.start(step)
            yield
            play.succeed(step, outcome if step == "register" else "")
            yield
        play.end("SUCCEEDED")
        yield

    return scene


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


def test_refusing_gate_is_exit_code_three(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """To Kubeflow the run has succeeded; the step's log says what the gate said."""
    stage(server, whole('words\ndpo-outcome {"outcome": "refused", "why": "accuracy 0.4 is below 0.5"}\nmore words\n'))

    code, out, _ = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 3
    assert out.splitlines()[-1] == "Refused. accuracy 0.4 is below 0.5"


def test_refusing_gate_is_seen_in_mlflow(
    server: Server, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where MLflow answers here, the tags of the run that Kubeflow's id is noted in count, and no log is read."""
    from dpo_train.config import load_config
    from dpo_train.tracking import Tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = write_config(tmp_path, server, tracking={"uri": None})

    def scene(play: Play) -> Iterator[None]:
        tracking = Tracking(load_config(config))
        run_id = tracking.start_pipeline("mine", kubeflow_run=next(iter(server.state.runs)))
        tracking.set_tags(run_id, {"dpo.registered": "false", "dpo.refusal": "the KL is 9.3"})
        play.end("SUCCEEDED")
        yield

    stage(server, scene)

    code, out, _ = dpo(capsys, "submit", config, "--wait")

    assert code == 3
    assert out.splitlines()[-1] == "Refused. the KL is 9.3"
    assert not any(request.path.endswith("log") for request in server.requests)


def test_outcome_that_nobody_tells(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Neither MLflow nor a log can be read: success by Kubeflow's word, and it is said that the gate's is not known."""
    server.fail("log", "status", times=99)
    config = write_config(tmp_path, server, tracking={"uri": "http://mlflow.invalid:9"})
    stage(server, whole(""))

    code, out, _ = dpo(capsys, "submit", config, "--wait")

    assert code == 0
    assert "what its gate said can be seen in MLflow" in out.splitlines()[-1]


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


def test_run_with_nothing_to_do_succeeds(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """The steps behind a condition that does not hold are skipped."""

    def scene(play: Play) -> Iterator[None]:
        play.succeed("resolve", 'dpo-outcome {"outcome": "unchanged", "why": "made of the same data"}\n')
        play.end("SUCCEEDED")
        yield

    stage(server, scene)

    code, out, _ = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 0
    assert out.splitlines()[-1] == "made of the same data"


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
    """No waiting helps: it is said at once."""
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "valid")

    def scene(play: Play) -> Iterator[None]:
        play.start("resolve")
        yield
        server.state.token = "another"
        yield

    stage(server, scene)

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server), "--wait")

    assert code == 2
    assert "does not know who asks" in err


def test_interrupt_leaves_the_run_alone(server: Server, tmp_path: Path) -> None:
    """Ctrl-C ends the waiting with 130, and the command that would end the run is shown."""

    def scene(play: Play) -> Iterator[None]:
        play.start("resolve")
        while True:
            yield

    stage(server, scene)
    config = write_config(tmp_path, server)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kubeflow.commands", "submit", str(config), "--wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
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
        [sys.executable, "-m", "tests.kubeflow.commands", "submit", str(config), "--wait"],
        stdout=theirs,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
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
