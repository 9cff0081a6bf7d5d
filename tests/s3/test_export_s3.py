"""An exported model at s3://."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_train import storage
from dpo_train.config import ModelConfig
from dpo_train.errors import StoreError
from dpo_train.export import export
from dpo_train.named_models import NamedModel
from tests.s3.proxy import Proxy
from tests.s3.server import Server
from tests.tiny import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> NamedModel:
    storage.use(storage.Options(cache=str(tmp_path / "cache"), attempts=2))
    folder = tiny_model(tmp_path / "model")
    return NamedModel(name="tiny", about="a tiny model", digest="", model=ModelConfig(path=str(folder)))


def test_folder_is_written_once(direct: Server, model: NamedModel, tmp_path: Path) -> None:
    """All files, byte for byte; what lies there is not overwritten, and nothing of it stays here."""
    home = f"{direct.bucket('exports')}/mine"
    export(model, home)

    there = {key.removeprefix("mine/"): body for key, body in direct.objects("exports").items()}
    assert there == {file.name: file.read_bytes() for file in Path(model.model.path).iterdir()}
    with pytest.raises(StoreError, match="There is something at s3://exports/mine/ already"):
        export(model, f"{home}/")
    assert not list((tmp_path / "cache").iterdir())


def test_failed_upload_leaves_nothing(direct: Server, proxied: Proxy, model: NamedModel) -> None:
    """The last file, without which it is no model folder, is refused: the ones before it are taken away again."""
    home = f"{direct.bucket('failing')}/mine"
    proxied.fault("PUT", "/failing/mine/config.json", "denied")
    with pytest.raises(StoreError, match=r"config\.json"):
        export(model, home)
    assert proxied.count("PUT", "/failing/mine/model.safetensors") == 1
    assert direct.objects("failing") == {}
