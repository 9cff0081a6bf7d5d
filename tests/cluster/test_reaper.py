"""Jobs that nobody waits for any more."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cli import reap as command
from dpo_train.cluster import reaper
from dpo_train.cluster.heartbeat import HEARTBEAT, PERIOD, sign
from dpo_train.cluster.kube import MERGE_PATCH, Kube
from dpo_train.cluster.kube_errors import ClusterError
from dpo_train.cluster.rayjob import manifest
from tests.cluster.jobs import config_in, job_of
from tests.cluster.proxy import Proxy

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
def space(namespaces: Callable[[], Kube]) -> Kube:
    """A namespace of the test's own: a reaper sees all jobs of one."""
    return namespaces()


def add(
    kube: Kube,
    folder: Path,
    name: str,
    annotations: dict[str, str],
    *,
    status: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
    keep_seconds: int = 600,
) -> None:
    """A RayJob with these annotations, and in this state."""
    config = config_in(folder, keep_seconds=keep_seconds)
    content: dict[str, Any] = manifest(job_of(config), config, namespace=kube.namespace, owner=None)
    content["metadata"] |= {"name": name, "annotations": annotations, **({} if labels is None else {"labels": labels})}
    path = f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs"
    kube.ask("POST", path, body=content)
    if status:
        kube.ask("PATCH", f"{path}/{name}/status", body={"status": status}, content_type=MERGE_PATCH)


