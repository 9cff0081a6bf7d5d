"""What a RayJob's status means. Pure: from the object as the API gives it to a phase, or an end in words.

    (new) -> Initializing -> Running -> Complete | Failed        KubeRay's jobDeploymentStatus
    Suspended: Kueue has it in its queue                         Retrying: KubeRay starts it once more
    ValidationFailed: KubeRay refuses the spec

Only Complete together with Ray's own SUCCEEDED is a success: a job that was stopped ends as Complete too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dpo_train.cluster.job import Ended
from dpo_train.cluster.rayjob import QUEUE_LABEL

Phase = Literal["new", "queued", "starting", "running", "retrying", "ended"]

_ENDS = {"Complete", "Failed", "ValidationFailed"}
_PHASES: dict[str, Phase] = {
    "": "new",
    "Initializing": "starting",
    "Waiting": "starting",
    "Running": "running",
    "Retrying": "retrying",
    "Suspending": "queued",
    "Suspended": "queued",
    **dict.fromkeys(_ENDS, "ended"),
}
_WORDS: dict[Phase, str] = {
    "new": "waiting for KubeRay's operator",
    "starting": "its Ray cluster is being started",
    "running": "running",
    "retrying": "KubeRay starts it once more, on a new Ray cluster",
    "ended": "ended",
}
_REASONS = {
    "AppFailed": "the job's own process failed",
    "SubmissionFailed": "the job could not be handed over to its Ray cluster",
    "PreRunningDeadlineExceeded": "its Ray cluster was not ready in time",
    "JobDeploymentStatusTransitionGracePeriodExceeded": (
        "its Ray job was over, or its submitter was, and the other did not follow in time"
    ),
    "JobStatusCheckTimeoutExceeded": "KubeRay could not reach the job's head pod any more",
    "ValidationFailed": "KubeRay does not accept what the job asks for",
    "STOPPED": "it was stopped",
    "FAILED": "the job's own process failed",
}


def phase_of(rayjob: Mapping[str, Any]) -> Phase:
    """How far the job is."""
    deployment = str(_status(rayjob).get("jobDeploymentStatus") or "")
    if deployment in {"", "Initializing"} and rayjob.get("spec", {}).get("suspend"):
        return "queued"
    return _PHASES.get(deployment, "starting")


def ended_of(rayjob: Mapping[str, Any]) -> Ended | None:
    """How it ended; None: it has not."""
    status = _status(rayjob)
    deployment, of_ray = str(status.get("jobDeploymentStatus") or ""), str(status.get("jobStatus") or "")
    if deployment not in _ENDS:
        return None
    if deployment == "Complete" and of_ray == "SUCCEEDED":
        return Ended(succeeded=True, reason="SUCCEEDED")
    reason = str(status.get("reason") or (of_ray if of_ray in _REASONS else deployment))
    if reason == "Complete":
        explained = f"it is over, and Ray's job {of_ray or 'never began'}"
    elif reason == "DeadlineExceeded":
        explained = f"it ran longer than {_hours(rayjob)}"
    else:
        explained = _REASONS.get(reason, "see KubeRay's documentation")
    message = " ".join(str(status.get("message") or "").split())
    return Ended(succeeded=False, reason=f"{reason}: {explained}" + (f" ({message})" if message else ""))


def words_of(rayjob: Mapping[str, Any]) -> str:
    """The phase, for who waits."""
    phase = phase_of(rayjob)
    if phase == "queued":
        return f"waiting in queue {rayjob['metadata'].get('labels', {}).get(QUEUE_LABEL, '(it is suspended)')}"
    return _WORDS[phase]


def _status(rayjob: Mapping[str, Any]) -> Mapping[str, Any]:
    return rayjob.get("status") or {}


def _hours(rayjob: Mapping[str, Any]) -> str:
    seconds = rayjob.get("spec", {}).get("activeDeadlineSeconds")
    return "its deadline" if seconds is None else f"{seconds / 3600:g} hours"
