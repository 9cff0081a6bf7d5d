"""Why a job does not begin: what its pods' states and the cluster's events say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo_train.cluster.kube import Kube
from dpo_train.errors import DpoError

PATIENCE_S = 10.0
"""Reasons can wait; whether the API is away for good, the watch of the job finds out."""
_HOPELESS = {"InvalidImageName"}
"""Nothing that happens in the cluster mends these; everything else may yet: a node comes, a Secret, an image."""
_ORDINARY = {"ContainerCreating", "PodInitializing"}


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """What keeps a job from beginning."""

    text: str
    hopeless: bool = False


def obstacles(kube: Kube, name: str, cluster: str | None) -> list[Obstacle]:
    """What is in the way of a job, each thing once; empty also where the caller may not look.

    Args:
        cluster: name of its RayCluster, if it has one yet.
    """
    pods = _pods(kube, f"job-name={name}") + ([] if cluster is None else _pods(kube, f"ray.io/cluster={cluster}"))
    found = [obstacle for pod in pods for obstacle in _of_pod(pod)]
    # Not of pods that wait for others: Ray's workers and submitter do until the head is there.
    names = {name, cluster, *(pod["metadata"]["name"] for pod in pods)}
    told = " ".join(obstacle.text for obstacle in found)
    found += [event for event in _of_events(kube, names) if event.text.split(": ")[1] not in told]
    return list({obstacle.text: obstacle for obstacle in found}.values())


def _pods(kube: Kube, selector: str) -> list[dict[str, Any]]:
    return _listed(kube, "pods", {"labelSelector": selector})


def _listed(kube: Kube, kind: str, query: dict[str, str]) -> list[dict[str, Any]]:
    path = f"/api/v1/namespaces/{kube.namespace}/{kind}"
    try:
        answer = kube.ask("GET", path, query={"limit": "500", **query}, patience_s=PATIENCE_S)
    except DpoError:
        return []
    return list(answer["items"])


def _of_pod(pod: dict[str, Any]) -> Iterator[Obstacle]:
    status, kind = pod.get("status", {}), _kind(pod)
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield Obstacle(text=_text(kind, "FailedScheduling", condition.get("message")))
    for container in (status.get("initContainerStatuses") or []) + (status.get("containerStatuses") or []):
        waiting = container.get("state", {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        if reason and reason not in _ORDINARY:
            yield Obstacle(text=_text(kind, reason, waiting.get("message")), hopeless=reason in _HOPELESS)


def _of_events(kube: Kube, names: set[Any]) -> Iterator[Obstacle]:
    for event in _listed(kube, "events", {"fieldSelector": "type=Warning"}):
        subject = event.get("involvedObject", {})
        if subject.get("name") in names:
            what = "pod" if subject.get("kind") == "Pod" else str(subject.get("kind"))
            yield Obstacle(text=_text(what, str(event.get("reason")), event.get("message")))


def _kind(pod: dict[str, Any]) -> str:
    kind = pod["metadata"].get("labels", {}).get("ray.io/node-type")
    return f"{kind} pod" if kind else "submitter pod"


def _text(kind: str, reason: str, message: object) -> str:
    words = " ".join(str(message or "").split())
    return f"{kind}: {reason}: {words}" if words else f"{kind}: {reason}"
