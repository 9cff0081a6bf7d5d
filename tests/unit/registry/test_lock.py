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


def test_server_that_neither_makes_nor_shows_a_lock_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, and with pauses: in 0.3 s at a pause of 0.1 s there are at most 4 rounds of 2 requests."""
    monkeypatch.setattr(lock, "GIVE_UP_SECONDS", 0.3)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.1)
    client = Nowhere()
    with pytest.raises(RunError, match=r"m cannot be locked: MLflow does not make m\.lock"), lock.locked(client, "m"):
        pass
    assert 4 <= client.requests <= 8
