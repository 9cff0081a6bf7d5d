"""Routes of health, experiments, pipelines and their versions."""

from __future__ import annotations

from typing import Any

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.kubeflow.server import Request, route
from tests.kubeflow.state import RefusalError, State, find, new_id, page

_FIELDS = ("display_name", "name", "created_at", "description", "namespace")


@route("GET", "/apis/v2beta1/healthz", None)
def health(state: State, request: Request) -> dict[str, Any]:
    return {
        "commit_sha": "unknown",
        "tag_name": state.release,
        "multi_user": state.multi_user,
        "pipeline_store": "database",
    }


@route("GET", "/apis/v2beta1/experiments", "V2beta1ListExperimentsResponse")
def list_experiments(state: State, request: Request) -> dict[str, Any]:
    namespace = request.query.get("namespace", "")
    state.check_namespace(namespace)
    mine = [item for item in state.experiments.values() if item.get("namespace", "") == namespace]
    return page(mine, request.query, key="experiments", fields=(*_FIELDS, "experiment_id", "storage_state"))


@route("POST", "/apis/v2beta1/experiments", "V2beta1Experiment")
def create_experiment(state: State, request: Request) -> dict[str, Any]:
    given = request.json("V2beta1Experiment")
    state.check_namespace(given.get("namespace"))
    same = [
        item
        for item in state.experiments.values()
        if (item["display_name"], item.get("namespace")) == (given["display_name"], given.get("namespace"))
    ]
    if same:
        raise RefusalError(409, f"Already exist error: Experiment {given['display_name']}", code=6)
    made = {**given, "experiment_id": new_id(), "created_at": state.now(), "storage_state": "AVAILABLE"}
    state.experiments[made["experiment_id"]] = made
    return made


@route("GET", "/apis/v2beta1/pipelines", "V2beta1ListPipelinesResponse")
def list_pipelines(state: State, request: Request) -> dict[str, Any]:
    namespace = request.query.get("namespace", "")
    state.check_namespace(namespace)
    mine = [item for item in state.pipelines.values() if item.get("namespace", "") == namespace]
    return page(mine, request.query, key="pipelines", fields=(*_FIELDS, "pipeline_id"))


@route("POST", "/apis/v2beta1/pipelines", "V2beta1Pipeline")
def create_pipeline(state: State, request: Request) -> dict[str, Any]:
    given = request.json("V2beta1Pipeline")
    state.check_namespace(given.get("namespace"))
    name = given.get("name") or given["display_name"]
    if any(item["name"] == name for item in state.pipelines.values()):
        raise RefusalError(409, f"Already exist error: a pipeline of the name {name}", code=6)
    made = {**given, "name": name, "pipeline_id": new_id(), "created_at": state.now()}
    state.pipelines[made["pipeline_id"]] = made
    return made


@route("GET", "/apis/v2beta1/pipelines/{}", "V2beta1Pipeline")
def get_pipeline(state: State, request: Request) -> dict[str, Any]:
    return find(state.pipelines, request.names[0], "Pipeline")


@route("GET", "/apis/v2beta1/pipelines/{}/versions", "V2beta1ListPipelineVersionsResponse")
def list_versions(state: State, request: Request) -> dict[str, Any]:
    pipeline = find(state.pipelines, request.names[0], "Pipeline")
    mine = [item for item in state.versions.values() if item["pipeline_id"] == pipeline["pipeline_id"]]
    return page(mine, request.query, key="pipeline_versions", fields=(*_FIELDS, "pipeline_version_id"))


@route("GET", "/apis/v2beta1/pipelines/{}/versions/{}", "V2beta1PipelineVersion")
def get_version(state: State, request: Request) -> dict[str, Any]:
    find(state.pipelines, request.names[0], "Pipeline")
    return find(state.versions, request.names[1], "PipelineVersion")


@route("POST", "/apis/v2beta1/pipelines/upload_version", "V2beta1PipelineVersion")
def upload_version(state: State, request: Request) -> dict[str, Any]:
    """A form with the YAML. All refusals but a name twice are 400."""
    text, query = request.file("uploadfile").decode(), request.query
    if query.get("pipelineid") not in state.pipelines:
        raise RefusalError(400, "Failed to create a pipeline version", upload=True)
    pipeline = state.pipelines[query["pipelineid"]]
    if state.multi_user and pipeline.get("namespace") not in state.namespaces:
        raise RefusalError(400, "pipeline upload denied: permission to create pipelines is required", upload=True)
    mine = [item for item in state.versions.values() if item["pipeline_id"] == pipeline["pipeline_id"]]
    if any(item["name"] == query["name"] for item in mine):
        raise RefusalError(409, "Failed to create a pipeline version", upload=True)
    made = {
        "pipeline_id": pipeline["pipeline_id"],
        "pipeline_version_id": new_id(),
        "name": query["name"],
        "display_name": query.get("display_name", query["name"]),
        "created_at": state.now(),
        "pipeline_spec": _spec(text),
    }
    state.versions[made["pipeline_version_id"]] = made
    return made


def _spec(text: str) -> dict[str, Any]:
    """The documents as the server's own messages write them again, with the two in one where there are two."""
    pipeline, platform = None, None
    for part in text.split("\n---\n"):
        content = yaml.safe_load(part)
        if "platforms" in content:
            platform = _again(content, pipeline_spec_pb2.PlatformSpec())
        else:
            pipeline = _again(content, pipeline_spec_pb2.PipelineSpec())
    if pipeline is None:
        raise RefusalError(400, "Failed to create a pipeline version: no pipeline spec", upload=True)
    return pipeline if platform is None else {"pipeline_spec": pipeline, "platform_spec": platform}


def _again(content: dict[str, Any], message: Any) -> dict[str, Any]:
    try:
        return dict(json_format.MessageToDict(json_format.ParseDict(content, message)))
    except json_format.ParseError as error:
        raise RefusalError(400, f"Failed to create a pipeline version: {error}", upload=True) from None
