"""The manifest of a job: what stands in it, and that its pods are as restricted as they claim to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_train.cluster.job import NAME_LENGTH, job_for
from dpo_train.cluster.rayjob import RAY_VERSION, Owner, hash_of, manifest, num_pods, spec_hash
from dpo_train.config import RunConfig, parse_config
from dpo_train.errors import ConfigError
from tests.cluster.configs import CONFIGS, config_of
from tests.restricted import pods_of, violations

INPUTS = {"prepare": "prepare/0123456789abcdef"}


def made(config: RunConfig, stage: str = "train", **more: Any) -> dict[str, Any]:
    return manifest(job_for(stage, config, INPUTS, run_id="r1"), config, namespace="team-a", **more)


def pods(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template of a manifest, by what it is."""
    spec = job["spec"]
    yield "submitter", spec["submitterPodTemplate"]["spec"]
    yield "head", spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_pod_passes_the_restricted_standard(name: str) -> None:
    """Each pod of each config, by the rules of Kubernetes' pod security standard `restricted`."""
    found = dict(pods_of(made(config_of(name))))

    assert len(found) == 3
    assert {where: violations(pod) for where, pod in found.items()} == {where: [] for where in found}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_mount_has_its_volume_and_every_container_its_limits(name: str) -> None:
    """A name that leads nowhere would be refused only when the pod is made, after the job was accepted."""
    for kind, pod in pods(made(config_of(name))):
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(set(volumes)) == len(volumes), kind
        for container in pod["containers"]:
            mounts = container["volumeMounts"]
            assert {mount["name"] for mount in mounts} == set(volumes), kind
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts), kind
            assert container["resources"]["limits"] == container["resources"]["requests"], kind
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}, kind


def test_secrets_come_by_reference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launching process has in its environment is nowhere in the manifest; Ray's pods name the Secrets."""
    planted = {name: f"planted-{name.lower()}" for name in (
        "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "RAY_AUTH_TOKEN",
    )}  # fmt: skip
    for name, value in planted.items():
        monkeypatch.setenv(name, value)

    job = made(config_of("everything"))

    assert "planted" not in json.dumps(job)
    for kind, pod in pods(job):
        references = [entry["secretRef"]["name"] for entry in pod["containers"][0].get("envFrom", [])]
        assert references == ([] if kind == "submitter" else ["dpo-credentials", "team-login"]), kind


def test_the_entry_point_names_the_folder_and_nothing_else() -> None:
    """Arguments are public: the config, with its addresses, stays in the store. A folder with a blank is one word."""
    config = config_of("everything")

    job = made(parse_config(json.dumps({**_tree(config), "store": "s3://bucket/my store"})))

    name = job["metadata"]["name"]
    assert job["spec"]["entrypoint"] == f"dpo job 's3://bucket/my store/jobs/{name}'"
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {
        "env_vars": {
            "AWS_ENDPOINT_URL": "http://minio.team-a:9000",
            "AWS_REGION": "eu-west-1",
            "RAY_JOB_STOP_WAIT_TIME_S": "20",
        }
    }


def _tree(config: RunConfig) -> dict[str, Any]:
    from dpo_train.config import to_dict

    return to_dict(config)


@pytest.mark.parametrize("stage", ["prepare", "sft", "score_reference", "sweep", "train", "evaluate"])
def test_name_is_short_and_says_the_stage(stage: str) -> None:
    """KubeRay takes 47 characters: it adds to the name for the cluster, the services and the submitter."""
    name = made(config_of("plain"), stage)["metadata"]["name"]

    assert len(name) <= NAME_LENGTH
    assert name.startswith(f"dpo-{stage.replace('_', '-')}-")


def test_the_same_question_has_the_same_name_and_every_other_another() -> None:
    """Run, stage, inputs and config decide: a task that was restarted finds its job, and nobody else's."""
    config, other = config_of("plain"), config_of("gpus")
    names = {
        job_for("train", config, INPUTS, run_id="r1").name,
        job_for("train", config, INPUTS, run_id="r2").name,
        job_for("sweep", config, INPUTS, run_id="r1").name,
        job_for("train", config, {"prepare": "prepare/other"}, run_id="r1").name,
        job_for("train", other, INPUTS, run_id="r1").name,
    }

    assert len(names) == 5
    assert job_for("train", config, dict(INPUTS), run_id="r1").name in names


def test_hash_tells_specs_apart_and_owners_not() -> None:
    """A job that is found by its name is the same one if its spec is, whoever owns it."""
    config = config_of("plain")
    owner = Owner(api_version="argoproj.io/v1alpha1", kind="Workflow", name="dpo-x", uid="u-1")
    plain, owned = made(config), made(config, owner=owner)

    assert spec_hash(plain) == spec_hash(owned) == hash_of(plain["spec"])
    assert owned["metadata"]["ownerReferences"] == [
        {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "dpo-x", "uid": "u-1"}
    ]
    assert spec_hash(made(config_of("deadline"))) != spec_hash(plain)


