"""What k8s/ makes, before a real API server: it is taken as it stands, and rights and defaults hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError
from tests.cluster.operator import DEADLINE_S
from tests.manifests import OVERLAYS, built, of_kind

STRICT = {"fieldValidation": "Strict", "dryRun": "All"}
PATHS = {
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "LimitRange": "/api/v1/namespaces/{}/limitranges",
    "Namespace": "/api/v1/namespaces",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "PriorityClass": "/apis/scheduling.k8s.io/v1/priorityclasses",
    "ResourceQuota": "/api/v1/namespaces/{}/resourcequotas",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "Service": "/api/v1/namespaces/{}/services",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "StatefulSet": "/apis/apps/v1/namespaces/{}/statefulsets",
}
UNKNOWN = {"CronJob", "ClusterQueue", "LocalQueue", "ResourceFlavor", "WorkloadPriorityClass"}
"""Kinds that a server may lack: CronJobs of batch/v1 came with 1.21, and Kueue's with Kueue."""


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_server_takes_every_object_whole(admin: Kube, overlay: str) -> None:
    """A dry run of creating it. All that was sent comes back: an old server drops unknown fields in silence."""
    checked = []
    for item in built(overlay):
        if item["kind"] in UNKNOWN:
            continue
        if "namespace" in item["metadata"]:
            item["metadata"]["namespace"] = admin.namespace
        elif item["kind"] == "Namespace":
            item["metadata"]["name"] = f"{admin.namespace}-copy"
        found = admin.ask("POST", PATHS[item["kind"]].format(admin.namespace), body=item, query=STRICT)
        assert _lost(item, found) == [], item["kind"]
        checked.append(item["kind"])

    assert len(checked) > 20
    assert set(checked) >= set(PATHS) - {"PriorityClass"}


def test_a_field_that_the_server_does_not_know_is_noticed(admin: Kube) -> None:
    """The check can fail: refused by new servers, dropped by old ones."""
    item = of_kind(built("gpu"), "Deployment")["mlflow"]
    item["metadata"]["namespace"] = admin.namespace
    item["spec"]["template"]["spec"]["enableServiceLink"] = False
    try:
        lost = _lost(item, admin.ask("POST", PATHS["Deployment"].format(admin.namespace), body=item, query=STRICT))
    except RefusedError as refused:
        lost = [str(refused)]

    assert len(lost) == 1
    assert "enableServiceLink" in lost[0]


def _lost(sent: Any, found: Any, path: str = "") -> list[str]:
    """Paths of what was sent and did not come back as it was; quantities may be written otherwise."""
    if isinstance(sent, dict):
        if not isinstance(found, dict):
            return [path]
        return [lost for key, value in sent.items() for lost in _lost(value, found.get(key), f"{path}.{key}")]
    if isinstance(sent, list):
        if not isinstance(found, list) or len(sent) != len(found):
            return [path]
        return [lost for index, value in enumerate(sent) for lost in _lost(value, found[index], f"{path}[{index}]")]
    return [] if sent == found else [path]


def test_kubeflows_tasks_may_start_jobs_here_and_nothing_more(namespaces: Callable[[], Kube]) -> None:
    """By the server's own word about the account that Kubeflow's tasks run under."""
    kube = namespaces()
    for kind in ("Role", "RoleBinding"):
        for item in of_kind(built("gpu"), kind).values():
            item["metadata"]["namespace"] = kube.namespace
            kube.ask("POST", PATHS[kind].format(kube.namespace), body=item)

    allowed = {
        (verb, group, resource)
        for group, resource in (("ray.io", "rayjobs"), ("", "pods"), ("", "secrets"), ("batch", "jobs"))
        for verb in ("create", "get", "list", "delete")
        if _may(kube, verb, group, resource)
    }

    assert allowed == {
        ("create", "ray.io", "rayjobs"), ("get", "ray.io", "rayjobs"), ("delete", "ray.io", "rayjobs"),
        ("get", "", "pods"), ("list", "", "pods"),
    }  # fmt: skip


def _may(kube: Kube, verb: str, group: str, resource: str) -> bool:
    attributes = {"namespace": kube.namespace, "verb": verb, "group": group, "resource": resource}
    spec = {"user": "system:serviceaccount:kubeflow:pipeline-runner", "resourceAttributes": attributes}
    answer = kube.ask("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body={"spec": spec})
    return bool(answer["status"]["allowed"])


def test_a_pod_that_says_nothing_gets_the_namespaces_defaults(namespaces: Callable[[], Kube]) -> None:
    """Else the quota would refuse it."""
    kube = namespaces()
    limits = of_kind(built("gpu"), "LimitRange")["dpo"]
    limits["metadata"]["namespace"] = kube.namespace
    kube.ask("POST", PATHS["LimitRange"].format(kube.namespace), body=limits)
    pod = {"metadata": {"name": "plain"}, "spec": {"containers": [{"name": "plain", "image": "plain"}]}}

    end, given = time.monotonic() + DEADLINE_S, {}
    while not given and time.monotonic() < end:  # the server learns of a new LimitRange by a watch of its own
        found = kube.ask("POST", f"/api/v1/namespaces/{kube.namespace}/pods", body=pod, query={"dryRun": "All"})
        given = found["spec"]["containers"][0]["resources"]

    assert given == {"limits": {"memory": "1Gi"}, "requests": {"cpu": "100m", "memory": "256Mi"}}
