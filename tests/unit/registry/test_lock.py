"""The lock where a server gives none; all else about it needs a server and stands with those tests."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("mlflow")

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from dpo_train.errors import RunError
from dpo_train.registry import lock


class Nowhere:
    """A server to whose client nothing exists, nor can be made."""

    def __init__(self) -> None:
        self.requests = 0

    def _absent(self, *_: Any) -> None:
        self.requests += 1
        raise MlflowException("not here", error_code=RESOURCE_DOES_NOT_EXIST)

    create_registered_model = get_registered_model = _absent


class Clock:
    """Moves by pauses alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_server_that_neither_makes_nor_shows_a_lock_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 30 s with pauses of 0.5 s: 61 rounds of 2 requests."""
    clock, client = Clock(), Nowhere()
    monkeypatch.setattr(lock.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(lock.time, "sleep", clock.sleep)
    with pytest.raises(RunError, match=r"m cannot be locked: MLflow does not make m\.lock"), lock.locked(client, "m"):
        pass
    assert (clock.now, client.requests) == (30.0, 122)
