"""What must be installed in the cluster, and whether it takes the job that the config makes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from typing import Any

from dpo_train.cluster.doctor.answers import Answer, failed, passed, unchecked
from dpo_train.cluster.doctor.api import Access, find, listed, post, there
from dpo_train.cluster.job import job_for
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.cluster.rayjob import API_VERSION, manifest
from dpo_train.config import RunConfig

OLDEST_KUBERAY = (1, 5, 1)
"""The first with authOptions, by which Ray's dashboard of a job asks for a token."""
NAME = "dpo-doctor"
"""Of the job that is sent as a dry run, and never made."""

_KUEUE = "kueue.x-k8s.io"
_OPERATORS = "app.kubernetes.io/name in (kuberay-operator,kuberay)"


def server(access: Access) -> Answer:
    """Whether there is a login, and who answers to it."""
    access.kube()
    return passed(f"Kubernetes {access.version}, client {importlib.metadata.version('kubernetes')}")


def namespace(kube: Kube, _: RunConfig) -> Answer:
    """Where jobs are to run."""
    found = find(kube, f"/api/v1/namespaces/{kube.namespace}")
    if found is None:
        return failed(
            f"there is no namespace {kube.namespace}",
            f"set cluster.namespace, or have it made: kubectl create namespace {kube.namespace}",
        )
    if found.get("status", {}).get("phase") == "Terminating":
        return failed(f"the namespace {kube.namespace} is being deleted", "set another cluster.namespace")
    return passed(kube.namespace)


def kuberay(kube: Kube, _: RunConfig) -> Answer:
    """Its CRDs: without them the API does not know what a RayJob is."""
    found = find(kube, f"/apis/{API_VERSION}")
    kinds = {item["name"] for item in (found or {}).get("resources", [])}
    missing = sorted({"rayjobs", "rayclusters"} - kinds)
    if missing:
        return failed(
            f"the cluster does not know {' and '.join(missing)} of {API_VERSION}",
            "install the KubeRay operator with its CRDs: helm install kuberay-operator kuberay/kuberay-operator",
        )
    return passed(f"the cluster knows RayJobs ({API_VERSION})")


def operator(kube: Kube, _: RunConfig) -> Answer:
    """The process that makes pods of RayJobs; a provider may run it where nobody sees it."""
    found = listed(kube, "/apis/apps/v1/deployments", {"labelSelector": _OPERATORS})
    if not found:
        return unchecked(
            "no deployment of KubeRay's operator is to be seen",
            "see that one runs and watches this namespace; one that your provider runs for you does not show",
        )
    ready = [item for item in found if item.get("status", {}).get("availableReplicas")]
    if not ready:
        where = ", ".join(f"{item['metadata']['namespace']}/{item['metadata']['name']}" for item in found)
        return failed(f"KubeRay's operator is not running: {where}", "look at its pods: kubectl describe deployment")
    image = str(ready[0]["spec"]["template"]["spec"]["containers"][0]["image"])
    version = _version(image)
    if version is not None and version < OLDEST_KUBERAY:
        oldest = ".".join(map(str, OLDEST_KUBERAY))
        return failed(f"KubeRay's operator is too old: {image}", f"renew it and its CRDs to {oldest} or newer")
    return passed(f"KubeRay's operator runs: {image}")


def queue(kube: Kube, config: RunConfig) -> Answer:
    """Kueue, and the local queue that lets jobs in."""
    group = find(kube, f"/apis/{_KUEUE}")
    if group is None:
        return failed(
            "cluster.queue is set, and Kueue is not installed: jobs would stay suspended for ever",
            "install Kueue with its CRDs, or leave cluster.queue out",
        )
    path = f"/apis/{group['preferredVersion']['groupVersion']}/namespaces/{kube.namespace}/localqueues"
    found = find(kube, f"{path}/{config.cluster.queue}")
    if found is None:
        return failed(
            f"there is no local queue {config.cluster.queue} in {kube.namespace}; there are: {there(kube, path)}",
            "set cluster.queue to one of them, or have it made",
        )
    for condition in found.get("status", {}).get("conditions", []):
        if condition["type"] == "Active" and condition["status"] == "False":
            return failed(
                f"the queue {config.cluster.queue} lets nothing in: {condition.get('message', '')}",
                "look at the cluster queue behind it: kubectl describe clusterqueue",
            )
    return passed(f"local queue {config.cluster.queue} of cluster queue {found['spec'].get('clusterQueue', '?')}")


def priority(kube: Kube, config: RunConfig) -> Answer:
    """The priority class of the pods, and the one of the same name by which Kueue sorts jobs."""
    name = config.cluster.priority
    path = "/apis/scheduling.k8s.io/v1/priorityclasses"
    found = find(kube, f"{path}/{name}")
    if found is None:
        return failed(
            f"there is no priority class {name}, and without it no pod is let in; there are: {there(kube, path)}",
            "set cluster.priority to one of them, or have it made",
        )
    group = find(kube, f"/apis/{_KUEUE}") if config.cluster.queue is not None else None
    if group is not None:
        path = f"/apis/{group['preferredVersion']['groupVersion']}/workloadpriorityclasses"
        if find(kube, f"{path}/{name}") is None:
            return failed(
                f"the pods' priority class {name} is there, and Kueue's WorkloadPriorityClass of that name is not; "
                f"there are: {there(kube, path)}",
                "have it made (kueue.x-k8s.io, WorkloadPriorityClass) with the same value",
            )
    return passed(f"{name}, value {found.get('value')}")


def dry_run(kube: Kube, config: RunConfig) -> Answer:
    """The very RayJob that would be made, looked at by the API, its webhooks and quotas, and not made."""
    job = job_manifest(config, kube.namespace)
    path = f"/apis/{API_VERSION}/namespaces/{kube.namespace}/rayjobs"
    try:
        post(kube, path, job, {"dryRun": "All", "fieldValidation": "Strict"})
    except RefusedError as refused:
        if refused.status == 404:
            return unchecked("there is nobody to show a RayJob to, see the lines above")
        if refused.status == 403 and "exceeded quota" not in refused.words and "cannot create" in refused.words:
            return unchecked("this login may not make RayJobs, see the line `rights`")
        if refused.status == 409:
            return passed("the API takes the RayJob (one of the same name is there)")
        text, _, fix = str(refused).partition(" What to do: ")
        return failed(text, fix or "look at the message")
    return passed("the API takes the RayJob (tried as a dry run)")


def job_manifest(config: RunConfig, namespace: str) -> dict[str, Any]:
    """A RayJob as the config's stages would have it, under a name of ours.

    What else may be wrong with the config, other lines say: the image, MLflow's address.
    """
    whole = dataclasses.replace(
        config,
        cluster=dataclasses.replace(config.cluster, image=config.cluster.image or config.kubeflow.image or "none:none"),
        tracking=dataclasses.replace(config.tracking, uri="http://mlflow:5000"),
    )
    stage = "train" if "train" in config.cluster.stages else next(iter(config.cluster.stages), "train")
    return manifest(dataclasses.replace(job_for(stage, whole, {}), name=NAME), whole, namespace=namespace)


def _version(image: str) -> tuple[int, ...] | None:
    """The version that an image's tag names; None: it names none."""
    found = re.search(r":v?(\d+)\.(\d+)\.(\d+)", image)
    return None if found is None else tuple(int(part) for part in found.groups())
