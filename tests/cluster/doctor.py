"""One line of `dpo doctor` at a time, in a namespace of its own and with objects that go with the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dpo_train import storage
from dpo_train.cluster.doctor import Finding, checks_of, run
from dpo_train.cluster.kube import MERGE_PATCH, Kube
from dpo_train.config import RunConfig, parse_config

NODES = "/api/v1/nodes"


@pytest.fixture(autouse=True)
def own_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    before = storage.options()
    yield
    storage.use(before)


@pytest.fixture(scope="module")
def place(namespaces: Callable[[], Kube]) -> Kube:
    """A namespace for these tests alone."""
    return namespaces()


@pytest.fixture
def lay(place: Kube) -> Iterator[Callable[..., str]]:
    """Makes an object of the cluster, which is removed after the test; its name."""
    made: list[str] = []

    def make(path: str, body: dict[str, Any], status: dict[str, Any] | None = None) -> str:
        name = body["metadata"]["name"]
        place.ask("POST", path, body=body)
        made.append(f"{path}/{name}")
        if status is not None:
            place.ask("PATCH", f"{path}/{name}/status", body={"status": status}, content_type=MERGE_PATCH)
        if path == NODES:  # the API server taints a new node, and the node controller takes that away
            taints = body["spec"]["taints"]
            place.ask("PATCH", f"{path}/{name}", body={"spec": {"taints": taints}}, content_type=MERGE_PATCH)
        return str(name)

    yield make
    for path in reversed(made):
        place.ask("DELETE", path)


def config_for(place: Kube, **sections: Any) -> RunConfig:
    """A config whose stages are jobs in the tests' namespace."""
    cluster = {"launcher": "rayjob", "image": "registry.example/dpo:1.0", "namespace": place.namespace}
    content = {
        "store": "s3://bucket/dpo",
        "model": {"path": "org/model"},
        "prepare": {"path": "s3://bucket/pairs.jsonl"},
        **sections,
        "tracking": {"uri": "http://mlflow.example:5000"},
        "cluster": {**cluster, **sections.get("cluster", {})},
    }
    return parse_config(json.dumps(content), origin="the test")


def line(config: RunConfig, name: str) -> Finding:
    """One line of the doctor's."""
    return next(run([next(check for check in checks_of(config) if check.name == name)]))


def core(place: Kube, kind: str) -> str:
    return f"/api/v1/namespaces/{place.namespace}/{kind}"
