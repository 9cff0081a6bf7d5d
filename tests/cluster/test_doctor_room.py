"""`dpo doctor` against a real API server: is there room? Nodes, quotas and limits, claims and storage classes."""

from __future__ import annotations

import secrets as random
from collections.abc import Callable
from typing import Any

import pytest

from dpo_train.cluster.kube import Kube
from tests.cluster.doctor import NODES, config_for, core, lay, line, own_options, place

__all__ = ["lay", "own_options", "place"]


def node(name: str, labels: dict[str, str], *taints: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "spec": {"taints": list(taints)}}


def size(cpu: int, memory: str, **more: str) -> dict[str, Any]:
    resources = {"cpu": str(cpu), "memory": memory, "pods": "100", **more}
    return {"allocatable": resources, "capacity": resources}


GPUS = {"nvidia.com/gpu": "8"}


def _claim(name: str, storage_class: str | None = None, mode: str = "ReadWriteMany") -> dict[str, Any]:
    spec: dict[str, Any] = {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    return {"metadata": {"name": name}, "spec": spec}


@pytest.fixture
def storage_class(lay: Callable[..., str]) -> str:
    body = {"metadata": {"name": f"fast-{random.token_hex(3)}"}, "provisioner": "example.com/none"}
    return lay("/apis/storage.k8s.io/v1/storageclasses", {**body, "volumeBindingMode": "WaitForFirstConsumer"})


def test_claims(place: Kube, lay: Callable[..., str], storage_class: str) -> None:
    """Bound, waiting for its first pod, without its storage class, and not there at all."""
    claims = core(place, "persistentvolumeclaims")
    lay(claims, _claim("bound"), {"phase": "Bound", "capacity": {"storage": "1Gi"}})
    lay(claims, _claim("waiting", storage_class), {"phase": "Pending"})
    lay(claims, _claim("classless", "gold"), {"phase": "Pending"})
    lay(claims, _claim("lost"), {"phase": "Lost"})
    config = config_for(
        place,
        cluster={"volumes": {"/a": "bound", "/b": "waiting", "/c": "classless", "/d": "none"}, "model_cache": "lost"},
    )

    found = {name: line(config, f"claim {name}") for name in ("bound", "waiting", "classless", "none", "lost")}

    assert [each.status for each in found.values()] == ["pass", "pass", "fail", "fail", "fail"]
    assert "wants the storage class gold, which is not there" in found["classless"].text
    assert storage_class in found["classless"].text
    assert "storageClassName" in str(found["classless"].mend)
    assert "bound, classless, lost, waiting" in found["none"].text


def test_an_unknown_gpu_type(place: Kube, lay: Callable[..., str]) -> None:
    """Those that are there are listed, and the nearest is the mend."""
    kind = f"NVIDIA-H100-{random.token_hex(4)}"
    name = lay(NODES, node(f"gpu-{random.token_hex(4)}", {"nvidia.com/gpu.product": kind}), size(64, "512Gi", **GPUS))
    workers = {"gpus": 8, "gpu_type": f"{kind}-SXM", "memory": "256Gi", "cpus": 32}

    found = line(config_for(place, cluster={"workers": workers}), "gpu nodes")

    assert name
    assert found.status == "fail"
    assert f"no node has nvidia.com/gpu.product={kind}-SXM" in found.text
    assert f"{kind} (1)" in found.text
    assert f"set cluster.workers.gpu_type={kind}" in str(found.mend)


@pytest.mark.parametrize(
    ("workers", "status", "words"),
    [
        ({"gpus": 8}, "pass", "room for 1 worker pods"),
        ({"gpus": 16}, "fail", "16 nvidia.com/gpu (the largest node has 8)"),
        ({"gpus": 8, "memory": "2Ti"}, "fail", "2048Gi memory (the largest node has 512Gi)"),
        ({"gpus": 8, "pods": 3}, "fail", "room for 1 of 3 worker pods"),
        ({"gpus": 2, "gpu_resource": "amd.com/gpu"}, "fail", "none of 1 nodes offers amd.com/gpu"),
    ],
)
def test_gpus_of_nodes(place: Kube, lay: Callable[..., str], workers: dict[str, Any], status: str, words: str) -> None:
    """A node's allocatable resources against what a worker asks for."""
    kind = f"T-{random.token_hex(4)}"
    lay(NODES, node(f"gpu-{random.token_hex(4)}", {"nvidia.com/gpu.product": kind}), size(64, "512Gi", **GPUS))

    found = line(config_for(place, cluster={"workers": {"gpu_type": kind, **workers}}), "gpu nodes")

    assert (found.status, words in found.text) == (status, True), found


def test_a_taint_that_nobody_tolerates(place: Kube, lay: Callable[..., str]) -> None:
    """The GPUs' own taint is left to the cluster; another one needs a toleration."""
    kind = f"T-{random.token_hex(4)}"
    taints = [
        {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
        {"key": "team", "value": "vision", "effect": "NoSchedule"},
    ]
    body = node(f"gpu-{random.token_hex(4)}", {"nvidia.com/gpu.product": kind}, *taints)
    lay(NODES, body, size(64, "512Gi", **GPUS))
    workers = {"gpus": 8, "gpu_type": kind}
    tolerant = {**workers, "tolerations": [{"key": "team", "operator": "Exists"}]}

    found = line(config_for(place, cluster={"workers": workers}), "gpu nodes")

    assert found.status == "fail"
    assert "tainted: team=vision:NoSchedule" in found.text
    assert line(config_for(place, cluster={"workers": tolerant}), "gpu nodes").status == "pass"


def test_a_quota_that_is_too_small(place: Kube, lay: Callable[..., str]) -> None:
    """Head, workers and submitter together, against what others leave."""
    hard = {"requests.cpu": "16", "requests.memory": "64Gi", "pods": "10"}
    lay(core(place, "resourcequotas"), {"metadata": {"name": "team"}, "spec": {"hard": hard}},
        {"hard": hard, "used": {"requests.cpu": "10", "requests.memory": "0", "pods": "0"}})  # fmt: skip
    small = {"cpus": 1, "memory": "1Gi"}

    fits = line(config_for(place, cluster={"head": small, "workers": {**small, "pods": 2}}), "quota")
    later = line(config_for(place, cluster={"head": small, "workers": {**small, "pods": 6}}), "quota")
    never = line(
        config_for(place, cluster={"head": small, "workers": {"cpus": 8, "memory": "48Gi", "pods": 2}}), "quota"
    )

    assert fits.status == "pass"
    assert "requests.cpu: needs 7.5, 6 left of 16 (team)" in later.text
    assert str(later.mend).startswith("wait until other jobs have ended")
    assert "requests.memory: needs 97.5Gi, 64Gi left of 64Gi" in never.text
    assert not str(never.mend).startswith("wait")


def test_a_pod_larger_than_the_namespace_allows(place: Kube, lay: Callable[..., str]) -> None:
    """KubeRay's pods would be refused, long after the job was taken."""
    rules = [
        {"type": "Container", "max": {"memory": "32Gi"}},
        {"type": "PersistentVolumeClaim", "max": {"storage": "1Gi"}},
    ]
    lay(core(place, "limitranges"), {"metadata": {"name": "sizes"}, "spec": {"limits": rules}})

    fits = line(config_for(place), "limits")
    large = line(config_for(place, cluster={"workers": {"memory": "48Gi"}}), "limits")

    assert fits.status == "pass"
    assert (large.status, large.text.partition(": ")[2]) == ("fail", "worker pod: memory 48Gi, at most 32Gi (sizes)")