def names(kube: Kube) -> set[str]:
    """Jobs that are there to stay: no garbage collector takes away here what is removed."""
    found = kube.ask("GET", f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs")["items"]
    return {item["metadata"]["name"] for item in found if "deletionTimestamp" not in item["metadata"]}


def test_only_live_jobs_of_ours_with_an_old_sign_are_removed(space: Kube, tmp_path: Path) -> None:
    """After ten of the job's own periods, and not before its launcher gives up an API that is away."""
    old = sign(60, NOW - timedelta(seconds=1021))
    add(space, tmp_path, "orphaned", old)
    add(space, tmp_path, "orphaned-in-queue", old, status={"jobDeploymentStatus": "Suspended"})
    add(space, tmp_path, "waited-for", sign(60, NOW - timedelta(seconds=1020)))
    add(space, tmp_path, "quick-sign", sign(1, NOW - timedelta(seconds=902)))
    add(space, tmp_path, "quick-sign-orphaned", sign(1, NOW - timedelta(seconds=903)))
    add(space, tmp_path, "slow-sign", sign(3600, NOW - timedelta(hours=9)))
    add(space, tmp_path, "ended", old, status={"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    add(space, tmp_path, "failed", old, status={"jobDeploymentStatus": "Failed"})
    add(space, tmp_path, "without-sign", {})
    add(space, tmp_path, "without-period", {HEARTBEAT: old[HEARTBEAT]})
    add(space, tmp_path, "unreadable", {HEARTBEAT: "yesterday", PERIOD: "60"})
    add(space, tmp_path, "no-timezone", {HEARTBEAT: "2020-01-01T00:00:00", PERIOD: "60"})
    add(space, tmp_path, "endless-period", {HEARTBEAT: old[HEARTBEAT], PERIOD: "9" * 30})
    add(space, tmp_path, "senseless-period", {HEARTBEAT: old[HEARTBEAT], PERIOD: "0"})
    add(space, tmp_path, "from-the-future", sign(60, NOW + timedelta(days=1)))
    add(space, tmp_path, "foreign", old, labels={"app.kubernetes.io/managed-by": "another"})
    before = names(space)

    named = reaper.reap(space, space.namespace, NOW, dry_run=True)
    assert names(space) == before
    removed = reaper.reap(space, space.namespace, NOW)

    assert set(named) == set(removed) == {"orphaned", "orphaned-in-queue", "quick-sign-orphaned"}
    assert names(space) == before - set(removed)


def ended(hours_ago: float, deployment: str = "Complete") -> dict[str, str]:
    """A status with its end, as KubeRay writes it."""
    time = NOW - timedelta(hours=hours_ago)
    return {"jobDeploymentStatus": deployment, "jobStatus": "SUCCEEDED", "endTime": f"{time:%Y-%m-%dT%H:%M:%SZ}"}


def test_jobs_that_ended_a_day_ago_are_removed(space: Kube, tmp_path: Path) -> None:
    """KubeRay removes their pods and leaves the RayJobs, which would fill a quota; another time can be asked for."""
    early, late = sign(60, NOW - timedelta(hours=60)), sign(60, NOW - timedelta(hours=20))
    add(space, tmp_path, "long-ago", early, status=ended(24.1))
    add(space, tmp_path, "failed-long-ago", early, status=ended(48, "Failed"))
    add(space, tmp_path, "without-sign", {}, status=ended(48))
    add(space, tmp_path, "refused-long-ago", early, status={"jobDeploymentStatus": "ValidationFailed"})
    add(space, tmp_path, "refused", late, status={"jobDeploymentStatus": "ValidationFailed"})
    add(space, tmp_path, "lately", early, status=ended(23.9))
    add(space, tmp_path, "pods-are-kept", early, status=ended(48), keep_seconds=72 * 3600)
    add(space, tmp_path, "without-times", {}, status={"jobDeploymentStatus": "Failed"})
    add(space, tmp_path, "foreign", early, status=ended(48), labels={"app.kubernetes.io/managed-by": "another"})
    before = names(space)
    told: list[str] = []

    named = reaper.reap(space, space.namespace, NOW, dry_run=True)
    assert names(space) == before
    removed = reaper.reap(space, space.namespace, NOW, tell=told.append)

    assert set(named) == set(removed) == {"long-ago", "failed-long-ago", "without-sign", "refused-long-ago"}
    assert names(space) == before - set(removed)
    assert "removed  failed-long-ago  ended 48 hours ago" in told
    assert reaper.reap(space, space.namespace, NOW, keep=timedelta(hours=23), dry_run=True) == ["lately"]


def test_a_sign_that_comes_while_the_reaper_looks_saves_the_job(
    space: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal holds for the job as it was listed."""
    add(space, tmp_path, "late", sign(60, NOW - timedelta(hours=1)))
    judge = reaper.silence

    def then_it_gives_a_sign(rayjob: dict[str, Any], now: datetime) -> timedelta | None:
        path = f"/apis/ray.io/v1/namespaces/{space.namespace}/rayjobs/late"
        space.ask("PATCH", path, body={"metadata": {"annotations": sign(60, NOW)}}, content_type=MERGE_PATCH)
        return judge(rayjob, now)

    monkeypatch.setattr(reaper, "silence", then_it_gives_a_sign)

    assert reaper.reap(space, space.namespace, NOW) == []
    assert names(space) == {"late"}


def test_the_command_names_and_removes_with_its_own_account(
    admin: Kube,
    proxy: Proxy,
    token_of: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`dpo reap` as the CronJob runs it; with a worker's account it says which Role is lacking."""
    add(admin, tmp_path, "alone", sign(60, datetime.now(UTC) - timedelta(hours=1)))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def use(account: str) -> None:
        file = proxy.kubeconfig(tmp_path / account, namespace=admin.namespace, token=token_of(account))
        monkeypatch.setenv("KUBECONFIG", str(file))

    use("dpo-worker")
    with pytest.raises(ClusterError, match=r"may not list rayjobs.*Role dpo-reaper"):
        command.reap(parser.parse_args([]))
    use("dpo-reaper")
    assert command.reap(parser.parse_args(["--dry-run"])) == 0
    assert "would remove  alone  no sign of life for 60 minutes" in capsys.readouterr().out
    assert "alone" in names(admin)
    assert command.reap(parser.parse_args(["--namespace", admin.namespace])) == 0
    assert "removed  alone" in capsys.readouterr().out
    assert "alone" not in names(admin)


@pytest.mark.parametrize("hours", ["-1", "nan", "inf", "a day"])
def test_hours_that_are_none_are_refused(hours: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a mistake of the user's."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    with pytest.raises(SystemExit) as caught:
        parser.parse_args([f"--keep-hours={hours}"])

    assert caught.value.code == 2
    assert "is not a number of hours" in capsys.readouterr().err
