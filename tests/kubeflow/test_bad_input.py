"""Mistakes are said in one line, with exit code 2, before anything is made on the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cluster.kubeflow import client
from tests.kubeflow.commands import dpo, write_config
from tests.kubeflow.server import Server

Capture = pytest.CaptureFixture[str]


def refused(server: Server, capsys: Capture, *arguments: object) -> str:
    """What a submission says that is refused without a change on the server."""
    code, out, err = dpo(capsys, "submit", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dpo: ")
    assert err.count("\n") == 1
    assert server.changes() == []
    return err


def test_no_address(tmp_path: Path, server: Server, capsys: Capture) -> None:
    """It says where the address may stand."""
    err = refused(server, capsys, write_config(tmp_path))

    assert "kubeflow.host or KF_PIPELINES_ENDPOINT" in err


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"store": "here/store"}, "store=/"),
        ({"prepare": {"path": "/home/me/pairs.jsonl"}}, "prepare.path=/home/me/pairs.jsonl"),
        ({"model": {"path": "./model"}}, "model.path=/"),
        ({"tracking": {"uri": "http://localhost:5000"}}, "tracking.uri=http://localhost:5000"),
        ({"tracking": {"uri": "sqlite:////tmp/mlflow.db"}}, "tracking.uri=sqlite:"),
        ({"storage": {"endpoint": "http://127.0.0.1:9000"}}, "storage.endpoint=http://127.0.0.1:9000"),
    ],
)
def test_what_the_cluster_cannot_see(
    sections: dict[str, Any], named: str, server: Server, tmp_path: Path, capsys: Capture
) -> None:
    """Places of this machine are named with their keys, and nothing is asked."""
    err = refused(server, capsys, write_config(tmp_path, server, **sections))

    assert named in err
    assert server.requests == []


def test_secret_in_the_config(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """The config becomes an argument that all may read: a password in an address is refused and not shown."""
    config = write_config(tmp_path, server, tracking={"uri": "https://me:hunter2@mlflow.example.com"})

    err = refused(server, capsys, config)

    assert "tracking.uri" in err
    assert "hunter2" not in err


@pytest.mark.parametrize("image", ["dpo-train", "registry.example.com:5000/dpo", "dpo@sha256:123", "dpo:", "a b:1"])
def test_image_without_a_version(image: str, server: Server, tmp_path: Path, capsys: Capture) -> None:
    """A port is no tag."""
    assert "names no version of an image" in refused(server, capsys, write_config(tmp_path, server), "--image", image)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--argument", "speed=9"], "has no argument speed. Expected: config,"),
        (["--argument", "config=x"], "argument config is not set by --argument. What to do: it is the config file"),
        (["--argument", "run_name=x"], "argument run_name is not set by --argument. What to do: give --name"),
        (["--argument", "image=dpo:1"], "argument image is not set by --argument. What to do: give --image"),
        (
            ["--argument", 'overrides=["train.beta=1"]'],
            "argument overrides is not set by --argument. What to do: write",
        ),
        (["--argument", "speed"], "needs a name and a value"),
    ],
)
def test_arguments_of_the_pipeline(
    arguments: list[str], said: str, server: Server, tmp_path: Path, capsys: Capture
) -> None:
    """Unknown, or with a way of its own: found in the compiled pipeline, on the laptop."""
    assert said in refused(server, capsys, write_config(tmp_path, server), *arguments)


@pytest.mark.parametrize(
    "override",
    ["tracking.uri=https://me:hunter2@mlflow.example.com", "store=/home/me/store", "train.bta=1"],
)
def test_overrides_have_one_way_in(override: str, server: Server, tmp_path: Path, capsys: Capture) -> None:
    """On the command line they are part of the config that is checked; as the pipeline's argument nothing would be."""
    config = write_config(tmp_path, server)

    assert "hunter2" not in refused(server, capsys, config, override)
    err = refused(server, capsys, config, "--argument", f"overrides={json.dumps([override])}")
    assert "write them behind the config" in err
    assert "hunter2" not in err


