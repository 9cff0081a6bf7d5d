"""MLflow's global address; versions themselves need a server and stand with those tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.importorskip("mlflow")

import mlflow

from dpo_train.registry.versions import default_uri

NAMES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An MLflow to which nobody has said where it is; afterwards what other tests said to it."""
    from mlflow.tracking._model_registry import utils as of_registry
    from mlflow.tracking._tracking_service import utils as of_tracking

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(of_tracking, "_tracking_uri", None)
    monkeypatch.setattr(of_registry, "_registry_uri", None)
    yield
    for name in NAMES:
        os.environ.pop(name, None)


@pytest.mark.usefixtures("unset")
def test_address_that_was_not_set_follows_the_environment_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tracking and, with it, of the registry; neither variable is left behind."""
    with default_uri("sqlite:///inside.db"):
        assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == "sqlite:///inside.db"
    assert [name for name in NAMES if name in os.environ] == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///later.db")
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == "sqlite:///later.db"


@pytest.mark.usefixtures("unset")
def test_addresses_that_were_set_are_those_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two different ones, of which the registry's came by the environment."""
    mlflow.set_tracking_uri("sqlite:///tracking.db")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///registry.db")
    with default_uri("sqlite:///inside.db"):
        pass
    assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///tracking.db"
    assert mlflow.get_registry_uri() == os.environ["MLFLOW_REGISTRY_URI"] == "sqlite:///registry.db"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///later.db")
    assert mlflow.get_registry_uri() == "sqlite:///later.db"
