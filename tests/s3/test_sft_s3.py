"""The model that SFT makes at s3://, and who starts from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_train import launch, storage
from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.stages import prepare, score_reference, sft, train
from dpo_train.stages.executor import InProcess
from tests.s3.flow import Counting, contents, machine, numbers
from tests.s3.proxy import Proxy
from tests.s3.server import Server
from tests.tiny import tiny_config

LOCAL = InProcess()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(
        tmp_path_factory.mktemp("sft"), sft__enabled=True, sft__learning_rate=5e-3, sft__max_steps=4,
        sft__batch_pairs=16, sft__checkpoint_steps=2, sft__lora={"rank": 4}, train__max_steps=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def here(config: RunConfig) -> Artifact:
    """The model that SFT makes on local paths."""
    return sft(config, prepare(config, LOCAL), LOCAL)


def test_later_stages_on_other_machines_start_from_the_model_in_the_bucket(
    s3_server: Server, proxied: Proxy, config: RunConfig, here: Artifact, tmp_path: Path
) -> None:
    """The same model as on local paths; found by its record, while every listing of the bucket lags behind."""
    remote = machine(replace(config, store=f"{s3_server.bucket('sft')}/store"), tmp_path / "one")
    pairs = prepare(remote, LOCAL)
    made = sft(remote, pairs, LOCAL)
    assert numbers(made) == numbers(here)
    assert made.record.details == here.record.details
    assert contents(made, ".safetensors") == contents(here, ".safetensors")
    assert not any("/checkpoints/" in key for key in s3_server.objects("sft"))

    proxied.fault("GET", "list-type", "empty_listing", None)
    other = launch.with_sft_model(machine(remote, tmp_path / "two"), made)
    assert other.model.path == f"{made.home}/model"
    scored = score_reference(other, pairs, LOCAL)
    assert scored.record.inputs["model"] == made.record.details["model"]
    assert storage.cache_folder() == tmp_path / "two"
    policy = train(other, scored, LOCAL)
    assert policy.record.metrics["first_loss"] == pytest.approx(0.69314718, rel=1e-5)


def test_training_killed_before_its_record_goes_on_elsewhere(
    direct: Server, config: RunConfig, here: Artifact, tmp_path: Path
) -> None:
    """Another machine finds the last checkpoint in the bucket, trains nothing, and merges the adapters again."""
    remote = machine(replace(config, store=f"{direct.bucket('killed')}/store"), tmp_path / "one")
    pairs = prepare(remote, LOCAL)
    with pytest.raises(KeyboardInterrupt):
        sft(remote, pairs, Counting(dies_after_training=True))
    made = sft(machine(remote, tmp_path / "two"), pairs, LOCAL)
    assert made.record.details == here.record.details
    assert made.record.counts["steps"] == 4
