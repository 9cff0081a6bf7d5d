"""Volume claims, and the storage classes that are to fill them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo_train.cluster.doctor.answers import Answer, failed, passed
from dpo_train.cluster.doctor.api import find, in_namespace, listed, names, there
from dpo_train.cluster.kube import Kube
from dpo_train.config import RunConfig

_CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
_DEFAULT = "storageclass.kubernetes.io/is-default-class"


def claims_of(config: RunConfig) -> tuple[str, ...]:
    """Every claim that pods mount, once."""
    cache = (config.cluster.model_cache,) if config.cluster.model_cache is not None else ()
    return tuple(dict.fromkeys((*config.cluster.volumes.values(), *cache)))


def claim(name: str) -> Callable[[Kube, RunConfig], Answer]:
    """A check of one claim."""

    def look(kube: Kube, _: RunConfig) -> Answer:
        path = in_namespace(kube, "persistentvolumeclaims")
        found = find(kube, f"{path}/{name}")
        if found is None:
            return failed(
                f"there is no volume claim {name} in {kube.namespace}; there are: {there(kube, path)}",
                "have it made, or name another one in cluster.volumes or cluster.model_cache",
            )
        return _judged(kube, found)

    return look


def _judged(kube: Kube, found: dict[str, Any]) -> Answer:
    name, phase = found["metadata"]["name"], found.get("status", {}).get("phase", "Pending")
    modes = found["spec"].get("accessModes", [])
    if modes == ["ReadWriteOncePod"]:
        return failed(
            f"{name} may be mounted by one pod alone (ReadWriteOncePod), and a job has several",
            "make it with the access mode ReadWriteMany",
        )
    if phase == "Bound":
        size = found.get("status", {}).get("capacity", {}).get("storage", "unknown size")
        note = "" if _is_shared(modes) else "; its mode lets it be mounted on one node at a time"
        return passed(f"{name} is bound, {size}{note}")
    if phase == "Lost":
        return failed(f"{name} has lost its volume", f"make it anew: kubectl -n {kube.namespace} delete pvc {name}")
    return _pending(kube, name, found["spec"].get("storageClassName"))


def _pending(kube: Kube, name: str, wanted: str | None) -> Answer:
    """Why a claim has no volume: mostly its storage class."""
    describe = f"kubectl -n {kube.namespace} describe pvc {name} says why"
    if wanted == "":
        return failed(f"{name} waits for a volume that somebody makes by hand", describe)
    classes = listed(kube, _CLASSES)
    if wanted is None:
        chosen = next((each for each in classes if _is_default(each)), None)
        if chosen is None:
            return failed(
                f"{name} names no storage class, and none is the default; there are: {names(classes)}",
                "make the claim anew with storageClassName set to one of them",
            )
    else:
        chosen = next((each for each in classes if each["metadata"]["name"] == wanted), None)
        if chosen is None:
            return failed(
                f"{name} wants the storage class {wanted}, which is not there; there are: {names(classes)}",
                "make the claim anew with storageClassName set to one of them, or have the class made",
            )
    if chosen.get("volumeBindingMode") == "WaitForFirstConsumer":
        return passed(f"{name} gets its volume with the first pod ({chosen['metadata']['name']})")
    return failed(f"{name} is not bound yet ({chosen['metadata']['name']})", f"wait a minute; else {describe}")


def _is_shared(modes: list[str]) -> bool:
    return bool({"ReadWriteMany", "ReadOnlyMany"} & set(modes))


def _is_default(storage_class: dict[str, Any]) -> bool:
    annotations = storage_class["metadata"].get("annotations") or {}
    return str(annotations.get(_DEFAULT)) == "true"
