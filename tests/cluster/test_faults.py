"""An API server that throttles, fails, forgets, cuts and refuses, between a job's creation and its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_train.cluster import kube as kube_module
from dpo_train.cluster import watching
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.kube_errors import ClusterError, RefusedError
from dpo_train.errors import RunError
from tests.cluster.jobs import Waiting
from tests.cluster.operator import DEADLINE_S, Operator, until
from tests.cluster.proxy import Proxy

Launch = Callable[..., Waiting]
WATCH = r"/rayjobs\?watch"


def test_throttling_is_waited_out_for_as_long_as_the_server_says(
    launch: Launch, operator: Operator, proxy: Proxy, pauses: list[float]
) -> None:
    """429 with Retry-After: 3, at every kind of request."""
    for method in ("GET", "POST", "PATCH"):
        proxy.fault(method, "/rayjobs", "throttled", times=2)
    waiting = launch()
    operator.created()
    operator.succeed("a line")

    assert waiting.result().succeeded
    assert pauses.count(3.0) == 6
    assert proxy.count("POST", "/rayjobs") == 3


@pytest.mark.parametrize("kind", ["internal_error", "refuse"])
def test_failures_of_the_server_are_tried_again_with_growing_pauses(
    kube: Kube, proxy: Proxy, pauses: list[float], kind: str
) -> None:
    """500 and broken connections; each pause is longer than the one before it can be short."""
    proxy.fault("GET", "/pods", kind, times=4)  # type: ignore[arg-type]

    kube.ask("GET", f"/api/v1/namespaces/{kube.namespace}/pods")

    assert len(pauses) == 4
    assert pauses[3] > pauses[0]
    assert proxy.count("GET", "/pods") == 5


def test_a_server_that_stays_away_is_an_error_with_its_last_words(kube: Kube, proxy: Proxy) -> None:
    """The time is limited, and the job is not lost by it."""
    proxy.fault("GET", "/pods", "internal_error")

    with pytest.raises(RunError, match=r"cannot be reached.*500.*internal_error.*a job that runs is found"):
        kube.ask("GET", f"/api/v1/namespaces/{kube.namespace}/pods", patience_s=0.3)


def test_a_creation_whose_answer_was_lost_is_found_again(
    launch: Launch, operator: Operator, kube: Kube, proxy: Proxy
) -> None:
    """The second attempt meets a conflict with our own first, also if that has failed by then: one call, one start."""
    proxy.fault("POST", "/rayjobs", "lost_answer", times=1)
    may_try_again = threading.Event()
    kube.pause = lambda _: may_try_again.wait(DEADLINE_S) and None
    waiting = launch()
    operator.created()
    operator.status("Failed", "FAILED", reason="AppFailed")
    may_try_again.set()

    assert waiting.result().reason.startswith("AppFailed")
    assert proxy.count("POST", "/rayjobs") == 2
    assert proxy.count("DELETE", "/rayjobs") == 0


@pytest.mark.parametrize("kind", ["cut", "expired", "expired_event", "internal_error", "refuse", "unauthorized"])
def test_a_watch_that_breaks_misses_no_end(launch: Launch, operator: Operator, proxy: Proxy, kind: str) -> None:
    """Cut connections, a version that is too old (410, both ways), failures, one refused login: and the end is seen."""
    proxy.fault("GET", WATCH, kind, times=1)  # type: ignore[arg-type]
    waiting = launch(heartbeat_seconds=1)  # its patches are events, of which each watch may be cut after the first
    operator.created()
    until(lambda: proxy.count("GET", WATCH, kind), "the watch was hurt")
    operator.status("Initializing")
    operator.succeed("a line")

    assert waiting.result().succeeded
    assert waiting.lines == ["a line"]
    assert proxy.count("POST", "/rayjobs") == 1


def test_an_end_that_came_while_the_watch_was_away_is_seen(launch: Launch, operator: Operator, proxy: Proxy) -> None:
    """The job is deleted and nobody tells: the version is too old, and the look at the object finds nothing."""
    proxy.fault("GET", WATCH, "expired_event")
    waiting = launch()
    operator.created()
    until(lambda: proxy.count("GET", WATCH, "expired_event"), "it is followed")
    operator.delete()

    with pytest.raises(RunError, match="was deleted while it ran"):
        waiting.result()


def test_an_api_that_stays_away_ends_the_waiting_and_leaves_the_job(
    launch: Launch, operator: Operator, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call finds the job; an error of the cluster's is no reason to throw its work away."""
    monkeypatch.setattr(watching, "PATIENCE_S", 0.3)
    proxy.fault("GET", WATCH, "internal_error")

    with pytest.raises(RunError, match="cannot be reached"):
        launch().result()

    assert operator.find() is not None
    assert proxy.count("DELETE", "/rayjobs") == 0


def test_a_token_that_rotates_is_read_again_once(
    proxy: Proxy, admin: Kube, token_of: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod's token is a file that Kubernetes renews. The token, the account and the refusal are the server's own."""
    _in_cluster(tmp_path, monkeypatch, admin, "an-old-token")
    kube = Kube()
    path = f"/apis/ray.io/v1/namespaces/{kube.namespace}/rayjobs/none"
    with pytest.raises(ClusterError, match=r"does not accept this login.*expired"):
        kube.ask("GET", path)

    (tmp_path / "token").write_text(token_of("dpo-launcher"))
    with pytest.raises(RefusedError, match="not found") as caught:
        kube.ask("GET", path)
    assert caught.value.status == 404
    assert kube.namespace == kube.home == admin.namespace


def test_a_refused_login_is_tried_twice_and_no_more(launch: Launch, operator: Operator, proxy: Proxy) -> None:
    """It ends as a mistake of the user's and not as an endless wait."""
    proxy.fault("GET", WATCH, "unauthorized")
    waiting = launch()
    operator.created()

    with pytest.raises(ClusterError, match="does not accept this login") as caught:
        waiting.result()

    assert caught.value.exit_code == 2
    assert proxy.count("GET", WATCH) == 2


def test_the_clients_own_retries_are_off(kube: Kube, proxy: Proxy, pauses: list[float]) -> None:
    """One layer: urllib3 would wait by Retry-After a second time, and out of sight."""
    proxy.fault("GET", "/pods", "throttled", times=1)

    kube.ask("GET", f"/api/v1/namespaces/{kube.namespace}/pods")

    assert pauses == [3.0]
    assert proxy.count("GET", "/pods", "throttled") == 1


def test_a_watch_that_gives_half_an_event_counts_as_cut(kube: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no JSON is no event (the stream's end is made here, since no server can be made to send it)."""
    monkeypatch.setattr(kube, "lines", lambda *_, **__: iter([json.dumps({"type": "BOOKMARK", "object": {}})[:20]]))

    with pytest.raises(kube_module.StreamBrokenError, match="an event was cut"):
        list(watching._events(kube, "/rayjobs", "x", "1", 1))


def _in_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch, admin: Kube, token: str) -> None:
    """Lays what Kubernetes mounts in a pod."""
    configuration = admin._link.configuration
    host, port = configuration.host.removeprefix("https://").split(":")
    (folder / "token").write_text(token)
    (folder / "namespace").write_text(admin.namespace)
    (folder / "ca.crt").write_text(Path(configuration.ssl_ca_cert).read_text())
    monkeypatch.setattr(kube_module, "IN_CLUSTER", folder)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
