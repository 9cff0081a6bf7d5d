"""What a Kubeflow task sets for its job: where it lands, what contradicts the config, what has no effect."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from dpo_train.cluster.job import job_for
from dpo_train.cluster.rayjob import manifest, num_pods
from dpo_train.cluster.task_settings import with_task_settings
from dpo_train.config import RunConfig, parse_config, to_dict
from dpo_train.errors import ConfigError
from tests.cluster.configs import config_of
from tests.cluster.task import EVERYTHING
from tests.restricted import pods_of, violations


def changed(name: str = "plain", **cluster: Any) -> RunConfig:
    """The named config, with other keys of its section cluster."""
    tree = to_dict(config_of(name))
    workers = {**tree["cluster"]["workers"], **cluster.pop("workers", {})}
    return parse_config(json.dumps({**tree, "cluster": {**tree["cluster"], **cluster, "workers": workers}}))


def pods_with(config: RunConfig, task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Head and worker of the job."""
    config = with_task_settings(config, "train", task)
    cluster = manifest(job_for("train", config, {}), config, namespace="n")["spec"]["rayClusterSpec"]
    return (
        cluster["headGroupSpec"]["template"]["spec"],
        cluster["workerGroupSpecs"][0]["template"]["spec"],
    )


def test_workers_get_the_place_and_the_resources_and_the_head_does_not() -> None:
    """The head drives: GPUs, and nodes that have them, are the workers'."""
    head, worker = pods_with(config_of("plain"), EVERYTHING)
    (container,) = worker["containers"]

    assert container["resources"]["limits"] == {"cpu": "7500m", "memory": "64Gi", "nvidia.com/gpu": "2"}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert worker["nodeSelector"] == {"pool": "gpu"}
    assert worker["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert worker["affinity"] == EVERYTHING["affinity"]
    assert head["containers"][0]["resources"]["limits"] == {"cpu": "4", "memory": "16Gi"}
    assert not {"nodeSelector", "tolerations", "affinity"} & head.keys()


def test_head_and_workers_get_the_environment_and_the_volumes() -> None:
    """A login stays a reference. MLflow's run of the task is not the job's."""
    for pod in pods_with(config_of("plain"), EVERYTHING):
        (container,) = pod["containers"]
        variables = {each["name"]: each for each in container["env"]}
        volumes = {each["name"]: each for each in pod["volumes"]}
        mounted = {
            mount["mountPath"]: (volumes[mount["name"]], mount)
            for mount in container["volumeMounts"]
        }  # fmt: skip

        assert len(variables) == len(container["env"])
        assert variables["NCCL_DEBUG"]["value"] == "INFO"
        assert variables["WANDB_API_KEY"] == {
            "name": "WANDB_API_KEY",
            "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "token", "optional": False}},
        }
        assert "MLFLOW_RUN_ID" not in variables
        assert mounted["/data"][0]["persistentVolumeClaim"] == {"claimName": "team-data"}
        assert mounted["/etc/ca"][0]["secret"] == {"secretName": "our-ca", "optional": False}
        assert mounted["/models"][0]["persistentVolumeClaim"] == {"claimName": "models"}
        assert mounted["/models"][1]["subPath"] == "llama"


def test_pods_of_such_a_job_pass_the_restricted_standard() -> None:
    """As those of every other one."""
    config = with_task_settings(config_of("plain"), "train", EVERYTHING)
    found = dict(pods_of(manifest(job_for("train", config, {}), config, namespace="n")))

    assert {where: violations(pod) for where, pod in found.items()} == {where: [] for where in found}


def test_gpus_of_the_task_decide_device_and_number_of_pods() -> None:
    """Two GPUs a pod: eight workers need four pods, and the job computes on GPUs."""
    config = changed()
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, workers=8))

    settled = with_task_settings(config, "train", EVERYTHING)

    assert num_pods(settled) == (4, 4)
    assert job_for("train", settled, {}).config.compute.device == "cuda"
    assert job_for("train", config, {}).config.compute.device == "cpu"


def test_a_request_alone_is_the_limit_too() -> None:
    """A job's pods have one value for both."""
    _, worker = pods_with(config_of("plain"), {"resources": {"requests": {"cpu": "2", "memory": "8Gi"}}})

    assert worker["containers"][0]["resources"]["limits"] == {"cpu": "2", "memory": "8Gi"}


