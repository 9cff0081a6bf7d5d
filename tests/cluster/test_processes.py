"""What becomes of a job whose caller is interrupted, ended or killed: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo_train.cluster.kube import Kube
from tests.cluster.operator import DEADLINE_S, Operator, until
from tests.cluster.proxy import Proxy

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(proxy: Proxy, admin: Kube, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts processes that wait for the job of the test's store; they all end with it."""
    running: list[subprocess.Popen[str]] = []
    file = proxy.kubeconfig(tmp_path / "kubeconfig", namespace=admin.namespace)

    def begin() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.waiter", str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "KUBECONFIG": str(file)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """The process's output up to the line that holds these words."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"ended without {words!r}: {seen}{process.communicate()[1]}")


@pytest.mark.parametrize("sign", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupt_removes_the_job_with_the_first_request(
    start: Callable[[], subprocess.Popen[str]], operator: Operator, proxy: Proxy, sign: signal.Signals
) -> None:
    """A task that Kubeflow ends has about a second: no look at the job, no waiting for threads, one DELETE."""
    process = start()
    uid = operator.created()["metadata"]["uid"]
    operator.status("Running", "RUNNING")
    operator.print(operator.submitter(), "a line")  # and the stream stays open
    read_until(process, "line: a line")
    before = len(proxy.seen)

    process.send_signal(sign)
    output, errors = process.communicate(timeout=DEADLINE_S)

    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert "told: removed from" in output
    operator.collect_garbage()
    assert operator.find() is None
    asked = [(seen.method, seen.path) for seen in proxy.seen[before:] if seen.method in {"GET", "DELETE", "POST"}]
    assert [item for item in asked if "/log" not in item[1]] == [("DELETE", operator.path)]
    assert uid


def test_an_interrupt_before_the_creation_was_answered_leaves_no_job(
    start: Callable[[], subprocess.Popen[str]], operator: Operator, proxy: Proxy
) -> None:
    """The job is there, its uid is not known yet: it is looked up, and removed if it is the one that was asked for."""
    proxy.fault("POST", "/rayjobs", "lost_answer", times=1)
    proxy.fault("POST", "/rayjobs", "throttled")
    process = start()
    operator.created()
    until(lambda: proxy.count("POST", "/rayjobs", "throttled"), "it tries to create again")

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)

    operator.collect_garbage()
    assert operator.find() is None


def test_a_server_that_is_away_does_not_hold_up_an_interrupt(
    start: Callable[[], subprocess.Popen[str]], operator: Operator, proxy: Proxy
) -> None:
    """The job is left to `dpo reap`, and that is said."""
    process = start()
    operator.created()
    read_until(process, "told: created")
    proxy.fault("DELETE", "/rayjobs", "internal_error")

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)

    assert "could not be removed; `dpo reap` will" in output
    assert operator.find() is not None


def test_a_killed_launcher_finds_its_job_again(start: Callable[[], subprocess.Popen[str]], operator: Operator) -> None:
    """SIGKILL removes nothing; the same call again makes no second job, and has all lines from the first one on."""
    first = start()
    uid = operator.created()["metadata"]["uid"]
    operator.status("Running", "RUNNING")
    pod = operator.submitter()
    operator.print(pod, "one")
    read_until(first, "line: one")
    first.kill()
    first.communicate()
    assert operator.created()["metadata"]["uid"] == uid

    second = start()
    read_until(second, "told: found in")
    operator.print(pod, "two")
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")
    output, errors = second.communicate(timeout=DEADLINE_S)

    assert second.returncode == 0, errors
    assert [line for line in output.splitlines() if line.startswith("line: ")] == ["line: one", "line: two"]
    assert "ended: SUCCEEDED" in output
    assert operator.created()["metadata"]["uid"] == uid
