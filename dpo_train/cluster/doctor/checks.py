"""Which checks a config asks for, in the order of their lines. What it does not use is not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from dpo_train import storage
from dpo_train.cluster.doctor import installed, local, logins, rights, room, services, volumes
from dpo_train.cluster.doctor.api import Access, Look
from dpo_train.cluster.doctor.running import IMPORT_LIMIT_S, Check
from dpo_train.config import RunConfig

if TYPE_CHECKING:
    from dpo_train.cluster.kubeflow.package import Package


def checks_of(config: RunConfig, package: Package | None = None) -> tuple[Check, ...]:
    """All checks of a config. Makes its section on object storage this process's.

    Args:
        package: the compiled pipeline, whose version is looked for on Kubeflow.
    """
    services.use_storage(config)
    access = Access(config.cluster.namespace)
    return (
        *_here(config),
        *_kubernetes(config, access),
        *_kubeflow(config, access, package),
        *_services(config),
    )


def _here(config: RunConfig) -> Iterator[Check]:
    yield Check(name="packages", ask=partial(local.packages, config))
    if config.cluster.launcher == "none" and not services.uses_kubeflow(config) and config.compute.device != "cpu":
        yield Check(name="gpu", ask=partial(local.gpu, config), limit_s=IMPORT_LIMIT_S)
    if not storage.is_remote(config.store):
        yield Check(name="disk", ask=partial(local.disk, config))
    if local.has_local_data(config):
        yield Check(name="data", ask=partial(local.data, config), limit_s=IMPORT_LIMIT_S)
    if not storage.is_remote(config.model.path):
        yield Check(name="model", ask=partial(local.model, config))
    if config.cluster.launcher == "rayjob" or services.uses_kubeflow(config):
        yield Check(name="reach", ask=partial(local.reach, config))


def _kubernetes(config: RunConfig, access: Access) -> Iterator[Check]:
    cluster = config.cluster
    if cluster.launcher != "rayjob":
        return

    def check(name: str, look: Look) -> Check:
        return Check(name=name, ask=access.check(look, config))

    yield Check(name="kubernetes", ask=partial(installed.server, access))
    yield check("namespace", installed.namespace)
    yield check("kuberay", installed.kuberay)
    yield check("operator", installed.operator)
    yield check("rights", rights.rights)
    yield check("account", rights.service_account)
    yield Check(name="image", ask=partial(logins.image, config, "cluster.image"))
    for name in cluster.image_pull_secrets:
        yield check(f"pull secret {name}", logins.pull_secret(name))
    for name in cluster.secrets:
        yield check(f"secret {name}", logins.secret(name))
    for name in volumes.claims_of(config):
        yield check(f"claim {name}", volumes.claim(name))
    if cluster.queue is not None:
        yield check("queue", installed.queue)
    if cluster.priority is not None:
        yield check("priority", installed.priority)
    yield check("head node", room.nodes_for("head"))
    yield check("gpu nodes" if cluster.workers.gpus else "worker nodes", room.nodes_for("worker"))
    yield check("quota", room.quota)
    yield check("limits", room.limits)
    yield check("job", installed.dry_run)


def _kubeflow(config: RunConfig, access: Access, package: Package | None) -> Iterator[Check]:
    if not services.uses_kubeflow(config):
        return
    kubeflow = services.KubeflowAccess(config, package)
    yield Check(name="kubeflow", ask=kubeflow.login, limit_s=IMPORT_LIMIT_S)
    yield Check(name="pipeline", ask=kubeflow.pipeline, limit_s=IMPORT_LIMIT_S)
    if config.kubeflow.image is not None:
        yield Check(name="task image", ask=partial(logins.image, config, "kubeflow.image"))
    tasks = rights.kubeflow_namespace(config)
    yield Check(name="task account", ask=access.check(rights.task_account, config, of=tasks))
    yield Check(name="task secret", ask=access.check(logins.task_secret, config, of=tasks))
    if config.cluster.launcher == "rayjob":
        yield Check(name="task rights", ask=access.check(rights.task_rights, config))


def _services(config: RunConfig) -> Iterator[Check]:
    if config.cluster.launcher == "ray":
        yield Check(name="ray", ask=partial(services.ray, config))
    if storage.is_remote(config.store):
        yield Check(name="store", ask=partial(services.store, config))
    if services.remote_inputs(config):
        yield Check(name="s3 inputs", ask=partial(services.inputs, config))
    yield Check(name="mlflow", ask=partial(services.mlflow, config), limit_s=IMPORT_LIMIT_S)
