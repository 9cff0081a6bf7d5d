"""What a resume needs, in a folder that is whole or absent. Shards of several ranks: tests/distributed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_train.config import TrainConfig
from dpo_train.errors import ModelError, StoreError
from dpo_train.model.load import Policy, parameter_state
from dpo_train.train.checkpoint import Checkpoints
from dpo_train.train.job import CHECKPOINT_FOLDER
from dpo_train.train.optimizer import build_optimizer
from dpo_train.train.ranks import Ranks
from dpo_train.train.state import TrainingState
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


def _checkpoints(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, origin: object = "id") -> Checkpoints:
    return Checkpoints(str(folder), {"config": {"beta": 0.1}, "data": origin}, policy, optimizer, Ranks())


def _save(folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, **state: Any) -> None:
    _checkpoints(folder, policy, optimizer).save(TrainingState(step=step, **state), wait=True)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / CHECKPOINT_FOLDER).iterdir())


@pytest.mark.parametrize("optimizer_name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("wait", [True, False])
def test_loaded_checkpoint_goes_on_bit_for_bit(
    model_folder: Path, tmp_path: Path, optimizer_name: str, wait: bool
) -> None:
    """Parameters, moments and random state: the next update is the same as without the interruption.

    Saved in the background, the checkpoint is of the step at which it was asked for, though training went on meanwhile.
    """
    policy, optimizer = _trained(model_folder, optimizer_name)
    twin, twin_optimizer = _trained(model_folder, optimizer_name)
    torch.manual_seed(3)
    state = TrainingState(step=2, best_step=1, best_value=0.5, stale=1, warned=True)
    saving = _checkpoints(tmp_path, policy, optimizer)
    saving.save(state, wait=wait)
    if not wait:
        _update(policy, optimizer)
        saving.finish()
    wanted_random = torch.rand(3)
    fresh, fresh_optimizer = _trained(model_folder, optimizer_name, steps=0)
    assert _checkpoints(tmp_path, fresh, fresh_optimizer).resume() == state
    assert torch.equal(torch.rand(3), wanted_random)
    for _ in range(2):
        wanted, got = parameter_state(twin), parameter_state(fresh)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        _update(twin, twin_optimizer)
        _update(fresh, fresh_optimizer)


def test_no_checkpoint_means_the_beginning(model_folder: Path, tmp_path: Path) -> None:
    """A fresh folder starts at step 0 and changes nothing."""
    policy, optimizer = _trained(model_folder)
    before = parameter_state(policy)
    assert _checkpoints(tmp_path, policy, optimizer).resume() == TrainingState()
    assert all(torch.equal(value, before[name]) for name, value in parameter_state(policy).items())


def test_newest_checkpoint_replaces_older_ones_but_not_the_best(model_folder: Path, tmp_path: Path) -> None:
    """Two at most stay, however long the training (step 10 is newer than 9)."""
    policy, optimizer = _trained(model_folder)
    for step, best in ((3, 3), (9, 3), (10, 3)):
        _save(tmp_path, step, policy, optimizer, best_step=best)
    assert _names(tmp_path) == ["step-00000003", "step-00000010"]
    assert _checkpoints(tmp_path, policy, optimizer).resume().step == 10
    _save(tmp_path, 11, policy, optimizer, best_step=11)
    assert _names(tmp_path) == ["step-00000011"]


def test_best_weights_come_back(model_folder: Path, tmp_path: Path) -> None:
    """The weights of the best step, whatever was trained since."""
    policy, optimizer = _trained(model_folder)
    best = parameter_state(policy)
    _save(tmp_path, 1, policy, optimizer, best_step=1)
    _update(policy, optimizer)
    _save(tmp_path, 2, policy, optimizer, best_step=1)
    _checkpoints(tmp_path, policy, optimizer).load_parameters(1)
    assert all(torch.equal(value, best[name]) for name, value in parameter_state(policy).items())


@pytest.mark.parametrize("damage", ["no state file", "cut shard"])
def test_half_written_checkpoint_is_never_resumed(model_folder: Path, tmp_path: Path, damage: str) -> None:
    """A crash while writing leaves the one before it in force, and its remains are cleared away."""
    policy, optimizer = _trained(model_folder)
    _save(tmp_path, 3, policy, optimizer, best_step=3)
    folder = tmp_path / CHECKPOINT_FOLDER
    shutil.copytree(folder / "step-00000003", folder / "step-00000006.partial")
    (folder / "step-00000006.partial" / "training.json").unlink()
    if damage == "cut shard":
        (shard,) = (folder / "step-00000006.partial").glob("shard-*")
        shard.write_bytes(shard.read_bytes()[:100])
    assert _checkpoints(tmp_path, policy, optimizer).resume().step == 3
    assert _names(tmp_path) == ["step-00000003"]
    _save(tmp_path, 6, policy, optimizer)
    assert _names(tmp_path) == ["step-00000006"]


def test_checkpoint_of_another_training_is_refused_with_the_difference(model_folder: Path, tmp_path: Path) -> None:
    """Other data: both are named, and the policy is left as it was."""
    policy, optimizer = _trained(model_folder)
    _save(tmp_path, 2, policy, optimizer)
    fresh, fresh_optimizer = _trained(model_folder, steps=0)
    before = parameter_state(fresh)
    with pytest.raises(StoreError, match=r"another training.* Got: data was 'id', is now 'other'\."):
        _checkpoints(tmp_path, fresh, fresh_optimizer, origin="other").resume()
    assert all(torch.equal(value, before[name]) for name, value in parameter_state(fresh).items())


def test_checkpoint_of_other_parameters_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """Adapters do not resume into a full fine-tuning, even under one origin."""
    policy, optimizer = _trained(model_folder)
    _save(tmp_path, 2, policy, optimizer)
    full = tiny_policy(model_folder, lora=False)
    with pytest.raises(ModelError, match="other parameters"):
        _checkpoints(tmp_path, full, build_optimizer(full.trainable().values(), TrainConfig())).resume()


def test_failed_save_is_told_and_the_last_one_stays(model_folder: Path, tmp_path: Path) -> None:
    """The thread's error reaches the training at the next call; nothing half written counts."""
    policy, optimizer = _trained(model_folder)
    _save(tmp_path, 2, policy, optimizer)
    saving = _checkpoints(tmp_path, policy, optimizer)
    (tmp_path / CHECKPOINT_FOLDER / "step-00000004.partial").write_text("a file where a folder must be")
    with pytest.raises(OSError):
        saving.save(TrainingState(step=4), wait=True)
    (tmp_path / CHECKPOINT_FOLDER / "step-00000004.partial").unlink()
    assert _checkpoints(tmp_path, policy, optimizer).resume().step == 2


