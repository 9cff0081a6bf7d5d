"""One server for all tests here, and a way to it that does harm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("mlflow")

from dpo_train.tracking import client as tracking_client
from tests.mlflow.server import serving
from tests.s3.proxy import Proxy


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture
def client(server: str) -> Any:
    from dpo_train.tracking import _client

    return _client(server)


@pytest.fixture(scope="session")
def _one_proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server, {}) as proxy:
        yield proxy


@pytest.fixture
def proxy(_one_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """A way to the server that does harm when told to; whoever waits for it waits a second."""
    _one_proxy.clear()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(tracking_client, "QUICK_SECONDS", 1)
    return _one_proxy
