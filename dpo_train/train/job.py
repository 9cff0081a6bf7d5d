"""What a training is told. Free of torch, so that a stage whose output is reused never imports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_train import storage
from dpo_train.config import FitConfig, ModelConfig
from dpo_train.progress import Reporter

CHECKPOINT_FOLDER = "checkpoints"
POLICY_NOTE = f"{CHECKPOINT_FOLDER}/policy.json"
"""Files of the policy with their sizes, as the first rank has brought them to s3://."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a rank needs to know; picklable, paths as text."""

    model: ModelConfig
    device: str
    config: FitConfig
    """Its kind says what is trained: DPO on scored pairs, or SFT on chosen answers."""
    seed: int
    origin: Mapping[str, Any]
    """What makes this training this one: config and inputs, by which a checkpoint is known."""
    pairs: str
    output: str
    """Where the pairs lie and the training belongs: folders, or s3://."""
    shard: bool
    tensor_parallel: int = 1
    activation_checkpointing: Literal["off", "selective", "full"] = "off"
    compile: Literal["auto", "on", "off"] = "auto"
    reporter: Reporter
    storage: storage.Options = field(default_factory=storage.Options)
