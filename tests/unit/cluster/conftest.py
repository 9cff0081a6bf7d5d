"""A Ray cluster that is played."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_train.cluster import ray_rest
from tests.unit.cluster.fake_ray import FakeRay, fake_ray


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    for name in (ray_rest.TOKEN, ray_rest.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_rest, "DEFAULT_TOKEN_PATH", Path("/nowhere/auth_token"))
    with fake_ray() as server:
        yield server
