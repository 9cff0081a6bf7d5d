"""With which object a job is to be deleted: the workflow whose task waits for it."""

from __future__ import annotations

import os
from collections.abc import Callable

from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.cluster.rayjob import Owner

POD_NAME, POD_UID = "KFP_POD_NAME", "KFP_POD_UID"
"""Kubeflow sets both in its tasks' pods."""


def owner_of_this_pod(kube: Kube, tell: Callable[[str], None]) -> Owner | None:
    """The Argo workflow of this pod, else the pod itself; None outside a task, or where it cannot be found.

    Raises:
        RunError: the cluster cannot be reached.
    """
    name = os.environ.get(POD_NAME)
    if not name:
        return None
    if kube.home != kube.namespace:
        # An owner in another namespace does not exist for Kubernetes: it would delete the job at once.
        tell(f"the job stays if this task is deleted: it is in {kube.namespace}, and the task in {kube.home}")
        return None
    try:
        pod = kube.ask("GET", f"/api/v1/namespaces/{kube.namespace}/pods/{name}")["metadata"]
    except RefusedError as refused:
        tell(f"the job stays if this task's workflow is deleted: its pod cannot be read. {refused}")
        return None
    if os.environ.get(POD_UID) not in {None, "", pod["uid"]}:
        tell(f"the job stays if this task is deleted: the pod {name} is another one by now")
        return None
    for reference in pod.get("ownerReferences", []):
        if reference.get("controller") and reference["kind"] == "Workflow":
            return Owner(
                api_version=reference["apiVersion"],
                kind=reference["kind"],
                name=reference["name"],
                uid=reference["uid"],
            )
    return Owner(api_version="v1", kind="Pod", name=name, uid=pod["uid"])
