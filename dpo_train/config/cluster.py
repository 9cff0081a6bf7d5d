"""Clusters: where the heavy stages run on Kubernetes, where pipelines are submitted, and what a retraining does.

Never part of an output's identity, except that ``retrain.start`` decides which model is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Len
from pydantic import Field

from dpo_train.config.kinds import STRICT, Count, Positive, option

LaunchedStage = Literal["prepare", "sft", "score_reference", "sweep", "train", "evaluate"]

# Kubernetes' own limits; it would refuse anything else, but only when the job is created.
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
MountPath = Annotated[str, Field(pattern=r"^/[^:/][^:]*$")]


@dataclass(frozen=True, kw_only=True)
class PodConfig:
    """Resources and place of one kind of pod."""

    __pydantic_config__ = STRICT

    cpus: Positive = option(4.0, "CPU cores of a pod, requested and its limit")
    memory: Quantity = option("16Gi", "memory of a pod, requested and its limit")
    node_selector: Mapping[str, str] = option({}, "labels that its node must have")
    tolerations: tuple[Mapping[str, Any], ...] = option(
        (), "taints of nodes that it tolerates, as Kubernetes writes them"
    )


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(PodConfig):
    """The pods that train and score."""

    pods: Count | None = option(
        None,
        "how many; default: what compute.workers need at `gpus` workers a pod, or one a pod without GPUs. With "
        "compute.min_workers the cluster may take pods away and bring them back",
    )
    gpus: Annotated[int, Ge(0)] = option(0, "GPUs of a pod")
    gpu_resource: str = option("nvidia.com/gpu", "resource name of a GPU: amd.com/gpu, nvidia.com/mig-3g.40gb, ...")
    gpu_type: str | None = option(None, "value of `gpu_label` that the node must have, e.g. NVIDIA-H100-80GB-HBM3")
    gpu_label: str = option("nvidia.com/gpu.product", "label of nodes that says which GPU they have")
    shared_memory: Quantity | None = option(
        "8Gi", "size of /dev/shm, which NCCL and data loaders use; part of `memory`"
    )
    affinity: Mapping[str, Any] = option({}, "nodes and pods that it is drawn to or kept from, as Kubernetes writes it")
    spot: bool = option(False, "may run on nodes that are taken away at short notice")
    grace_seconds: Count = option(120, "from the notice to the end: a training saves its state meanwhile")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where stages run that are too large for the task that asks for them."""

    __pydantic_config__ = STRICT

    launcher: Literal["none", "rayjob", "ray"] = option(
        "none",
        "none: a stage runs where it is called; rayjob: each as a KubeRay RayJob of its own; ray: on the Ray cluster "
        "at cluster.address",
    )
    stages: tuple[LaunchedStage, ...] = option(
        ("prepare", "sft", "score_reference", "sweep", "train", "evaluate"), "the stages that are launched"
    )
    address: str | None = option(
        None, "launcher ray: address of Ray's dashboard, e.g. http://head:8265; its token comes from RAY_AUTH_TOKEN"
    )
    namespace: DnsName | None = option(None, "default: the one of this pod, or of the kubeconfig's context")
    image: str | None = option(None, "image that holds `dpo`, best with its digest; default: kubeflow.image")
    service_account: DnsName = option("dpo-worker", "of Ray's pods; it needs no rights")
    head: PodConfig = field(default_factory=PodConfig, metadata={"help": "the pod that drives a job"})
    workers: WorkerConfig = field(default_factory=WorkerConfig, metadata={"help": "the pods that train and score"})
    image_pull_secrets: tuple[DnsName, ...] = option((), "Secrets with logins of the image's registry")
    secrets: tuple[DnsName, ...] = option(
        ("dpo-credentials",), "Secrets whose keys become environment variables: S3, MLflow and hub logins"
    )
    volumes: Mapping[MountPath, DnsName] = option({}, "volume claims by the path where every pod mounts them")
    mounts: Mapping[MountPath, Mapping[str, Any]] = option(
        {},
        "volumes of other kinds by the path where every pod mounts them, as Kubernetes writes their source: "
        "{/etc/ca: {secret: {secretName: our-ca}}}; beside it the mount's subPath and readOnly may stand",
    )
    model_cache: DnsName | None = option(None, "volume claim for models and data that were downloaded once")
    environment: Mapping[EnvironmentName, str] = option(
        {}, "further environment variables, e.g. {NCCL_SOCKET_IFNAME: eth0}; secrets belong in Secrets"
    )
    environment_from: Mapping[EnvironmentName, Mapping[str, Any]] = option(
        {},
        "environment variables that Kubernetes fills in, each by its valueFrom: "
        "{WANDB_API_KEY: {secretKeyRef: {name: wandb, key: token}}}",
    )
    queue: DnsName | None = option(None, "Kueue's local queue; a job waits there until there is room")
    priority: DnsName | None = option(None, "priority class of the pods, and in Kueue of the job")
    deadline_hours: Positive = option(24.0, "a job that runs longer is ended by the cluster")
    keep_seconds: Annotated[int, Ge(0)] = option(600, "how long an ended job's pods stay, to be looked at")
    heartbeat_seconds: Count = option(
        60,
        "how often the waiting task says that it is alive; after ten times that, and at least 15 minutes and two "
        "periods, its jobs are removed",
    )


@dataclass(frozen=True, kw_only=True)
class KubeflowConfig:
    """Kubeflow Pipelines, for `dpo submit` and `dpo schedule`. Logins come from the environment, never from here."""

    __pydantic_config__ = STRICT

    host: str | None = option(None, "address of Kubeflow Pipelines; default: KF_PIPELINES_ENDPOINT")
    namespace: DnsName | None = option(None, "profile namespace, where Kubeflow has several users")
    pipeline: str = option("dpo", "name of the pipeline there")
    experiment: str = option("dpo", "experiment of the runs")
    service_account: DnsName | None = option(None, "of the runs' tasks; default: Kubeflow's")
    image: str | None = option(None, "image of the tasks, best with its digest; default: the one compiled in")
    secret: DnsName = option("dpo-credentials", "Secret whose keys become environment variables of the tasks")


Outcome = Literal["failed", "refused", "unchanged", "registered", "promoted"]


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """What a run that comes again does with data that grow."""

    __pydantic_config__ = STRICT

    when: Literal["always", "new_data"] = option(
        "always", "new_data: a pipeline run ends after its first task, green, if the champion was made of the same data"
    )
    start: Literal["base", "champion"] = option(
        "base", "which model is trained: model.path, or the champion where there is one"
    )
    promote: Literal["by_hand", "if_better"] = option(
        "by_hand",
        "if_better: a version that passes the gate becomes the champion if there is none, or if it is better on the "
        "same held-out pairs, with the whole 95 % interval",
    )
    notify: Annotated[tuple[Outcome, ...], Len(0)] = option(
        ("failed", "refused"), "outcomes that are posted to the webhook that DPO_WEBHOOK_URL names"
    )
    webhook: Literal["json", "slack"] = option("json", "what is posted: our own JSON, or a Slack message")
