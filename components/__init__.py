"""Kubeflow components, one file each: decode, call the stage, log.

A component hands on an artifact whose metadata holds the address of the stage's output in the store
(``<stage>/<digest>``), by which the next component finds it. Its ``uri`` stays Kubeflow's own: the launcher in each pod
takes only what lies below the run's own root for an artifact, and kfp.local rewrites paths that hold "python3".
"""

import os

IMAGE = os.environ.get("DPO_IMAGE", "dpo-train:0.1.0")
"""The image that has ``dpo`` installed; set DPO_IMAGE when compiling to pin your own by digest."""

SECRET = os.environ.get("DPO_SECRET", "dpo-credentials")
"""The Kubernetes Secret with the tasks' logins, in their own namespace; set DPO_SECRET when compiling for another."""

WEBHOOK_SECRET = os.environ.get("DPO_WEBHOOK_SECRET", "dpo-webhook")
"""A Secret of its own, which only the task that notifies gets: the other one reaches Ray's pods as well."""

SECRET_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "HF_TOKEN",
    "OPENAI_API_KEY",
)
"""The Secret's keys, each the name of the environment variable that it becomes. All may be missing, and the Secret."""

WEBHOOK_KEY = "DPO_WEBHOOK_URL"
"""The key in WEBHOOK_SECRET."""
