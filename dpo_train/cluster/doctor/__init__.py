"""Is everything there that a config needs? Nothing is started, and what is written is removed at once.

    config -> checks (which there are, in a fixed order) -> running (side by side, each with its limit) -> findings

answers      pass, fail with the mend, or not checkable with why
api          the cluster's login, found once; what a refusal means to a check
installed    Kubernetes, KubeRay, Kueue, priority classes, and the job itself as a dry run
rights       what the launcher may do, service accounts
logins       Secrets and the names of their keys; images
volumes      claims and storage classes
demand       what the job's pods ask for, from its manifest;   quantities: Kubernetes' numbers
room         nodes with the right GPUs, quotas
services     object storage, MLflow, Kubeflow Pipelines, Ray
local        this machine: packages, GPU, disk, data, model
"""

from dpo_train.cluster.doctor.answers import Finding, Status, counts, summary, to_json
from dpo_train.cluster.doctor.checks import checks_of
from dpo_train.cluster.doctor.running import Check, run
from dpo_train.cluster.doctor.services import uses_kubeflow

__all__ = ["Check", "Finding", "Status", "checks_of", "counts", "run", "summary", "to_json", "uses_kubeflow"]
