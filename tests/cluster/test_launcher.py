"""RayJobs from their creation to their end, through every state that KubeRay has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cluster import launcher as module
from dpo_train.cluster.job import read_job, write_result
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import ClusterError
from dpo_train.cluster.launcher import RayJobLauncher
from dpo_train.cluster.rayjob_removal import delete
from dpo_train.errors import RunError
from tests.cluster.jobs import Full, Waiting, config_in, job_of
from tests.cluster.operator import Operator, until
from tests.cluster.proxy import Proxy

Launch = Callable[..., Waiting]


def test_a_job_is_created_followed_and_ends_well(launch: Launch, operator: Operator, proxy: Proxy) -> None:
    """From nothing to SUCCEEDED, with every line once, each state told once, and the job's file in its folder."""
    waiting = launch()
    created = operator.created()
    operator.status("Initializing")
    until(lambda: "its Ray cluster is being started" in waiting.told, "told of the start")
    operator.succeed("one", "", "two")

    ended = waiting.result()

    assert ended.succeeded
    assert ended.reason == "SUCCEEDED"
    assert waiting.lines == ["one", "", "two"]
    assert len(waiting.told) == len(set(waiting.told))
    assert created["spec"]["backoffLimit"] == 0
    assert created["spec"]["activeDeadlineSeconds"] == 24 * 3600
    assert read_job(waiting.job.folder).stage == "prepare"
    assert proxy.count("POST", r"fieldValidation=Strict") == 1


