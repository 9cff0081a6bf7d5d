"""What a resume needs: trainable parameters, optimiser state and position, in one file that is whole or absent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_train.errors import StoreError
from dpo_train.model.load import Policy, load_parameter_state, parameter_state
from dpo_train.train.job import CHECKPOINT_FOLDER


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` steps. ``identity`` names the training (config, data and reference) it belongs to."""

    step: int
    identity: str
    policy: Policy
    optimizer: torch.optim.Optimizer


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the newest checkpoint and then removes older ones."""
    target = folder / CHECKPOINT_FOLDER / f"step-{checkpoint.step:08d}.pt"
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_suffix(".partial")
    content = {
        "step": checkpoint.step,
        "identity": checkpoint.identity,
        "parameters": parameter_state(checkpoint.policy),
        "optimizer": checkpoint.optimizer.state_dict(),
    }
    with temporary.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(target)
    for older in target.parent.glob("*"):
        if older != target:
            older.unlink()


def latest_checkpoint(folder: Path, identity: str, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Loads the newest checkpoint, if any, and returns the step to go on with.

    Raises:
        StoreError: the checkpoint belongs to another training.
    """
    files = sorted((folder / CHECKPOINT_FOLDER).glob("step-*.pt"))
    if not files:
        return 0
    content = torch.load(files[-1], map_location="cpu", weights_only=True)
    if content["identity"] != identity:
        raise StoreError(
            f"{files[-1]} was made by another training (other data, reference or config)",
            got=content["identity"],
            expected=identity,
            fix=f"remove {folder}",
        )
    load_parameter_state(policy, content["parameters"])
    optimizer.load_state_dict(content["optimizer"])
    return int(content["step"])
