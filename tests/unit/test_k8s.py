"""What k8s/ makes: it builds, is valid, restricted, closed to the network, and holds no secret."""

from __future__ import annotations

import argparse
import functools
import json
import operator
import re
from typing import Any

import pytest
import yaml

from dpo_train.cli import reap
from dpo_train.cluster.job import job_for
from dpo_train.cluster.rayjob import manifest
from tests.cluster.configs import CONFIGS, config_of
from tests.manifests import K8S, OVERLAYS, built, built_text, may_talk, of_kind
from tests.restricted import containers_of, pods_of, violations

SECRETS = {
    "dpo-credentials": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "dpo-mlflow": {"admin-password", "session-key", "database-password"},
}
"""The Secrets that people make, and the keys that pods cannot start without."""
KUEUE = "kueue.x-k8s.io/"
VERSIONS = ("1.32", "1.34", "1.37")
"""Of Kubernetes: the oldest that is still looked after somewhere, one between, the newest with schemas."""
PLATFORM = "dpo"
MLFLOW, POSTGRES, REAPER, S3 = (
    (PLATFORM, {"app.kubernetes.io/name": name}) for name in ("mlflow", "mlflow-postgres", "dpo-reaper", "s3")
)
RAY = (PLATFORM, {"ray.io/is-ray-node": "yes", "ray.io/cluster": "a"})
SUBMITTER = (PLATFORM, {"ray.io/originated-from-crd": "RayJob"})
STRANGER = (PLATFORM, {"app": "another"})
TASK = ("kubeflow", {"pipeline/runid": "r"})
OPERATOR = ("kuberay", {"app.kubernetes.io/name": "kuberay-operator"})
ELSEWHERE = ("default", {})
DNS = ("kube-system", {"k8s-app": "kube-dns"})
S3_OUTSIDE, METADATA = "52.216.0.1", "169.254.169.254"


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The objects of each overlay in turn."""
    return built(request.param)


def test_no_two_objects_are_the_same(objects: list[dict[str, Any]]) -> None:
    """And each is where it belongs: in the one namespace, or in none."""
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]

    assert len(set(names)) == len(names)
    assert {item["metadata"].get("namespace", PLATFORM) for item in objects} == {PLATFORM}
    assert all(item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "dpo" for item in objects)


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid_for_current_versions(objects: list[dict[str, Any]], version: str) -> None:
    """By Kubernetes' own schemas, and no field is unknown. Kueue's kinds are not in them."""
    validate = pytest.importorskip("kubernetes_validate")

    checked = [item for item in objects if not item["apiVersion"].startswith(KUEUE)]
    for item in checked:
        validate.validate(item, version, strict=True)

    assert {"CronJob", "Deployment", "StatefulSet", "NetworkPolicy"} <= {item["kind"] for item in checked}


def test_a_misspelt_field_is_not_valid() -> None:
    """The check can fail."""
    validate = pytest.importorskip("kubernetes_validate")
    cron = of_kind(built("gpu"), "CronJob")["dpo-reaper"]
    cron["spec"]["concurencyPolicy"] = "Forbid"

    with pytest.raises(validate.ValidationError, match="concurencyPolicy"):
        validate.validate(cron, VERSIONS[-1], strict=True)


def test_every_pod_is_restricted_and_the_namespace_enforces_it(objects: list[dict[str, Any]]) -> None:
    """Also beyond the standard: nothing is written outside volumes, and nobody but the reaper has a token."""
    pods = [pod for item in objects for pod in pods_of(item)]
    accounts = of_kind(objects, "ServiceAccount")

    assert len(pods) >= 3
    for where, pod in pods:
        assert violations(pod) == [], where
        assert all(each["securityContext"]["readOnlyRootFilesystem"] for each in containers_of(pod)), where
        account = accounts[pod["serviceAccountName"]]
        has_token = pod.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True))
        assert has_token == (pod["serviceAccountName"] == "dpo-reaper"), where
    [namespace] = of_kind(objects, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert accounts["default"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("path", "value", "violated"),
    [
        (("hostNetwork",), True, "hostNetwork"),
        (("volumes", 0, "hostPath"), {"path": "/"}, "hostPath"),
        (("securityContext", "runAsNonRoot"), False, "runAsNonRoot"),
        (("securityContext", "runAsUser"), 0, "runAsUser 0"),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "seccompProfile"),
        (("securityContext", "sysctls"), [{"name": "kernel.msgmax"}], "sysctl"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), True, "allowPrivilegeEscalation"),
        (("containers", 0, "securityContext", "privileged"), True, "privileged"),
        (("containers", 0, "securityContext", "capabilities"), {"drop": ["NET_RAW"]}, "capabilities.drop"),
        (("containers", 0, "securityContext", "capabilities", "add"), ["SYS_ADMIN"], "capabilities.add"),
        (("containers", 0, "securityContext", "procMount"), "Unmasked", "procMount"),
        (("containers", 0, "securityContext"), None, "allowPrivilegeEscalation"),
        (("containers", 0, "ports"), [{"hostPort": 80}], "hostPort"),
        (("initContainers",), [{"name": "first"}], "first: capabilities.drop"),
    ],
)
def test_rule_of_the_standard(path: tuple[Any, ...], value: object, violated: str) -> None:
    """The check can fail, field by field."""
    [(_, pod)] = pods_of(of_kind(built("gpu"), "Deployment")["mlflow"])
    *way, last = path
    functools.reduce(operator.getitem, way, pod)[last] = value

    assert violated in " ".join(violations(pod))


def test_secrets_are_named_and_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of who builds gets in; no Secret, no generator of one, no literal under a secret's name."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "PGPASSWORD"):
        monkeypatch.setenv(name, f"planted-{name}")
    built_text.cache_clear()
    for overlay in OVERLAYS:
        text, objects = built_text(overlay), built(overlay)
        assert "planted-" not in text
        assert not of_kind(objects, "Secret")
        assert re.findall(r"[a-z+0-9]+://[^/\s]*:[^/\s]*@", text) == []
        for where, pod in (pod for item in objects for pod in pods_of(item)):
            for container in containers_of(pod):
                words = " ".join([*container.get("command", []), *container.get("args", [])])
                assert not re.search(r"(?i)password|secret|token|key", words), where
                for variable in container.get("env", []):
                    secret = re.search(r"(?i)password$|secret|token|_key", variable["name"])
                    assert not secret or "value" not in variable, (where, variable["name"])
    for file in K8S.rglob("kustomization.yaml"):
        assert "secretGenerator" not in yaml.safe_load(file.read_text())
    for name in CONFIGS:
        config = config_of(name)
        assert "planted-" not in json.dumps(manifest(job_for("train", config, {}), config, namespace=PLATFORM))


def test_what_pods_name_is_there_or_is_made_by_hand(objects: list[dict[str, Any]]) -> None:
    """Claims, settings, accounts, hosts; and of Secrets nothing but what docs/install.md makes, none of it optional."""
    names = {kind: set(of_kind(objects, kind)) for kind in ("ConfigMap", "ServiceAccount", "PriorityClass")}
    claims = set(of_kind(objects, "PersistentVolumeClaim"))
    for where, pod in (pod for item in objects for pod in pods_of(item)):
        assert pod["serviceAccountName"] in names["ServiceAccount"], where
        assert pod.get("priorityClassName") in names["PriorityClass"] | {None}, where
        for volume in pod["volumes"]:
            assert volume.get("configMap", {}).get("name") in names["ConfigMap"] | {None}, where
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in claims | {None}, where
        for container in containers_of(pod):
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in names["ConfigMap"], where
    manual = (K8S.parent / "docs" / "install.md").read_text()
    for name, key in _secret_keys(objects):
        assert key in SECRETS[name]
        assert f"create secret generic {name}" in manual
        assert key in manual
    assert {name for name, _ in _secret_keys(objects)} == set(SECRETS)


def _secret_keys(objects: list[dict[str, Any]]) -> set[tuple[str, str]]:
    found = set()
    for _, pod in (pod for item in objects for pod in pods_of(item)):
        for volume in pod["volumes"]:
            secret = volume.get("secret", {})
            found |= {(secret["secretName"], item["key"]) for item in secret.get("items", [])}
        for container in containers_of(pod):
            assert not any("secretRef" in source for source in container.get("envFrom", []))
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    assert not reference.get("optional")
                    found.add((reference["name"], reference["key"]))
    return found


def test_nothing_is_exposed(objects: list[dict[str, Any]]) -> None:
    """Neither by a kind of object nor by a kind of Service, and the quota refuses what others would add."""
    assert not {"Ingress", "HTTPRoute", "Gateway", "Route"} & {item["kind"] for item in objects}
    assert all(item["spec"].get("type", "ClusterIP") == "ClusterIP" for item in of_kind(objects, "Service").values())
    hard = of_kind(objects, "ResourceQuota")["dpo"]["spec"]["hard"]
    assert (hard["services.loadbalancers"], hard["services.nodeports"]) == ("0", "0")


@pytest.mark.parametrize(
    ("sender", "receiver", "port", "allowed"),
    [
        (RAY, RAY, 6379, True),
        (RAY, MLFLOW, 5000, True),
        (RAY, S3_OUTSIDE, 443, True),
        (RAY, METADATA, 443, False),
        (RAY, METADATA, 80, False),
        (RAY, S3_OUTSIDE, 80, False),
        (RAY, POSTGRES, 5432, False),
        (RAY, ELSEWHERE, 80, False),
        (SUBMITTER, RAY, 8265, True),
        (SUBMITTER, RAY, 6379, False),
        (SUBMITTER, S3_OUTSIDE, 443, False),
        (OPERATOR, RAY, 8265, True),
        (OPERATOR, RAY, 10001, False),
        (OPERATOR, MLFLOW, 5000, False),
        (TASK, MLFLOW, 5000, True),
        (TASK, POSTGRES, 5432, False),
        (TASK, RAY, 8265, False),
        (MLFLOW, POSTGRES, 5432, True),
        (MLFLOW, S3_OUTSIDE, 443, True),
        (MLFLOW, RAY, 8265, False),
        (POSTGRES, S3_OUTSIDE, 443, False),
        (POSTGRES, MLFLOW, 5000, False),
        (REAPER, S3_OUTSIDE, 443, True),
        (REAPER, S3_OUTSIDE, 6443, True),
        (REAPER, RAY, 8265, False),
        (STRANGER, RAY, 8265, False),
        (STRANGER, MLFLOW, 5000, False),
        (STRANGER, S3_OUTSIDE, 443, False),
        (ELSEWHERE, RAY, 8265, False),
        (ELSEWHERE, MLFLOW, 5000, False),
        (ELSEWHERE, POSTGRES, 5432, False),
    ],
)
def test_who_may_talk_to_whom(
    objects: list[dict[str, Any]], sender: Any, receiver: Any, port: int, allowed: bool
) -> None:
    """By the policies' own meaning, in each overlay. Everyone asks DNS."""
    policies = of_kind(objects, "NetworkPolicy").values()

    assert may_talk(policies, sender, receiver, port) is allowed
    assert may_talk(policies, sender, DNS, 53, "UDP")