def test_a_field_that_this_cluster_does_not_know_is_refused_and_not_dropped(
    launch: Launch, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older CRD would otherwise drop a field, such as a deadline, in silence."""
    made = module.manifest

    def with_more(*arguments: Any, **options: Any) -> dict[str, Any]:
        content = made(*arguments, **options)
        return {**content, "spec": {**content["spec"], "fieldOfTomorrow": 1}}

    monkeypatch.setattr(module, "manifest", with_more)

    with pytest.raises(ClusterError, match=r"fieldOfTomorrow.*What to do: .*CRDs"):
        launch().result()

    assert operator.find() is None


def test_a_queue_is_no_trouble(
    launch: Launch, operator: Operator, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kueue suspends a job for as long as it has no room; that is told once, and nothing is looked for in it."""
    monkeypatch.setattr(module, "QUIET_S", 0.1)
    waiting = launch(queue="gpus")
    operator.created()
    operator.status("Suspended")
    until(lambda: waiting.told[-1:] == ["waiting in queue gpus"], "told of the queue")
    until(lambda: proxy.count("GET", "watch") >= 4, "a watch that is opened again and again")
    operator.patch({"spec": {"suspend": False}})
    operator.status("")
    operator.status("Initializing")
    operator.succeed()

    assert waiting.result().succeeded
    assert waiting.told.count("waiting in queue gpus") == 1
    assert not [text for text in waiting.told if text.startswith("not begun")]


ENDS: list[tuple[str, str, dict[str, Any], str]] = [
    ("ValidationFailed", "", {"reason": "ValidationFailed", "message": "bad"}, r"does not accept.*\(bad\)"),
    ("Complete", "STOPPED", {}, r"^STOPPED: it was stopped"),
    ("Failed", "FAILED", {"reason": "AppFailed", "message": "exit\ncode 1"}, r"^AppFailed: .*\(exit code 1\)"),
    ("Complete", "FAILED", {}, r"^FAILED"),
    ("Failed", "RUNNING", {"reason": "DeadlineExceeded"}, r"^DeadlineExceeded: it ran longer than 24 hours"),
    ("Failed", "", {"reason": "SubmissionFailed"}, r"could not be handed over"),
    (
        "Failed",
        "SUCCEEDED",
        {"reason": "JobDeploymentStatusTransitionGracePeriodExceeded"},
        r"did not follow in time",
    ),
    ("Complete", "", {}, r"never began"),
]


@pytest.mark.parametrize(("deployment", "of_ray", "more", "words"), ENDS)
def test_every_other_end_is_a_failure_in_words(
    launch: Launch, operator: Operator, deployment: str, of_ray: str, more: dict[str, Any], words: str
) -> None:
    """Only Complete with SUCCEEDED is a success; and a job that failed is not started again."""
    waiting = launch()
    uid = operator.created()["metadata"]["uid"]
    operator.status("Initializing")
    operator.status(deployment, of_ray, **more)

    ended = waiting.result()

    assert not ended.succeeded
    assert re.search(words, ended.reason)
    assert operator.created()["metadata"]["uid"] == uid


def test_a_retry_of_kuberays_is_followed_with_the_lines_of_both_attempts(launch: Launch, operator: Operator) -> None:
    """Our manifest asks for none, but an admission policy may; another Ray job's lines are all new ones."""
    waiting = launch()
    operator.created()
    operator.status("Running", "RUNNING")
    first = operator.submitter(0, ray_job="ray-1")
    operator.print(first, "start", "failed")
    until(lambda: waiting.lines == ["start", "failed"], "the first lines")
    operator.end_submitter(first, "Failed")
    operator.status("Retrying", "FAILED")
    until(lambda: [text for text in waiting.told if "once more" in text], "told of the retry")
    operator.status("Initializing")
    operator.succeed("start", "done", pod=operator.submitter(1, ray_job="ray-2"))

    assert waiting.result().succeeded
    assert waiting.lines == ["start", "failed", "start", "done"]


def test_a_job_that_is_deleted_under_us_is_a_clear_error(launch: Launch, operator: Operator) -> None:
    """Nobody waits for what is not there any more; and while its pods end, that is said."""
    waiting = launch()
    operator.created()
    operator.patch({"metadata": {"finalizers": ["ray.io/rayjob-finalizer"]}})
    operator.status("Running", "RUNNING")
    until(lambda: "running" in waiting.told, "told that it runs")
    operator.delete()
    until(lambda: [text for text in waiting.told if "somebody has removed it" in text], "told of the removal")
    operator.patch({"metadata": {"finalizers": None}})

    with pytest.raises(RunError, match="was deleted while it ran"):
        waiting.result()


@pytest.mark.parametrize("outcome", ["prepare/0123", RunError("its own words")])
def test_a_job_that_is_tidied_up_after_its_end_has_ended(
    launch: Launch, operator: Operator, outcome: str | RunError
) -> None:
    """KubeRay may delete ended RayJobs, and the API may have been away until then: what counts is the result."""
    waiting = launch()
    operator.created()
    operator.status("Running", "RUNNING")
    until(lambda: "running" in waiting.told, "told that it runs")
    write_result(waiting.job, outcome)
    operator.delete()

    assert waiting.result().succeeded == isinstance(outcome, str)


def test_a_job_that_is_replaced_under_us_is_not_taken_for_ours(launch: Launch, operator: Operator) -> None:
    """The name is the same, the job is another."""
    waiting = launch()
    made = operator.created()
    operator.status("Running", "RUNNING")
    until(lambda: "running" in waiting.told, "followed")
    operator.delete()
    for key in ("uid", "resourceVersion", "creationTimestamp", "managedFields", "generation"):
        made["metadata"].pop(key, None)
    operator._kube.ask("POST", operator.collection, body=made)

    with pytest.raises(RunError, match="was deleted while it ran"):
        waiting.result()


def test_what_keeps_a_job_from_beginning_is_told(
    launch: Launch, operator: Operator, admin: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scheduling, images and events of its own pods, each once; the job goes on waiting."""
    monkeypatch.setattr(module, "QUIET_S", 0.1)
    waiting = launch()
    operator.created()
    cluster = f"{operator.name}-c1"
    operator.status("Initializing", rayClusterName=cluster)
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}
    labels = {"ray.io/cluster": cluster, "ray.io/node-type": "worker"}
    operator.pod(f"{cluster}-w", labels, {"phase": "Pending", "conditions": [unschedulable]})
    head = {"ray.io/cluster": cluster, "ray.io/node-type": "head"}
    waits = {"name": "main", "image": "none", "imageID": "", "ready": False, "restartCount": 0}
    pulling = {**waits, "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
    operator.pod(f"{cluster}-h", head, {"phase": "Pending", "containerStatuses": [pulling]})
    _event(admin, f"{cluster}-h", "FailedMount", 'claim "data" is not there')
    _event(admin, "somebody-else", "FailedMount", "not ours")
    expected = {
        "not begun yet: worker pod: FailedScheduling: no GPU",
        "not begun yet: head pod: ImagePullBackOff: not found",
        'not begun yet: pod: FailedMount: claim "data" is not there',
    }
    until(lambda: expected <= set(waiting.told), "told of all three")
    operator.succeed()

    assert waiting.result().succeeded
    assert len([text for text in waiting.told if text.startswith("not begun")]) == 3


def test_an_image_that_no_registry_can_have_ends_the_job_at_once(
    launch: Launch, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InvalidImageName stays as it is: the user is told, and no pod waits for the deadline."""
    monkeypatch.setattr(module, "QUIET_S", 0.1)
    waiting = launch()
    operator.created()
    operator.status("Initializing", rayClusterName="c2")
    state = {"waiting": {"reason": "InvalidImageName", "message": "couldn't parse image"}}
    container = {"name": "main", "image": "none", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    labels = {"ray.io/cluster": "c2", "ray.io/node-type": "head"}
    operator.pod("c2-head", labels, {"phase": "Pending", "containerStatuses": [container]})

    with pytest.raises(ClusterError, match=r"can never begin.*couldn't parse image.*cluster.image"):
        waiting.result()

    operator.collect_garbage()
    assert operator.find() is None


def test_a_job_that_no_operator_looks_at_is_told(
    launch: Launch, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRDs without an operator, or one that watches other namespaces."""
    monkeypatch.setattr(module, "QUIET_S", 0.1)
    waiting = launch()
    operator.created()
    until(lambda: [text for text in waiting.told if "has not looked at it" in text], "told of the operator")
    operator.succeed()

    assert waiting.result().succeeded


def test_an_error_of_the_callers_own_takes_the_job_away(kube: Kube, operator: Operator, tmp_path: Path) -> None:
    """A line that cannot be printed ends the caller, whose job would run for nobody."""
    config = config_in(tmp_path, heartbeat_seconds=1)
    waiting = Waiting(RayJobLauncher(config, kube), job_of(config_in(tmp_path)), lines=Full()).start()
    operator.created()
    operator.status("Running", "RUNNING")
    operator.print(operator.submitter(), "a line")

    with pytest.raises(OSError, match="no space left"):
        waiting.result()

    operator.collect_garbage()
    assert operator.find() is None


def test_a_removal_hits_only_the_job_that_was_followed(launch: Launch, kube: Kube, operator: Operator) -> None:
    """Another one may have its name by now."""
    waiting = launch()
    operator.created()

    assert not delete(kube, operator.path, "uid-of-an-earlier-one")
    assert operator.find() is not None
    operator.succeed()
    assert waiting.result().succeeded


def test_an_error_after_the_jobs_end_leaves_what_has_ended(kube: Kube, operator: Operator, tmp_path: Path) -> None:
    """The next call finds the job and its result, and need not start it again."""
    waiting = Waiting(RayJobLauncher(config_in(tmp_path), kube), job_of(config_in(tmp_path)), lines=Full()).start()
    operator.created()
    pod = operator.submitter()
    operator.print(pod, "the last line")
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")

    with pytest.raises(OSError, match="no space left"):
        waiting.result()

    assert operator.find() is not None


def _event(admin: Kube, pod: str, reason: str, message: str) -> None:
    admin.ask(
        "POST",
        f"/api/v1/namespaces/{admin.namespace}/events",
        body={
            "metadata": {"generateName": "event-"},
            "involvedObject": {"kind": "Pod", "name": pod, "namespace": admin.namespace},
            "type": "Warning",
            "reason": reason,
            "message": message,
        },
    )
