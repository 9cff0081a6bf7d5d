"""The compiled pipeline: its version's name, its arguments, its steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kfp")

from dpo_train.cluster.kubeflow.package import (
    Package,
    check_arguments,
    load_package,
    package_of,
    parse_argument,
    with_image,
    with_secret,
    with_volumes,
    without_cache,
)
from dpo_train.errors import ConfigError


def task(name: str, *after: str, cached: bool = True) -> dict[str, Any]:
    return {
        "cachingOptions": {"enableCache": True} if cached else {},
        "componentRef": {"name": f"comp-{name}"},
        "dependentTasks": list(after),
        "taskInfo": {"name": name},
    }


def pipeline() -> dict[str, Any]:
    """A before (B before C, within a condition), before D."""
    leaf = {"executorLabel": "exec"}
    return {
        "pipelineInfo": {"name": "small"},
        "schemaVersion": "2.1.0",
        "sdkVersion": "kfp-2.17.0",
        "components": {
            "comp-d": leaf,
            "comp-a": leaf,
            "comp-b": leaf,
            "comp-c": leaf,
            "comp-condition": {"dag": {"tasks": {"c": task("c", "b"), "b": task("b")}}},
        },
        "deploymentSpec": {"executors": {"exec": {"container": {"image": "dpo:1", "command": ["dpo"]}}}},
        "root": {
            "dag": {"tasks": {"d": task("d", "condition"), "condition": task("condition", "a"), "a": task("a")}},
            "inputDefinitions": {
                "parameters": {
                    "config": {"parameterType": "STRING"},
                    "steps": {"parameterType": "NUMBER_INTEGER", "isOptional": True},
                    "rate": {"parameterType": "NUMBER_DOUBLE", "defaultValue": 0.5, "isOptional": True},
                    "dry": {"parameterType": "BOOLEAN", "isOptional": True},
                    "more": {"parameterType": "LIST", "isOptional": True},
                    "table": {"parameterType": "STRUCT", "isOptional": True},
                    "rates": {"parameterType": "LIST", "defaultValue": [0.5, 1]},
                    "limits": {"parameterType": "STRUCT", "defaultValue": {"a": 1, "b": None}},
                    "colour": {"parameterType": "STRING", "isOptional": True, "literals": ["red", "blue"]},
                    "colours": {"parameterType": "LIST", "isOptional": True, "literals": ["red", "blue"]},
                }
            },
        },
    }


PLATFORM = {
    "platforms": {
        "kubernetes": {
            "deploymentSpec": {
                "executors": {
                    "exec": {
                        "secretAsEnv": [
                            {
                                "secretName": "logins",
                                "secretNameParameter": {"runtimeValue": {"constant": "logins"}},
                                "keyToEnv": [{"secretKey": "TOKEN", "envVar": "TOKEN"}],
                            }
                        ]
                    }
                }
            }
        }
    }
}
SMALL = Package(pipeline=pipeline(), platform={})


def test_version_is_a_name_of_the_content() -> None:
    """The same for the same content in any order of keys; another for any other content."""
    shuffled = json.loads(json.dumps(pipeline(), sort_keys=True))
    changed = pipeline()
    changed["deploymentSpec"]["executors"]["exec"]["container"]["command"] = ["dpo", "-v"]

    assert SMALL.version == Package(pipeline=shuffled, platform={}).version
    assert len({SMALL.version, Package(pipeline=changed, platform={}).version}) == 2
    assert Package(pipeline=pipeline(), platform=PLATFORM).version != SMALL.version
    assert SMALL.version.startswith("sha-")


def test_version_does_not_depend_on_what_a_server_leaves_out() -> None:
    """Kubeflow writes a pipeline again from its own messages: false and empty values go, whole numbers become 1.0."""
    written = pipeline()
    written["root"]["dag"]["tasks"]["a"]["cachingOptions"] = {"enableCache": False}
    written["root"]["dag"]["tasks"]["a"]["dependentTasks"] = []
    left_out = pipeline()
    left_out["root"]["dag"]["tasks"]["a"]["cachingOptions"] = {}
    del left_out["root"]["dag"]["tasks"]["a"]["dependentTasks"]

    assert Package(pipeline=written, platform={}).version == Package(pipeline=left_out, platform={}).version


def test_content_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    """A field that Kubeflow does not know, another YAML file, and none."""
    with pytest.raises(ConfigError, match="no pipeline that Kubeflow takes"):
        _ = Package(pipeline={**pipeline(), "colour": "red"}, platform={}).version
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="no compiled pipeline"):
        load_package(tmp_path / "other.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_package(tmp_path / "nothing.yaml")


def test_text_is_read_back_the_same(tmp_path: Path) -> None:
    """Both documents, parted by the line that the server looks for."""
    package = Package(pipeline=pipeline(), platform=PLATFORM)
    (tmp_path / "dpo.yaml").write_text(package.text)

    assert load_package(tmp_path / "dpo.yaml").canonical == package.canonical
    assert len(package.text.split("\n---\n")) == 2
    assert list(yaml.safe_load_all(package.text)) == [pipeline(), PLATFORM]


def test_pipeline_within_a_servers_answer() -> None:
    """By itself, or beside what is for Kubernetes."""
    assert package_of(pipeline()) == SMALL
    both = package_of({"pipeline_spec": pipeline(), "platform_spec": PLATFORM})
    assert both == Package(pipeline=pipeline(), platform=PLATFORM)
    assert package_of(None) is None
    assert package_of({"something": "else"}) is None


def test_steps_are_in_an_order_in_which_they_may_run() -> None:
    """Those within a condition know the way to them."""
    assert [("/".join(step.path), step.name) for step in SMALL.steps] == [
        ("a", "a"),
        ("condition/b", "b"),
        ("condition/c", "c"),
        ("d", "d"),
    ]


def test_another_image_secret_and_no_cache() -> None:
    """What is changed is changed everywhere, and the given package is not."""
    image = with_image(SMALL, "dpo:2")
    secret = with_secret(Package(pipeline=pipeline(), platform=PLATFORM), "others")
    fresh = without_cache(SMALL)

    assert image.pipeline["deploymentSpec"]["executors"]["exec"]["container"]["image"] == "dpo:2"
    assert "logins" not in json.dumps(secret.platform)
    assert json.dumps(secret.platform).count("others") == 2
    assert "enableCache" not in json.dumps(fresh.pipeline)
    assert pipeline() == SMALL.pipeline
    assert len({SMALL.version, image.version, fresh.version}) == 3


def test_task_that_comes_whatever_has_happened_is_a_hook() -> None:
    """Argo's node for it hangs on the one before it; it comes behind that all the same."""
    changed = pipeline()
    changed["root"]["dag"]["tasks"]["d"]["triggerPolicy"] = {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}

    last = Package(pipeline=changed, platform={}).steps[-1]

    assert (last.name, last.path) == ("d", ("condition.onExit", "d"))