def test_secret_in_another_argument(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """It is looked for before anything else is said of the argument, and not shown."""
    for text in ("speed=https://me:hunter2@example.com", "https://me:hunter2@example.com"):
        err = refused(server, capsys, write_config(tmp_path, server), "--argument", text)
        assert "hunter2" not in err


def test_claim_that_kubeflow_cannot_mount(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """It would call the pod's volume as the claim is called."""
    config = write_config(tmp_path, server, cluster={"volumes": {"/data": "my.claim"}})

    assert "whose name has a dot" in refused(server, capsys, config)


def test_mistake_in_the_config(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """The config is decoded here, not an hour later in a pod."""
    err = refused(server, capsys, write_config(tmp_path, server), "train.bta=0.1")

    assert "train.bta" in err
    assert server.requests == []


def test_namespace_is_missing(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Where Kubeflow has several users it is asked for."""
    server.state.multi_user = True

    assert "set kubeflow.namespace" in refused(server, capsys, write_config(tmp_path, server))


def test_namespace_without_users(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Where it has none, a namespace would be ignored."""
    config = write_config(tmp_path, server, kubeflow={"namespace": "team-a"})

    assert "leave kubeflow.namespace out" in refused(server, capsys, config)


def test_namespace_is_not_allowed(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Kubeflow's own words are shown."""
    server.state.multi_user, server.state.namespaces = True, {"team-a"}
    config = write_config(tmp_path, server, kubeflow={"namespace": "team-b"})

    assert "not authorized in namespace team-b" in refused(server, capsys, config)


def test_expired_token(server: Server, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told what to set; the token is not shown."""
    server.state.token = "fresh"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "stale-0123456789")

    err = refused(server, capsys, write_config(tmp_path, server))

    assert "does not know who asks" in err
    assert "KF_PIPELINES_TOKEN" in err
    assert "stale-0123456789" not in err


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("html", "answers with a login page"),
        ("redirect", "a redirect to /dex/auth."),
        ("page", "is not the API of Kubeflow Pipelines"),
        ("text", "is not the API of Kubeflow Pipelines"),
    ],
)
def test_something_else_answers(how: str, said: str, server: Server, tmp_path: Path, capsys: Capture) -> None:
    """A login page, a way to one, and a server of another kind are told apart."""
    server.fail("/healthz", how, times=9)

    assert said in refused(server, capsys, write_config(tmp_path, server))


def test_other_path_on_the_host(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """In a full Kubeflow the API is below /pipeline."""
    config = write_config(tmp_path, server, kubeflow={"host": f"{server.url}/elsewhere"})

    assert "it ends in /pipeline" in refused(server, capsys, config)


def test_nobody_answers(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """A closed port."""
    config = write_config(tmp_path, server, kubeflow={"host": "http://127.0.0.1:9"})

    assert "does not answer" in refused(server, capsys, config)


def test_server_that_is_too_slow(
    server: Server, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that does not come in time is none."""
    monkeypatch.setattr(client, "TIMES", (1.0, 0.1))
    fault = server.fail("/healthz", "slow", times=99)

    err = refused(server, capsys, write_config(tmp_path, server))
    fault.released.set()

    assert "does not answer" in err
    assert "timed out" in err


def test_server_that_is_ill(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """500 for as long as it is asked."""
    server.fail("/healthz", "status", status=500, times=99)

    assert "cannot do that just now (500)" in refused(server, capsys, write_config(tmp_path, server))


@pytest.mark.parametrize(
    ("host", "said"),
    [("ftp://kubeflow", "none of http"), ("https://", "none of http"), ("https://me:pw@kubeflow", "holds a login")],
)
def test_address_that_is_none(host: str, said: str, server: Server, tmp_path: Path, capsys: Capture) -> None:
    """Other schemes, nothing, and logins."""
    assert said in refused(server, capsys, write_config(tmp_path, server, kubeflow={"host": host}))
