"""k8s/base/roles.yaml: exactly what each account may do, by the API server's own word, with the account's own token."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError

VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
RESOURCES = (
    "ray.io/rayjobs",
    "ray.io/rayjobs/status",
    "ray.io/rayclusters",
    "ray.io/rayservices",
    "/pods",
    "/pods/log",
    "/pods/exec",
    "/events",
    "/secrets",
    "/configmaps",
    "/serviceaccounts",
    "/serviceaccounts/token",
    "/persistentvolumeclaims",
    "batch/jobs",
    "rbac.authorization.k8s.io/roles",
    "rbac.authorization.k8s.io/rolebindings",
)
ALLOWED: dict[str, set[tuple[str, str]]] = {
    "dpo-launcher": {
        ("create", "ray.io/rayjobs"),
        ("get", "ray.io/rayjobs"),
        ("watch", "ray.io/rayjobs"),
        ("patch", "ray.io/rayjobs"),
        ("delete", "ray.io/rayjobs"),
        ("get", "/pods"),
        ("list", "/pods"),
        ("get", "/pods/log"),
        ("list", "/events"),
    },
    "dpo-worker": set(),
    "dpo-reaper": {("list", "ray.io/rayjobs"), ("delete", "ray.io/rayjobs")},
}


@pytest.mark.parametrize("account", ALLOWED)
def test_an_account_may_do_this_and_nothing_else(as_account: Callable[[str], Kube], account: str) -> None:
    """All verbs on all resources that could matter, here and in another namespace."""
    kube = as_account(account)

    here = {(verb, what) for what in RESOURCES for verb in VERBS if _may(kube, verb, what, kube.namespace)}
    elsewhere = {(verb, what) for verb, what in here if _may(kube, verb, what, "default")}

    assert here == ALLOWED[account]
    assert elsewhere == set()


@pytest.mark.parametrize("account", ALLOWED)
def test_the_server_acts_by_the_table(as_account: Callable[[str], Kube], account: str) -> None:
    """Real requests, one for each kind of resource."""
    kube = as_account(account)
    core, ray = f"/api/v1/namespaces/{kube.namespace}", f"/apis/ray.io/v1/namespaces/{kube.namespace}"
    requests = {
        ("get", "ray.io/rayjobs"): ("GET", f"{ray}/rayjobs/none"),
        ("list", "ray.io/rayjobs"): ("GET", f"{ray}/rayjobs"),
        ("delete", "ray.io/rayjobs"): ("DELETE", f"{ray}/rayjobs/none"),
        ("get", "/pods"): ("GET", f"{core}/pods/none"),
        ("list", "/pods"): ("GET", f"{core}/pods"),
        ("list", "/events"): ("GET", f"{core}/events"),
        ("list", "/secrets"): ("GET", f"{core}/secrets"),
    }

    forbidden = {what for what, (method, path) in requests.items() if _is_forbidden(kube, method, path)}

    assert forbidden == set(requests) - ALLOWED[account]


def _may(kube: Kube, verb: str, what: str, namespace: str) -> bool:
    group, _, resource = what.partition("/")
    name, _, sub = resource.partition("/")
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": name, "subresource": sub}
    answer = kube.ask(
        "POST",
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        body={"spec": {"resourceAttributes": attributes}},
    )
    return bool(answer["status"]["allowed"])


def _is_forbidden(kube: Kube, method: str, path: str) -> bool:
    try:
        kube.ask(method, path)
    except RefusedError as refused:
        return refused.status == 403
    return False