@pytest.mark.parametrize("platform", [{}, PLATFORM])
def test_volumes(platform: dict[str, Any]) -> None:
    """Beside the logins, or where nothing was told to Kubernetes; other claims are another version."""
    given = Package(pipeline=pipeline(), platform=platform)

    mounted = with_volumes(given, {"/data": "claim"})

    executor = mounted.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec"]
    assert executor["pvcMount"] == [
        {"mountPath": "/data", "constant": "claim", "pvcNameParameter": {"runtimeValue": {"constant": "claim"}}}
    ]
    assert ("secretAsEnv" in executor) == bool(platform)
    assert given == Package(pipeline=pipeline(), platform=platform)
    assert "pvcMount" not in json.dumps(PLATFORM)
    assert with_volumes(given, {}) == given
    assert with_volumes(mounted, {"/data": "claim"}) == mounted
    assert len({each.version for each in (given, mounted, with_volumes(given, {"/data": "other"}))}) == 3


def test_volumes_as_kubeflow_reads_them() -> None:
    """kfp's own message takes every key; it does not look into the executors."""
    from google.protobuf import json_format
    from kfp.pipeline_spec import pipeline_spec_pb2

    mounted = with_volumes(Package(pipeline=pipeline(), platform=PLATFORM), {"/data": "claim"})

    json_format.ParseDict(mounted.platform, pipeline_spec_pb2.PlatformSpec())


