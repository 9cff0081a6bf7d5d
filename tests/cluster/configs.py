"""Twenty configs of what a RayJob may look like, by name."""

from __future__ import annotations

import json
from typing import Any

from dpo_train.config import RunConfig, parse_config

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one worker": {"compute": {"workers": 1, "data_workers": 1}},
    "many workers": {"compute": {"workers": 64}},
    "gpus": {"compute": {"workers": 8}, "cluster": {"workers": {"gpus": 8, "memory": "512Gi", "cpus": 64}}},
    "one gpu a pod": {"compute": {"workers": 4}, "cluster": {"workers": {"gpus": 1}}},
    "elastic": {"compute": {"workers": 16, "min_workers": 4}, "cluster": {"workers": {"gpus": 4}}},
    "amd": {"cluster": {"workers": {"gpus": 8, "gpu_resource": "amd.com/gpu"}}},
    "mig": {"cluster": {"workers": {"gpus": 1, "gpu_resource": "nvidia.com/mig-3g.40gb"}}},
    "gpu type": {"cluster": {"workers": {"gpus": 8, "gpu_type": "NVIDIA-H100-80GB-HBM3"}}},
    "google's label": {
        "cluster": {"workers": {"gpus": 8, "gpu_label": "cloud.google.com/gke-accelerator", "gpu_type": "nvidia-l4"}}
    },
    "spot": {
        "cluster": {
            "workers": {
                "gpus": 1, "spot": True, "grace_seconds": 25,
                "tolerations": [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
                                 "effect": "NoSchedule"}],
            }
        }
    },
    "no shared memory": {"cluster": {"workers": {"shared_memory": None}}},
    "fractions of cores": {"cluster": {"head": {"cpus": 0.5, "memory": "1500Mi"}, "workers": {"cpus": 1.25}}},
    "node selectors": {
        "cluster": {"head": {"node_selector": {"pool": "cpu"}}, "workers": {"node_selector": {"pool": "gpu"}}}
    },
    "kueue": {"cluster": {"queue": "team-queue", "priority": "high"}},
    "volumes": {"cluster": {"volumes": {"/data": "team-data", "/models": "models"}, "model_cache": "cache"}},
    "registry login": {"cluster": {"image_pull_secrets": ["registry", "other-registry"]}},
    "environment": {"cluster": {"environment": {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5"}}},
    "deadline": {"cluster": {"deadline_hours": 0.5, "keep_seconds": 0}},
    "everything": {
        "compute": {"workers": 32},
        "storage": {"endpoint": "http://minio.team-a:9000", "region": "eu-west-1"},
        "cluster": {
            "secrets": ["dpo-credentials", "team-login"],
            "queue": "team-queue",
            "priority": "high",
            "volumes": {"/data": "team-data"},
            "model_cache": "cache",
            "image_pull_secrets": ["registry"],
            "environment": {"NCCL_SOCKET_IFNAME": "eth0"},
            "head": {"tolerations": [{"operator": "Exists"}]},
            "workers": {
                "gpus": 8, "gpu_type": "NVIDIA-H100-80GB-HBM3", "node_selector": {"pool": "gpu"}, "cpus": 96,
                "memory": "1Ti", "shared_memory": "64Gi", "spot": True, "grace_seconds": 300,
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            },
        },
    },
}  # fmt: skip


def config_of(name: str) -> RunConfig:
    """The config of this name, with what every launched run needs."""
    changes = CONFIGS[name]
    image = "registry.example/dpo@sha256:" + "0" * 64
    tree = {
        "store": "s3://bucket/store",
        "model": {"path": "org/model"},
        "prepare": {"path": "s3://bucket/pairs.jsonl"},
        "tracking": {"uri": "http://mlflow.team-a:5000"},
        **{key: value for key, value in changes.items() if key != "cluster"},
        "cluster": {"launcher": "rayjob", "image": image, **changes.get("cluster", {})},
    }
    return parse_config(json.dumps(tree), origin=name)
