"""A job's lines: each once and in order, through broken streams and second submitters.

No kubelet: the log endpoint is the proxy's own, see there. Pods and everything else are the API server's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dpo_train.cluster import launcher as module
from dpo_train.cluster import rayjob_logs
from tests.cluster.jobs import Waiting
from tests.cluster.operator import DEADLINE_S, Operator, until
from tests.cluster.proxy import Proxy

Launch = Callable[..., Waiting]
PREAMBLE = ("Job submission server address: http://head:8265", "", "-----", "Job 'ray-1' submitted", "-----", "")
LINES = [f"line {number}" for number in range(40)]


def started(launch: Launch, operator: Operator) -> tuple[Waiting, str]:
    """A job that runs, and its submitter."""
    waiting = launch()
    operator.created()
    operator.status("Running", "RUNNING")
    return waiting, operator.submitter()


@pytest.mark.parametrize("cuts", [[1], [4, 4, 4], [1, 1, 2, 3, 5, 8], [39]])
def test_a_broken_stream_goes_on_at_the_next_line(
    launch: Launch, operator: Operator, proxy: Proxy, cuts: list[int]
) -> None:
    """Also within a second, and within lines that have the same time to the nanosecond."""
    waiting, pod = started(launch, operator)
    proxy.logs[pod].cut_after = list(cuts)
    operator.print(pod, *LINES)
    until(lambda: waiting.lines == LINES, "all lines")
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert waiting.lines == LINES
    assert proxy.logs[pod].cut_after == []


def test_the_kubelets_own_words_are_passed_on_and_end_nothing(launch: Launch, operator: Operator, proxy: Proxy) -> None:
    """It writes lines without a time into a stream that it cannot go on with; the next one begins where that ended."""
    waiting, pod = started(launch, operator)
    proxy.logs[pod].cut_after = [4, 4]
    proxy.logs[pod].last_word = word = "failed to create fsnotify watcher: too many open files"
    operator.print(pod, *LINES)
    until(lambda: waiting.lines[-1:] == LINES[-1:], "the last line")
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert [line for line in waiting.lines if line != word] == LINES
    assert waiting.lines.count(word) == 2


def test_a_sidecar_beside_the_submitter_is_no_submitter(launch: Launch, operator: Operator, proxy: Proxy) -> None:
    """A service mesh puts its container first, and it never ends: the log and the state are those of the other one."""
    waiting = launch()
    operator.created()
    operator.status("Running", "RUNNING")
    first = operator.submitter(0, sidecar=True)
    operator.print(first, *LINES[:25])
    until(lambda: waiting.lines == LINES[:25], "the lines")
    operator.end_submitter(first, "Failed")
    second = operator.submitter(1, sidecar=True)  # of the same Ray job, as its environment says
    operator.print(second, *LINES)
    operator.end_submitter(second)
    until(lambda: waiting.lines == LINES, "the other lines")
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert waiting.lines == LINES
    assert proxy.count("GET", "/log") == proxy.count("GET", "/log.*container=ray-job-submitter")


def test_lines_come_while_the_job_runs(launch: Launch, operator: Operator) -> None:
    """They are followed, not fetched at the end; and equal lines are lines of their own."""
    waiting, pod = started(launch, operator)
    for number in range(3):
        operator.print(pod, "the same")
        until(lambda: len(waiting.lines) == number + 1, "one line more")  # noqa: B023
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert waiting.lines == ["the same"] * 3


def test_lines_that_come_after_the_jobs_end_are_not_lost(
    launch: Launch, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last ones say what went wrong. The RayJob's end may be seen before its submitter has printed them."""
    end_was_seen, finish = threading.Event(), rayjob_logs.LogReader.finish

    def say_and_finish(reader: rayjob_logs.LogReader, limit_s: float) -> None:
        end_was_seen.set()
        finish(reader, limit_s)

    monkeypatch.setattr(rayjob_logs.LogReader, "finish", say_and_finish)
    waiting, pod = started(launch, operator)
    operator.print(pod, "first")
    until(lambda: waiting.lines == ["first"], "the first line")
    operator.status("Failed", "FAILED", reason="AppFailed")
    assert end_was_seen.wait(DEADLINE_S)
    operator.print(pod, "RunError: ...", "last")
    operator.end_submitter(pod, "Failed")

    assert not waiting.result().succeeded
    assert waiting.lines == ["first", "RunError: ...", "last"]


def test_lines_of_a_job_that_was_over_at_once_are_read(launch: Launch, operator: Operator) -> None:
    """Nobody saw it run."""
    waiting = launch()
    operator.created()
    pod = operator.submitter()
    operator.print(pod, "short")
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert waiting.lines == ["short"]


def test_a_second_submitter_repeats_nothing(launch: Launch, operator: Operator) -> None:
    """It asks Ray for the same job's lines from the first one on; what `ray job submit` printed it does not print."""
    waiting, first = started(launch, operator)
    operator.print(first, *PREAMBLE, *LINES[:25], "Error: connection lost")
    until(lambda: waiting.lines[-1:] == ["Error: connection lost"], "the first submitter's lines")
    operator.end_submitter(first, "Failed")
    second = operator.submitter(1)
    operator.print(second, PREAMBLE[0], *LINES)
    operator.end_submitter(second)
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert waiting.lines == [*PREAMBLE, *LINES[:25], "Error: connection lost", *LINES[25:]]


def test_a_submitter_that_hangs_does_not_keep_the_end(
    launch: Launch, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a deadline the submitter may go on waiting for a Ray cluster that is gone."""
    monkeypatch.setattr(module, "LAST_LINES_S", 0.3)
    waiting, pod = started(launch, operator)
    operator.print(pod, "a line")
    until(lambda: waiting.lines == ["a line"], "the line")
    operator.status("Failed", "RUNNING", reason="DeadlineExceeded")

    assert not waiting.result().succeeded
    operator.print(pod, "too late")
    operator.end_submitter(pod)
    reader = f"logs of {operator.name}"
    until(lambda: reader not in {thread.name for thread in threading.enumerate()}, "the reader's end")
    assert waiting.lines == ["a line"]


def test_without_the_right_to_read_logs_the_job_goes_on(launch: Launch, operator: Operator, proxy: Proxy) -> None:
    """It is said, with what helps, and once."""
    proxy.fault("GET", "/log", "forbidden")
    waiting, pod = started(launch, operator)
    operator.print(pod, "unseen")
    until(lambda: [text for text in waiting.told if "cannot be shown" in text], "told of the missing right")
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert waiting.lines == []
    assert len([text for text in waiting.told if f"kubectl logs job/{operator.name}" in text]) == 1


def test_a_stream_that_gives_nothing_is_opened_anew(
    launch: Launch, operator: Operator, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that a firewall has forgotten looks like a quiet job."""
    monkeypatch.setattr(rayjob_logs, "SILENCE_S", 0.2)
    waiting, pod = started(launch, operator)
    operator.print(pod, "one")
    until(lambda: proxy.count("GET", "/log.*sinceTime") >= 2, "opened again")
    operator.print(pod, "two")
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert waiting.lines == ["one", "two"]


def test_log_endpoints_that_fail_for_a_while_are_asked_again(launch: Launch, operator: Operator, proxy: Proxy) -> None:
    """A node that is out of reach answers 500."""
    proxy.fault("GET", "/log", "internal_error", times=7)
    waiting, pod = started(launch, operator)
    operator.print(pod, "one")
    until(lambda: waiting.lines == ["one"], "the line")
    operator.end_submitter(pod)
    operator.status("Complete", "SUCCEEDED")

    assert waiting.result().succeeded
    assert waiting.lines == ["one"]
