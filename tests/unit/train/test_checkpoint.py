"""What a resume needs, in one file that is whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo_train.config import TrainConfig
from dpo_train.errors import ModelError, StoreError
from dpo_train.model.load import Policy, parameter_state
from dpo_train.train.checkpoint import CHECKPOINT_FOLDER, Checkpoint, latest_checkpoint, save_checkpoint
from dpo_train.train.optimizer import build_optimizer
from tests.tiny import tiny_policy


def _trained(folder: Path, optimizer_name: str = "adamw", steps: int = 2) -> tuple[Policy, torch.optim.Optimizer]:
    policy = tiny_policy(folder)
    optimizer = build_optimizer(policy.trainable().values(), TrainConfig(optimizer=optimizer_name, learning_rate=0.01))
    for _ in range(steps):
        _update(policy, optimizer)
    return policy, optimizer


def _update(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    for index, parameter in enumerate(policy.trainable().values(), 1):
        parameter.grad = index * torch.ones_like(parameter) + parameter.detach()
    optimizer.step()


def _names(folder: Path) -> list[str]:
    return [p.name for p in (folder / CHECKPOINT_FOLDER).iterdir()]


@pytest.mark.parametrize("optimizer_name", ["adamw", "rmsprop"])
def test_loaded_checkpoint_goes_on_bit_for_bit(model_folder: Path, tmp_path: Path, optimizer_name: str) -> None:
    """Parameters and the optimiser's moments: the next update is the same as without the interruption."""
    policy, optimizer = _trained(model_folder, optimizer_name)
    save_checkpoint(tmp_path, Checkpoint(2, "id", policy, optimizer))
    fresh, fresh_optimizer = _trained(model_folder, optimizer_name, steps=0)
    assert latest_checkpoint(tmp_path, "id", fresh, fresh_optimizer) == 2
    for _ in range(2):
        wanted, got = parameter_state(policy), parameter_state(fresh)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        _update(policy, optimizer)
        _update(fresh, fresh_optimizer)


def test_no_checkpoint_means_the_beginning(model_folder: Path, tmp_path: Path) -> None:
    """A fresh folder starts at step 0 and changes nothing."""
    policy, optimizer = _trained(model_folder)
    before = parameter_state(policy)
    assert latest_checkpoint(tmp_path, "id", policy, optimizer) == 0
    assert all(torch.equal(value, before[name]) for name, value in parameter_state(policy).items())


def test_newest_checkpoint_replaces_older_ones(model_folder: Path, tmp_path: Path) -> None:
    """One file stays, however long the training (step 10 is newer than 9)."""
    policy, optimizer = _trained(model_folder)
    for step in (9, 10):
        save_checkpoint(tmp_path, Checkpoint(step, "id", policy, optimizer))
    assert _names(tmp_path) == ["step-00000010.pt"]
    assert latest_checkpoint(tmp_path, "id", policy, optimizer) == 10


def test_half_written_checkpoint_is_not_seen(model_folder: Path, tmp_path: Path) -> None:
    """A crash while writing leaves the one before it in force."""
    policy, optimizer = _trained(model_folder)
    save_checkpoint(tmp_path, Checkpoint(3, "id", policy, optimizer))
    whole = tmp_path / CHECKPOINT_FOLDER / "step-00000003.pt"
    (tmp_path / CHECKPOINT_FOLDER / "step-00000006.partial").write_bytes(whole.read_bytes()[:100])
    assert latest_checkpoint(tmp_path, "id", policy, optimizer) == 3
    save_checkpoint(tmp_path, Checkpoint(6, "id", policy, optimizer))
    assert _names(tmp_path) == ["step-00000006.pt"]


def test_checkpoint_of_another_training_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """Other data, reference or config: both identities are named and the policy is left as it was."""
    policy, optimizer = _trained(model_folder)
    save_checkpoint(tmp_path, Checkpoint(2, "data-1", policy, optimizer))
    fresh, fresh_optimizer = _trained(model_folder, steps=0)
    before = parameter_state(fresh)
    with pytest.raises(StoreError, match=r"another training .* Got: data-1\. Expected: data-2\."):
        latest_checkpoint(tmp_path, "data-2", fresh, fresh_optimizer)
    assert all(torch.equal(value, before[name]) for name, value in parameter_state(fresh).items())


def test_checkpoint_of_other_parameters_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """Adapters do not resume into a full fine-tuning, even under one identity."""
    policy, optimizer = _trained(model_folder)
    save_checkpoint(tmp_path, Checkpoint(2, "id", policy, optimizer))
    full = tiny_policy(model_folder, lora=False)
    with pytest.raises(ModelError, match="other parameters"):
        latest_checkpoint(tmp_path, "id", full, build_optimizer(full.trainable().values(), TrainConfig()))
