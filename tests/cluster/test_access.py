"""What a person reads who may not, or cannot, use the cluster. The refusals are the API server's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dpo_train.cluster import launcher as module
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import ClusterError, NoLoginError
from dpo_train.cluster.launcher import RayJobLauncher
from tests.cluster.jobs import Waiting, config_in, job_of
from tests.cluster.operator import Operator, until
from tests.cluster.proxy import Proxy


def refused(config_store: Path, kube: Kube) -> str:
    """The words with which a launch is refused; always as the user's mistake."""
    config = config_in(config_store)
    with pytest.raises(ClusterError) as caught:
        RayJobLauncher(config, kube).run(job_of(config), tell=print, line=print)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a kubeconfig nor a pod."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    with pytest.raises(NoLoginError, match=r"no login for a cluster.*KUBECONFIG.*export KUBECONFIG"):
        Kube()


@pytest.mark.parametrize("content", ["{", "[]", "apiVersion: v1\nkind: Config\n", "current-context: none"])
def test_a_login_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """A file, but no kubeconfig: an error in words, and no traceback."""
    (tmp_path / "config").write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    with pytest.raises(NoLoginError, match="cannot be used"):
        Kube()


def test_a_token_that_the_cluster_does_not_accept(
    proxy: Proxy, admin: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token itself is never shown."""
    file = proxy.kubeconfig(tmp_path / "config", namespace=admin.namespace, token="a-token-of-yesterday")
    monkeypatch.setenv("KUBECONFIG", str(file))

    words = refused(tmp_path, Kube())

    assert re.search("does not accept this login.*expired.*log in again", words)
    assert "yesterday" not in words


def test_a_certificate_that_is_not_trusted(
    admin: Kube, kubeconfig: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried again: it will be no other."""
    content = yaml.safe_load(Path(kubeconfig).read_text())
    for cluster in content["clusters"]:
        for key in ("certificate-authority", "certificate-authority-data"):
            cluster["cluster"].pop(key, None)
    (tmp_path / "config").write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    kube = Kube(admin.namespace)
    kube.pause = lambda _: pytest.fail("tried again")

    assert re.search("certificate .* not trusted.*certificate-authority", refused(tmp_path, kube))


def test_a_namespace_that_is_missing(kube: Kube, tmp_path: Path) -> None:
    """With the config's own key."""
    kube.namespace = "nowhere"

    assert re.search("namespace nowhere does not exist.*cluster.namespace", refused(tmp_path, kube))


def test_a_cluster_without_kuberay(kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An API version that this server does not serve stands for one without the CRDs."""
    monkeypatch.setattr(module, "API_VERSION", "ray.io/v9")

    assert "KubeRay is not installed" in refused(tmp_path, kube)


def test_an_account_without_rights(
    proxy: Proxy, admin: Kube, token_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verb, resource, account and namespace, and the command that grants it."""
    file = proxy.kubeconfig(tmp_path / "config", namespace=admin.namespace, token=token_of("dpo-worker"))
    monkeypatch.setenv("KUBECONFIG", str(file))

    words = refused(tmp_path, Kube())

    space = admin.namespace
    assert words.startswith(
        f"The service account {space}/dpo-worker may not get rayjobs in the namespace {space}. Got: "
    )
    assert f"--role=dpo-launcher --serviceaccount={space}:dpo-worker" in words


def test_a_quota_that_is_used_up(admin: Kube, namespaces: Callable[[], Kube]) -> None:
    """The server counts pods here: RayJobs are counted by servers that hold the CRDs themselves."""
    kube = namespaces()
    path = f"/api/v1/namespaces/{kube.namespace}/resourcequotas"
    kube.ask("POST", path, body={"metadata": {"name": "little"}, "spec": {"hard": {"pods": "0"}}})
    # The quota controller's part, which a test server may lack.
    status = {"status": {"hard": {"pods": "0"}, "used": {"pods": "0"}}}
    kube.ask("PATCH", f"{path}/little/status", body=status, content_type="application/merge-patch+json")
    pod = {"metadata": {"name": "one"}, "spec": {"containers": [{"name": "main", "image": "none"}]}}

    with pytest.raises(ClusterError, match=r"quota of the namespace .* does not allow it.*exceeded quota: little"):
        kube.ask("POST", f"/api/v1/namespaces/{kube.namespace}/pods", body=pod)


def test_the_launchers_rights_suffice_for_a_whole_run(
    proxy: Proxy,
    admin: Kube,
    token_of: Callable[[str], str],
    operator: Operator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The account dpo-launcher, no admin behind it: a job that failed, is replaced, waits, is asked why, and ends."""
    monkeypatch.setattr(module, "QUIET_S", 0.1)
    monkeypatch.setattr(module, "POLL_S", 0.01)
    file = proxy.kubeconfig(tmp_path / "config", namespace=admin.namespace, token=token_of("dpo-launcher"))
    monkeypatch.setenv("KUBECONFIG", str(file))
    first = Waiting(RayJobLauncher(config_in(tmp_path), Kube()), job_of(config_in(tmp_path))).start()
    operator.created()
    operator.status("Failed", "FAILED")
    assert not first.result().succeeded
    second = Waiting(first.launcher, first.job).start()
    operator.collect_garbage()
    until(lambda: [text for text in second.told if text.startswith("created")], "replaced")
    until(lambda: proxy.count("GET", "/events"), "asked why it does not begin")
    operator.succeed("a line")

    assert second.result().succeeded
    assert second.lines == ["a line"]
    assert not [text for text in first.told + second.told if "may not" in text]
    assert {method for method in ("GET", "POST", "PATCH", "DELETE") if proxy.count(method, "/rayjobs")} == {
        "GET",
        "POST",
        "PATCH",
        "DELETE",
    }
