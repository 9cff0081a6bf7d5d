"""A stage through a RayJob: the API server keeps the job, and its entry point runs here, as it would in the head."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_train import launch
from dpo_train.artifacts import Artifact
from dpo_train.cluster.kube import MERGE_PATCH, Kube
from dpo_train.config import RunConfig
from dpo_train.errors import DataError
from dpo_train.stages import prepare
from dpo_train.stages.executor import InProcess
from tests.cluster.operator import until
from tests.tiny import tiny_config


def run_what_comes(kube: Kube, outputs: list[str]) -> None:
    """Plays KubeRay for the next RayJob of the namespace: its entry point is run, with its environment, to the end."""
    collection = f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs"

    def waiting() -> dict[str, Any] | None:
        items = kube.ask("GET", collection)["items"]
        return next((item for item in items if not item.get("status", {}).get("jobDeploymentStatus")), None)

    job = until(waiting, "a RayJob")
    path = f"{collection}/{job['metadata']['name']}"
    spec = job["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    variables = {
        entry["name"]: entry["value"] for entry in head["env"] if entry["name"] not in {"DPO_CACHE", "HF_HOME"}
    }
    variables |= yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    kept = {key: value for key, value in os.environ.items() if key not in {"KUBECONFIG", "RAY_ADDRESS", "DPO_EVENTS"}}
    path_here = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"

    def move(deployment: str, of_ray: str) -> None:
        status = {"jobDeploymentStatus": deployment, "jobStatus": of_ray}
        kube.ask("PATCH", f"{path}/status", body={"status": status}, content_type=MERGE_PATCH)

    move("Running", "RUNNING")
    done = subprocess.run(
        shlex.split(spec["entrypoint"]), env={**kept, **variables, "PATH": path_here}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    outputs.append(done.stdout + done.stderr)
    move("Complete" if done.returncode == 0 else "Failed", "SUCCEEDED" if done.returncode == 0 else "FAILED")


def through_a_job(kube: Kube, config: RunConfig) -> tuple[Artifact, str]:
    """The stage prepare, and what its job printed."""
    printed: list[str] = []
    cluster = threading.Thread(target=run_what_comes, args=(kube, printed), daemon=True)
    cluster.start()
    try:
        made = launch.run_stage("prepare", config, {})
    finally:
        cluster.join(300)
    return made, printed[0]


def on_a_cluster(folder: Path, namespace: str, **changes: Any) -> RunConfig:
    return tiny_config(
        folder, cluster__launcher="rayjob", cluster__image="registry.example/dpo@sha256:0",
        cluster__namespace=namespace, cluster__volumes={str(folder): "claim"}, compute__device="cpu", **changes,
    )  # fmt: skip


@pytest.fixture
def kube(namespaces: Callable[[], Kube]) -> Kube:
    """A namespace of its own: jobs that other tests have left are nobody's to run."""
    return namespaces()


@pytest.mark.slow
def test_stage_of_a_rayjob_leaves_what_it_leaves_here(kube: Kube, tmp_path: Path) -> None:
    """The same output at the same address, and its record in MLflow, from the command that stands in the manifest."""
    config = on_a_cluster(tmp_path, kube.namespace)

    made, printed = through_a_job(kube, config)

    assert made.home.startswith(f"{config.store}/prepare/")
    assert not made.reused
    assert "dpo-event" in printed
    here = tiny_config(tmp_path, store=str(tmp_path / "here"))
    assert prepare(here, InProcess()).address == made.address


@pytest.mark.slow
def test_mistake_in_a_rayjob_is_told_as_the_mistake_that_it_is(kube: Kube, tmp_path: Path) -> None:
    """The stage's own error comes back with its kind and its words, not that some job has failed."""
    config = on_a_cluster(tmp_path, kube.namespace)
    (tmp_path / "pairs.jsonl").write_text("{}\n")

    with pytest.raises(DataError, match=r"format cannot be recognised"):
        through_a_job(kube, config)
