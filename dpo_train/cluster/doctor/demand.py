"""What a job asks of a cluster, read from its manifest. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from dpo_train.cluster.doctor.quantities import number

_AUTOSCALER = {"cpu": Decimal("0.5"), "memory": Decimal(512 * 2**20)}
"""KubeRay's default for the container that it adds to the head of an elastic job."""


@dataclass(frozen=True, kw_only=True)
class Pods:
    """One kind of the job's pods."""

    what: str
    """"head", "worker" or "submitter"."""
    least: int
    most: int
    requests: Mapping[str, Decimal]
    """Of one pod."""
    limits: Mapping[str, Decimal]
    spec: Mapping[str, Any]


def pods_of(job: Mapping[str, Any]) -> tuple[Pods, ...]:
    """Head, workers and submitter of a RayJob's manifest."""
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    more = _AUTOSCALER if cluster.get("enableInTreeAutoscaling") else {}
    found = [_pods("head", 1, 1, head, more)]
    for group in cluster["workerGroupSpecs"]:
        found.append(_pods("worker", group["minReplicas"], group["maxReplicas"], group["template"]["spec"]))
    found.append(_pods("submitter", 1, 1, job["spec"]["submitterPodTemplate"]["spec"]))
    return tuple(found)


def total(pods: Iterable[Pods], *, most: bool) -> dict[str, Decimal]:
    """What the job counts as, by the names that quotas use.

    Args:
        most: with as many workers as it may have; else with as few as it begins with.
    """
    sums: dict[str, Decimal] = {"count/rayjobs.ray.io": Decimal(1), "count/jobs.batch": Decimal(1)}
    for kind in pods:
        count = kind.most if most else kind.least
        for name in ("pods", "count/pods"):
            sums[name] = sums.get(name, Decimal(0)) + count
        for prefix, amounts in (("requests.", kind.requests), ("limits.", kind.limits)):
            for resource, amount in amounts.items():
                key = prefix + resource
                sums[key] = sums.get(key, Decimal(0)) + count * amount
    for resource in ("cpu", "memory"):  # a quota's short names
        sums[resource] = sums[f"requests.{resource}"]
    return sums


def applies(quota: Mapping[str, Any], pods: Sequence[Pods]) -> bool:
    """Whether a quota counts these pods: its scopes say of which kind they must be."""
    spec = quota.get("spec", {})
    priority = pods[0].spec.get("priorityClassName")
    of_ours = {"NotTerminating": True, "NotBestEffort": True, "PriorityClass": priority is not None}
    if not all(of_ours.get(scope, False) for scope in spec.get("scopes") or []):
        return False
    expressions = (spec.get("scopeSelector") or {}).get("matchExpressions") or []
    return all(_matches(expression, of_ours, priority) for expression in expressions)


def _matches(expression: Mapping[str, Any], of_ours: Mapping[str, bool], priority: str | None) -> bool:
    if expression.get("scopeName") != "PriorityClass":
        return of_ours.get(str(expression.get("scopeName")), False)
    values = expression.get("values") or []
    operator = expression.get("operator")
    return {
        "In": priority in values,
        "NotIn": priority not in values,
        "Exists": priority is not None,
        "DoesNotExist": priority is None,
    }.get(str(operator), False)


def tolerates(tolerations: Iterable[Mapping[str, Any]], taint: Mapping[str, Any]) -> bool:
    """Whether a pod with these tolerations may be scheduled in spite of a taint, by Kubernetes' own rules."""
    for each in tolerations:
        if each.get("effect") not in {None, "", taint["effect"]}:
            continue
        if each.get("operator", "Equal") == "Exists":
            if each.get("key") in {None, "", taint["key"]}:
                return True
        elif each.get("key") == taint["key"] and (each.get("value") or "") == (taint.get("value") or ""):
            return True
    return False


def _pods(what: str, least: int, most: int, spec: Mapping[str, Any], more: Mapping[str, Decimal] | None = None) -> Pods:
    sums: dict[str, dict[str, Decimal]] = {"requests": dict(more or {}), "limits": dict(more or {})}
    for container in spec["containers"]:
        for kind, amounts in sums.items():
            for resource, amount in container["resources"].get(kind, {}).items():
                amounts[resource] = amounts.get(resource, Decimal(0)) + number(amount)
    return Pods(what=what, least=least, most=most, requests=sums["requests"], limits=sums["limits"], spec=spec)
