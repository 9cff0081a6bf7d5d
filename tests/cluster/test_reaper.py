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
) -> None:
    """A RayJob with these annotations, and in this state."""
    config = config_in(folder)
    content: dict[str, Any] = manifest(job_of(config), config, namespace=kube.namespace, owner=None)
    content["metadata"] |= {"name": name, "annotations": annotations, **({} if labels is None else {"labels": labels})}
    path = f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs"
    kube.ask("POST", path, body=content)
    if status:
        kube.ask("PATCH", f"{path}/{name}/status", body={"status": status}, content_type=MERGE_PATCH)


def names(kube: Kube) -> set[str]:
    found = kube.ask("GET", f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs")["items"]
    return {item["metadata"]["name"] for item in found}


def test_only_live_jobs_of_ours_with_an_old_sign_are_removed(space: Kube, tmp_path: Path) -> None:
    """After ten of the job's own periods; everything else stays."""
    old = sign(60, NOW - timedelta(seconds=601))
    add(space, tmp_path, "orphaned", old)
    add(space, tmp_path, "orphaned-in-queue", old, status={"jobDeploymentStatus": "Suspended"})
    add(space, tmp_path, "waited-for", sign(60, NOW - timedelta(seconds=600)))
    add(space, tmp_path, "slow-sign", sign(3600, NOW - timedelta(hours=9)))
    add(space, tmp_path, "ended", old, status={"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})
    add(space, tmp_path, "failed", old, status={"jobDeploymentStatus": "Failed"})
    add(space, tmp_path, "without-sign", {})
    add(space, tmp_path, "without-period", {HEARTBEAT: old[HEARTBEAT]})
    add(space, tmp_path, "unreadable", {HEARTBEAT: "yesterday", PERIOD: "60"})
    add(space, tmp_path, "no-timezone", {HEARTBEAT: "2020-01-01T00:00:00", PERIOD: "60"})
    add(space, tmp_path, "senseless-period", {HEARTBEAT: old[HEARTBEAT], PERIOD: "0"})
    add(space, tmp_path, "from-the-future", sign(60, NOW + timedelta(days=1)))
    add(space, tmp_path, "foreign", old, labels={"app.kubernetes.io/managed-by": "another"})
    before = names(space)

    named = reaper.reap(space, space.namespace, NOW, dry_run=True)
    assert names(space) == before
    removed = reaper.reap(space, space.namespace, NOW)

    assert set(named) == set(removed) == {"orphaned", "orphaned-in-queue"}
    assert names(space) == before - set(removed)


def test_a_sign_that_comes_while_the_reaper_looks_saves_the_job(
    space: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal holds for the job as it was listed."""
    add(space, tmp_path, "late", sign(60, NOW - timedelta(hours=1)))
    judge = reaper.silence

    def then_it_gives_a_sign(rayjob: dict[str, Any], now: datetime) -> float | None:
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
    assert "orphaned  alone  no sign of life for 60 minutes" in capsys.readouterr().out
    assert "alone" in names(admin)
    assert command.reap(parser.parse_args(["--namespace", admin.namespace])) == 0
    assert "removed  alone" in capsys.readouterr().out
    assert "alone" not in names(admin)
