"""Plays Argo: lets a run of the test's server advance, with the nodes that Kubeflow's persistence agent reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.kubeflow.state import NEVER, State

_TEMPLATE = "system-container-impl"


class Play:
    """The workflow of one run."""

    def __init__(self, state: State, run_id: str, workflow: str = "dpo-x7k2p") -> None:
        self._state, self._run, self._workflow = state, state.runs[run_id], workflow
        self._nodes: dict[str, dict[str, Any]] = {}
        version = state.versions[self._run["pipeline_version_reference"]["pipeline_version_id"]]["pipeline_spec"]
        spec = version.get("pipeline_spec", version)
        self.paths = dict(_paths(spec, spec["root"], ()))
        self._set((), "RUNNING")
        self._run["state"] = "RUNNING"

    def start(self, step: str) -> None:
        """Its driver has done its work, and its container runs."""
        self._set((*self.paths[step][:-1], f"{step}-driver"), "SUCCEEDED")
        self._set(self.paths[step], "RUNNING")
        self._set((*self.paths[step], "executor"), "RUNNING")

    def succeed(self, step: str, log: str = "") -> None:
        self._end(step, "SUCCEEDED", log, None)

    def fail(self, step: str, log: str = "", message: str | None = None) -> None:
        self._end(step, "FAILED", log, message)

    def retry(self, step: str, *logs: str) -> None:
        """Attempts, one after the other; the last one runs."""
        self.start(step)
        above = (*self.paths[step], "executor")
        for number, log in enumerate(logs):
            path = (*self.paths[step], f"executor({number})")
            # Called like a sister of the node that it is a child of.
            self._set(path, "RUNNING" if number == len(logs) - 1 else "FAILED", parent=above)
            self._state.logs[self.pod(path, f"retry-{_TEMPLATE}")] = log

    def fail_driver(
        self, step: str, log: str, message: str | None = None, template: str = "system-container-driver"
    ) -> None:
        """Kubeflow's own container before the step's fails."""
        path = (*self.paths[step][:-1], f"{step}-driver")
        self._set(path, "FAILED", message)
        self._state.logs[self.pod(path, template)] = log

    def end(self, state: str) -> None:
        self._set((), state)
        self._run["state"], self._run["finished_at"] = state, self._state.now()

    def pod(self, path: tuple[str, ...], template: str = _TEMPLATE) -> str:
        """The name that Argo gives."""
        digest = _node(self._workflow, path).rpartition("-")[2]
        return (
            f"{self._workflow}-{digest}" if self._state.pod_names == "v1" else f"{self._workflow}-{template}-{digest}"
        )

    def _end(self, step: str, state: str, log: str, message: str | None) -> None:
        self.start(step)
        self._set((*self.paths[step], "executor"), state, message)
        self._set(self.paths[step], state, message)
        self._state.logs[self.pod((*self.paths[step], "executor"))] = log

    def _set(
        self,
        path: tuple[str, ...],
        state: str,
        message: str | None = None,
        parent: tuple[str, ...] | None = None,
    ) -> None:
        node = self._nodes.setdefault(
            _node(self._workflow, path),
            {
                "run_id": self._run["run_id"],
                "task_id": f"task-{len(self._nodes)}",
                "display_name": path[-1] if path else self._workflow,
                "create_time": self._run["created_at"],
                "start_time": self._state.now(),
                "end_time": NEVER,
                "child_tasks": [],
            },
        )
        node["state"] = state
        if message:
            node["error"] = {"code": 13, "message": message}
        if state in {"SUCCEEDED", "FAILED", "SKIPPED"}:
            node["end_time"] = self._state.now()
        if path:
            self._attach(path, _above(path) if parent is None else parent)
        self._run["run_details"] = {"task_details": list(self._nodes.values())}

    def _attach(self, path: tuple[str, ...], parent: tuple[str, ...]) -> None:
        """A node is told by its parent's children alone."""
        if _node(self._workflow, parent) not in self._nodes:
            self._set(parent, "RUNNING")
        children = self._nodes[_node(self._workflow, parent)]["child_tasks"]
        child = {"pod_name": _node(self._workflow, path)}
        if child not in children:
            children.append(child)


def _node(workflow: str, path: tuple[str, ...]) -> str:
    """Argo's id of a node."""
    if not path:
        return workflow
    digest = 2166136261
    for byte in ".".join((workflow, "root", *path)).encode():
        digest = ((digest ^ byte) * 16777619) & 0xFFFFFFFF
    return f"{workflow}-{digest}"


def _above(path: tuple[str, ...]) -> tuple[str, ...]:
    """A hook is a child of the node that it waits for, whose sister it is called like."""
    return (*path[:-1], path[-1].removesuffix(".onExit")) if path[-1].endswith(".onExit") else path[:-1]


def _paths(
    spec: dict[str, Any], component: dict[str, Any], above: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, task in component["dag"]["tasks"].items():
        inner = spec["components"][task["componentRef"]["name"]]
        at, policy = above, task.get("triggerPolicy", {})
        if policy.get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED":
            # Kubeflow's compiler makes such a task the exit hook of what it depends on (argocompiler/dag.go), and Argo
            # calls a hook's node <node>.onExit (workflow/common/util.go).
            (before,) = task["dependentTasks"]
            at = (*above, f"{before}.onExit")
        if "dag" in inner:
            yield from _paths(spec, inner, (*at, name))
        else:
            yield name, (*at, name)
