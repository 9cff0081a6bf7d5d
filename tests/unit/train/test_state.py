"""Where a training stands: the best value, patience, and the line that counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpo_train.config import TrainConfig
from dpo_train.train.state import TrainingState, kept_line

CONFIG = TrainConfig(keep="best", patience=2)


def _after(values: list[float], config: TrainConfig = CONFIG) -> TrainingState:
    """After one measurement every ten steps."""
    state = TrainingState()
    for index, value in enumerate(values, 1):
        state = replace(state, step=10 * index)
        state = state.evaluated(state.step, {f"validation/{config.best_metric}": value}, config)
    return state


@pytest.mark.parametrize(
    ("metric", "values", "best_step", "stale"),
    [
        ("loss", [0.6], 10, 0),
        ("loss", [0.6, 0.5, 0.7], 20, 1),
        ("loss", [0.6, 0.6, 0.6], 10, 2),  # as good is not better
        ("rewards/accuracy", [0.6, 0.5, 0.7], 30, 0),
        ("rewards/margin", [-0.1, -0.2], 10, 1),
    ],
)
def test_best_is_the_lowest_loss_or_the_highest_reward(
    metric: str, values: list[float], best_step: int, stale: int
) -> None:
    """And what came since then is counted."""
    state = _after(values, replace(CONFIG, best_metric=metric))
    assert (state.best_step, state.stale) == (best_step, stale)


def test_it_is_over_after_all_steps_or_when_patience_ends() -> None:
    """Two measurements without a better one; without patience only the steps count."""
    assert not _after([0.6, 0.7]).is_over(100, CONFIG)
    assert _after([0.6, 0.7, 0.8]).is_over(100, CONFIG)
    assert not _after([0.6, 0.7, 0.8]).is_over(100, replace(CONFIG, patience=None))
    assert _after([0.6, 0.5]).is_over(20, CONFIG)


def test_kept_line_is_the_best_measured_or_the_last() -> None:
    """Steps between measurements have no value and are never kept as best."""
    history = [
        {"step": 0, "loss": 0.7},
        {"step": 1, "loss": 0.6, "validation/loss": 0.65},
        {"step": 2, "loss": 0.1},
        {"step": 3, "loss": 0.5, "validation/loss": 0.66},
    ]
    assert kept_line(history, CONFIG) == history[1]
    assert kept_line(history, replace(CONFIG, keep="last")) == history[3]
