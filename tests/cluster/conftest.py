"""A namespace on the cluster that KUBECONFIG names, a proxy before it, and jobs that threads wait for.

Without KUBECONFIG every test here is skipped. The cluster needs KubeRay's CRDs and no operator: the tests play it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_train.cluster import rayjob_logs
from dpo_train.cluster.kube import MERGE_PATCH, Kube
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.cluster.launcher import RayJobLauncher
from tests.cluster.jobs import Waiting, config_in, job_of, without_pauses
from tests.cluster.operator import Operator
from tests.cluster.proxy import Proxy

pytest.importorskip("kubernetes")
ROLES = Path(__file__).parents[2] / "k8s" / "base" / "roles.yaml"
API_OF = {
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
}


@pytest.fixture(scope="session", autouse=True)
def kubeconfig() -> str:
    """The cluster's address and login."""
    path = os.environ.get("KUBECONFIG", "")
    if not path:
        pytest.skip("needs a cluster with KubeRay's CRDs: set KUBECONFIG")
    return path


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs are looked for often."""
    monkeypatch.setattr(rayjob_logs, "POLL_S", 0.1)


@pytest.fixture(scope="session")
def namespaces(kubeconfig: str) -> Iterator[Callable[[], Kube]]:
    """Makes namespaces, which are deleted with what is in them when the session ends."""
    made: list[Kube] = []

    def make() -> Kube:
        kube = Kube(f"dpo-test-{secrets.token_hex(4)}")
        kube.ask("POST", "/api/v1/namespaces", body={"metadata": {"name": kube.namespace}})
        made.append(kube)
        return kube

    yield make
    for kube in made:
        _remove(kube)


@pytest.fixture(scope="session")
def admin(namespaces: Callable[[], Kube]) -> Kube:
    """The session's namespace, with all rights."""
    return namespaces()


@pytest.fixture(scope="session")
def _one_proxy(kubeconfig: str) -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@pytest.fixture
def proxy(_one_proxy: Proxy) -> Iterator[Proxy]:
    """The proxy, without rules and with an empty memory."""
    _one_proxy.clear()
    yield _one_proxy
    _one_proxy.clear()


@pytest.fixture
def pauses() -> list[float]:
    """The pauses, in seconds, that ``kube`` was to make and has not: it makes a hundredth of a second each."""
    return []


@pytest.fixture
def kube(proxy: Proxy, admin: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> Kube:
    """The session's namespace by way of the proxy."""
    for name in ("KFP_POD_NAME", "KFP_POD_UID", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    file = proxy.kubeconfig(tmp_path / "kubeconfig", namespace=admin.namespace)
    monkeypatch.setenv("KUBECONFIG", str(file))
    return without_pauses(Kube(), pauses)


@pytest.fixture
def roles(admin: Kube) -> Iterator[list[dict[str, Any]]]:
    """``k8s/base/roles.yaml``, applied in the session's namespace for the length of a test; what it holds."""
    objects = [item for item in yaml.safe_load_all(ROLES.read_text()) if item]
    for item in objects:
        item["metadata"]["namespace"] = admin.namespace
        for subject in item.get("subjects", []):
            subject["namespace"] = admin.namespace
        admin.ask("POST", API_OF[item["kind"]].format(admin.namespace), body=item)
    yield objects
    for item in objects:
        admin.ask("DELETE", f"{API_OF[item['kind']].format(admin.namespace)}/{item['metadata']['name']}")


@pytest.fixture
def token_of(admin: Kube, roles: list[dict[str, Any]]) -> Callable[[str], str]:
    """A real token of a service account, as the API gives it."""

    def make(account: str) -> str:
        path = f"/api/v1/namespaces/{admin.namespace}/serviceaccounts/{account}/token"
        return str(admin.ask("POST", path, body={"spec": {"expirationSeconds": 3600}})["status"]["token"])

    return make


@pytest.fixture
def launch(kube: Kube, tmp_path: Path) -> Callable[..., Waiting]:
    """Starts to run a job in a thread."""

    def start(**cluster: Any) -> Waiting:
        # A job's name comes from its config; here it is always the same one, so that specs can meet under one name.
        return Waiting(RayJobLauncher(config_in(tmp_path, **cluster), kube), job_of(config_in(tmp_path))).start()

    return start


@pytest.fixture
def operator(admin: Kube, proxy: Proxy, tmp_path: Path) -> Operator:
    """The operator of the job that ``launch`` starts."""
    return Operator(admin, proxy, job_of(config_in(tmp_path)).name)


def _remove(kube: Kube) -> None:
    """What the namespace controller does, which a test server may lack."""
    name = kube.namespace
    rayjobs = f"/apis/ray.io/v1/namespaces/{name}/rayjobs"
    for found in kube.ask("GET", rayjobs)["items"]:  # of which some may wait for a garbage collector
        body = {"metadata": {"finalizers": None}}
        kube.ask("PATCH", f"{rayjobs}/{found['metadata']['name']}", body=body, content_type=MERGE_PATCH)
    for collection in (rayjobs, f"/api/v1/namespaces/{name}/pods"):
        kube.ask("DELETE", collection, query={"gracePeriodSeconds": "0"})
    kube.ask("DELETE", f"/api/v1/namespaces/{name}")
    try:
        left = kube.ask("GET", f"/api/v1/namespaces/{name}")
        left["spec"]["finalizers"] = []
        kube.ask("PUT", f"/api/v1/namespaces/{name}/finalize", body=left)
    except RefusedError as refused:
        if refused.status not in {404, 409}:  # the controller was faster
            raise


@pytest.fixture
def as_account(
    proxy: Proxy, admin: Kube, token_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Kube]:
    """A client with nothing but an account's token; KUBECONFIG becomes the account's."""

    def make(account: str) -> Kube:
        file = proxy.kubeconfig(tmp_path / account, namespace=admin.namespace, token=token_of(account))
        monkeypatch.setenv("KUBECONFIG", str(file))
        return Kube()

    return make
