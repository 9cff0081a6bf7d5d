"""A server for each test, and nothing of the developer's own Kubeflow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("kfp")

from dpo_train.cluster.kubeflow import client, following, login
from dpo_train.cluster.kubeflow.following import Patience
from tests.kubeflow.server import Server, serving


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No login from outside, no waiting."""
    names = (login.HOST, login.PAGE, *login.TOKENS, login.COOKIES, login.TOKEN_FILE, *login.AUTHORITIES)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(following, "PATIENCE", Patience(first_seconds=0.01, last_seconds=0.02))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running
