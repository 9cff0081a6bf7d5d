"""One Ray for all tests here."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

ray = pytest.importorskip("ray")


@pytest.fixture(scope="session", autouse=True)
def session() -> Iterator[None]:
    """Ray as a run starts it. Workers get this test package's classes by value, since they cannot import it."""
    from dpo_train.runtime.session import ray_session

    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):
            ray.cloudpickle.register_pickle_by_value(module)
    with ray_session():
        yield
