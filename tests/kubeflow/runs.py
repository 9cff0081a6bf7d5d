"""Routes of runs and of what their steps print."""

from __future__ import annotations

from typing import Any

from tests.kubeflow.server import Request, Text, route
from tests.kubeflow.state import NEVER, RefusalError, State, find, new_id, page

_FIELDS = (
    "run_id", "display_name", "created_at", "finished_at", "description", "storage_state", "namespace", "experiment_id",
    "state", "recurring_run_id",
)  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,), "NUMBER_INTEGER": (int, float), "NUMBER_DOUBLE": (int, float), "BOOLEAN": (bool,),
    "LIST": (list,), "STRUCT": (dict,),
}  # fmt: skip


@route("POST", "/apis/v2beta1/runs", "V2beta1Run")
def create_run(state: State, request: Request) -> dict[str, Any]:
    given = request.json("V2beta1Run")
    experiment = find(state.experiments, given["experiment_id"], "Experiment")
    state.check_namespace(experiment.get("namespace"))
    if experiment["storage_state"] == "ARCHIVED":
        raise RefusalError(400, "Failed to create a run: the experiment is archived", code=9)
    version = find(state.versions, given["pipeline_version_reference"]["pipeline_version_id"], "PipelineVersion")
    check_parameters(version, given["runtime_config"].get("parameters", {}))
    made = {
        **given,
        "run_id": new_id(),
        "created_at": state.now(),
        "scheduled_at": state.now(),
        "finished_at": NEVER,
        "state": "PENDING",
        "storage_state": "AVAILABLE",
    }
    state.runs[made["run_id"]] = made
    return made


@route("GET", "/apis/v2beta1/runs", "V2beta1ListRunsResponse")
def list_runs(state: State, request: Request) -> dict[str, Any]:
    runs = list(state.runs.values())
    if experiment := request.query.get("experiment_id"):
        state.check_namespace(find(state.experiments, experiment, "Experiment").get("namespace"))
        runs = [run for run in runs if run["experiment_id"] == experiment]
    else:
        namespace = request.query.get("namespace", "")
        state.check_namespace(namespace)
        runs = [run for run in runs if state.experiments[run["experiment_id"]].get("namespace", "") == namespace]
    return page(runs, request.query, key="runs", fields=_FIELDS)


@route("GET", "/apis/v2beta1/runs/{}", "V2beta1Run")
def get_run(state: State, request: Request) -> dict[str, Any]:
    return find(state.runs, request.names[0], "Run")


@route("POST", "/apis/v2beta1/runs/{}:terminate", None)
def terminate_run(state: State, request: Request) -> dict[str, Any]:
    run = find(state.runs, request.names[0], "Run")
    if run["state"] not in {"PENDING", "RUNNING", "PAUSED"}:
        raise RefusalError(
            400, f"Invalid input error: Failed to terminate a run {run['run_id']}. Row not found", code=3
        )
    run["state"] = "CANCELING"
    return {}


@route("GET", "/apis/v1alpha1/runs/{}/nodes/{}/log", None)
def log_by_api(state: State, request: Request) -> Text:
    """There is no v2beta1 of it. A pod that is not there is an error of the server's own."""
    if not state.logs_by_api:
        raise RefusalError(
            403, "Failed to authorize the request: User identity is empty in the request header", upload=True
        )
    find(state.runs, request.names[0], "Run")
    if request.names[1] not in state.logs:
        raise RefusalError(500, f"Failed to read logs for run {request.names[0]}: pods not found", upload=True)
    return Text(state.logs[request.names[1]])


@route("GET", "/k8s/pod/logs", None)
def log_by_page(state: State, request: Request) -> Text:
    """As the page for people gets it."""
    if state.multi_user and request.query.get("podnamespace") not in state.namespaces:
        raise RefusalError(403, "Access denied to namespace")
    if request.query.get("podname") not in state.logs:
        raise RefusalError(500, "Could not get main container logs: pods not found")
    return Text(state.logs[request.query["podname"]])


def check_parameters(version: dict[str, Any], given: dict[str, Any]) -> None:
    """As the server does since release 2.0, but for types of numbers."""
    spec = version["pipeline_spec"]
    root = spec.get("pipeline_spec", spec)["root"]
    known = root.get("inputDefinitions", {}).get("parameters", {})
    for name, about in known.items():
        if name not in given and not about.get("isOptional") and "defaultValue" not in about:
            raise RefusalError(400, f"Invalid input error: parameter {name} is not optional", code=3)
    for name, value in given.items():
        if name not in known:
            raise RefusalError(400, f"Invalid input error: parameter {name} is not defined", code=3)
        if not isinstance(value, _TYPES[known[name]["parameterType"]]):
            raise RefusalError(400, f"Invalid input error: parameter {name} has another type", code=3)
