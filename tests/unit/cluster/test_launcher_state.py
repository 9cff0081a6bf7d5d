"""From a RayJob's status to a phase, an end, and words."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_train.cluster.rayjob_state import ended_of, phase_of, words_of


def rayjob(deployment: str | None, of_ray: str = "", *, suspend: bool = False, **more: Any) -> dict[str, Any]:
    """As the API gives it; None: nothing has looked at it."""
    found: dict[str, Any] = {"metadata": {"name": "a"}, "spec": {"activeDeadlineSeconds": 5400, "suspend": suspend}}
    return (
        found
        if deployment is None
        else found | {"status": {"jobDeploymentStatus": deployment, "jobStatus": of_ray, **more}}
    )


@pytest.mark.parametrize(
    ("found", "phase"),
    [
        (rayjob(None), "new"),
        (rayjob(""), "new"),
        (rayjob(None, suspend=True), "queued"),
        (rayjob("Initializing"), "starting"),
        (rayjob("Initializing", suspend=True), "queued"),
        (rayjob("Suspending"), "queued"),
        (rayjob("Suspended"), "queued"),
        (rayjob("Running", "RUNNING"), "running"),
        (rayjob("Running", "SUCCEEDED"), "running"),
        (rayjob("Running", "FAILED"), "running"),
        (rayjob("Retrying", "FAILED"), "retrying"),
        (rayjob("Complete", "SUCCEEDED"), "ended"),
        (rayjob("Failed"), "ended"),
        (rayjob("ValidationFailed"), "ended"),
        (rayjob("AStateOfTomorrow"), "starting"),
    ],
)
def test_phase(found: dict[str, Any], phase: str) -> None:
    """Ray's word alone ends nothing: KubeRay's comes after the submitter's last lines."""
    assert phase_of(found) == phase
    assert (ended_of(found) is not None) == (phase == "ended")
    assert words_of(found)


@pytest.mark.parametrize("of_ray", ["", "PENDING", "RUNNING", "STOPPED", "FAILED"])
def test_complete_is_a_success_only_with_rays_own(of_ray: str) -> None:
    """A stopped job ends as Complete."""
    assert ended_of(rayjob("Complete", of_ray)) != ended_of(rayjob("Complete", "SUCCEEDED"))
    ended = ended_of(rayjob("Complete", of_ray))
    assert ended is not None
    assert not ended.succeeded


def test_failed_is_no_success_whatever_ray_says() -> None:
    """A grace period that ran out leaves SUCCEEDED beside Failed."""
    ended = ended_of(rayjob("Failed", "SUCCEEDED", reason="JobDeploymentStatusTransitionGracePeriodExceeded"))
    assert ended is not None
    assert not ended.succeeded


def test_the_reason_is_in_words_with_kuberays_message_on_one_line() -> None:
    """5400 seconds are one and a half hours; a reason that we do not know keeps its name."""
    deadline = ended_of(rayjob("Failed", reason="DeadlineExceeded", message="The RayJob\nhas passed"))
    unknown = ended_of(rayjob("Failed", reason="ReasonOfTomorrow"))

    assert deadline is not None
    assert deadline.reason == "DeadlineExceeded: it ran longer than 1.5 hours (The RayJob has passed)"
    assert unknown is not None
    assert unknown.reason.startswith("ReasonOfTomorrow: ")
