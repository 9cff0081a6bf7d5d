"""What a step has printed.

Kubeflow's API tells neither pods nor containers of a run. It tells a step's children by the ids of Argo's nodes,
``<workflow>-<hash>``, and a pod is called ``<workflow>-<template>-<hash>``, with the template that Kubeflow's compiler
gives to containers. The hash is FNV-1a (32 bits) of the node's path, ``<workflow>.root.<step>.executor``, by which the
attempts of a step that was tried again are found too: ``...executor(0)``, ``...executor(1)``. A step that comes
whatever has happened is a hook of the one before it: ``<workflow>.root.<the one before>.onExit.<step>.executor``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from dpo_train.cluster.kubeflow.client import AwayError, Kubeflow, KubeflowError
from dpo_train.cluster.kubeflow.package import Step
from dpo_train.errors import UserError

_TEMPLATES = ("system-container-impl", "retry-system-container-impl")
_DRIVERS = ("system-container-driver", "exit-system-container-driver")
"""The second is a hook's, after release 2.17."""
_ATTEMPTS = 10
"""At most so many are looked for."""


def read_log(kubeflow: Kubeflow, run: Any, step: Step) -> str:
    """The log of a step's newest attempt: by Kubeflow's API server, or as its page shows it.

    Raises:
        UserError: the step has not started, or neither has its log (any more).
        AwayError: Kubeflow does not answer.
    """
    pods = list(candidates(run, step))
    if not pods:
        raise UserError(
            f"The step {step.name} has printed nothing yet",
            got=f"the run {run.run_id} is {run.state}",
            fix="wait until it runs; `dpo submit --wait` shows when",
        )
    refusals = []
    for pod in pods:
        for path, query in _ways(kubeflow, run.run_id, pod):
            try:
                return kubeflow.text(path, **query)
            except KubeflowError as error:
                if isinstance(error, AwayError) and not error.answered:
                    raise
                # Kubeflow answers 500 for a pod that is not there.
                refusals.append(error)
    at = f" -n {kubeflow.namespace}" if kubeflow.namespace else " -n NAMESPACE"
    raise UserError(
        f"Kubeflow has no log of {step.name}: {_first(refusals)}",
        fix=f"its pod may be gone already; otherwise `kubectl logs{at} {pods[0]} -c main`",
    )


def candidates(run: Any, step: Step) -> Iterator[str]:
    """Names that the pod of a step may have, the likeliest first."""
    details = (run.run_details and run.run_details.task_details) or []
    own = [detail for detail in details if detail.display_name == step.name]
    yield from (detail.pod_name for detail in own if detail.pod_name)
    nodes = [child.pod_name for detail in own for child in detail.child_tasks or () if child.pod_name]
    workflow = _workflow(details)
    if workflow is None:
        return
    path = ".".join((workflow, "root", *step.path))
    attempts = sum(detail.display_name.startswith("executor(") for detail in details if detail.display_name)
    retried = [f"{workflow}-{fnv1a(f'{path}.executor({n})')}" for n in reversed(range(min(attempts, _ATTEMPTS)))]
    if own:
        for node in [*retried, *nodes, f"{workflow}-{fnv1a(f'{path}.executor')}"]:
            yield from _pods(node, _TEMPLATES)
    elif any(detail.display_name == f"{step.name}-driver" for detail in details):
        yield from _pods(f"{workflow}-{fnv1a(f'{path}-driver')}", _DRIVERS)


def _pods(node: str, templates: Sequence[str]) -> Iterator[str]:
    begin, _, end = node.rpartition("-")
    yield from (f"{begin}-{template}-{end}" for template in templates)
    yield node  # as Argo calls pods with POD_NAMES=v1


def fnv1a(text: str) -> int:
    """FNV-1a of 32 bits."""
    digest = 0x811C9DC5
    for byte in text.encode():
        digest = (digest ^ byte) * 0x01000193 % 2**32
    return digest


def _workflow(details: Sequence[Any]) -> str | None:
    """The workflow's name: what stands before the hash of every node."""
    for detail in details:
        for child in detail.child_tasks or ():
            if child.pod_name and "-" in child.pod_name:
                return str(child.pod_name.rpartition("-")[0])
    return None


def _ways(kubeflow: Kubeflow, run_id: str, pod: str) -> Iterator[tuple[str, dict[str, str]]]:
    yield f"/apis/v1alpha1/runs/{quote(run_id)}/nodes/{quote(pod)}/log", {}
    yield "/k8s/pod/logs", {"podname": pod, "runid": run_id, "podnamespace": kubeflow.namespace or ""}


def _first(refusals: Sequence[KubeflowError]) -> str:
    """The refusal that says most: what the API server answered, not a page that is not there."""
    return str(next((error for error in refusals if isinstance(error, AwayError)), refusals[0]))