def test_saved_files_hold_no_code(model_folder: Path, tmp_path: Path) -> None:
    """safetensors and JSON: loading a checkpoint unpickles nothing."""
    policy, optimizer = _trained(model_folder)
    _save(tmp_path, 2, policy, optimizer)
    files = {p.name for p in (tmp_path / CHECKPOINT_FOLDER / "step-00000002").iterdir()}
    assert files == {"shard-0-of-1.safetensors", "training.json"}


@pytest.mark.parametrize("world_size", [2, 12])
def test_shards_of_many_ranks_are_put_together_in_their_order(
    model_folder: Path, tmp_path: Path, world_size: int
) -> None:
    """Shard 10 stands after shard 9, though not as text; the first rank's shard has what is whole."""
    policy, optimizer = _trained(model_folder)
    _save(tmp_path, 2, policy, optimizer)
    (whole,) = (tmp_path / CHECKPOINT_FOLDER / "step-00000002").glob("shard-*")
    tensors, shards = load_file(whole), [({}, {}) for _ in range(world_size)]
    for name, tensor in tensors.items():
        if not tensor.shape or name == "random":
            shards[0][0][name], shards[0][1][name] = tensor, None
            continue
        size = -(-len(tensor) // world_size)
        for rank, (held, boxes) in enumerate(shards):
            start, stop = min(rank * size, len(tensor)), min((rank + 1) * size, len(tensor))
            held[name] = tensor[start:stop].clone()
            boxes[name] = [[start, stop], *([0, width] for width in tensor.shape[1:])]
    whole.unlink()
    for rank, (held, boxes) in enumerate(shards):
        save_file(held, whole.with_name(f"shard-{rank}-of-{world_size}.safetensors"), {"boxes": json.dumps(boxes)})
    fresh, fresh_optimizer = _trained(model_folder, steps=0)
    assert _checkpoints(tmp_path, fresh, fresh_optimizer).resume().step == 2
    for _ in range(2):
        wanted = parameter_state(policy)
        assert all(torch.equal(value, wanted[name]) for name, value in parameter_state(fresh).items())
        _update(policy, optimizer)
        _update(fresh, fresh_optimizer)
