"""With whom a job goes: the workflow of the task that waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpo_train.cluster.kube import Kube
from dpo_train.cluster.rayjob import Owner
from dpo_train.cluster.rayjob_owner import owner_of_this_pod
from tests.cluster.jobs import Waiting
from tests.cluster.operator import Operator, until
from tests.cluster.proxy import Proxy

WORKFLOW = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "flow-1",
    "uid": "uid-1",
    "controller": True,
}


def task(admin: Kube, name: str, owners: list[dict[str, Any]]) -> str:
    """A pod as Kubeflow makes it; its uid."""
    body = {
        "metadata": {"name": name, "ownerReferences": owners},
        "spec": {"containers": [{"name": "main", "image": "none"}], "schedulerName": "none"},
    }
    made = admin.ask("POST", f"/api/v1/namespaces/{admin.namespace}/pods", body=body)
    return str(made["metadata"]["uid"])


def test_a_job_belongs_to_the_workflow_of_its_task(
    launch: Callable[..., Waiting], operator: Operator, admin: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes deletes it with the workflow: a task that is ended has no time to."""
    monkeypatch.setenv("KFP_POD_UID", task(admin, "task-1", [WORKFLOW]))
    monkeypatch.setenv("KFP_POD_NAME", "task-1")
    waiting = launch()
    owners = operator.created()["metadata"]["ownerReferences"]
    operator.succeed()

    assert waiting.result().succeeded
    assert owners == [{key: value for key, value in WORKFLOW.items() if key != "controller"}]


def test_a_job_that_is_adopted_belongs_to_both_workflows(
    launch: Callable[..., Waiting], operator: Operator, admin: Kube, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would go with the workflow that began it. Who adds itself meets others who do (409), and looks again."""
    task(admin, "task-2", [WORKFLOW])
    task(admin, "task-3", [{**WORKFLOW, "name": "flow-2", "uid": "uid-2"}])
    monkeypatch.setenv("KFP_POD_NAME", "task-2")
    first = launch()
    operator.created()
    until(lambda: proxy.count("PATCH", "/rayjobs"), "the first one's sign of life")
    proxy.fault("PATCH", "/rayjobs", "conflict", times=1)
    monkeypatch.setenv("KFP_POD_NAME", "task-3")
    second = launch()
    until(lambda: [text for text in second.told if "found" in text], "adopted")
    until(lambda: len(operator.created()["metadata"]["ownerReferences"]) == 2, "two owners")
    operator.succeed()

    assert second.result().succeeded
    assert proxy.count("PATCH", "/rayjobs", "conflict") == 1
    assert first.result().succeeded
    assert [owner["name"] for owner in operator.created()["metadata"]["ownerReferences"]] == ["flow-1", "flow-2"]


def test_a_pod_without_a_workflow_is_itself_the_owner(kube: Kube, admin: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other schedulers' tasks."""
    uid = task(admin, "task-4", [])
    monkeypatch.setenv("KFP_POD_NAME", "task-4")

    assert owner_of_this_pod(kube, print) == Owner(api_version="v1", kind="Pod", name="task-4", uid=uid)


def test_outside_a_task_there_is_no_owner(kube: Kube, proxy: Proxy) -> None:
    """And nothing is asked."""
    assert owner_of_this_pod(kube, print) is None
    assert proxy.seen == []


@pytest.mark.parametrize("trouble", ["no rights", "no pod", "another pod", "another namespace"])
def test_a_job_without_an_owner_is_started_and_it_is_said(
    kube: Kube, admin: Kube, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Across namespaces an owner would even be harm: Kubernetes takes it for deleted, and the job with it."""
    monkeypatch.setenv("KFP_POD_NAME", "task-5" if trouble != "no pod" else "nobody")
    if trouble == "another pod":
        task(admin, "task-5", [WORKFLOW])
        monkeypatch.setenv("KFP_POD_UID", "of-an-earlier-pod")
    if trouble == "no rights":
        proxy.fault("GET", "/pods/", "forbidden")
    if trouble == "another namespace":
        kube.namespace = "elsewhere"
    told: list[str] = []

    assert owner_of_this_pod(kube, told.append) is None
    assert len(told) == 1
    assert told[0].startswith("the job stays if this task")
