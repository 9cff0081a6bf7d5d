"""With whom a job goes: the workflow of the task that waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cluster.kube import Kube
from dpo_train.cluster.launcher import RayJobLauncher
from dpo_train.cluster.rayjob import Owner
from dpo_train.cluster.rayjob_owner import owner_of_this_pod
from dpo_train.cluster.rayjob_removal import give_up
from tests.cluster.jobs import Full, Waiting, config_in, job_of
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


@pytest.fixture
def wait_as(
    kube: Kube, admin: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | None], Waiting]:
    """Waits for the job as a task of this workflow, or outside of any, until the job prints a line: then it fails."""

    def begin(flow: str | None) -> Waiting:
        monkeypatch.delenv("KFP_POD_NAME", raising=False)
        if flow is not None:
            task(admin, f"task-of-{flow}", [{**WORKFLOW, "name": flow, "uid": f"uid-of-{flow}"}])
            monkeypatch.setenv("KFP_POD_NAME", f"task-of-{flow}")
        config = config_in(tmp_path, heartbeat_seconds=1)  # its signs are events, at which it sees that it has failed
        waiting = Waiting(RayJobLauncher(config, kube), job_of(config_in(tmp_path)), lines=Full()).start()
        until(lambda: [text for text in waiting.told if text.startswith(("created", "found"))], "followed")
        return waiting

    return begin


def test_who_is_interrupted_leaves_the_job_to_those_that_wait_on(
    wait_as: Callable[[str | None], Waiting], operator: Operator, proxy: Proxy, admin: Kube
) -> None:
    """It loses one owner, and goes with the last one. Both are interrupted at once here: not both may leave it."""
    both = [wait_as("flow-3"), wait_as("flow-4")]
    until(lambda: len(operator.created()["metadata"]["ownerReferences"]) == 2, "two owners")
    operator.status("Running", "RUNNING")
    operator.print(operator.submitter(), "a line")
    for waiting in both:
        with pytest.raises(OSError, match="no space left"):
            waiting.result()

    said = sorted(waiting.told[-1] for waiting in both)

    space = admin.namespace
    assert said == [f"left in {space}: it belongs to 1 other workflow too", f"removed from {space}"]
    assert proxy.count("DELETE", "/rayjobs") == 1
    operator.collect_garbage()


def test_a_waiter_that_owns_nothing_leaves_a_workflows_job(
    wait_as: Callable[[str | None], Waiting], launch: Callable[..., Waiting], operator: Operator, admin: Kube
) -> None:
    """A laptop that looked on; whoever waits as a workflow has its end, and its lines."""
    task(admin, "task-of-flow-5", [{**WORKFLOW, "name": "flow-5", "uid": "uid-of-flow-5"}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KFP_POD_NAME", "task-of-flow-5")
        workflow = launch()
        until(lambda: workflow.told, "created")
    laptop = wait_as(None)
    operator.status("Running", "RUNNING")
    pod = operator.submitter()
    operator.print(pod, "a line")

    with pytest.raises(OSError, match="no space left"):
        laptop.result()

    assert laptop.told[-1] == f"left in {admin.namespace}: it belongs to 1 other workflow too"
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")
    assert workflow.result().succeeded
    assert workflow.lines == ["a line"]
    assert [owner["name"] for owner in operator.created()["metadata"]["ownerReferences"]] == ["flow-5"]


def test_an_owner_that_came_or_went_unseen_is_found_by_a_second_look(
    launch: Callable[..., Waiting], kube: Kube, operator: Operator
) -> None:
    """The change holds for these owners alone, and for this job alone."""
    waiting = launch()
    uid = operator.created()["metadata"]["uid"]
    mine, other = (
        {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": f"uid-{name}"} for name in ("mine", "other")
    )
    operator.patch({"metadata": {"ownerReferences": [other, mine]}})

    assert give_up(kube, operator.path, "uid-of-an-earlier-one", [other, mine], "uid-mine", limit_s=2) == ""
    assert give_up(kube, operator.path, uid, [mine, other], "uid-mine", limit_s=2).startswith("left in")

    assert [owner["name"] for owner in operator.created()["metadata"]["ownerReferences"]] == ["other"]
    operator.succeed()
    assert waiting.result().succeeded


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
