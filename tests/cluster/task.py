"""What a Kubeflow task may set for its job, as Kubeflow's driver writes it for ``dsl.TaskConfig``."""

from __future__ import annotations

from typing import Any

EVERYTHING: dict[str, Any] = {
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
            }
        }
    },
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "node_selector": {"pool": "gpu"},
    "env": [
        {"name": "NCCL_DEBUG", "value": "INFO"},
        {"name": "MLFLOW_RUN_ID", "value": "the-task's"},
        {
            "name": "WANDB_API_KEY",
            "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "token", "optional": False}},
        },
    ],
    "volumes": [
        {"name": "team-data", "persistentVolumeClaim": {"claimName": "team-data"}},
        {"name": "our-ca", "secret": {"secretName": "our-ca", "optional": False}},
        {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
    ],
    "volume_mounts": [
        {"name": "team-data", "mountPath": "/data"},
        {"name": "our-ca", "mountPath": "/etc/ca"},
        {"name": "models", "mountPath": "/models", "subPath": "llama"},
    ],
    "resources": {"limits": {"cpu": "7500m", "memory": "64Gi", "nvidia.com/gpu": "2"}},
}
"""Every field of ``dsl.TaskConfig``, by its name in Python."""

JSON_NAMES = {"node_selector": "nodeSelector", "volume_mounts": "volumeMounts"}


def as_the_driver_writes_it(task: dict[str, Any]) -> dict[str, Any]:
    """The component's input of the type TASK_CONFIG: Go's names, and null for what is not set."""
    fields = ("affinity", "tolerations", "node_selector", "env", "volumes", "volume_mounts")
    written = {JSON_NAMES.get(name, name): task.get(name) for name in fields}
    return {**written, "resources": task.get("resources", {})}
