"""What the tests of sweeps share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.stages.executor import InProcess, TrialCall, TrialEnd
from dpo_train.train.job import RankJob, TrainJob

LOCAL = InProcess()
BETAS = (0.05, 0.1, 0.5, 1.0)


def with_sweep(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, sweep=replace(config.sweep, **changes))


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def with_evaluate(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, evaluate=replace(config.evaluate, **changes))


def elsewhere(config: RunConfig) -> RunConfig:
    """The same with another, empty store."""
    return replace(config, store=f"{config.store}-2")


def trials_of(artifact: Artifact) -> dict[str, dict[str, Any]]:
    content = json.loads((artifact.path / "trials.json").read_text())
    return {trial["name"]: trial for trial in content["trials"]}


def policies(config: RunConfig) -> list[str]:
    """Addresses of the complete trainings in the store, none of which is without its weights."""
    folder = Path(config.store) / "train"
    complete = {file.parent for file in folder.glob("*/record.json")}
    assert complete == {file.parent.parent for file in folder.glob("*/adapter/*.safetensors")}
    return sorted(f"train/{each.name}" for each in complete)


def same_weights(one: Artifact, other: Artifact) -> bool:
    """Bit for bit."""
    mine, others = (load_file(each.path / "adapter" / "adapter_model.safetensors") for each in (one, other))
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


class Counting(InProcess):
    """Notes every training, its beta and where it was to pause, and counts what models were asked."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.trained: list[tuple[float, int | None]] = []
        self.asked = 0
        self._meanwhile = meanwhile

    def run_ranks(self, job: RankJob) -> None:
        if isinstance(job, TrainJob):
            self.trained.append((job.config.beta, job.pause_at))
        super().run_ranks(job)

    def map_tables(self, *args: Any, **more: Any) -> Any:
        self.asked += 1
        return super().map_tables(*args, **more)

    def trials(self, trials: Sequence[TrialCall], ended: Callable[[int, TrialEnd], None]) -> None:
        def both(number: int, end: TrialEnd) -> None:
            ended(number, end)
            self._meanwhile()

        super().trials(trials, both)
