"""Removes jobs that nobody waits for any more: live RayJobs of ours whose sign of life is old."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from dpo_train.cluster.heartbeat import HEARTBEAT, PERIOD
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import RefusedError
from dpo_train.cluster.rayjob import API_VERSION, MANAGED_BY
from dpo_train.cluster.rayjob_state import ended_of

PATIENCE = 10
"""A sign may be so many of its periods old."""


def reap(
    kube: Kube,
    namespace: str,
    now: datetime,
    *,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Removes the jobs that are orphaned at ``now``; all others are left alone, also those without a readable sign.

    Returns:
        Their names.

    Raises:
        ClusterError: the account may not list or delete RayJobs.
        RunError: the cluster cannot be reached.
    """
    path = f"/apis/{API_VERSION}/namespaces/{namespace}/rayjobs"
    selector = ",".join(f"{key}={value}" for key, value in MANAGED_BY.items())
    reaped = []
    for rayjob in kube.ask("GET", path, query={"labelSelector": selector})["items"]:
        name, age = rayjob["metadata"]["name"], silence(rayjob, now)
        if age is None:
            continue
        if dry_run or _delete(kube, f"{path}/{name}", rayjob):
            reaped.append(name)
            tell(f"{'orphaned' if dry_run else 'removed'}  {name}  no sign of life for {round(age / 60)} minutes")
    return reaped


def silence(rayjob: dict[str, Any], now: datetime) -> float | None:
    """Seconds since the sign of life of an orphaned job; None: it is not orphaned."""
    metadata = rayjob["metadata"]
    found = metadata.get("annotations", {})
    if "deletionTimestamp" in metadata or ended_of(rayjob) is not None:
        return None
    try:
        age = now - datetime.fromisoformat(found[HEARTBEAT])
        period = timedelta(seconds=int(found[PERIOD]))
    except (KeyError, ValueError, TypeError):
        return None
    return age.total_seconds() if age > PATIENCE * period > timedelta() else None


def _delete(kube: Kube, path: str, rayjob: dict[str, Any]) -> bool:
    """Whether it was removed; not if it has given a sign, or was replaced, since it was listed."""
    metadata = rayjob["metadata"]
    as_listed = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
    try:
        kube.ask("DELETE", path, body={"propagationPolicy": "Background", "preconditions": as_listed})
    except RefusedError as refused:
        if refused.status in {404, 409}:
            return False
        raise
    return True
