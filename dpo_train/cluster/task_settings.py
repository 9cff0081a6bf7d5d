"""What a Kubeflow task sets for the job that it launches becomes part of the config. Pure.

A component with `task_config_passthroughs` gets what its task's own pod would have got (kfp's ``dsl.TaskConfig``), as
fragments of a pod in Kubernetes' own words:

    resources, node selector, tolerations, affinity    -> cluster.workers: the pods that train and score
    environment variables, volumes                     -> cluster: head and workers; the task's pod has them as well

What the task sets takes the place of a key's default. Where the config sets the same thing differently it is an error:
neither of them is known to be the newer one. In mappings each entry stands for itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from dpo_train.cluster.doctor.quantities import number
from dpo_train.config import ClusterConfig, RunConfig, parse_config, to_dict
from dpo_train.errors import ConfigError

_OF_THE_TASK = {"MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"}
"""Kubeflow's MLflow plugin names the task's own run by them; a job has its own, below the pipeline's."""
_BY_ENTRY = {"node_selector", "environment", "environment_from", "volumes", "mounts"}


def with_task_settings(config: RunConfig, stage: str, task: Mapping[str, Any]) -> RunConfig:
    """The config with what the task sets for its job.

    Args:
        task: the fields of ``dsl.TaskConfig``; empty or None where the task sets nothing.

    Raises:
        ConfigError: task and config contradict each other; or a job's pods cannot be given what the task sets; or the
            stage is not run as a RayJob, so that the settings would have no effect.
    """
    workers, cluster = _of_workers(task), _of_all_pods(task)
    if config.cluster.launcher != "rayjob" or stage not in config.cluster.stages:
        if workers:
            raise ConfigError(
                f"The task sets {', '.join(sorted(workers))} for a RayJob, and {stage} is not run as one",
                got=f"cluster.launcher={config.cluster.launcher}, cluster.stages={', '.join(config.cluster.stages)}",
                fix=f"set cluster.launcher=rayjob, or use the component `{stage}`, not `{stage}_job`: it works in its "
                "own pod, which gets what the task sets",
            )
        return config
    tree, defaults = to_dict(config), to_dict(ClusterConfig())
    contradictions = [
        *_put(workers, tree["cluster"]["workers"], defaults["workers"], "cluster.workers"),
        *_put(cluster, tree["cluster"], defaults, "cluster"),
    ]
    contradictions += _taken_twice(tree["cluster"])
    if contradictions:
        raise ConfigError(
            f"The task of {stage} and the config set the same thing differently",
            got="; ".join(contradictions),
            fix="set it in one of the two places",
        )
    return parse_config(json.dumps(tree), origin=f"the config with what the task of {stage} sets")


def _of_workers(task: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of cluster.workers."""
    found = {
        **_resources(task.get("resources") or {}),
        "node_selector": task.get("node_selector"),
        "tolerations": task.get("tolerations"),
        "affinity": task.get("affinity"),
    }
    return {key: value for key, value in found.items() if value}


def _resources(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of cluster.workers; ``given`` holds Kubernetes' limits and requests.

    Raises:
        ConfigError: a request differs from its limit.
    """
    limits, requests = given.get("limits") or {}, given.get("requests") or {}
    for name in limits.keys() & requests.keys():
        if number(limits[name]) != number(requests[name]):
            raise ConfigError(
                "The task sets a request that differs from its limit, and a job's pods have one value for both",
                got=f"{name}: request {requests[name]}, limit {limits[name]}",
                fix="set one of them, or both the same",
            )
    found: dict[str, Any] = {}
    for name, quantity in {**requests, **limits}.items():
        if name == "cpu":
            found["cpus"] = float(number(quantity))
        elif name == "memory":
            found["memory"] = str(quantity)
        else:  # Kubeflow knows cores, memory and one kind of accelerator
            found |= {"gpus": int(number(quantity)), "gpu_resource": name}
    return found


def _of_all_pods(task: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of cluster."""
    variables = {each["name"]: each for each in task.get("env") or [] if each["name"] not in _OF_THE_TASK}
    filled_in = {name: each["valueFrom"] for name, each in variables.items() if each.get("valueFrom")}
    found: dict[str, Any] = {
        "environment": {name: each.get("value", "") for name, each in variables.items() if name not in filled_in},
        "environment_from": filled_in,
        "volumes": {},
        "mounts": {},
    }
    sources = {volume["name"]: volume for volume in task.get("volumes") or []}
    for mount in task.get("volume_mounts") or []:
        source = {key: value for key, value in sources[mount["name"]].items() if key != "name"}
        options = {key: mount[key] for key in ("subPath", "readOnly") if mount.get(key)}
        claim = source.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and not options and len(source["persistentVolumeClaim"]) == 1:
            found["volumes"][mount["mountPath"]] = claim
        else:
            found["mounts"][mount["mountPath"]] = {**source, **options}
    return {key: value for key, value in found.items() if value}


def _put(wanted: Mapping[str, Any], section: dict[str, Any], defaults: Mapping[str, Any], name: str) -> Iterator[str]:
    """Puts what the task sets into a section, and tells what contradicts it."""
    for key, value in wanted.items():
        if key in _BY_ENTRY:
            for entry, wish in value.items():
                there = section[key].setdefault(entry, wish)
                if there != wish:
                    yield _words(f"{name}.{key}", f"{entry}: {there}", f"{entry}: {wish}")
        elif _equal(key, section[key], defaults[key]):
            section[key] = value
        elif not _equal(key, section[key], value):
            yield _words(f"{name}.{key}", section[key], value)


def _taken_twice(cluster: Mapping[str, Any]) -> Iterator[str]:
    """Names, paths and labels that two keys of the section want."""
    workers = cluster["workers"]
    label, kind = workers["gpu_label"], workers["gpu_type"]
    selected = workers["node_selector"].get(label)
    if kind is not None and selected not in {None, kind}:
        yield f"cluster.workers.gpu_type={kind}, and a node selector {label}={selected}"
    for name in sorted(cluster["environment"].keys() & cluster["environment_from"].keys()):
        yield f"{name}={cluster['environment'][name]}, and the same name from {cluster['environment_from'][name]}"
    for path in sorted(cluster["volumes"].keys() & cluster["mounts"].keys()):
        yield f"the claim {cluster['volumes'][path]} at {path}, and there also {cluster['mounts'][path]}"


def _words(key: str, there: object, wish: object) -> str:
    return f"the config {key}={there}, the task {wish}"


def _equal(key: str, one: Any, other: Any) -> bool:
    """Whether two values of a key mean the same; a quantity can be written in several ways."""
    if key == "memory":
        return number(one) == number(other)
    return Decimal(one) == Decimal(other) if key == "cpus" else bool(one == other)
