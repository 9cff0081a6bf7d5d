"""`dpo doctor` and what a run talks to: a real S3 server, MLflow's own server, Kubeflow's and Ray's interfaces."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("kfp")

from dpo_train import storage
from dpo_train.cli.kubeflow import compiled_pipeline
from dpo_train.cluster import ray_rest
from dpo_train.cluster.doctor import Finding, checks_of, run
from dpo_train.cluster.kubeflow import client, login, submission
from dpo_train.config import RunConfig, parse_config
from dpo_train.storage import failures
from tests.kubeflow.server import serving as kubeflow_serving
from tests.mlflow.server import guarding, serving
from tests.s3.server import Server, s3_server
from tests.unit.cluster.fake_ray import Answer, fake_ray

__all__ = ["s3_server"]

KUBEFLOW = (login.HOST, login.PAGE, *login.TOKENS, login.COOKIES, login.TOKEN_FILE, *login.AUTHORITIES)
RAY = (ray_rest.TOKEN, ray_rest.TOKEN_PATH)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the developer's own logins, and short pauses."""
    ours = [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]
    for name in (*ours, *KUBEFLOW, *RAY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(failures, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(client, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(ray_rest, "DEFAULT_TOKEN_PATH", Path("/nowhere/auth_token"))
    before = storage.options()
    yield
    storage.use(before)


@pytest.fixture
def bucket(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.bucket("doctor")


def config_of(store: str = "/nowhere/store", **sections: Any) -> RunConfig:
    content = {"store": store, "model": {"path": "org/model"}, "prepare": {"path": "hf://some/data"}, **sections}
    return parse_config(json.dumps(content), origin="the test")


def line(config: RunConfig, name: str) -> Finding:
    checks = checks_of(config, compiled_pipeline())
    return next(run([next(check for check in checks if check.name == name)]))


def test_the_store_is_written_read_and_left_as_it_was(s3_server: Server, bucket: str) -> None:
    """One object, which is gone afterwards."""
    found = line(config_of(f"{bucket}/dpo"), "store")

    assert (found.status, found.text) == ("pass", f"{bucket}/dpo: written, read and deleted")
    assert s3_server.keys("doctor") == []


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    """In the words of every other command."""
    found = line(config_of("s3://not-a-bucket-of-ours/dpo"), "store")

    assert found.status == "fail"
    assert "not-a-bucket-of-ours" in found.text
    assert found.mend


def test_a_key_that_may_not_delete(s3_server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention and clean-up would fail much later."""
    keys = s3_server.user("writer", "s3:PutObject", "s3:GetObject", "s3:ListBucket")
    for name, value in keys.items():
        monkeypatch.setenv(name, value)

    with s3_server.enforcing():
        found = line(config_of(f"{bucket}/dpo"), "store")

    assert found.status == "fail"
    assert "delete" in found.text
    assert keys["AWS_SECRET_ACCESS_KEY"] not in repr(found)


def test_a_dead_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried for as long as a run would."""
    config = config_of("s3://bucket/dpo", storage={"endpoint": "http://127.0.0.1:9", "region": "us-east-1"})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")

    found = line(config, "store")

    assert found.status == "fail"
    assert "in 2 attempts" in found.text


def test_inputs_at_s3_are_read(bucket: str, s3_server: Server) -> None:
    """Wherever they are."""
    good = config_of(prepare={"path": f"{bucket}/pairs.jsonl"})
    bad = config_of(prepare={"path": "s3://not-a-bucket-of-ours/pairs.jsonl"})

    assert line(good, "s3 inputs").status == "pass"
    assert line(bad, "s3 inputs").status == "fail"


def test_mlflow_without_a_server(tmp_path: Path) -> None:
    """Its file is not made."""
    found = line(config_of(f"{tmp_path}/store"), "mlflow")

    assert found.status == "pass"
    assert list(tmp_path.iterdir()) == []


def test_mlflow_has_no_address() -> None:
    """A store at s3:// holds no database; on Kubeflow a plugin may name the server."""
    assert line(config_of("s3://bucket/dpo"), "mlflow").status == "fail"
    with_kubeflow = config_of("s3://bucket/dpo", kubeflow={"host": "https://kubeflow.example"})
    assert line(with_kubeflow, "mlflow").status == "unchecked"


@pytest.mark.slow
def test_login_to_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own server with logins: without one, with a wrong and with the right one; no experiment is made."""
    admin = ("admin", "a-password-of-12")
    with serving(tmp_path, "--app-name", "basic-auth", variables=guarding(tmp_path, admin)) as url:
        config = config_of(tracking={"uri": url, "experiment": "never-made"})
        nobody = line(config, "mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password-9")
        wrong = line(config, "mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", admin[1])
        right, again = line(config, "mlflow"), line(config, "mlflow")

    assert [nobody.status, wrong.status, right.status] == ["fail", "fail", "pass"]
    assert "MLFLOW_TRACKING_USERNAME" in str(nobody.mend)
    assert "wrong-password-9" not in repr(wrong)
    assert "never-made will be made by the first run" in right.text
    assert again == right


def test_kubeflow_and_its_pipeline() -> None:
    """Before and after a submission; nothing is changed by looking."""
    with kubeflow_serving() as server:
        config = config_of("s3://bucket/dpo", kubeflow={"host": server.url}, tracking={"uri": "http://mlflow.example"})
        assert line(config, "kubeflow").status == "pass"
        assert "dpo is not there yet" in line(config, "pipeline").text
        assert server.changes() == []
        address = login.address(config.kubeflow)
        prepared = submission.prepare(config, compiled_pipeline(), name="one")
        submission.submit(client.connect(address, config.kubeflow), prepared)

        found = line(config, "pipeline")

    assert found.status == "pass"
    assert f"its version {prepared.package.version} is there" in found.text


def test_kubeflow_does_not_know_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which variables hold the login; the token itself is not shown."""
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "a-token-of-yesterday")
    with kubeflow_serving() as server:
        server.state.token = "a-token-of-today"

        found = line(config_of("s3://bucket/dpo", kubeflow={"host": server.url}), "kubeflow")

    assert found.status == "fail"
    assert "KF_PIPELINES_TOKEN" in str(found.mend)
    assert "yesterday" not in repr(found)


def test_a_namespace_is_missing() -> None:
    """Kubeflow has several users, and the config names no profile."""
    with kubeflow_serving() as server:
        server.state.multi_user = True

        found = line(config_of("s3://bucket/dpo", kubeflow={"host": server.url}), "kubeflow")

    assert found.status == "fail"
    assert "kubeflow.namespace" in str(found.mend)


def test_ray_answers_or_does_not() -> None:
    """An address with Ray behind it, with a server that refuses, and none at all."""
    with fake_ray() as server:
        config = config_of(cluster={"launcher": "ray", "address": server.url})
        good = line(config, "ray")
        server.fault = lambda method, path, number: Answer(status=401)
        refused = line(config, "ray")
    without = line(config_of(cluster={"launcher": "ray"}), "ray")

    assert [good.status, refused.status, without.status] == ["pass", "fail", "fail"]
    assert "RAY_AUTH_TOKEN" in str(refused.mend)
    assert "set cluster.address" in str(without.mend)


def test_places_that_pods_do_not_see() -> None:
    """A store on this machine, and MLflow at localhost."""
    cluster = {"launcher": "rayjob", "image": "a/b:1"}

    here = line(config_of(cluster=cluster), "reach")
    local = line(config_of("s3://bucket/dpo", cluster=cluster, tracking={"uri": "http://localhost:5000"}), "reach")

    assert (here.status, local.status) == ("fail", "fail")
    assert "store=/nowhere/store" in here.text
    assert "tracking.uri" in local.text
