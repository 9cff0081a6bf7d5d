"""Plays KubeRay's operator on an API server that has none: moves a RayJob's status, and lays its pods.

Plays the garbage collector too, for which a RayJob that is removed waits until its pods are gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from dpo_train.cluster.kube import MERGE_PATCH, Kube
from dpo_train.cluster.kube_errors import RefusedError
from tests.cluster.proxy import Proxy

T = TypeVar("T")
SUBMITTER = "ray-job-submitter"
"""The container's name, by KubeRay's source (`SubmitterContainerName`) as in our manifest."""
DEADLINE_S = 20.0


def until(look: Callable[[], T | bool | None], what: str = "") -> T:
    """What ``look`` returns as soon as that is something."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        found = look()
        if found:
            return found  # type: ignore[return-value]
        time.sleep(0.01)
    raise AssertionError(f"did not happen within {DEADLINE_S:.0f} s: {what}")


class Operator:
    """KubeRay and kubelet for one job."""

    def __init__(self, admin: Kube, proxy: Proxy, name: str) -> None:
        self._kube, self._proxy, self.name = admin, proxy, name
        self.collection = f"/apis/ray.io/v1/namespaces/{admin.namespace}/rayjobs"
        self.path = f"{self.collection}/{name}"
        self._with_sidecar: dict[str, bool] = {}
        self._pods = f"/api/v1/namespaces/{admin.namespace}/pods"

    def find(self) -> dict[str, Any] | None:
        """The RayJob, if it is there."""
        try:
            return self._kube.ask("GET", self.path)
        except RefusedError as refused:
            if refused.status != 404:
                raise
            return None

    def created(self) -> dict[str, Any]:
        """Waits for the RayJob."""
        return until(self.find, f"RayJob {self.name}")

    def status(self, deployment: str, of_ray: str = "", **more: Any) -> None:
        """Moves the RayJob."""
        status = {"jobDeploymentStatus": deployment, "jobStatus": of_ray, **more}
        self._kube.ask("PATCH", f"{self.path}/status", body={"status": status}, content_type=MERGE_PATCH)

    def patch(self, content: dict[str, Any]) -> None:
        """Changes the RayJob itself."""
        self._kube.ask("PATCH", self.path, body=content, content_type=MERGE_PATCH)

    def delete(self) -> None:
        self._kube.ask("DELETE", self.path)

    def collect_garbage(self) -> None:
        """The RayJob is being removed: its pods go, and then it goes."""

        def is_waiting() -> bool:
            return "foregroundDeletion" in ((self.find() or {"metadata": {}})["metadata"].get("finalizers") or [])

        until(is_waiting, "a RayJob that waits for its pods' end")
        query = {"labelSelector": f"job-name={self.name}", "gracePeriodSeconds": "0"}
        self._kube.ask("DELETE", self._pods, query=query)
        self.patch({"metadata": {"finalizers": None}})

    def pod(
        self,
        name: str,
        labels: dict[str, str],
        status: dict[str, Any],
        *,
        containers: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """A pod that nothing schedules, with this status."""
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "containers": containers or [{"name": "main", "image": "none"}],
                "schedulerName": "none",
                "restartPolicy": "Never",
            },
        }
        self._kube.ask("POST", self._pods, body=body)
        return self.pod_status(name, status)

    def pod_status(self, name: str, status: dict[str, Any]) -> dict[str, Any]:
        return self._kube.ask("PATCH", f"{self._pods}/{name}/status", body={"status": status}, content_type=MERGE_PATCH)

    def submitter(self, number: int = 0, *, ray_job: str = "ray-1", sidecar: bool = False) -> str:
        """A running submitter pod; its name. A sidecar stands before its own container, and never ends."""
        name = f"{self.name}-{number}"
        own = {"name": SUBMITTER, "image": "none", "env": [{"name": "RAY_JOB_SUBMISSION_ID", "value": ray_job}]}
        containers = [{"name": "mesh", "image": "none"}, own] if sidecar else [own]
        self._with_sidecar[name] = sidecar
        status = self._submitter_status(name, {"running": {}}, "Running")
        self.pod(name, {"job-name": self.name}, status, containers=containers)
        return name

    def print(self, pod: str, *lines: str) -> None:
        """Has the pod print lines."""
        self._proxy.logs[pod].append(*lines)

    def end_submitter(self, pod: str, phase: str = "Succeeded") -> None:
        """The pod's container ends."""
        state = {"terminated": {"exitCode": 0 if phase == "Succeeded" else 1}}
        self.pod_status(pod, self._submitter_status(pod, state, phase))
        self._proxy.logs[pod].end()

    def succeed(self, *lines: str, pod: str | None = None) -> None:
        """The way of a job that goes well, from wherever it is."""
        self.status("Running", "RUNNING")
        pod = pod or self.submitter()
        self.print(pod, *lines)
        self.end_submitter(pod)
        self.status("Complete", "SUCCEEDED")

    def _submitter_status(self, pod: str, state: dict[str, Any], phase: str) -> dict[str, Any]:
        """A pod with a sidecar goes on running when its other container has ended."""
        if not self._with_sidecar[pod]:
            return {"phase": phase, "containerStatuses": [_container(SUBMITTER, state)]}
        statuses = [_container("mesh", {"running": {}}), _container(SUBMITTER, state)]
        return {"phase": "Running", "containerStatuses": statuses}


def _container(name: str, state: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "image": "none", "imageID": "", "ready": False, "restartCount": 0, "state": state}
