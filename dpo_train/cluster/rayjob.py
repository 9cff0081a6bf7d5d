"""A job and the config to a KubeRay RayJob (ray.io/v1). Pure: the same arguments give the same manifest.

    RayJob
      entrypoint           dpo job <folder>, run by a submitter pod once the Ray cluster is ready
      rayClusterSpec       head (drives the job, runs no training) and one group of workers
      backoffLimit 0       who launches it decides about another attempt, see launcher.py
      activeDeadline, shutdown after the end, suspended from the start where Kueue is to admit it

Pods pass the `restricted` pod security standard. Logins come from Secrets, by reference, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dpo_train.cluster.job import Job
from dpo_train.config import ClusterConfig, PodConfig, RunConfig
from dpo_train.errors import ConfigError

API_VERSION = "ray.io/v1"
MANAGED_BY = {"app.kubernetes.io/managed-by": "dpo"}
STAGE_LABEL = "dpo.dev/stage"
SPEC_HASH = "dpo.dev/spec-hash"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
CACHE_PATH = "/var/cache/dpo"
SHARED_MEMORY_PATH = "/dev/shm"  # noqa: S108
USER = 1000
"""The image's user; files on volumes get its group."""

RAY_VERSION = "2.60.0"
"""Of the image. KubeRay takes a job with tokens only if it is told, and this machine may have no Ray to ask."""

_SUBMITTER = PodConfig(cpus=0.5, memory="512Mi")
_OF_THE_MOUNT = ("subPath", "readOnly")
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    # Groups of large volumes are set once, and not file by file at every start.
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
_NCCL = {
    # A collective that hangs is ended after compute.timeout_minutes, and what each rank did last is written down.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
}

_STOPPING = {"RAY_JOB_STOP_WAIT_TIME_S": "20"}
"""From SIGTERM to SIGKILL of a job that is stopped: it ends its MLflow run meanwhile. Ray's own is 3 s."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The object with which the job is deleted."""

    api_version: str
    kind: str
    name: str
    uid: str


def manifest(job: Job, config: RunConfig, *, namespace: str, owner: Owner | None = None) -> dict[str, Any]:
    """The RayJob.

    Args:
        config: of whoever launches it; ``job.config`` is what the job works by.

    Raises:
        ConfigError: no image is named.
    """
    cluster = config.cluster
    metadata: dict[str, Any] = {
        "name": job.name,
        "namespace": namespace,
        "labels": {**MANAGED_BY, STAGE_LABEL: job.stage.replace("_", "-"), **_kueue_labels(cluster)},
        "annotations": {},
    }
    if owner is not None:
        metadata["ownerReferences"] = [
            {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid}
        ]
    spec = _spec(job, config)
    metadata["annotations"][SPEC_HASH] = hash_of(spec)
    return {"apiVersion": API_VERSION, "kind": "RayJob", "metadata": metadata, "spec": spec}


def spec_hash(manifest: Mapping[str, Any]) -> str:
    """What tells one content of a job from another; owner and heartbeat take no part."""
    return str(manifest["metadata"]["annotations"][SPEC_HASH])


