"""`dpo logs`: what a step has printed, by whichever way this Kubeflow has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kubeflow.argo import Play
from tests.kubeflow.commands import dpo, write_config
from tests.kubeflow.server import Server

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(server: Server, tmp_path: Path, capsys: Capture) -> Path:
    """Of a run called `mine` that has been submitted."""
    path = write_config(tmp_path, server)
    assert dpo(capsys, "submit", path, "--name", "mine")[0] == 0
    return path


@pytest.fixture
def play(server: Server, config: Path) -> Play:
    return Play(server.state, next(iter(server.state.runs)))


def test_log_of_a_step(play: Play, config: Path, capsys: Capture) -> None:
    """By the run's name; stages may be written as the config writes them."""
    play.succeed("score-reference", "one\ntwo")

    assert dpo(capsys, "logs", config, "mine", "score_reference") == (0, "one\ntwo\n", "")


def test_newest_attempt_of_a_step(play: Play, config: Path, capsys: Capture) -> None:
    """A step that was tried again has several pods."""
    play.retry("train", "first\n", "second\n", "third\n")

    assert dpo(capsys, "logs", config, "mine", "train")[1] == "third\n"


def test_older_names_of_pods(play: Play, server: Server, config: Path, capsys: Capture) -> None:
    """Argo with POD_NAMES=v1."""
    server.state.pod_names = "v1"
    play.succeed("train", "text\n")

    assert dpo(capsys, "logs", config, "mine", "train")[1] == "text\n"


def test_pod_that_the_server_names(play: Play, server: Server, config: Path, capsys: Capture) -> None:
    """A server that tells pods is believed."""
    play.succeed("train", "wrong\n")
    server.state.logs = {"another-pod": "right\n"}
    (run,) = server.state.runs.values()
    node = next(node for node in run["run_details"]["task_details"] if node["display_name"] == "train")
    node["pod_name"] = "another-pod"

    assert dpo(capsys, "logs", config, "mine", "train")[1] == "right\n"


def test_driver_of_a_step_that_never_started(play: Play, config: Path, capsys: Capture) -> None:
    """Its log says why."""
    play.fail_driver("train", "no such image\n")

    assert dpo(capsys, "logs", config, "mine", "train")[1] == "no such image\n"


def test_step_that_comes_whatever_has_happened(play: Play, config: Path, capsys: Capture) -> None:
    """To Argo it is a hook of what it waits for, and its pod's name is made of another path."""
    play.fail("prepare", "broken\n")
    play.succeed("notify", "told\n")

    assert dpo(capsys, "logs", config, "mine", "notify")[1] == "told\n"
    play.retry("notify", "first\n", "second\n")
    assert dpo(capsys, "logs", config, "mine", "notify")[1] == "second\n"


@pytest.mark.parametrize("template", ["system-container-driver", "exit-system-container-driver"])
def test_driver_of_a_hook_that_never_started(template: str, play: Play, config: Path, capsys: Capture) -> None:
    """Newer releases of Kubeflow have a template of its own for it."""
    play.fail_driver("notify", "no such secret\n", template=template)

    assert dpo(capsys, "logs", config, "mine", "notify")[1] == "no such secret\n"


def test_log_as_the_page_gets_it(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """With several users the API server of release 2.17 refuses everyone; the page's server asks who it is."""
    server.state.multi_user, server.state.namespaces, server.state.logs_by_api = True, {"team-a"}, False
    config = write_config(tmp_path, server, kubeflow={"namespace": "team-a"})
    dpo(capsys, "submit", config, "--name", "mine")
    Play(server.state, next(iter(server.state.runs))).succeed("train", "text\n")

    assert dpo(capsys, "logs", config, "mine", "train")[:2] == (0, "text\n")


def test_log_that_is_gone(play: Play, server: Server, config: Path, capsys: Capture) -> None:
    """The pod was removed, and nothing archives logs: the command that would ask Kubernetes is shown."""
    play.succeed("train", "text\n")
    server.state.logs.clear()

    code, out, err = dpo(capsys, "logs", config, "mine", "train")

    assert (code, out) == (2, "")
    assert "Kubeflow has no log of train" in err
    assert "kubectl logs -n NAMESPACE dpo-x7k2p-system-container-impl-" in err


def test_step_that_has_not_started(play: Play, config: Path, capsys: Capture) -> None:
    """There is nothing to print yet."""
    play.start("resolve")

    code, _, err = dpo(capsys, "logs", config, "mine", "train")

    assert code == 2
    assert "has printed nothing yet" in err


def test_unknown_step(play: Play, config: Path, capsys: Capture) -> None:
    """The steps of that very run's pipeline are named."""
    code, _, err = dpo(capsys, "logs", config, "mine", "tran")

    assert code == 2
    assert "has no step 'tran'. Expected: resolve, prepare," in err


def test_signs_that_move_the_cursor_are_left_out(play: Play, config: Path, capsys: Capture) -> None:
    """A log is text of others; progress that was written over itself is shown line by line."""
    play.succeed("train", "\x1b[31mred\x1b[0m\ttab\x07\r\n10%\r20%\n\x1b]0;title\x07end\n")

    assert dpo(capsys, "logs", config, "mine", "train")[1] == "red\ttab\n10%\n20%\nend\n"


def test_server_that_does_not_answer(play: Play, server: Server, config: Path, capsys: Capture) -> None:
    """It is not asked for every name that the pod may have."""
    play.succeed("train", "text\n")
    server.fail("/log", "cut", times=99)

    code, _, err = dpo(capsys, "logs", config, "mine", "train")

    assert code == 2
    assert "does not answer" in err
    assert sum(request.path.endswith("/log") for request in server.requests) == 1
