"""`dpo submit`: pipeline, version, experiment, run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_train.config import load_config, parse_config
from tests.kubeflow.commands import dpo, write_config
from tests.kubeflow.server import Server
from tests.kubeflow.state import new_id

Capture = pytest.CaptureFixture[str]


def test_first_submission_makes_all_that_a_run_needs(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Pipeline, version by content, experiment and run by reference; the link is printed; the config arrives whole."""
    config = write_config(tmp_path, server)

    code, out, _ = dpo(capsys, "submit", config, "--name", "first", "--service-account", "runner", "train.beta=0.3")

    assert code == 0
    (pipeline,), (version,) = server.state.pipelines.values(), server.state.versions.values()
    (experiment,), (run,) = server.state.experiments.values(), server.state.runs.values()
    assert (pipeline["display_name"], experiment["display_name"]) == ("dpo", "dpo")
    assert version["name"].startswith("sha-")
    assert len(version["name"]) == 16
    assert run["pipeline_version_reference"] == {
        "pipeline_id": pipeline["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }
    assert (run["display_name"], run["service_account"]) == ("first", "runner")
    arguments = run["runtime_config"]["parameters"]
    assert arguments["run_name"] == "first"
    assert parse_config(arguments["config"]) == load_config(config, ["train.beta=0.3"])
    assert f"{server.url}/#/runs/details/{run['run_id']}" in out.splitlines()


def test_same_content_is_not_uploaded_again(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """A second run, with another config, refers to the same version."""
    config = write_config(tmp_path, server)
    dpo(capsys, "submit", config)
    before = len(server.changes())

    code, _, _ = dpo(capsys, "submit", config, "train.beta=0.2")

    assert code == 0
    assert server.changes()[before:] == ["POST /apis/v2beta1/runs"]
    assert len({run["pipeline_version_reference"]["pipeline_version_id"] for run in server.state.runs.values()}) == 1


def test_volumes_are_mounted_into_every_task(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """A path below one of cluster.volumes is no path of this machine, and the tasks have what is promised."""
    dpo(capsys, "submit", write_config(tmp_path, server))
    places = {"store": "/data/store", "model": {"path": "/models/a"}}
    config = write_config(tmp_path, server, **places, cluster={"volumes": {"/data": "pairs", "/models": "hub"}})

    assert dpo(capsys, "submit", config)[0] == 0

    (plain, mounted) = (version["pipeline_spec"] for version in server.state.versions.values())
    tasks = plain["pipeline_spec"]["deploymentSpec"]["executors"].keys()
    executors = mounted["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors.keys() == tasks
    for executor in executors.values():
        assert [(mount["mountPath"], mount["constant"]) for mount in executor["pvcMount"]] == [
            ("/data", "pairs"),
            ("/models", "hub"),
        ]
        assert executor["secretAsEnv"]


def test_another_image_is_another_version(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """--image stands in every container of a version of its own."""
    config = write_config(tmp_path, server)
    dpo(capsys, "submit", config)

    code, _, _ = dpo(capsys, "submit", config, "--image", "registry.example.com:5000/dpo@sha256:" + "a" * 64)

    assert code == 0
    _, other = server.state.versions.values()
    spec = other["pipeline_spec"].get("pipeline_spec", other["pipeline_spec"])
    images = {executor["container"]["image"] for executor in spec["deploymentSpec"]["executors"].values()}
    assert images == {"registry.example.com:5000/dpo@sha256:" + "a" * 64}


def test_names_of_the_config_and_of_options(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """kubeflow.pipeline and .experiment count, and --experiment above it; names may hold any sign."""
    config = write_config(tmp_path, server, kubeflow={"pipeline": "my pipeline 50%+", "experiment": "a"})

    assert dpo(capsys, "submit", config, "--experiment", 'b "quoted" + 100%')[0] == 0
    assert dpo(capsys, "submit", config, "--experiment", 'b "quoted" + 100%')[0] == 0

    assert [item["display_name"] for item in server.state.pipelines.values()] == ["my pipeline 50%+"]
    assert [item["display_name"] for item in server.state.experiments.values()] == ['b "quoted" + 100%']


def test_someone_else_is_faster(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """What appears between the look and the creation is taken, if it is the same."""
    config, state = write_config(tmp_path, server), server.state
    dpo(capsys, "submit", config)
    taken = state.pipelines.copy(), state.versions.copy(), state.experiments.copy()
    for table in (state.pipelines, state.versions, state.experiments):
        table.clear()
    server.before("/apis/v2beta1/pipelines", lambda: state.pipelines.update(taken[0]), "POST")
    server.before("/apis/v2beta1/pipelines/upload_version", lambda: state.versions.update(taken[1]), "POST")
    server.before("/apis/v2beta1/experiments", lambda: state.experiments.update(taken[2]), "POST")

    code, _, err = dpo(capsys, "submit", config)

    assert (code, err) == (0, "")
    assert (len(state.pipelines), len(state.versions), len(state.experiments), len(state.runs)) == (1, 1, 1, 2)


def test_version_of_the_name_with_other_content_is_refused(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """It says so, and nothing is made."""
    config = write_config(tmp_path, server)
    dpo(capsys, "submit", config)
    (version,) = server.state.versions.values()
    spec = version["pipeline_spec"]
    spec.get("pipeline_spec", spec)["pipelineInfo"]["description"] = "somebody's own"
    before = len(server.changes())

    code, _, err = dpo(capsys, "submit", config)

    assert code == 2
    assert f"has a version {version['name']} of this pipeline whose content is another" in err
    assert len(server.changes()) == before


def test_archived_experiment_is_refused_before_anything_is_made(
    server: Server, tmp_path: Path, capsys: Capture
) -> None:
    """Kubeflow would refuse only when pipeline and version are there."""
    archived = {
        "experiment_id": new_id(),
        "display_name": "dpo",
        "created_at": server.state.now(),
        "storage_state": "ARCHIVED",
    }
    server.state.experiments[archived["experiment_id"]] = archived

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server))

    assert code == 2
    assert "archived" in err
    assert server.changes() == []


def test_lost_answer_starts_no_second_run(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """The run was made and the connection cut: it is found again, and its link printed."""
    server.fail("/runs$", "cut_after", method="POST")

    code, out, err = dpo(capsys, "submit", write_config(tmp_path, server), "--name", "twin")

    assert (code, err) == (0, "")
    (run_id,) = server.state.runs
    assert run_id in out


def test_lost_answer_that_cannot_be_looked_for_is_said(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """It may have begun: exit 1, with what to look at."""
    server.fail("/runs$", "cut_after", method="POST")
    server.fail("/runs$", "cut", method="GET", times=9)

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server))

    assert code == 1
    assert "not known whether the run" in err
    assert "--kfp" in err


def test_request_that_did_not_arrive_is_not_repeated(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Cut before it was done: nobody can know, so it is said, and there is no run."""
    server.fail("/runs$", "cut", method="POST")

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server))

    assert code == 1
    assert "not known whether the run" in err
    assert server.changes().count("POST /apis/v2beta1/runs") == 1


def test_questions_are_asked_again(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """A gateway's 503 and a cut connection during the lookups are survived."""
    server.fail("/experiments$", "status", status=503)
    server.fail("/pipelines$", "cut", method="GET")

    assert dpo(capsys, "submit", write_config(tmp_path, server))[0] == 0


def test_several_users(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Pipeline and experiment are made in the user's namespace."""
    server.state.multi_user, server.state.namespaces = True, {"team-a"}

    code, _, _ = dpo(capsys, "submit", write_config(tmp_path, server, kubeflow={"namespace": "team-a"}))

    assert code == 0
    assert {item["namespace"] for item in server.state.pipelines.values()} == {"team-a"}
    assert {item["namespace"] for item in server.state.experiments.values()} == {"team-a"}


def test_checks_that_fail_start_nothing(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """The store of this config is a bucket that cannot be written; each check that fails is a line."""
    config = write_config(tmp_path, server, storage={"endpoint": "http://127.0.0.1:9", "attempts": 1})

    code, out, error = dpo(capsys, "submit", config, "--check")

    assert code == 2
    assert "FAIL" in out
    assert "nothing was started" in error
    assert server.changes() == []
