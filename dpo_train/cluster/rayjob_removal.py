"""Takes RayJobs away, or one of several waiters' hands off a job.

A removed RayJob stays until its pods are gone (foreground deletion): who creates the next one under its name must not
have the old one's process write to the same output. The request itself is answered at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_train.cluster.kube import JSON_PATCH, PATIENCE_S, READ_TIMEOUT_S, Kube
from dpo_train.cluster.kube_errors import RefusedError

_TRIES = 2
"""Others may come and go between a look at the owners and the change."""


def delete(
    kube: Kube,
    path: str,
    uid: str,
    *,
    version: str | None = None,
    patience_s: float = PATIENCE_S,
    timeout_s: float = READ_TIMEOUT_S,
) -> bool:
    """Whether this one was there: not if it is gone, if another one has its place, or has another ``version`` by now.

    Raises:
        RefusedError: the caller may not.
        RunError: the API could not be reached for ``patience_s``.
    """
    preconditions = {"uid": uid} if version is None else {"uid": uid, "resourceVersion": version}
    body = {"propagationPolicy": "Foreground", "preconditions": preconditions}
    try:
        kube.ask("DELETE", path, body=body, patience_s=patience_s, timeout_s=timeout_s)
    except RefusedError as refused:
        if refused.status in {404, 409}:
            return False
        raise
    return True


def give_up(
    kube: Kube, path: str, uid: str, owners: Sequence[Mapping[str, Any]], own: str | None, *, limit_s: float
) -> str:
    """Removes the job, unless others wait for it: workflows that own it and are not ``own``. Then it loses one owner.

    Args:
        owners: its owner references, as they were last seen.
        own: the uid of the caller's own owner, if it has one.
        limit_s: of each request; mostly there is one.

    Returns:
        What became of it, for people; nothing if it was not there any more.

    Raises:
        RefusedError: the caller may not.
        RunError: the API could not be reached.
    """
    for _ in range(_TRIES):
        others = sum(owner["uid"] != own for owner in owners)
        if not others:
            there = delete(kube, path, uid, patience_s=limit_s, timeout_s=limit_s)
            return f"removed from {kube.namespace}" if there else ""
        left = f"left in {kube.namespace}: it belongs to {others} other workflow{'s' if others > 1 else ''} too"
        if others == len(owners) or _disown(kube, path, uid, owners, own, limit_s):
            return left
        found = kube.ask("GET", path, patience_s=limit_s, timeout_s=limit_s)["metadata"]
        if found["uid"] != uid:
            return ""
        owners = found.get("ownerReferences", [])
    return left


def _disown(
    kube: Kube, path: str, uid: str, owners: Sequence[Mapping[str, Any]], own: str | None, limit_s: float
) -> bool:
    """Whether the owner was taken off; not if the owners are others by now."""
    index = [owner["uid"] for owner in owners].index(own)
    # Not by version, as when an owner is added: signs of life change that all the time, and there is one request.
    change = [
        {"op": "test", "path": "/metadata/uid", "value": uid},
        {"op": "test", "path": "/metadata/ownerReferences", "value": list(owners)},
        {"op": "remove", "path": f"/metadata/ownerReferences/{index}"},
    ]
    try:
        kube.ask("PATCH", path, body=change, content_type=JSON_PATCH, patience_s=limit_s, timeout_s=limit_s)
    except RefusedError as refused:
        if refused.status in {409, 422}:
            return False
        raise
    return True