def test_kind_has_its_own_s3() -> None:
    """For those that store something, here and in Kubeflow's namespace."""
    policies = of_kind(built("kind"), "NetworkPolicy").values()

    assert [who for who in (RAY, MLFLOW, TASK) if not may_talk(policies, who, S3, 9000)] == []
    assert [who for who in (POSTGRES, REAPER, ELSEWHERE, S3) if may_talk(policies, who, S3, 9000)] == []


def test_every_container_has_requests_and_fits_the_quota(objects: list[dict[str, Any]]) -> None:
    """The quota counts requests and memory's limits: a container without them would be refused."""
    hard = of_kind(objects, "ResourceQuota")["dpo"]["spec"]["hard"]
    total = {"cpu": 0.0, "memory": 0.0}
    for where, pod in (pod for item in objects for pod in pods_of(item)):
        for container in pod["containers"]:
            resources = container["resources"]
            assert set(resources["requests"]) >= {"cpu", "memory"}, where
            assert _number(resources["limits"]["memory"]) >= _number(resources["requests"]["memory"]), where
            for name in total:
                total[name] += _number(resources["requests"][name])

    assert total["cpu"] < 0.5 * _number(hard["requests.cpu"])
    assert total["memory"] < 0.5 * _number(hard["requests.memory"])


