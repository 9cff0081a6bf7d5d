"""Retry or raise: a pure decision."""

from __future__ import annotations

import pickle

import pytest

from dpo_train.errors import DataError, NonFiniteLossError, WorkerError
from dpo_train.runtime.failures import Decision, cause_of, decide, known_error


@pytest.mark.parametrize(
    ("error", "decision"),
    [
        (NonFiniteLossError("step 3"), Decision.RAISE),
        (DataError("empty"), Decision.RAISE),
        (KeyError("bug"), Decision.RAISE),
        (RuntimeError("shapes do not match"), Decision.RAISE),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), Decision.RETRY),
        (ConnectionResetError(), Decision.RETRY),
        (TimeoutError(), Decision.RETRY),
    ],
)
def test_only_lost_processes_and_connections_are_retried(error: Exception, decision: Decision) -> None:
    """An error on purpose and a bug would repeat themselves."""
    assert decide(error) is decision


def test_cause_is_found_under_wrappers() -> None:
    """Ray wraps a worker's error; what matters lies at the bottom."""
    inner = ValueError("inner")
    middle = RuntimeError("middle")
    middle.cause = inner  # type: ignore[attr-defined]
    outer = RuntimeError("outer")
    outer.__cause__ = middle

    assert cause_of(outer) is inner
    assert cause_of(inner) is inner


def test_foreign_error_becomes_one_that_pickles() -> None:
    """An error that cannot cross a process border is named in one that can."""

    class LocalError(Exception):
        pass

    error = pickle.loads(pickle.dumps(known_error(LocalError("x"), "A rank failed")))

    assert isinstance(error, WorkerError)
    assert "A rank failed: LocalError: x" in str(error)
