"""The compiled pipeline: fresh, and made of components that do nothing but decode, call and log."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_train.cluster.doctor.logins import TASKS_JUDGE_KEYS
from dpo_train.launch import INPUTS

pytest.importorskip("kfp")

ROOT = Path(__file__).parents[2]


def test_committed_yaml_is_what_the_graph_compiles_to(tmp_path: Path) -> None:
    """`make compile` was run after the last change of the graph or a component."""
    from pipelines.compile import PACKAGE, compile_pipeline

    fresh = compile_pipeline(tmp_path / "dpo.yaml")

    assert PACKAGE.read_text() == fresh.read_text()


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """The pipeline, and what Kubernetes is told beside it."""
    return list(yaml.safe_load_all((ROOT / "pipelines" / "dpo.yaml").read_text()))


def test_platform_is_what_the_executor_reads(documents: list[dict[str, Any]]) -> None:
    """kfp-kubernetes' message, by which Kubeflow reads it, takes every key; kfp's own looks into no executor."""
    messages = pytest.importorskip("kfp.kubernetes.kubernetes_executor_config_pb2")
    from google.protobuf import json_format

    for executor in documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        assert json_format.ParseDict(executor, messages.KubernetesExecutorConfig()).secret_as_env


def test_parameters_say_what_they_are(documents: list[dict[str, Any]]) -> None:
    """Whoever starts a run on Kubeflow's page reads it there; all but the config may be left out."""
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]

    assert {name: each["parameterType"] for name, each in parameters.items()} == {
        "config": "STRING",
        "run_name": "STRING",
        "overrides": "LIST",
    }
    assert all(each["description"] for each in parameters.values())
    assert [name for name, each in parameters.items() if not each.get("isOptional")] == ["config"]


def test_every_stage_is_one_task_that_reads_what_the_stage_reads(documents: list[dict[str, Any]]) -> None:
    """The graph's edges are those of launch.INPUTS; caching is off for all."""
    found = dict(_tasks(documents[0], "comp-condition-2"))
    names = {name: name.replace("-", "_") for name in found}

    assert set(names.values()) == set(INPUTS)
    for name, task in found.items():
        producers = {
            names[given["taskOutputArtifact"]["producerTask"]] for given in task["inputs"].get("artifacts", {}).values()
        }
        assert producers == set(INPUTS.get(names[name], ()))
    others = [*_tasks(documents[0], "comp-exit-handler-1"), *documents[0]["root"]["dag"]["tasks"].items()]
    assert {name for name, _ in others} == {"resolve", "condition-2", "exit-handler-1", "notify"}
    for _, task in [*found.items(), *others]:
        assert not task.get("cachingOptions", {}).get("enableCache", False)


def test_stages_run_where_there_is_something_to_do_and_notify_runs_whatever_happens(
    documents: list[dict[str, Any]],
) -> None:
    """All stages lie in the condition, all but notify in the exit handler; stages get the config that resolve puts out.

    The condition looks at an output called Output: kfp.local takes a comparison with any other for false.
    """
    condition = dict(_tasks(documents[0], "comp-exit-handler-1"))["condition-2"]
    notify = documents[0]["root"]["dag"]["tasks"]["notify"]

    assert condition["triggerPolicy"]["condition"] == (
        "inputs.parameter_values['pipelinechannel--resolve-Output'] == 'train'"
    )
    assert condition["inputs"]["parameters"]["pipelinechannel--resolve-config"]["taskOutputParameter"] == {
        "outputParameterKey": "config",
        "producerTask": "resolve",
    }
    assert notify["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert notify["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    for _, task in _tasks(documents[0], "comp-condition-2"):
        assert task["inputs"]["parameters"]["config"] == {"componentInputParameter": "pipelinechannel--resolve-config"}


def test_logins_come_from_a_secret_that_may_be_missing(documents: list[dict[str, Any]]) -> None:
    """No manifest holds one; the webhook's address reaches the task that posts to it alone."""
    pipeline, platform = documents
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    assert executors.keys() == pipeline["deploymentSpec"]["executors"].keys()
    for name, executor in executors.items():
        variables = {}
        for given in executor["secretAsEnv"]:
            assert given["secretNameParameter"]["runtimeValue"]["constant"] == given["secretName"]
            assert given["optional"] is True
            assert all(each["secretKey"] == each["envVar"] for each in given["keyToEnv"])
            variables[given["secretName"]] = {each["envVar"] for each in given["keyToEnv"]}
        webhook = {"dpo-webhook": {"DPO_WEBHOOK_URL"}} if name == "exec-notify" else {}
        logins = variables.pop("dpo-credentials")
        assert logins >= {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", *TASKS_JUDGE_KEYS}
        assert "DPO_WEBHOOK_URL" not in logins
        assert variables == webhook
    assert not any("env" in each["container"] for each in pipeline["deploymentSpec"]["executors"].values())


def _tasks(pipeline: dict[str, Any], component: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from pipeline["components"][component]["dag"]["tasks"].items()


@pytest.mark.parametrize("path", sorted((ROOT / "components").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_component_leaves_the_place_of_its_artifacts_to_kubeflow(path: Path) -> None:
    """The launcher in a pod fails a task whose artifact lies elsewhere than below the run's root, in or out."""
    named = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]

    assert not [node.attr for node in named if node.attr in {"uri", "custom_path"}]


@pytest.mark.parametrize("path", sorted((ROOT / "components").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_component_body_is_at_most_ten_statements(path: Path) -> None:
    """A component decodes, calls one stage, and logs."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]

    assert len(functions) == 1
    statements = [node for node in ast.walk(functions[0]) if isinstance(node, ast.stmt)]
    assert 2 <= len(statements) - 2 <= 10  # without the function itself and its docstring
