"""What ranks are told. Free of torch, so that a stage whose output is reused never imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dpo_train import storage
from dpo_train.config import FitConfig, ModelConfig
from dpo_train.progress import Reporter

if TYPE_CHECKING:
    from dpo_train.train.ranks import Ranks

CHECKPOINT_FOLDER = "checkpoints"
POLICY_NOTE = f"{CHECKPOINT_FOLDER}/policy.json"
"""Files of the policy with their sizes, as the first rank has brought them to s3://."""


def pause_note(step: int) -> str:
    """Name of the file that a training leaves where it was told to pause."""
    return f"{CHECKPOINT_FOLDER}/pause-{step:08d}.json"


class RankJob(Protocol):
    """Work of all ranks together; picklable, paths as text."""

    @property
    def output(self) -> str: ...
    @property
    def reporter(self) -> Reporter: ...
    @property
    def storage(self) -> storage.Options: ...

    def run(self, ranks: Ranks, *, is_preempted: Callable[[], bool]) -> None:
        """This rank's part, from loading the model to the end."""


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
    pause_at: int | None = None
    """Stop after so many steps, saved, and leave a note of what the validation pairs say there (``pause_note``)."""

    def run(self, ranks: Ranks, *, is_preempted: Callable[[], bool] = lambda: False) -> None:
        """See RankJob."""
        from dpo_train.train.worker import run_rank

        run_rank(self, ranks, is_preempted=is_preempted)
