"""Mistakes are said in one line, with exit code 2, before anything is made on the server."""

from __future__ import annotations

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


def test_mounted_volume_is_seen(server: Server, tmp_path: Path, capsys: Capture) -> None:
    """A path below one of cluster.volumes is no path of this machine."""
    config = write_config(
        tmp_path, server, store="/data/store", model={"path": "/data/model"}, cluster={"volumes": {"/data": "claim"}}
    )

    assert dpo(capsys, "submit", config)[0] == 0


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
        (["--argument", "config=x"], "argument config comes from the config"),
        (["--argument", "speed"], "needs a name and a value"),
        (["--argument", "overrides=train.beta=1"], "overrides has another type. Got: 'train.beta=1'. Expected: a list"),
    ],
)
def test_arguments_of_the_pipeline(
    arguments: list[str], said: str, server: Server, tmp_path: Path, capsys: Capture
) -> None:
    """Unknown, given twice or of another type: found in the compiled pipeline, on the laptop."""
    from dpo_train.cli.kubeflow import compiled_pipeline

    if "overrides" in said and "overrides" not in compiled_pipeline().parameters:
        pytest.skip("the pipeline has no argument that is no text")
    assert said in refused(server, capsys, write_config(tmp_path, server), *arguments)


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
