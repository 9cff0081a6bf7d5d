"""How many trials run at a time, and on what. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpo_train.config import ComputeConfig
from dpo_train.runtime.sweep_job import Plan, plan

ONE = ComputeConfig(workers=1)


@pytest.mark.parametrize(
    ("compute", "cores", "gpus", "expected"),
    [
        # A laptop: one trial at a time, on all cores, whatever the workers of the training.
        (ONE, [8.0], 0, (1, {"CPU": 0.5}, 8, 1)),
        (replace(ONE, workers=2), [2.0], 0, (1, {"CPU": 0.5}, 2, 1)),
        # Two machines of eight cores: one trial on each.
        (ONE, [8.0, 8.0], 0, (2, {"CPU": 4.08}, 8, 1)),
        # Trainings of several workers on several machines, or whose weights no single one could hold.
        (replace(ONE, workers=4), [8.0, 8.0], 0, (1, {"CPU": 0.01}, 1, 4)),
        (replace(ONE, workers=2, shard="on"), [2.0], 0, (1, {"CPU": 0.01}, 1, 2)),
        (replace(ONE, workers=2, tensor_parallel=2), [2.0], 0, (1, {"CPU": 0.01}, 1, 2)),
        # Eight GPUs and 64 cores: eight trials of one, four of two, one that has all.
        (ONE, [64.0], 8, (8, {"CPU": 0.5, "GPU": 1.0}, 8, 1)),
        (replace(ONE, workers=2), [64.0], 8, (4, {"CPU": 0.01}, 8, 2)),
        (replace(ONE, workers=16), [64.0], 8, (1, {"CPU": 0.01}, 8, 8)),
    ],
)
def test_trials_get_what_their_training_will_have(
    compute: ComputeConfig, cores: list[float], gpus: int, expected: tuple[int, dict[str, float], int, int]
) -> None:
    """(at once, resources, threads, workers)"""
    at_once, resources, threads, workers = expected

    assert plan(compute, cores, gpus) == Plan(at_once=at_once, resources=resources, threads=threads, workers=workers)
