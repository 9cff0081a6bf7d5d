"""Signs of life: renewed, given again soon where one failed, and only to the job that is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_train.cluster import heartbeat as module
from dpo_train.cluster.heartbeat import HEARTBEAT, PERIOD, Heartbeat
from dpo_train.cluster.kube import Kube
from tests.cluster.jobs import Waiting
from tests.cluster.operator import Operator, until
from tests.cluster.proxy import Proxy

Launch = Callable[..., Waiting]


class Pauses(threading.Event):
    """Says which pauses were to be made, in seconds, and makes a hundredth of a second each."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return super().wait(0.01)


def test_the_sign_of_life_is_renewed(launch: Launch, operator: Operator, proxy: Proxy) -> None:
    """The annotation moves while somebody waits, and says its own period."""
    waiting = launch(heartbeat_seconds=1)
    found = operator.created()["metadata"]["annotations"]
    assert found[PERIOD] == "1"
    until(lambda: operator.created()["metadata"]["annotations"][HEARTBEAT] > found[HEARTBEAT], "a later sign")
    operator.succeed()

    assert waiting.result().succeeded
    assert found["dpo.dev/spec-hash"]


def test_a_sign_of_life_is_given_to_the_job_that_was_followed_alone(
    launch: Launch, kube: Kube, operator: Operator
) -> None:
    """Else a job that nobody waits for would be kept by the waiter of an earlier one."""
    waiting = launch()
    before = operator.created()["metadata"]["annotations"]
    told: list[str] = []

    assert Heartbeat(kube, operator.path, "uid-of-an-earlier-one", 77, tell=told.append)._beat() is None

    assert operator.created()["metadata"]["annotations"][PERIOD] == before[PERIOD] == "60"
    assert told == []
    operator.succeed()
    assert waiting.result().succeeded


def test_a_sign_that_could_not_be_given_is_given_soon(
    launch: Launch, kube: Kube, operator: Operator, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the API comes back the last sign is old already: another period of waiting could cost the job its life."""
    waiting = launch()
    uid = operator.created()["metadata"]["uid"]
    until(lambda: proxy.count("PATCH", "/rayjobs"), "the launcher's own sign")
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)  # no time for a second attempt: each beat is one request
    proxy.fault("PATCH", "/rayjobs", "internal_error", times=3)
    told: list[str] = []
    beats = Heartbeat(kube, operator.path, uid, 3600, tell=told.append)
    beats._stopped = pauses = Pauses()

    beats.start()
    until(lambda: 3600 in pauses.seconds, "a sign was given")
    beats.stop()

    assert pauses.seconds[:5] == [0, module.SOON_S, module.SOON_S, module.SOON_S, 3600]
    assert operator.created()["metadata"]["annotations"][PERIOD] == "3600"
    assert told == []
    operator.succeed()
    assert waiting.result().succeeded


def test_a_kubeconfig_that_is_being_rewritten_does_not_end_the_signs(
    launch: Launch, kube: Kube, operator: Operator, proxy: Proxy, tmp_path: Path
) -> None:
    """The login is read again after a 401, and the file may be half written then. It is said once, and tried again."""
    waiting = launch()
    uid = operator.created()["metadata"]["uid"]
    until(lambda: proxy.count("PATCH", "/rayjobs"), "the launcher's own sign")
    whole = (tmp_path / "kubeconfig").read_text()
    (tmp_path / "kubeconfig").write_text(whole[: len(whole) // 2])
    proxy.fault("PATCH", "/rayjobs", "unauthorized", times=3)
    told: list[str] = []
    beats = Heartbeat(kube, operator.path, uid, 3600, tell=told.append)
    beats._stopped = pauses = Pauses()

    beats.start()
    until(lambda: pauses.seconds.count(module.SOON_S) >= 2, "the login could not be read twice")
    (tmp_path / "kubeconfig").write_text(whole)
    until(lambda: operator.created()["metadata"]["annotations"][PERIOD] == "3600", "a sign was given")
    beats.stop()

    assert len(told) == 1
    assert "login for the cluster cannot be used" in told[0]
    operator.succeed()
    assert waiting.result().succeeded
