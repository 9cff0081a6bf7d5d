"""What a Kubeflow task sets, from the component's own input to the RayJob on a real API server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cluster.kube import Kube
from dpo_train.config import to_text
from tests.cluster.operator import until
from tests.cluster.task import EVERYTHING, as_the_driver_writes_it
from tests.tiny import tiny_config

pytest.importorskip("kfp")


def run_component(config: str, task: dict[str, Any], folder: Path) -> None:
    """The component prepare_job by kfp's own executor, with the input that Kubeflow's driver hands to its pod."""
    from kfp.dsl.executor import Executor

    from components.prepare import prepare_job

    def output(name: str, kind: str) -> dict[str, Any]:
        return {"artifacts": [{"name": name, "type": {"schemaTitle": kind}, "uri": f"{folder}/{name}", "metadata": {}}]}

    given = {"config": config, "run_id": "a-run", "data_digest": "d", "task_config": as_the_driver_writes_it(task)}
    outputs = {
        "artifacts": {"pairs": output("pairs", "system.Dataset"), "report": output("report", "system.HTML")},
        "outputFile": f"{folder}/executor_output.json",
    }
    Executor({"inputs": {"parameterValues": given}, "outputs": outputs}, prepare_job.python_func).execute()


@pytest.fixture
def rayjob(namespaces: Callable[[], Kube], tmp_path: Path) -> dict[str, Any]:
    """The RayJob that the component has created, with strict validation, from EVERYTHING."""
    kube = namespaces()
    config = tiny_config(
        tmp_path, cluster__launcher="rayjob", cluster__image="registry.example/dpo@sha256:0",
        cluster__namespace=kube.namespace, cluster__volumes={str(tmp_path): "claim"}, compute__device="cpu",
    )  # fmt: skip
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run_component(to_text(config), EVERYTHING, tmp_path)
        except BaseException as error:  # the RayJob is taken from it
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    collection = f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs"
    (found,) = until(lambda: errors or kube.ask("GET", collection)["items"], "a RayJob")
    if isinstance(found, BaseException):
        raise found
    kube.ask("DELETE", f"{collection}/{found['metadata']['name']}")
    thread.join(60)
    assert "was deleted while it ran" in str(errors[0])
    return dict(found)


def test_rayjob_of_a_component_has_what_its_task_sets(rayjob: dict[str, Any]) -> None:
    """The server has checked every field; the workers ask for the task's GPUs, on the task's nodes."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    head = cluster["headGroupSpec"]["template"]["spec"]

    assert worker["containers"][0]["resources"]["limits"] == EVERYTHING["resources"]["limits"]
    assert worker["affinity"] == EVERYTHING["affinity"]
    assert worker["tolerations"] == EVERYTHING["tolerations"]
    assert worker["nodeSelector"] == EVERYTHING["node_selector"]
    for pod in (head, worker):
        assert {"/data", "/etc/ca", "/models"} <= {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert {"NCCL_DEBUG", "WANDB_API_KEY"} <= {each["name"] for each in pod["containers"][0]["env"]}