def test_what_both_set_alike_is_no_contradiction() -> None:
    """Quantities by what they mean; `dpo submit` mounts the volumes of the config into the task as well."""
    config = changed(
        workers={"gpus": 2, "memory": "65536Mi", "cpus": 7.5, "node_selector": {"pool": "gpu", "zone": "a"}},
        volumes={"/data": "team-data", "/more": "more"}, environment={"NCCL_DEBUG": "INFO", "OTHER": "1"},
    )  # fmt: skip

    settled = with_task_settings(config, "train", EVERYTHING).cluster

    assert settled.workers.memory == "65536Mi"
    assert settled.workers.node_selector == {"pool": "gpu", "zone": "a"}
    assert settled.volumes == {"/data": "team-data", "/more": "more"}
    assert settled.environment == {"NCCL_DEBUG": "INFO", "OTHER": "1"}


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"workers": {"gpus": 8}}, r"cluster\.workers\.gpus=8, the task 2"),
        ({"workers": {"gpu_resource": "amd.com/gpu"}}, r"gpu_resource=amd\.com/gpu, the task nvidia\.com/gpu"),
        ({"workers": {"memory": "32Gi"}}, r"cluster\.workers\.memory=32Gi, the task 64Gi"),
        ({"workers": {"cpus": 8}}, r"cluster\.workers\.cpus=8\.0, the task 7\.5"),
        ({"workers": {"node_selector": {"pool": "cpu"}}}, r"node_selector=pool: cpu, the task pool: gpu"),
        ({"workers": {"tolerations": [{"operator": "Exists"}]}}, r"cluster\.workers\.tolerations="),
        ({"workers": {"affinity": {"podAffinity": {}}}}, r"cluster\.workers\.affinity="),
        ({"environment": {"NCCL_DEBUG": "WARN"}}, r"environment=NCCL_DEBUG: WARN, the task NCCL_DEBUG: INFO"),
        ({"environment": {"WANDB_API_KEY": "x"}}, r"WANDB_API_KEY=x, and the same name from .*secretKeyRef"),
        ({"volumes": {"/data": "other"}}, r"volumes=/data: other, the task /data: team-data"),
        ({"volumes": {"/etc/ca": "other"}}, r"the claim other at /etc/ca, and there also .*our-ca"),
        ({"workers": {"gpu_label": "pool", "gpu_type": "h100"}}, r"gpu_type=h100, and a node selector pool=gpu"),
    ],
)  # fmt: skip
def test_contradiction_names_both(cluster: dict[str, Any], words: str) -> None:
    """Neither the task nor the config is known to be the newer one."""
    with pytest.raises(ConfigError, match=rf"The task of train and the config .*{words}"):
        with_task_settings(changed(**cluster), "train", EVERYTHING)


def test_request_that_differs_from_its_limit_is_refused() -> None:
    """One value would have to be dropped in silence."""
    task = {"resources": {"requests": {"memory": "8Gi"}, "limits": {"memory": "16Gi"}}}

    with pytest.raises(ConfigError, match="memory: request 8Gi, limit 16Gi"):
        with_task_settings(config_of("plain"), "train", task)


@pytest.mark.parametrize("cluster", [{"launcher": "none"}, {"launcher": "ray"}, {"stages": ["score_reference"]}])
def test_resources_that_would_have_no_effect_are_refused(cluster: dict[str, Any]) -> None:
    """Kubeflow has not given them to the task's pod, and there is no job: the stage would train without its GPUs."""
    with pytest.raises(ConfigError, match=r"sets .*gpus.*and train is not run as one.*`train`, not `train_job`"):
        with_task_settings(changed(**cluster), "train", EVERYTHING)


def test_environment_and_volumes_alone_need_no_job() -> None:
    """The task's pod has got them."""
    config = changed(launcher="none")
    task = {key: EVERYTHING[key] for key in ("env", "volumes", "volume_mounts")}

    assert with_task_settings(config, "train", task) == config


@pytest.mark.parametrize(("path", "key"), [("/dev/shm", "shared_memory"), ("/var/cache/dpo", "model_cache")])
def test_two_volumes_at_one_path_are_refused(path: str, key: str) -> None:
    """Kubernetes would accept the job, and never make its pods."""
    task = {
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "v"}}],
        "volume_mounts": [{"name": "v", "mountPath": path}],
    }

    with pytest.raises(ConfigError, match=rf"Two volumes .*{path}.*{key}"):
        pods_with(config_of("plain"), task)