@pytest.mark.parametrize(
    ("compute", "workers", "pods"),
    [
        ({"workers": 1, "data_workers": 1}, {}, (1, 1)),
        ({"workers": 1, "data_workers": 6}, {}, (6, 6)),
        ({"workers": 16, "data_workers": 40}, {"gpus": 8}, (2, 2)),
        ({"workers": 17}, {"gpus": 8}, (3, 3)),
        ({"workers": 16, "min_workers": 4}, {"gpus": 8}, (1, 2)),
        ({"workers": 16, "min_workers": 16}, {"gpus": 8}, (2, 2)),
        ({"workers": 16}, {"gpus": 8, "pods": 5}, (5, 5)),
    ],
)
def test_number_of_pods(compute: dict[str, int], workers: dict[str, int], pods: tuple[int, int]) -> None:
    """As many as hold the workers, by hand; without GPUs, one worker a pod, those that score as well."""
    tree = {
        "model": {"path": "m"},
        "prepare": {"path": "s3://b/d"},
        "compute": compute,
        "cluster": {"workers": workers},
    }

    assert num_pods(parse_config(json.dumps({**tree, "cluster": {"workers": workers}}))) == pods


def test_gpus_their_kind_and_shared_memory_stand_at_the_workers_alone() -> None:
    """The head drives; it asks for no GPU."""
    found = dict(pods(made(config_of("everything"))))
    worker = found["workers"]

    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert worker["nodeSelector"] == {"pool": "gpu", "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}} in worker["volumes"]
    assert worker["terminationGracePeriodSeconds"] == 300
    assert "nvidia.com/gpu" not in json.dumps(found["head"])
    environment = {entry["name"]: entry["value"] for entry in worker["containers"][0]["env"]}
    assert environment["NCCL_SOCKET_IFNAME"] == "eth0"
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"


def test_kueue_gets_a_suspended_job_with_its_queue() -> None:
    """Kueue admits what is suspended, and wants the cluster shut down at the end."""
    job = made(config_of("everything"))

    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-queue"
    assert "suspend" not in made(config_of("plain"))["spec"]


def test_nobody_but_the_launcher_tries_again() -> None:
    """One layer of retries: neither KubeRay nor the submitter's pod starts a job anew."""
    spec = made(config_of("plain"))["spec"]

    assert spec["backoffLimit"] == 0
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    assert spec["activeDeadlineSeconds"] == 24 * 3600


def test_a_job_without_an_image_is_refused() -> None:
    """There is no default: an image that happens to have that name would run with our credentials."""
    tree = {
        "model": {"path": "m"},
        "prepare": {"path": "s3://b/d"},
        "store": "s3://b/s",
        "tracking": {"uri": "http://m"},
    }
    config = parse_config(json.dumps(tree))

    with pytest.raises(ConfigError, match=r"needs an image.*cluster\.image"):
        manifest(job_for("train", config, {}), config, namespace="n")


@pytest.mark.parametrize("name", CONFIGS)
def test_job_passes_what_the_operator_asks_beyond_the_schema(name: str) -> None:
    """KubeRay's own validation, which ends a job as ValidationFailed: tokens want a version, names are short, workers
    are within their bounds, a job that Kueue suspends shuts its cluster down."""
    job = made(config_of(name))
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]

    assert cluster["authOptions"]["mode"] == "token"
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["containers"]
    assert spec["shutdownAfterJobFinishes"] or not spec.get("suspend")
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert "clusterSelector" not in spec


def test_version_of_ray_is_that_of_the_image() -> None:
    """The image is made from the lock."""
    lock = (Path(__file__).parents[3] / "requirements.lock").read_text()

    assert f"ray=={RAY_VERSION}" in lock.splitlines()


def test_elastic_job_begins_with_the_least_and_its_autoscaler_is_restricted() -> None:
    """KubeRay submits when all pods of `replicas` run, and adds the autoscaler to the head."""
    cluster = made(config_of("elastic"))["spec"]["rayClusterSpec"]
    group = cluster["workerGroupSpecs"][0]

    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 4)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
    assert "serviceAccountName" not in cluster["headGroupSpec"]["template"]["spec"]


def test_kueue_and_elastic_contradict_each_other() -> None:
    """Kueue's webhook refuses a job that scales itself; it is said before anything is sent."""
    tree = {"model": {"path": "m"}, "prepare": {"path": "s3://b/d"}, "compute": {"workers": 4, "min_workers": 2}}

    with pytest.raises(ConfigError, match=r"Kueue"):
        parse_config(json.dumps({**tree, "cluster": {"launcher": "rayjob", "queue": "q"}}))
