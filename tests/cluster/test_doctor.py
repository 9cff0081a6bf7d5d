"""`dpo doctor` against a real API server: what is missing there is a line with its mend.

The server has no controllers and no kubelet: what they would write, such as a deployment's status, the tests do.
It cannot hold Kueue's CRDs, whose part is in tests/unit/cluster/test_doctor.py.
"""

from __future__ import annotations

import json
import secrets as random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cli import main
from dpo_train.cluster import kube as kube_module
from dpo_train.cluster.doctor import checks_of, installed, run
from dpo_train.cluster.kube import Kube
from dpo_train.config import RunConfig
from tests.cluster.doctor import config_for, core, lay, line, own_options, place
from tests.cluster.proxy import Proxy

__all__ = ["lay", "own_options", "place"]

VALUE = "c2VjcmV0LW9mLWEtdGVzdA=="  # "secret-of-a-test"


def test_versions_of_server_and_client(place: Kube) -> None:
    """Both are named."""
    found = line(config_for(place), "kubernetes")

    assert found.status == "pass"
    assert found.text.startswith("Kubernetes v1.")
    assert "client 3" in found.text


def test_a_namespace_that_is_not_there(place: Kube) -> None:
    """The mend is the command that makes it."""
    found = line(config_for(place, cluster={"namespace": "dpo-nowhere"}), "namespace")

    assert (found.status, found.text) == ("fail", "there is no namespace dpo-nowhere")
    assert "kubectl create namespace dpo-nowhere" in str(found.mend)
    assert line(config_for(place), "namespace").status == "pass"


