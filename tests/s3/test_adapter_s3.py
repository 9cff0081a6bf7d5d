"""A model's adapter at s3://."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo_train import storage
from dpo_train.config import LoraConfig
from dpo_train.data.adapter import ADAPTER_WEIGHTS, adapter_folder
from dpo_train.data.folder import ADAPTER_CONFIG
from dpo_train.errors import ModelError
from dpo_train.model.load import load_policy, save_policy
from dpo_train.stages.common import model_digest
from tests.s3.flow import copy_up, machine
from tests.s3.server import Server
from tests.tiny import tiny_config


def test_adapter_in_a_bucket_is_the_one_that_was_put_there(direct: Server, tmp_path: Path) -> None:
    """The same digest and weights as here; what a trainer left beside it is not fetched."""
    config = machine(tiny_config(tmp_path), tmp_path / "cache")
    cpu = torch.device("cpu")
    policy = load_policy(config.model, device=cpu, lora=LoraConfig(rank=3), trainable=True)
    for parameter in policy.trainable().values():
        parameter.data.add_(0.1)
    save_policy(policy, tmp_path, None)
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(bytes(1000))
    home = f"{direct.bucket('adapters')}/mine"
    copy_up(direct, tmp_path / "adapter", home)

    here, there = (
        replace(config, model=replace(config.model, adapter=address))
        for address in (str(tmp_path / "adapter"), f"{home}/")
    )

    assert model_digest(there) == model_digest(here) != model_digest(config)
    loaded = load_policy(there.model, device=cpu, lora=LoraConfig(), trainable=True).trainable()
    assert all(torch.equal(loaded[name], parameter) for name, parameter in policy.trainable().items())
    fetched = adapter_folder(home)
    assert fetched.is_relative_to(storage.cache_folder())
    assert sorted(path.name for path in fetched.iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    assert adapter_folder(f"{home}/") == fetched


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "There is no adapter at s3://empty/mine"),
        ((ADAPTER_CONFIG, "adapter_model.bin"), r"no adapter_model\.safetensors.*a pickle"),
    ],
)
def test_what_is_no_adapter_there_is_refused(
    direct: Server, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    """Nothing, or a pickle."""
    machine(tiny_config(tmp_path), tmp_path / "cache")
    direct.bucket("empty")
    for name in names:
        direct.client().put_object(Bucket="empty", Key=f"mine/{name}", Body=b"{}")
    with pytest.raises(ModelError, match=message):
        adapter_folder("s3://empty/mine")
