"""What is done with what there is under a job's name: created, adopted, taken as it is, replaced, refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_train.cluster import launcher as module
from dpo_train.cluster.job import Job, drop_result, read_job, read_result, write_result
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import ClusterError
from dpo_train.cluster.launcher import RayJobLauncher
from dpo_train.errors import RunError
from tests.cluster.jobs import Waiting, config_in, job_of
from tests.cluster.operator import DEADLINE_S, Operator, until
from tests.cluster.proxy import Proxy

Launch = Callable[..., Waiting]


def test_a_finished_job_is_not_run_again(launch: Launch, operator: Operator) -> None:
    """A task that was restarted after its job's end finds the result."""
    first = launch()
    operator.created()
    write_result(first.job, "prepare/0123")
    operator.succeed()
    assert first.result().succeeded
    uid = operator.created()["metadata"]["uid"]

    second = launch()

    assert second.result().succeeded
    assert operator.created()["metadata"]["uid"] == uid
    assert read_result(second.job) is not None


@pytest.mark.parametrize(
    ("deployment", "of_ray", "result"), [("Failed", "FAILED", True), ("Complete", "SUCCEEDED", False)]
)
def test_a_job_that_ended_without_use_is_replaced_when_its_pods_are_gone(
    launch: Launch, operator: Operator, proxy: Proxy, deployment: str, of_ray: str, result: bool
) -> None:
    """One that failed, or whose result is gone; what it had left is dropped before the new one is created.

    After a deadline the old one's process may still be there, and it would write to the same output.
    """
    first = launch()
    operator.created()
    operator.status(deployment, of_ray)
    first.result()
    uid = operator.created()["metadata"]["uid"]
    if result:
        write_result(first.job, RunError("the earlier attempt's"))

    second = launch()
    until(lambda: [text for text in second.told if "is being removed" in text], "it waits for the old one's end")
    assert proxy.count("POST", "/rayjobs") == 1
    operator.collect_garbage()
    until(lambda: (operator.find() or {"metadata": {"uid": uid}})["metadata"]["uid"] != uid, "a new RayJob")
    assert read_result(second.job) is None
    operator.succeed()

    assert second.result().succeeded


def test_outside_of_a_run_a_finished_job_is_run_again(kube: Kube, admin: Kube, proxy: Proxy, tmp_path: Path) -> None:
    """`dpo prepare` by itself: the raw data may have changed since. The job finds by itself what it can reuse."""
    config = config_in(tmp_path)
    job = job_of(config, run_id=None)
    operator = Operator(admin, proxy, job.name)
    first = Waiting(RayJobLauncher(config, kube), job).start()
    uid = operator.created()["metadata"]["uid"]
    write_result(job, "prepare/0123")
    operator.succeed()
    assert first.result().succeeded

    second = Waiting(RayJobLauncher(config, kube), job).start()
    operator.collect_garbage()
    until(lambda: (operator.find() or {"metadata": {"uid": uid}})["metadata"]["uid"] != uid, "a new RayJob")
    assert read_result(job) is None
    operator.succeed()

    assert second.result().succeeded


def test_another_spec_under_the_same_name_is_replaced_only_when_it_has_ended(
    launch: Launch, operator: Operator
) -> None:
    """While it is alive, two configs would share one job."""
    first = launch()
    uid = operator.created()["metadata"]["uid"]
    until(lambda: first.told, "followed")

    with pytest.raises(ClusterError, match=r"other content is alive.*kubectl"):
        launch(image="registry.example/other").result()
    assert operator.created()["metadata"]["uid"] == uid

    operator.status("Complete", "SUCCEEDED")
    first.result()
    other = launch(image="registry.example/other")
    operator.collect_garbage()
    until(lambda: (operator.find() or {"metadata": {"uid": uid}})["metadata"]["uid"] != uid, "a new RayJob")
    operator.succeed()
    assert other.result().succeeded


def test_a_foreign_rayjob_is_never_replaced(launch: Launch, operator: Operator) -> None:
    """Without our label it is somebody else's."""
    waiting = launch()
    operator.created()
    operator.status("Failed", "FAILED")
    waiting.result()
    operator.patch({"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}})

    with pytest.raises(ClusterError, match="not one that dpo has made"):
        launch().result()

    assert operator.find() is not None


def test_an_earlier_attempt_that_is_being_removed_is_waited_for(launch: Launch, operator: Operator) -> None:
    """KubeRay's finalizer keeps a deleted RayJob until its Ray job has stopped."""
    first = launch()
    operator.created()
    operator.patch({"metadata": {"finalizers": ["ray.io/rayjob-finalizer"]}})
    operator.status("Failed", "FAILED")
    first.result()
    second = launch()
    until(lambda: [text for text in second.told if "is being removed" in text], "told of the removal")
    old = operator.created()["metadata"]["uid"]
    operator.patch({"metadata": {"finalizers": None}})
    until(lambda: (operator.find() or {"metadata": {"uid": old}})["metadata"]["uid"] != old, "a new RayJob")
    operator.succeed()

    assert second.result().succeeded


def test_two_launchers_at_once_make_one_rayjob(
    launch: Launch, operator: Operator, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find nothing, both create: the second one meets a conflict, and follows the first one's job."""
    both_have_looked, drop = threading.Barrier(2), drop_result

    def wait_and_drop(job: Job) -> None:
        both_have_looked.wait(DEADLINE_S)
        drop(job)

    monkeypatch.setattr(module.jobs, "drop_result", wait_and_drop)
    both = [launch(), launch()]
    operator.created()
    until(lambda: all(waiting.told for waiting in both), "both follow")
    operator.succeed("a line")

    assert [waiting.result().succeeded for waiting in both] == [True, True]
    assert [waiting.lines for waiting in both] == [["a line"], ["a line"]]
    assert sorted(waiting.told[0].split()[0] for waiting in both) == ["created", "found"]
    assert proxy.count("POST", "/rayjobs") == 2


def test_adopting_keeps_the_result_that_the_job_may_have_written(
    launch: Launch, operator: Operator, tmp_path: Path
) -> None:
    """The job may write it between the adoption and the end."""
    first = launch()
    operator.created()
    until(lambda: first.told, "followed")
    write_result(first.job, "prepare/0123")
    second = launch()
    until(lambda: second.told, "adopted")

    assert read_result(second.job) is not None
    operator.succeed()
    assert second.result().succeeded
    assert first.result().succeeded


def test_a_job_whose_removal_hangs_is_an_error(
    launch: Launch, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KubeRay's finalizer stays if its operator is away."""
    first = launch()
    operator.created()
    operator.patch({"metadata": {"finalizers": ["ray.io/rayjob-finalizer"]}})
    operator.status("Failed", "FAILED")
    first.result()
    monkeypatch.setattr(module, "REMOVAL_S", 0.3)

    with pytest.raises(RunError, match=r"is being removed and does not go.*operator"):
        launch().result()

    operator.patch({"metadata": {"finalizers": None}})


def test_jobs_are_written_before_they_are_created(kube: Kube, tmp_path: Path, proxy: Proxy) -> None:
    """A job that starts at once must find what it is to do; and a refused creation leaves no RayJob."""
    config = config_in(tmp_path)
    proxy.fault("POST", "/rayjobs", "forbidden")
    job = job_of(config)

    with pytest.raises(ClusterError):
        RayJobLauncher(config, kube).run(job, tell=print, line=print)

    assert read_job(job.folder).name == job.name