def test_a_cluster_without_the_crds(place: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is asked for a version of RayJobs that it really has not."""
    assert line(config_for(place), "kuberay").status == "pass"
    monkeypatch.setattr(installed, "API_VERSION", "ray.io/v9")

    found = line(config_for(place), "kuberay")

    assert found.status == "fail"
    assert "does not know rayclusters and rayjobs of ray.io/v9" in found.text
    assert "install the KubeRay operator with its CRDs" in str(found.mend)
    assert line(config_for(place), "job").status == "unchecked"


@pytest.mark.parametrize(
    ("image", "ready", "status", "words"),
    [
        ("quay.io/kuberay/operator:v1.5.1", 1, "pass", "operator:v1.5.1"),
        ("quay.io/kuberay/operator:v1.3.2", 1, "fail", "too old"),
        ("quay.io/kuberay/operator:v1.5.1", 0, "fail", "not running"),
    ],
)
def test_the_operator(place: Kube, lay: Callable[..., str], image: str, ready: int, status: str, words: str) -> None:
    """It must run, and know what our manifest asks of it."""
    labels = {"app.kubernetes.io/name": "kuberay-operator"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "operator", "image": image}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod}
    lay(
        f"/apis/apps/v1/namespaces/{place.namespace}/deployments",
        {"metadata": {"name": "kuberay-operator", "labels": labels}, "spec": spec},
        {"availableReplicas": ready, "readyReplicas": ready, "replicas": 1},
    )

    found = line(config_for(place), "operator")

    assert found.status == status
    assert words in found.text


def test_an_operator_that_nobody_sees_may_be_the_providers(place: Kube) -> None:
    """No deployment is no proof of absence."""
    assert line(config_for(place), "operator").status == "unchecked"


def test_the_job_is_tried_and_not_made(place: Kube) -> None:
    """The API looks at the very RayJob; afterwards there is none."""
    found = line(config_for(place), "job")

    assert (found.status, found.text) == ("pass", "the API takes the RayJob (tried as a dry run)")
    assert place.ask("GET", f"/apis/ray.io/v1/namespaces/{place.namespace}/rayjobs")["items"] == []


def test_a_job_that_the_crds_do_not_know(place: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of a newer KubeRay, refused by the server's own strict validation."""
    real = installed.job_manifest

    def newer(config: RunConfig, namespace: str) -> dict[str, Any]:
        made = real(config, namespace)
        return {**made, "spec": {**made["spec"], "ofTomorrow": True}}

    monkeypatch.setattr(installed, "job_manifest", newer)

    found = line(config_for(place), "job")

    assert found.status == "fail"
    assert "ofTomorrow" in found.text
    assert "CRDs of this cluster are older" in str(found.mend)


def test_service_account(place: Kube, lay: Callable[..., str]) -> None:
    """A missing one is named with those that there are."""
    lay(core(place, "serviceaccounts"), {"metadata": {"name": "trainer"}})

    missing = line(config_for(place), "account")

    assert missing.status == "fail"
    assert "no service account dpo-worker" in missing.text
    assert "trainer" in missing.text
    assert "cluster.service_account" in str(missing.mend)
    assert line(config_for(place, cluster={"service_account": "trainer"}), "account").status == "pass"


def test_a_secret_with_the_wrong_key(place: Kube, lay: Callable[..., str]) -> None:
    """The name that is expected is said; what the Secret holds is not."""
    data = {"AWS_ACCESS_KEY_ID": VALUE, "AWS_SECRET_KEY": VALUE}
    lay(core(place, "secrets"), {"metadata": {"name": "dpo-credentials"}, "data": data})

    found = line(config_for(place), "secret dpo-credentials")

    assert found.status == "fail"
    assert "AWS_SECRET_KEY, which nobody reads; expected AWS_SECRET_ACCESS_KEY" in found.text
    assert VALUE not in repr(found)
    assert "secret-of-a-test" not in repr(found)


def test_a_pair_of_keys_may_be_in_two_secrets(place: Kube, lay: Callable[..., str]) -> None:
    """All Secrets become variables of the same pods."""
    for name, key in (("one", "AWS_ACCESS_KEY_ID"), ("two", "AWS_SECRET_ACCESS_KEY")):
        lay(core(place, "secrets"), {"metadata": {"name": name}, "data": {key: VALUE}})
    both, alone = (config_for(place, cluster={"secrets": names}) for names in (["one", "two"], ["one"]))

    assert line(both, "secret one").status == "pass"
    assert "AWS_ACCESS_KEY_ID without AWS_SECRET_ACCESS_KEY" in line(alone, "secret one").text


def test_a_secret_that_is_not_there(place: Kube) -> None:
    """The mend names the keys that this config needs, and the case in which none is needed."""
    found = line(config_for(place), "secret dpo-credentials")

    assert found.status == "fail"
    assert "MLFLOW_TRACKING_USERNAME" in str(found.mend)
    assert "cluster.secrets=[]" in str(found.mend)


def test_pull_secrets(place: Kube, lay: Callable[..., str]) -> None:
    """A Secret of another type is no registry's login."""
    lay(core(place, "secrets"), {"metadata": {"name": "plain"}, "data": {"password": VALUE}})
    docker = {".dockerconfigjson": "eyJhdXRocyI6IHt9fQ=="}
    body = {"metadata": {"name": "registry"}, "type": "kubernetes.io/dockerconfigjson", "data": docker}
    lay(core(place, "secrets"), body)
    config = config_for(place, cluster={"image_pull_secrets": ["plain", "registry", "none"]})

    found = {name: line(config, f"pull secret {name}") for name in ("plain", "registry", "none")}

    assert [each.status for each in found.values()] == ["fail", "pass", "fail"]
    assert "of type Opaque" in found["plain"].text
    assert "create secret docker-registry none" in str(found["none"].mend)


def test_priority_class(place: Kube, lay: Callable[..., str]) -> None:
    """Without it the pods are refused; those that are there are listed."""
    name = lay(
        "/apis/scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": f"p-{random.token_hex(4)}"}, "value": 7}
    )

    missing = line(config_for(place, cluster={"priority": "urgent"}), "priority")

    assert missing.status == "fail"
    assert name in missing.text
    assert line(config_for(place, cluster={"priority": name}), "priority").text == f"{name}, value 7"


def test_a_queue_without_kueue(place: Kube) -> None:
    """A job would be suspended for ever: that is said before."""
    found = line(config_for(place, cluster={"queue": "research"}), "queue")

    assert found.status == "fail"
    assert "Kueue is not installed" in found.text


def test_what_a_launcher_may_do(as_account: Callable[[str], Kube], place_of_roles: Kube) -> None:
    """The Role of k8s/base is enough for a run; what it cannot look at is not checkable, and no failure."""
    as_account("dpo-launcher")
    config = config_for(place_of_roles, cluster={"volumes": {"/data": "data"}, "priority": "p"})

    names = ("rights", "namespace", "operator", "account", "secret dpo-credentials", "claim data", "priority", "quota",
             "head node", "worker nodes")  # fmt: skip
    found = {name: line(config, name) for name in names}

    assert found.pop("rights").status == "pass"
    assert {each.status for each in found.values()} == {"unchecked"}
    assert all("may not look" in each.text for each in found.values())
    assert line(config, "job").status == "pass"


