"""The server and the proxy, the environment that leads to them, and pauses that cost no time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dpo_train import storage
from dpo_train.storage import failures
from tests.s3.proxy import Proxy
from tests.s3.server import Server, _one_proxy, s3_proxy, s3_server

__all__ = ["_one_proxy", "s3_proxy", "s3_server"]


@pytest.fixture(autouse=True)
def _own_process_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with default options and no AWS variables, and waits a hundredth as long between attempts."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(failures, "FIRST_PAUSE_S", failures.FIRST_PAUSE_S / 100)
    before = storage.options()
    storage.use(storage.Options())
    yield
    storage.use(before)


@pytest.fixture
def direct(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """This process talks to the server."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def proxied(s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """This process talks to the server through the proxy."""
    for name, value in s3_proxy.environment().items():
        monkeypatch.setenv(name, value)
    return s3_proxy
