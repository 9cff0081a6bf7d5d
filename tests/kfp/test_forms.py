"""The two forms of components whose stages may be jobs: what Kubeflow is told, and that both run.

kfp reads the annotations of the pipelines below as they are: no ``from __future__ import annotations`` here.
"""

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_train import launch
from dpo_train.config import to_text
from dpo_train.config.cluster import LaunchedStage
from tests.tiny import tiny_config

pytest.importorskip("kfp")

STAGES = typing.get_args(LaunchedStage)


def forms(stage: str) -> tuple[Any, Any]:
    """The component for its own pod, and the one for a job."""
    module = __import__(f"components.{stage}", fromlist=[stage])
    return getattr(module, stage), getattr(module, f"{stage}_job")


def specs(stage: str) -> list[dict[str, Any]]:
    from google.protobuf import json_format

    return [json_format.MessageToDict(form.pipeline_spec) for form in forms(stage)]


@pytest.mark.parametrize("stage", STAGES)
def test_both_forms_do_the_same(stage: str) -> None:
    """One function, one image, the same inputs and outputs but for Kubeflow's own."""
    (own, job), name = specs(stage), f"comp-{stage.replace('_', '-')}"

    assert own["deploymentSpec"] == job["deploymentSpec"]
    mine, jobs = own["components"][name], job["components"][name]
    assert mine["outputDefinitions"] == jobs["outputDefinitions"]
    assert jobs["inputDefinitions"]["parameters"].pop("task_config")["parameterType"] == "TASK_CONFIG"
    assert mine["inputDefinitions"] == jobs["inputDefinitions"]


@pytest.mark.parametrize("stage", STAGES)
def test_waiting_task_gets_environment_and_volumes_and_no_gpus(stage: str) -> None:
    """What is listed without applyToTask goes to the job alone; a server before 2.15 never sees any of it."""
    (own, job), name = specs(stage), f"comp-{stage.replace('_', '-')}"

    listed = {
        each["field"]: each.get("applyToTask", False) for each in job["components"][name]["taskConfigPassthroughs"]
    }
    assert listed == {
        "RESOURCES": False,
        "KUBERNETES_NODE_SELECTOR": False,
        "KUBERNETES_TOLERATIONS": False,
        "KUBERNETES_AFFINITY": False,
        "ENV": True,
        "KUBERNETES_VOLUMES": True,
    }
    assert "taskConfigPassthroughs" not in own["components"][name]
    assert "TASK_CONFIG" not in str(own)


def test_pipeline_of_ones_own_may_set_everything_on_the_task(tmp_path: Path) -> None:
    """The compiler refuses a setting that a component with passthroughs does not list; ours list all it knows."""
    from kfp import compiler, dsl

    from components.prepare import prepare_job

    @dsl.pipeline(name="mine")
    def mine(config: str) -> None:
        task = prepare_job(config=config, run_id="", data_digest="")
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(2)
        task.set_memory_limit("64Gi").set_env_variable("NCCL_DEBUG", "INFO")
        # As kfp-kubernetes writes them.
        task.platform_config["kubernetes"] = {
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "nodeSelector": {"labels": {"pool": "gpu"}},
            "nodeAffinity": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}],
            "pvcMount": [{"constant": "team-data", "mountPath": "/data"}],
        }

    compiler.Compiler().compile(mine, str(tmp_path / "mine.yaml"))

    pipeline, platform = yaml.safe_load_all((tmp_path / "mine.yaml").read_text())
    container = pipeline["deploymentSpec"]["executors"]["exec-prepare"]["container"]
    assert container["resources"]["accelerator"]["resourceCount"] == "2"
    (executor,) = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert executor.keys() == {"tolerations", "nodeSelector", "nodeAffinity", "pvcMount"}


@pytest.mark.parametrize("form", [0, 1], ids=["own pod", "job"])
def test_kfp_local_runs_both_forms(form: int, tmp_path: Path) -> None:
    """Nothing hands a task's settings over there: both find none, and prepare the pairs."""
    from kfp import compiler, components, dsl, local

    component = forms("prepare")[form]

    @dsl.pipeline(name="mine")
    def mine(config: str, run_id: str) -> None:
        component(config=config, run_id=run_id, data_digest="")

    config = tiny_config(tmp_path, tracking__uri=f"sqlite:///{tmp_path}/mlflow.db")
    run_id = launch.open_run(config, "mine")
    compiler.Compiler().compile(mine, str(tmp_path / "mine.yaml"))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"), raise_on_error=True)

    components.load_component_from_file(str(tmp_path / "mine.yaml"))(config=to_text(config), run_id=run_id)

    assert len(list((tmp_path / "store" / "prepare").glob("*/record.json"))) == 1