def test_missing_rights(as_account: Callable[[str], Kube], place_of_roles: Kube) -> None:
    """An account without rights: which, in which namespace, and the command that grants them."""
    as_account("dpo-worker")

    found = line(config_for(place_of_roles), "rights")

    assert found.status == "fail"
    assert "create, get, watch, patch, delete rayjobs; get, list pods; get pods/log; list events" in found.text
    assert f"kubectl -n {place_of_roles.namespace} create rolebinding" in str(found.mend)
    assert line(config_for(place_of_roles), "job").status == "unchecked"


def test_rights_of_kubeflows_tasks(place: Kube, lay: Callable[..., str]) -> None:
    """An administrator is told that the tasks' account may do nothing, before a pipeline finds out."""
    lay(core(place, "serviceaccounts"), {"metadata": {"name": "runner"}})
    kubeflow = {"host": "http://127.0.0.1:1", "namespace": place.namespace, "service_account": "runner"}
    config = config_for(place, kubeflow=kubeflow)

    found = line(config, "task rights")

    assert found.status == "fail"
    assert f"run as {place.namespace}/runner, which may not create" in found.text
    assert f"--serviceaccount={place.namespace}:runner" in str(found.mend)
    assert line(config, "task account").status == "pass"
    assert line(config, "task secret").status == "unchecked"


def test_a_judges_key_that_tasks_do_not_get(place: Kube) -> None:
    """Of a Secret's keys the pipeline's tasks get those of fixed names."""
    judge = {"kind": "endpoint", "url": "http://judge/v1", "model": "m", "api_key_variable": "JUDGE_KEY"}
    kubeflow = {"host": "http://127.0.0.1:1", "namespace": place.namespace}

    found = line(config_for(place, kubeflow=kubeflow, evaluate={"judge": judge}), "task secret")

    assert found.status == "fail"
    assert "no JUDGE_KEY" in found.text
    assert "OPENAI_API_KEY" in str(found.mend)


def test_an_api_that_is_away(place: Kube, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so, and the others that they could not be asked."""
    monkeypatch.setenv("KUBECONFIG", str(proxy.kubeconfig(tmp_path / "away", namespace=place.namespace)))
    monkeypatch.setattr(kube_module, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr("dpo_train.cluster.doctor.api.PATIENCE_S", 0.1)
    proxy.fault("*", ".", "refuse")
    config = config_for(place)
    wanted = {"kubernetes", "namespace", "rights", "head node", "quota", "job"}

    found = {each.name: each for each in run([check for check in checks_of(config) if check.name in wanted])}

    assert found.pop("kubernetes").status == "fail"
    assert {each.status for each in found.values()} == {"unchecked"}
    assert {each.text for each in found.values()} == {"the cluster cannot be asked, see the line `kubernetes`"}


def test_no_login(place: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are those of every other command."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))

    found = line(config_for(place), "kubernetes")

    assert found.status == "fail"
    assert "There is no login for a cluster" in found.text
    assert "export KUBECONFIG" in str(found.mend)


def test_the_command_prints_lines_and_json(
    place: Kube, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same findings in both; exit code 2, since something fails."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {path: org/model}\nprepare: {path: hf://some/data}\nstore: /data/dpo\n"
        "tracking: {uri: 'sqlite:////data/mlflow.db'}\n"
        f"cluster: {{launcher: rayjob, image: 'a/b:1', namespace: {place.namespace}, volumes: {{/data: team}}}}\n"
    )

    code = main(["doctor", str(path)])
    text = capsys.readouterr().out
    again = main(["doctor", str(path), "--json"])
    content = json.loads(capsys.readouterr().out)

    assert (code, again) == (2, 2)
    assert content["schema_version"] == 1
    assert content["ok"] is False
    lines = [each for each in text.splitlines() if each[:4] in {"pass", "FAIL", "?   "}]
    assert [each[6:].split("  ")[0] for each in lines] == [each["name"] for each in content["findings"]]
    assert "\x1b" not in text
    assert text.rstrip().endswith("not checkable")


@pytest.fixture
def place_of_roles(admin: Kube, roles: list[dict[str, Any]]) -> Kube:
    """The namespace that has the roles of k8s/base."""
    return admin
