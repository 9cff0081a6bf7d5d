"""Removes RayJobs of ours that are no use any more: live ones whose sign of life is old, and ended ones after a while.

KubeRay takes an ended job's pods away (``ttlSecondsAfterFinished``), but leaves the RayJob and its submitter's pod,
which count in quotas and are listed for ever, unless an owner takes them along.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from dpo_train.cluster import watching
from dpo_train.cluster.heartbeat import HEARTBEAT, PERIOD
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.rayjob import API_VERSION, MANAGED_BY
from dpo_train.cluster.rayjob_removal import delete
from dpo_train.cluster.rayjob_state import ended_of

PATIENCE = 10
"""A sign may be so many of its periods old, if that is longer than a launcher waits for an API that is away."""
KEEP = timedelta(days=1)
"""So long an ended job stays, for who asks how it ended."""


def reap(
    kube: Kube,
    namespace: str,
    now: datetime,
    *,
    keep: timedelta = KEEP,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Removes the jobs that are orphaned at ``now`` or have ended ``keep`` ago; all others are left alone.

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
        metadata, why = rayjob["metadata"], reason(rayjob, now, keep)
        if why is None:
            continue
        # As it was listed: a job that has given a sign since, or was replaced, is left alone.
        uid, version = metadata["uid"], metadata["resourceVersion"]
        if dry_run or delete(kube, f"{path}/{metadata['name']}", uid, version=version):
            reaped.append(metadata["name"])
            tell(f"{'would remove' if dry_run else 'removed'}  {metadata['name']}  {why}")
    return reaped


def reason(rayjob: dict[str, Any], now: datetime, keep: timedelta) -> str | None:
    """Why a job is to go; None: it stays, also if there is no readable time to judge it by."""
    if "deletionTimestamp" in rayjob["metadata"]:
        return None
    if ended_of(rayjob) is None:
        age = silence(rayjob, now)
        return None if age is None else f"no sign of life for {round(age.total_seconds() / 60)} minutes"
    age = _since_end(rayjob, now)
    # Its pods may have been meant to stay longer, and they go with it.
    pods = timedelta(seconds=rayjob.get("spec", {}).get("ttlSecondsAfterFinished") or 0)
    return None if age is None or age <= max(keep, pods) else f"ended {age.total_seconds() / 3600:.0f} hours ago"


def silence(rayjob: dict[str, Any], now: datetime) -> timedelta | None:
    """Time since the sign of life of a live job that is orphaned; None: it is not, or has no readable sign."""
    age = _age(_annotations(rayjob).get(HEARTBEAT), now)
    try:
        period_s = int(_annotations(rayjob)[PERIOD])
    except (KeyError, ValueError):
        return None
    # A launcher goes on waiting when the API comes back within its patience, and its next sign may take a period.
    patience_s = max(PATIENCE * period_s, watching.PATIENCE_S + 2 * period_s)
    return age if age is not None and period_s > 0 and age.total_seconds() > patience_s else None


def _since_end(rayjob: dict[str, Any], now: datetime) -> timedelta | None:
    """KubeRay writes no end for a job whose spec it does not accept; nobody waits for that one after its last sign."""
    ended = (rayjob.get("status") or {}).get("endTime")
    return _age(ended or _annotations(rayjob).get(HEARTBEAT), now)


def _annotations(rayjob: dict[str, Any]) -> dict[str, str]:
    return rayjob["metadata"].get("annotations") or {}


def _age(time: str | None, now: datetime) -> timedelta | None:
    """None: there is no time, or it cannot be compared."""
    try:
        return None if time is None else now - datetime.fromisoformat(time)
    except (ValueError, TypeError):  # TypeError: without a time zone
        return None