def test_volumes_as_the_executor_reads_them() -> None:
    """The message of kfp-kubernetes, by which Kubeflow mounts, takes every key and has the mount."""
    messages = pytest.importorskip("kfp.kubernetes.kubernetes_executor_config_pb2")
    from google.protobuf import json_format

    mounted = with_volumes(Package(pipeline=pipeline(), platform=PLATFORM), {"/data": "claim"})

    executors = mounted.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    read = json_format.ParseDict(executors["exec"], messages.KubernetesExecutorConfig())
    (mount,) = read.pvc_mount
    assert (mount.mount_path, mount.constant) == ("/data", "claim")
    assert mount.pvc_name_parameter.runtime_value.constant.string_value == "claim"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"steps": 3, "rate": 1, "dry": True, "more": ["a"], "table": {"a": 1}},
        {"rate": 0.25},
        {"rates": [1, 0.5]},
        {"rates": []},
        {"limits": {"a": 2, "b": "text", "new": 1}},
        {"colour": "red", "colours": ["red", "blue"]},
    ],
)
def test_arguments_of_the_right_types(more: dict[str, Any]) -> None:
    """A whole number is a number too; of an empty default nothing is learnt."""
    check_arguments(SMALL, {"config": "text", **more})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs a value for config"),
        ({"config": "a", "speed": 1}, "no argument speed"),
        ({"config": 1}, "config has another type. Got: 1. Expected: text"),
        ({"config": None}, "config has another type"),
        ({"config": "a", "steps": "3"}, "steps has another type"),
        ({"config": "a", "steps": 3.5}, "steps has another type"),
        ({"config": "a", "steps": True}, "steps has another type"),
        ({"config": "a", "rate": True}, "rate has another type"),
        ({"config": "a", "dry": 1}, "dry has another type"),
        ({"config": "a", "more": "a"}, "more has another type"),
        ({"config": "a", "table": []}, "table has another type"),
        (
            {"config": "a", "rates": [1, "2"]},
            r"rates holds something of another type, at \[1\]. Got: '2'. Exp.*a number",
        ),
        ({"config": "a", "rates": [True]}, "rates holds something of another type"),
        ({"config": "a", "rates": [None]}, "rates holds something of another type"),
        ({"config": "a", "limits": {"a": "1"}}, "limits holds something of another type, at a"),
        ({"config": "a", "colour": "grey"}, "colour has a value that is not allowed. Got: 'grey'. Expected: red, blue"),
        ({"config": "a", "colours": ["red", "grey"]}, "colours has a value that is not allowed"),
        ({"config": "a", "rate": float("nan")}, "rate holds a number that JSON does not have"),
        ({"config": "a", "more": [float("inf")]}, "more holds a number that JSON does not have"),
    ],
)
def test_arguments_of_wrong_types(arguments: dict[str, Any], said: str) -> None:
    """Found before anything is sent."""
    with pytest.raises(ConfigError, match=said):
        check_arguments(SMALL, arguments)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("config", "3", "3"), ("steps", "3", 3), ("rate", "0.5", 0.5), ("dry", "true", True), ("more", '["a"]', ["a"]),
     ("steps", "many", "many")],
)  # fmt: skip
def test_text_of_the_command_line(name: str, text: str, value: object) -> None:
    """Read by the type that the pipeline wants; what cannot be read is left to the check."""
    assert parse_argument(SMALL, name, text) == value
