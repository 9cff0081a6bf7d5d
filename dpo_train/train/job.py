"""What a training is told. Free of torch, so that a stage whose output is reused never imports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_train.config import ModelConfig, TrainConfig
from dpo_train.progress import Reporter

CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a rank needs to know; picklable, paths as text."""

    model: ModelConfig
    device: str
    config: TrainConfig
    seed: int
    origin: Mapping[str, Any]
    """What makes this training this one: config and inputs, by which a checkpoint is known."""
    scored: str
    output: str
    shard: bool
    reporter: Reporter
