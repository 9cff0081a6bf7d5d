"""Optimiser and learning-rate schedule, worked by hand."""

from __future__ import annotations

import pytest
import torch

from dpo_train.config import TrainConfig
from dpo_train.train.optimizer import build_optimizer, learning_rate


def _rates(schedule: str, warmup: int, total: int) -> list[float]:
    config = TrainConfig(learning_rate=8.0, schedule=schedule, warmup_steps=warmup)
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "rates"),
    [
        ("constant", 0, 3, [8.0, 8.0, 8.0]),
        ("constant", 4, 6, [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]),
        # Towards zero one step after the last: 8 x (1, 3/4, 1/2, 1/4)
        ("linear", 0, 4, [8.0, 6.0, 4.0, 2.0]),
        ("linear", 2, 6, [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]),
        # 8 x (1 + cos(0, pi/4, pi/2, 3 pi/4)) / 2
        ("cosine", 0, 4, [8.0, 6.8284271247, 4.0, 1.1715728753]),
        # A warm-up longer than the training never reaches the peak.
        ("linear", 10, 3, [0.8, 1.6, 2.4]),
    ],
)
def test_rates_of_all_steps(schedule: str, warmup: int, total: int, rates: list[float]) -> None:
    """Linear warm-up, then the schedule; no step has rate zero."""
    assert _rates(schedule, warmup, total) == pytest.approx(rates, rel=1e-9)


def _after_one_step(config: TrainConfig) -> float:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer([weight], config)
    weight.grad = torch.tensor([3.0])
    optimizer.step()
    return weight.item()


def test_adamw_moves_by_the_rate_and_decays_apart_from_it() -> None:
    """The first step of Adam is lr x sign(gradient): 2 - 0.1; decay takes lr x 0.5 x 2 = 0.1 more."""
    assert _after_one_step(TrainConfig(learning_rate=0.1)) == pytest.approx(1.9, rel=1e-6)
    assert _after_one_step(TrainConfig(learning_rate=0.1, weight_decay=0.5)) == pytest.approx(1.8, rel=1e-6)


def test_rmsprop_moves_by_the_gradient_over_its_root_mean_square() -> None:
    """The running square is 0.01 x 9, its root 0.3: 2 - 0.1 x 3 / 0.3."""
    assert _after_one_step(TrainConfig(learning_rate=0.1, optimizer="rmsprop")) == pytest.approx(1.0, rel=1e-6)
