"""Is there room? Nodes on which the job's pods can run at all, and quotas that let them in."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from dpo_train.cluster.doctor.answers import Answer, failed, passed
from dpo_train.cluster.doctor.api import listed
from dpo_train.cluster.doctor.demand import Pods, applies, pods_of, tolerates, total
from dpo_train.cluster.doctor.installed import job_manifest
from dpo_train.cluster.doctor.quantities import number, shown
from dpo_train.cluster.kube import Kube
from dpo_train.config import RunConfig

_AUTOSCALED = "a pool that an autoscaler has emptied does not show here"

Node = Mapping[str, Any]


def nodes_for(what: str) -> Callable[[Kube, RunConfig], Answer]:
    """A check of the nodes for one kind of pod, as they are when nothing else runs on them."""

    def look(kube: Kube, config: RunConfig) -> Answer:
        pods = next(kind for kind in pods_of(job_manifest(config, kube.namespace)) if kind.what == what)
        return judged(listed(kube, "/api/v1/nodes"), pods, config)

    return look


def judged(nodes: Sequence[Node], pods: Pods, config: RunConfig) -> Answer:
    """Whether these nodes would do. Pure."""
    usable = [node for node in nodes if _is_usable(node)]
    if not usable:
        return failed("the cluster has no node that is ready", f"have nodes added; {_AUTOSCALED}")
    labelled, selector = usable, pods.spec.get("nodeSelector") or {}
    for label, value in selector.items():
        before = labelled
        labelled = [node for node in before if _labels(node).get(label) == value]
        if not labelled:
            return _no_label(before, label, value, config)
    large = [node for node in labelled if _copies(node, pods)]
    if not large:
        return _too_small(labelled, pods, config)
    open_ = [node for node in large if not _taints(node, pods, config)]
    if not open_:
        taints = sorted({taint for node in large for taint in _taints(node, pods, config)})
        return failed(
            f"{len(large)} nodes would do for a {pods.what} pod, but are tainted: {', '.join(taints)}",
            f"add the matching tolerations to cluster.{_section(pods)}.tolerations",
        )
    copies = sum(_copies(node, pods) for node in open_)
    if copies < pods.least:
        return failed(
            f"there is room for {copies} of {pods.least} {pods.what} pods, even with nothing else running",
            f"ask for less (cluster.{_section(pods)}, compute.workers), or have nodes added; {_AUTOSCALED}",
        )
    each = ", ".join(f"{shown(resource, amount)} {resource}" for resource, amount in sorted(pods.requests.items()))
    need = f"{pods.most}" if pods.least == pods.most else f"{pods.least} to {pods.most}"
    return passed(f"room for {copies} {pods.what} pods ({each}) when nothing else runs; the job has {need}")


def quota(kube: Kube, config: RunConfig) -> Answer:
    """What the namespace may take in all, against what is in use and what the job adds."""
    found = listed(kube, f"/api/v1/namespaces/{kube.namespace}/resourcequotas")
    pods = pods_of(job_manifest(config, kube.namespace))
    counting = [each for each in found if applies(each, pods)]
    if not counting:
        return passed(f"no quota in {kube.namespace} counts the job's pods")
    least = total(pods, most=False)
    short, never = [], False
    for each in counting:
        used = each.get("status", {}).get("used", {})
        for resource, allowed in (each.get("spec", {}).get("hard") or {}).items():
            need = least.get(resource, Decimal(0))
            taken, limit = number(used.get(resource, 0)), number(allowed)
            if need and need + taken > limit:
                never = never or need > limit
                short.append(
                    f"{resource}: needs {shown(resource, need)}, {shown(resource, max(Decimal(0), limit - taken))} "
                    f"left of {shown(resource, limit)} ({each['metadata']['name']})"
                )
    if not short:
        return passed(f"the job fits into {', '.join(each['metadata']['name'] for each in counting)}")
    wait = "" if never else "wait until other jobs have ended, "
    return failed(
        f"the quota is too small for the job: {'; '.join(short)}",
        f"{wait}ask for less (cluster.head, cluster.workers, compute.workers), or have the quota raised",
    )


def limits(kube: Kube, config: RunConfig) -> Answer:
    """What one pod may take in this namespace: a larger one is refused when KubeRay makes it, and the job waits."""
    pods = pods_of(job_manifest(config, kube.namespace))
    wrong = []
    for found in listed(kube, f"/api/v1/namespaces/{kube.namespace}/limitranges"):
        for rule in found["spec"].get("limits", []):
            if rule.get("type") not in {"Pod", "Container"}:
                continue
            wrong += [f"{text} ({found['metadata']['name']})" for kind in pods for text in _beyond(rule, kind)]
    if wrong:
        return failed(
            f"the namespace does not allow pods of this size: {'; '.join(dict.fromkeys(wrong))}",
            "change cluster.head or cluster.workers, or have the limit range changed",
        )
    return passed(f"pods of this size are allowed in {kube.namespace}")


def _beyond(rule: Mapping[str, Any], pods: Pods) -> Iterator[str]:
    for resource, amount in pods.requests.items():
        most, least = ((rule.get(end) or {}).get(resource) for end in ("max", "min"))
        if most is not None and amount > number(most):
            yield f"{pods.what} pod: {resource} {shown(resource, amount)}, at most {shown(resource, number(most))}"
        if least is not None and amount < number(least):
            yield f"{pods.what} pod: {resource} {shown(resource, amount)}, at least {shown(resource, number(least))}"


def _no_label(nodes: Sequence[Node], label: str, value: str, config: RunConfig) -> Answer:
    there = Counter(found for node in nodes if (found := _labels(node).get(label)) is not None)
    words = ", ".join(f"{name} ({count})" for name, count in sorted(there.items())) or "no node has that label"
    is_gpu = label == config.cluster.workers.gpu_label and value == config.cluster.workers.gpu_type
    near = difflib.get_close_matches(value, there, n=1)
    if is_gpu and not there:
        fix = "set cluster.workers.gpu_label to the one that this cluster's nodes have, or label them"
    elif is_gpu:
        fix = f"set cluster.workers.gpu_type={near[0] if near else 'one of these'}"
    else:
        fix = "mend node_selector in cluster.head and cluster.workers, or have the nodes labelled"
    return failed(f"no node has {label}={value}; there are: {words}", f"{fix}; {_AUTOSCALED}")


def _too_small(nodes: Sequence[Node], pods: Pods, config: RunConfig) -> Answer:
    most = {resource: max(_allocatable(node, resource) for node in nodes) for resource in pods.requests}
    lacking = {resource: amount for resource, amount in pods.requests.items() if most[resource] < amount}
    section = _section(pods)
    gpu = config.cluster.workers.gpu_resource
    if gpu in lacking and not most[gpu]:
        return failed(
            f"none of {len(nodes)} nodes offers {gpu}; a {pods.what} pod needs {shown(gpu, lacking[gpu])}",
            f"install the device plugin, or set cluster.workers.gpu_resource; {_AUTOSCALED}",
        )
    if not lacking:
        return failed(
            f"no node is large enough for a {pods.what} pod in every respect",
            f"lower the values of cluster.{section}, or have larger nodes added; {_AUTOSCALED}",
        )
    words = ", ".join(
        f"{shown(resource, amount)} {resource} (the largest node has {shown(resource, most[resource])})"
        for resource, amount in lacking.items()
    )
    return failed(
        f"no node is large enough for a {pods.what} pod: {words}",
        f"lower the values of cluster.{section}, or have larger nodes added; {_AUTOSCALED}",
    )


def _is_usable(node: Node) -> bool:
    if node.get("spec", {}).get("unschedulable"):
        return False
    conditions = node.get("status", {}).get("conditions") or []
    return all(each["status"] == "True" for each in conditions if each["type"] == "Ready")


def _labels(node: Node) -> Mapping[str, str]:
    labels: Mapping[str, str] = node["metadata"].get("labels") or {}
    return labels


def _allocatable(node: Node, resource: str) -> Decimal:
    return number((node.get("status", {}).get("allocatable") or {}).get(resource, 0))


def _copies(node: Node, pods: Pods) -> int:
    """How many of the pods the node holds when it is empty."""
    shares = [int(_allocatable(node, resource) / amount) for resource, amount in pods.requests.items() if amount]
    return min(shares, default=0)


def _taints(node: Node, pods: Pods, config: RunConfig) -> list[str]:
    """What keeps the pods away. Kueue's flavours bring tolerations, and so does a cluster for its GPUs' own taint."""
    if config.cluster.queue is not None:
        return []
    tolerations = pods.spec.get("tolerations") or ()
    return [
        f"{taint['key']}{'=' + taint['value'] if taint.get('value') else ''}:{taint['effect']}"
        for taint in node.get("spec", {}).get("taints") or []
        if taint["effect"] != "PreferNoSchedule"
        and not (taint["key"] == config.cluster.workers.gpu_resource and taint["key"] in pods.requests)
        and not tolerates(tolerations, taint)
    ]


def _section(pods: Pods) -> str:
    return "workers" if pods.what == "worker" else "head"
