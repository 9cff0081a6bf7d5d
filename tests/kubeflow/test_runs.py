"""`dpo runs --kfp` and `dpo cancel`: runs listed, found and ended."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from dpo_train.cli.kubeflow import kubeflow_runs
from dpo_train.config import load_config
from dpo_train.errors import ConfigError, UserError
from tests.kubeflow.argo import Play
from tests.kubeflow.commands import dpo, write_config
from tests.kubeflow.server import Server

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(server: Server, tmp_path: Path, capsys: Capture) -> Path:
    """Of two runs, `one` and `two`, of which `one` has failed."""
    path = write_config(tmp_path, server)
    start = datetime.datetime.now(tz=datetime.UTC) - datetime.timedelta(hours=5)
    for number, name in enumerate(("one", "two")):
        server.state.clock = lambda number=number: start + datetime.timedelta(hours=number)
        assert dpo(capsys, "submit", path, "--name", name)[0] == 0
    server.state.clock = lambda: start + datetime.timedelta(minutes=30)
    Play(server.state, ids(server)["one"]).end("FAILED")
    return path


def ids(server: Server) -> dict[str, str]:
    return {run["display_name"]: run["run_id"] for run in server.state.runs.values()}


def test_newest_run_comes_first(config: Path, server: Server, capsys: Capture) -> None:
    """Where a program reads, cells stand between tabs."""
    capsys.readouterr()

    assert kubeflow_runs(load_config(config), 20) == 0

    found = ids(server)
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == [
        ["name", "status", "age", "took", "run id"],
        ["two", "pending", "4 h", "", found["two"]],
        ["one", "failed", "5 h", "30 min", found["one"]],
    ]


def test_list_is_read_over_pages(config: Path, server: Server, capsys: Capture) -> None:
    """250 runs are more than an answer holds."""
    (one,) = [run for run in server.state.runs.values() if run["display_name"] == "one"]
    for number in range(248):
        run_id = f"{number:08x}-0000-4000-8000-000000000000"
        server.state.runs[run_id] = {**one, "run_id": run_id, "display_name": f"more {number}"}
    capsys.readouterr()

    kubeflow_runs(load_config(config), 1000)
    assert len(capsys.readouterr().out.splitlines()) == 251

    kubeflow_runs(load_config(config), 3)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_experiment_without_runs(server: Server, config: Path, capsys: Capture) -> None:
    """An experiment that is not there is a mistake; one without runs is none."""
    with pytest.raises(UserError, match="no experiment 'elsewhere'"):
        kubeflow_runs(load_config(config, ["kubeflow.experiment=elsewhere"]), 5)
    with pytest.raises(ConfigError, match="at least 1"):
        kubeflow_runs(load_config(config), 0)
    server.state.runs.clear()

    assert kubeflow_runs(load_config(config), 5) == 0
    assert "no runs yet" in capsys.readouterr().out


@pytest.mark.parametrize("length", [36, 12])
def test_cancel_by_id(length: int, config: Path, server: Server, capsys: Capture) -> None:
    """The whole id or its beginning."""
    run_id = ids(server)["two"]

    code, out, _ = dpo(capsys, "cancel", config, run_id[:length])

    assert code == 0
    assert f"two ({run_id}) is being ended" in out
    assert server.state.runs[run_id]["state"] == "CANCELING"
    assert dpo(capsys, "cancel", config, "two")[0] == 0  # again changes nothing, and is no mistake


def test_cancel_of_what_has_ended_says_so(config: Path, server: Server, capsys: Capture) -> None:
    """Nothing is sent."""
    before = len(server.changes())

    code, out, _ = dpo(capsys, "cancel", config, "one")

    assert code == 0
    assert "had ended already: failed" in out
    assert len(server.changes()) == before


def test_run_that_ends_in_between(config: Path, server: Server, capsys: Capture) -> None:
    """It runs when it is looked at, and has ended when it is to be ended."""
    run_id = ids(server)["two"]
    server.before(f"/apis/v2beta1/runs/{run_id}:terminate", lambda: Play(server.state, run_id).end("SUCCEEDED"), "POST")

    code, out, _ = dpo(capsys, "cancel", config, run_id)

    assert code == 0
    assert "had ended already: succeeded" in out


def test_name_of_several_runs(config: Path, server: Server, capsys: Capture) -> None:
    """All are named by their ids, and none is ended."""
    for run in server.state.runs.values():
        run["display_name"] = "twin"

    code, _, err = dpo(capsys, "cancel", config, "twin")

    assert code == 2
    assert "'twin' means 2 runs" in err
    assert all(run_id in err for run_id in server.state.runs)


@pytest.mark.parametrize("text", ["", " ", "nothing", "0" * 8 + "-0000-0000-0000-" + "0" * 12])
def test_run_that_is_not_there(text: str, config: Path, server: Server, capsys: Capture) -> None:
    """By name and by id; nothing at all, as of a variable that is not set, means no run."""
    del server.state.runs[ids(server)["one"]]

    code, _, err = dpo(capsys, "cancel", config, text)

    assert code == 2
    assert f"Kubeflow has no run {text!r}" in err
    assert server.state.runs[ids(server)["two"]]["state"] == "PENDING"
