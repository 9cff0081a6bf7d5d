"""`dpo promote` and `dpo rollback`, and what they say where the registry cannot be used."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_train.cli import models
from dpo_train.tracking import TrackingError, _client
from tests.command import write_config
from tests.mlflow.server import free_port, guarding, serving
from tests.mlflow.test_promote import champion_of, model
from tests.tiny import tiny_config

ADMIN, READER = ("admin", "a-long-password-of-the-admin"), ("reader", "a-long-password-of-the-reader")


def arguments(folder: Path, url: str, name: str, **more: Any) -> argparse.Namespace:
    folder.mkdir(exist_ok=True)
    config = tiny_config(folder, tracking__uri=url, register__model_name=name)
    file = write_config(config, folder / "config.yaml")
    return argparse.Namespace(config=file, overrides=[], **more)


def test_promote_takes_the_challenger_and_rollback_goes_back(
    client: Any, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a version it is the one with register.alias; one line says what the champion is and was."""
    name = model(client, "commands", 2)
    client.set_registered_model_alias(name, "challenger", "2")
    assert models.promote(arguments(tmp_path, server, name, version="1")) == 0
    assert models.promote(arguments(tmp_path, server, name, version=None)) == 0
    assert models.rollback(arguments(tmp_path, server, name)) == 0

    assert capsys.readouterr().out.splitlines() == [
        "champion of commands: version 1 (before: none)",
        "champion of commands: version 2 (before: version 1)",
        "champion of commands: version 1 (before: version 2)",
    ]


def test_server_that_is_away_is_told(tmp_path: Path) -> None:
    """In one line with its address."""
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        TrackingError, match=f"MLflow at {url} does not do what was asked: .*Max retries exceeded"
    ) as caught:
        models.promote(arguments(tmp_path, url, "away", version="1"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks who one is: reading is for all, writing for those who made a model."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    folder = tmp_path_factory.mktemp("guarded")
    variables = guarding(folder, ADMIN) | {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1]}
    with serving(folder, "--app-name", "basic-auth", variables=variables) as url:
        yield url


def _log_in(monkeypatch: pytest.MonkeyPatch, who: tuple[str, str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", who[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", who[1])


@pytest.mark.slow
def test_who_may_only_read_promotes_nothing(guarded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The refusal is told with the address and what to look at; the champion stays and no lock is left behind."""
    from mlflow.server.auth.client import AuthServiceClient

    _log_in(monkeypatch, ADMIN)
    client = _client(guarded)
    name = model(client, "guarded", 1)
    AuthServiceClient(guarded).create_user(*READER)
    _log_in(monkeypatch, READER)

    with pytest.raises(TrackingError, match=r"(?i)does not do what was asked: .*(permission|403).*your rights there"):
        models.promote(arguments(tmp_path, guarded, name, version="1"))

    _log_in(monkeypatch, ADMIN)
    assert champion_of(client, name) is None
    assert client.search_registered_models("name LIKE 'guarded.%'") == []
    assert models.promote(arguments(tmp_path, guarded, name, version="1")) == 0


@pytest.mark.slow
def test_wrong_password_is_told(guarded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A 401 reads like any refusal."""
    _log_in(monkeypatch, ("reader", "not-the-password"))
    with pytest.raises(TrackingError, match=r"does not do what was asked: .*401.*set MLFLOW_TRACKING_USERNAME"):
        models.rollback(arguments(tmp_path, guarded, "guarded"))