def _number(quantity: str) -> float:
    units = {"m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "": 1.0}
    found = re.fullmatch(r"([0-9.]+)(m|Mi|Gi|Ti|)", quantity)
    assert found, quantity
    return float(found[1]) * units[found[2]]


def test_gpus_are_queued_where_they_are_and_nowhere_else() -> None:
    """The namespace's quota holds what the queue may admit, and only who asks for it is put on GPUs that may go."""
    objects = built("gpu")
    [queue] = of_kind(objects, "ClusterQueue").values()
    [group] = queue["spec"]["resourceGroups"]
    gpus = sum(
        int(resource["nominalQuota"])
        for flavor in group["flavors"]
        for resource in flavor["resources"]
        if resource["name"] == "nvidia.com/gpu"
    )
    [namespace] = of_kind(objects, "Namespace").values()

    assert gpus <= int(of_kind(objects, "ResourceQuota")["dpo"]["spec"]["hard"]["requests.nvidia.com/gpu"])
    assert {flavor["name"] for flavor in group["flavors"]} == set(of_kind(objects, "ResourceFlavor"))
    assert queue["spec"]["namespaceSelector"]["matchLabels"].items() <= namespace["metadata"]["labels"].items()
    assert [item["spec"]["clusterQueue"] for item in of_kind(objects, "LocalQueue").values()] == ["dpo"]
    # cluster.priority is written to the pods and to the job.
    workload = of_kind(objects, "WorkloadPriorityClass")
    assert set(workload) <= set(of_kind(objects, "PriorityClass"))
    spot = of_kind(objects, "ResourceFlavor")["dpo-gpu-spot"]["spec"]
    assert "dpo.dev/spot" not in {each["key"] for each in spot["tolerations"]}


def test_reaper_runs_a_command_that_there_is(objects: list[dict[str, Any]]) -> None:
    """The image's entry point is `dpo`."""
    [(_, pod)] = pods_of(of_kind(objects, "CronJob")["dpo-reaper"])
    command, *arguments = pod["containers"][0]["args"]
    parser = argparse.ArgumentParser()
    reap.add_arguments(parser)

    assert (command, parser.parse_args(arguments).dry_run) == ("reap", False)
    assert of_kind(objects, "CronJob")["dpo-reaper"]["spec"]["concurrencyPolicy"] == "Forbid"