def hash_of(spec: Mapping[str, Any]) -> str:
    """The digest of a spec."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def num_pods(config: RunConfig) -> tuple[int, int]:
    """The least and the greatest number of worker pods."""
    workers, compute = config.cluster.workers, config.compute
    per_pod = max(1, workers.gpus)
    wanted = max(compute.workers, compute.data_workers if not workers.gpus else 1)
    most = workers.pods or math.ceil(wanted / per_pod)
    least = most if compute.min_workers is None else min(most, math.ceil(compute.min_workers / per_pod))
    return least, most


def _spec(job: Job, config: RunConfig) -> dict[str, Any]:
    cluster = config.cluster
    least, most = num_pods(config)
    head = _pod(config, cluster.head, "ray-head", _environment(job, config))
    if least < most:
        # KubeRay gives the autoscaler beside the head an account of its own, if none is named.
        del head["serviceAccountName"], head["automountServiceAccountToken"]
    spec: dict[str, Any] = {
        "entrypoint": job.entrypoint,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": {"spec": _pod(config, _SUBMITTER, "ray-job-submitter", {}, mounts=False)},
        "backoffLimit": 0,
        "activeDeadlineSeconds": round(cluster.deadline_hours * 3600),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.keep_seconds,
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},
            "headGroupSpec": {
                "serviceType": "ClusterIP",
                # The driver runs here, and nothing else: it must outlive every worker.
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
                "template": {"spec": head},
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    # KubeRay calls a cluster ready, and submits, when all of these run: the least are enough.
                    "replicas": least,
                    "minReplicas": least,
                    "maxReplicas": most,
                    "rayStartParams": {},
                    "template": {"spec": _worker_pod(job, config)},
                }
            ],
        },
    }
    if least < most:
        spec["rayClusterSpec"]["enableInTreeAutoscaling"] = True
        spec["rayClusterSpec"]["autoscalerOptions"] = {"securityContext": _CONTAINER_SECURITY}
    if cluster.queue is not None:
        spec["suspend"] = True  # until Kueue admits it
    spec["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": {**_STOPPING, **job.environment}})
    return spec


def _kueue_labels(cluster: ClusterConfig) -> dict[str, str]:
    if cluster.queue is None:
        return {}
    labels = {QUEUE_LABEL: cluster.queue}
    return labels if cluster.priority is None else {**labels, PRIORITY_LABEL: cluster.priority}


def _worker_pod(job: Job, config: RunConfig) -> dict[str, Any]:
    workers = config.cluster.workers
    environment = {**(_NCCL if workers.gpus else {}), **_environment(job, config)}
    pod = _pod(config, workers, "ray-worker", environment)
    container = pod["containers"][0]
    if workers.gpus:
        for kind in ("requests", "limits"):
            container["resources"][kind][workers.gpu_resource] = str(workers.gpus)
    if workers.gpu_type is not None:
        pod["nodeSelector"] = {**pod.get("nodeSelector", {}), workers.gpu_label: workers.gpu_type}
    if workers.affinity:
        pod["affinity"] = dict(workers.affinity)
    if workers.shared_memory is not None:
        pod["volumes"].append(
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": workers.shared_memory}}
        )
        container["volumeMounts"].append({"name": "shared-memory", "mountPath": SHARED_MEMORY_PATH})
    _require_one_volume_a_path(container["volumeMounts"])
    if workers.spot:
        # From the notice on, a training saves its state: it must not be cut off by the default of 30 seconds.
        pod["terminationGracePeriodSeconds"] = workers.grace_seconds
    return pod


def _pod(
    config: RunConfig, place: PodConfig, name: str, environment: Mapping[str, str], *, mounts: bool = True
) -> dict[str, Any]:
    """A pod of one container."""
    cluster = config.cluster
    volumes, paths = _volumes(cluster) if mounts else ([], [])
    resources = {"cpu": _cpus(place.cpus), "memory": place.memory}
    container: dict[str, Any] = {
        "name": name,
        "image": _image(config),
        "env": _variables(environment, cluster.environment_from if mounts else {}),
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": paths,
    }
    if mounts:
        # A Secret that is not there is no error: a cluster's roles may stand in for logins.
        container["envFrom"] = [{"secretRef": {"name": secret, "optional": True}} for secret in cluster.secrets]
    pod: dict[str, Any] = {
        "containers": [container],
        "volumes": volumes,
        "securityContext": _POD_SECURITY,
        "serviceAccountName": cluster.service_account,
        # Ray's pods ask nothing of Kubernetes; the autoscaler's sidecar gets its token from KubeRay's own account.
        "automountServiceAccountToken": False,
    }
    if name == "ray-job-submitter":
        pod["restartPolicy"] = "Never"
    if place.node_selector:
        pod["nodeSelector"] = dict(place.node_selector)
    if place.tolerations:
        pod["tolerations"] = [dict(toleration) for toleration in place.tolerations]
    if cluster.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in cluster.image_pull_secrets]
    if cluster.priority is not None:
        pod["priorityClassName"] = cluster.priority
    return pod


def _volumes(cluster: ClusterConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes, and where a container mounts them: claims, others, and a cache, lost with the pod without a claim."""
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for index, (path, claim) in enumerate(sorted(cluster.volumes.items())):
        volumes.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{index}", "mountPath": path})
    for index, (path, given) in enumerate(sorted(cluster.mounts.items())):
        source = {key: value for key, value in given.items() if key not in _OF_THE_MOUNT}
        volumes.append({"name": f"mount-{index}", **source})
        of_the_mount = {key: value for key, value in given.items() if key in _OF_THE_MOUNT}
        mounts.append({"name": f"mount-{index}", "mountPath": path, **of_the_mount})
    cache: dict[str, Any] = {"emptyDir": {}}
    if cluster.model_cache is not None:
        cache = {"persistentVolumeClaim": {"claimName": cluster.model_cache}}
    volumes.append({"name": "cache", **cache})
    mounts.append({"name": "cache", "mountPath": CACHE_PATH})
    return volumes, mounts


def _require_one_volume_a_path(mounts: list[dict[str, Any]]) -> None:
    """Kubernetes would refuse the pods, long after it has accepted the job.

    Raises:
        ConfigError: two volumes are mounted at one path.
    """
    paths = [mount["mountPath"] for mount in mounts]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ConfigError(
            "Two volumes are mounted at one path of the job's pods",
            got=", ".join(twice),
            fix=f"look at cluster.volumes and cluster.mounts; at {CACHE_PATH} lies cluster.model_cache, and at "
            f"{SHARED_MEMORY_PATH}, unless it is null, cluster.workers.shared_memory",
        )


def _variables(environment: Mapping[str, str], filled_in: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A container's variables, each once; those that Kubernetes fills in count more."""
    entries: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in environment.items()}
    entries |= {name: {"valueFrom": dict(source)} for name, source in filled_in.items()}
    return [{"name": name, **entry} for name, entry in sorted(entries.items())]


def _environment(job: Job, config: RunConfig) -> dict[str, str]:
    """Plain settings; the config's own come last."""
    ours = {"DPO_CACHE": f"{CACHE_PATH}/store", "HF_HOME": f"{CACHE_PATH}/huggingface", "PYTHONUNBUFFERED": "1"}
    return {**ours, **job.environment, **config.cluster.environment}


def _image(config: RunConfig) -> str:
    image = config.cluster.image or config.kubeflow.image
    if image is None:
        raise ConfigError(
            "cluster.launcher=rayjob needs an image that holds dpo", fix="set cluster.image, best with its digest"
        )
    return image


def _cpus(cores: float) -> str:
    """As Kubernetes writes it: whole cores, or thousandths."""
    return str(int(cores)) if cores == int(cores) else f"{round(cores * 1000)}m"
