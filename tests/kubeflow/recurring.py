"""Routes of recurring runs, and what the controller does when one is due."""

from __future__ import annotations

import datetime
import itertools
from typing import Any

from dateutil.parser import isoparse

from tests.kubeflow.runs import check_parameters
from tests.kubeflow.server import Request, route
from tests.kubeflow.state import RefusalError, State, find, new_id, page

_FIELDS = ("recurring_run_id", "display_name", "created_at", "updated_at", "description", "namespace")


@route("POST", "/apis/v2beta1/recurringruns", "V2beta1RecurringRun")
def create(state: State, request: Request) -> dict[str, Any]:
    given = request.json("V2beta1RecurringRun")
    if not given["display_name"]:
        raise RefusalError(400, "Recurring run name is empty. Please specify a valid name", code=3)
    experiment = find(state.experiments, given["experiment_id"], "Experiment")
    state.check_namespace(experiment.get("namespace"))
    if not 1 <= int(given["max_concurrency"]) <= 10:
        raise RefusalError(400, "Max concurrency of a recurring run must be at least 1 and at most 10", code=3)
    fields = given["trigger"]["cron_schedule"]["cron"].split()
    # Five fields pass too, and mean another thing: the first is the second.
    if len(fields) not in {5, 6}:
        raise RefusalError(400, f"Expected 5 to 6 fields, found {len(fields)}", code=3)
    reference = given["pipeline_version_reference"]
    version = find(state.versions, reference["pipeline_version_id"], "PipelineVersion")
    if version["pipeline_id"] != reference["pipeline_id"]:
        raise RefusalError(400, "the pipeline version belongs to another pipeline", code=3)
    check_parameters(version, given["runtime_config"].get("parameters", {}))
    made = {
        "service_account": "pipeline-runner",
        "namespace": experiment.get("namespace") or "kubeflow",
        **given,
        "recurring_run_id": new_id(),
        "created_at": state.now(),
        "updated_at": state.now(),
    }
    state.recurring_runs[made["recurring_run_id"]] = made
    return _seen(made)


@route("GET", "/apis/v2beta1/recurringruns", "V2beta1ListRecurringRunsResponse")
def list_recurring(state: State, request: Request) -> dict[str, Any]:
    namespace = request.query.get("namespace", "")
    state.check_namespace(namespace)
    mine = [_seen(item) for item in state.recurring_runs.values() if namespace in {"", item["namespace"]}]
    return page(mine, request.query, key="recurringRuns", fields=_FIELDS)


@route("GET", "/apis/v2beta1/recurringruns/{}", "V2beta1RecurringRun")
def get(state: State, request: Request) -> dict[str, Any]:
    return _seen(find(state.recurring_runs, request.names[0], "Job"))


@route("DELETE", "/apis/v2beta1/recurringruns/{}", None)
def delete(state: State, request: Request) -> dict[str, Any]:
    """Kubernetes ends what belongs to it, unless it is told to leave that alone, which release 2.16 has taught it."""
    gone = find(state.recurring_runs, request.names[0], "Job")
    del state.recurring_runs[gone["recurring_run_id"]]
    if request.query.get("propagation_policy") != "ORPHAN" or tuple(map(int, state.release.split(".")[:2])) < (2, 16):
        for run in state.runs.values():
            if run.get("recurring_run_id") == gone["recurring_run_id"] and run["state"] in {"PENDING", "RUNNING"}:
                run["state"] = "FAILED"
    return {}


@route("POST", "/apis/v2beta1/recurringruns/{}:enable", None)
def enable(state: State, request: Request) -> dict[str, Any]:
    return _switch(state, request, "ENABLE")


@route("POST", "/apis/v2beta1/recurringruns/{}:disable", None)
def disable(state: State, request: Request) -> dict[str, Any]:
    return _switch(state, request, "DISABLE")


def fire(state: State, recurring_run_id: str, run_state: str = "SUCCEEDED") -> dict[str, Any]:
    """A run as the controller starts it; its name is the controller's own."""
    item = state.recurring_runs[recurring_run_id]
    count = itertools.count(1)
    run_id = new_id()
    state.runs[run_id] = {
        "run_id": run_id,
        "display_name": f"{item['display_name']}-{next(count)}-{run_id[:8]}",
        "recurring_run_id": recurring_run_id,
        "experiment_id": item["experiment_id"],
        "pipeline_version_reference": item["pipeline_version_reference"],
        "runtime_config": item["runtime_config"],
        "created_at": state.now(),
        "state": run_state,
        "storage_state": "AVAILABLE",
    }
    return state.runs[run_id]


def firing(state: State) -> list[dict[str, Any]]:
    """The schedules that are on."""
    return [item for item in state.recurring_runs.values() if item["mode"] == "ENABLE"]


def age(item: dict[str, Any], **ago: float) -> None:
    """Lets a schedule be older than it is."""
    item["created_at"] = (isoparse(item["created_at"]) - datetime.timedelta(**ago)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _switch(state: State, request: Request, mode: str) -> dict[str, Any]:
    item = find(state.recurring_runs, request.names[0], "Job")
    item["mode"], item["updated_at"] = mode, state.now()
    return {}


def _seen(item: dict[str, Any]) -> dict[str, Any]:
    status = "ENABLED" if item["mode"] == "ENABLE" else "DISABLED"
    return {**item, "status": status}
