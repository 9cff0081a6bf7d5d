"""A full training with frozen modules on two ranks that hold shares, on real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo_train.config import ModelConfig, TrainConfig
from dpo_train.model.load import load_policy
from dpo_train.model.shard import shard, whole
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import train_step
from tests.distributed.processes import spawn
from tests.tiny import random_pairs, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write

pytestmark = pytest.mark.slow

# A layer without anything to train, a frozen matrix within each layer, and everything but the vocabulary matrix.
FROZEN = [("embed_tokens", "layers.0"), ("q_proj", "norm"), ("model",)]
CONFIG = TrainConfig(beta=0.5, row_tokens=40, max_grad_norm=0.5, batch_pairs=5)


def _changes(folder: Path, frozen: tuple[str, ...], ranks: Ranks) -> dict[str, Tensor]:
    """What three steps of SGD at rate 1 do to each weight."""
    config, cpu = ModelConfig(path=str(folder)), torch.device("cpu")
    pairs = with_reference(load_policy(config, device=cpu), random_pairs(5, vocabulary=VOCABULARY))
    policy = load_policy(config, device=cpu, trainable=True, frozen=frozen)
    if ranks.world_size > 1:
        shard(policy)
    before = {name: whole(p).detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    for step in range(3):
        train_step(policy, optimizer, pairs, CONFIG, ranks, step=step, learning_rate=1.0)
    return {name: whole(p).detach() - before[name] for name, p in policy.model.named_parameters()}


def _all_changes(folder: Path, ranks: Ranks) -> list[dict[str, Tensor]]:
    return [_changes(folder, frozen, ranks) for frozen in FROZEN]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return write(tmp_path_factory.mktemp("frozen") / "model", FAMILIES["llama"])


@pytest.fixture(scope="module")
def ranks(model: Path) -> list[list[dict[str, Tensor]]]:
    """What both ranks found."""
    return spawn(2, model.parent / "ranks", _all_changes, model)


@pytest.mark.parametrize("case", range(len(FROZEN)))
def test_shares_of_frozen_weights_stay_and_the_others_change_as_on_one_rank(
    model: Path, ranks: list[list[dict[str, Tensor]]], case: int
) -> None:
    """Frozen weights bit for bit, on both ranks; changes of all others agree to 1e-5 relative."""
    torch.set_num_threads(1)
    wanted = _changes(model, FROZEN[case], Ranks())
    moved = {name for name, change in wanted.items() if change.any()}
    assert 0 < len(moved) < len(wanted)
    for found in (of_rank[case] for of_rank in ranks):
        assert {name for name, change in found.items() if change.any()} == moved
        difference = torch.cat([(found[name] - wanted[name]).flatten() for name in moved])
        assert difference.norm() <= 1e-5 * torch.cat([wanted[name].flatten() for name in moved]).norm()
