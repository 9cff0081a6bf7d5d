"""`dpo submit --wait`: what came of a run that has succeeded to Kubeflow, which knows of no gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubeflow.argo import Play
from tests.kubeflow.commands import dpo, write_config
from tests.kubeflow.scenes import stage, whole
from tests.kubeflow.server import Server

Capture = pytest.CaptureFixture[str]


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


def test_word_of_the_gate_that_nobody_tells_is_no_success(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Neither MLflow nor a log can be read: to Kubeflow the run has succeeded, but the gate may have refused."""
    server.fail("log", "status", times=99)
    config = write_config(tmp_path, server, tracking={"uri": "http://mlflow.invalid:9"})
    stage(server, whole(""))

    code, _, err = dpo(capsys, "submit", config, "--wait")

    (run_id,) = server.state.runs
    assert code == 1
    assert "the gate's word is unknown" in err
    assert f"dpo logs CONFIG {run_id} register" in err


@pytest.mark.parametrize(
    "line", ['dpo-outcome {"outcome": "regi', "dpo-outcome []", 'dpo-outcome {"why": "a"}', "words"]
)
def test_log_without_a_whole_line_of_the_outcome(line: str, server: Server, tmp_path: Path, capsys: Capture) -> None:
    """What was cut off, or is another's, says nothing; the gate's word is unknown."""
    config = write_config(tmp_path, server, tracking={"uri": "http://mlflow.invalid:9"})
    stage(server, whole(f"{line}\n"))

    code, _, err = dpo(capsys, "submit", config, "--wait")

    assert code == 1
    assert "the gate's word is unknown" in err


def test_outcome_that_is_no_success(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Whatever Kubeflow says: a run that is said to have failed is no success."""
    config = write_config(tmp_path, server, tracking={"uri": "http://mlflow.invalid:9"})
    stage(server, whole('dpo-outcome {"outcome": "failed", "why": "no policy"}\n'))

    code, _, err = dpo(capsys, "submit", config, "--wait")

    assert code == 1
    assert "is said to be failed. Got: no policy." in err


def test_run_that_asked_no_gate(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Where the step that registers was skipped, success is success, told or not."""

    def scene(play: Play) -> Iterator[None]:
        play.succeed("resolve")
        play.end("SUCCEEDED")
        yield

    config = write_config(tmp_path, server, tracking={"uri": "http://mlflow.invalid:9"})
    stage(server, scene)

    code, out, _ = dpo(capsys, "submit", config, "--wait")

    assert code == 0
    assert out.splitlines()[-1] == "the run succeeded, and registered nothing"


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
