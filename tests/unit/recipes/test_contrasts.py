"""Differences between policies that answered the same prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_train.errors import RunError
from dpo_train.findings import Estimate
from dpo_train.recipes.contrasts import Dot, Mean, above_at_equal, combined, over_seeds, student_95

PROMPTS = 52
WAVE = np.where(np.arange(PROMPTS) % 2, 1.0, -1.0)
HALF = student_95(PROMPTS - 1) / math.sqrt(PROMPTS - 1)
"""Of the interval of a mean of numbers that deviate as the wave does."""


def mean(value: float, spread: float = 0.0, *, wave: np.ndarray = WAVE) -> Mean:
    return Mean.of(value + spread * wave)


def dot(x: float, y: float, spread: float = 0.0, *, setting: str = "", x_spread: float = 0.0) -> Dot:
    return Dot(label=f"at {x:g}", setting=setting or f"{x:g}", x=mean(x, x_spread), y=mean(y, spread))


def half(found: Estimate) -> float:
    assert found.high - found.value == pytest.approx(found.value - found.low)
    return found.high - found.value


def test_an_interval_is_students() -> None:
    found = mean(2.0, spread=1.0).estimate

    assert (found.value, found.n) == (2.0, PROMPTS)
    assert half(found) == pytest.approx(HALF)


def test_what_a_prompt_does_to_both_is_no_part_of_a_difference() -> None:
    """Rewards that rise and fall together: only half a unit of three is each one's own."""
    found = combined([(1.0, "a", mean(2.0, spread=3.0)), (-1.0, "b", mean(1.5, spread=2.5))])

    assert found.value == pytest.approx(0.5)
    assert half(found) == pytest.approx(0.5 * HALF)


def test_seeds_of_one_training_err_together_and_of_two_apart() -> None:
    one = Mean(value=1.0, deviations_G=np.zeros(PROMPTS), between=0.3)

    assert half(combined([(0.5, "a", one), (0.5, "a", one)])) == pytest.approx(0.3)
    assert half(combined([(0.5, "a", one), (0.5, "b", one)])) == pytest.approx(math.hypot(0.15, 0.15))


def test_an_answer_without_a_reward_says_nothing() -> None:
    found = Mean.of(np.array([1.0, np.nan, 3.0, np.nan]))

    assert found.value == 2.0
    assert found.deviations_G.tolist() == [-0.5, 0.0, 0.5, 0.0]
    with pytest.raises(RunError, match="rewards none"):
        Mean.of(np.array([np.nan, np.nan]))


LINE = (dot(4, 2.0, 0.4), dot(0, 0.0, 0.3), dot(2, 1.0, 0.3))


def test_a_method_is_compared_at_its_own_places() -> None:
    """Half a unit of reward a nat of KL; the prompts do to all of them the same."""
    below = [dot(1, 0.1, 0.1), dot(3, 1.1, 0.1), dot(9, 5.0)]
    (claim,) = above_at_equal("DPO", LINE, below, method="PPO")

    assert claim.text == "DPO above PPO at equal KL (mean over 2 of 3 points)"
    assert claim.found.value == pytest.approx(0.4)
    assert half(claim.found) == pytest.approx(((0.3 - 0.1) + (0.35 - 0.1)) / 2 * HALF)
    assert above_at_equal("DPO", LINE, [dot(9, 5.0)], method="PPO") == []


def test_a_kl_that_errs_moves_along_the_line() -> None:
    """By 0.5 of reward a nat. Where the line's own KL errs alike nothing moves."""
    line = (dot(0, 0.0), dot(2, 1.0, x_spread=0.2))
    (alone,) = above_at_equal("DPO", line, [dot(2, 0.5)], method="PPO")
    (alike,) = above_at_equal("DPO", line, [dot(2, 0.5, x_spread=0.2)], method="PPO")

    assert half(alone.found) == pytest.approx(0.5 * 0.2 * HALF)
    assert half(alike.found) == pytest.approx(0, abs=1e-12)


def test_an_interval_at_equal_kl_covers_the_truth() -> None:
    """2,000 experiments on a line and a method 0.3 below it: the truth is within 95 % of the intervals, and few of them
    would hold it if they were two thirds as wide."""
    generator = np.random.Generator(np.random.PCG64(0))
    covered, narrow = 0, 0
    for _ in range(2000):
        common = generator.normal(0, 2, size=PROMPTS)

        def measured(x: float, y: float, common: np.ndarray = common) -> Dot:
            own = generator.normal(0, 1, size=(2, PROMPTS))
            return Dot(label="", setting=f"{x}", x=Mean.of(x + own[0]), y=Mean.of(y + common + own[1]))

        line = [measured(0, 0.0), measured(4, 2.0)]
        (claim,) = above_at_equal("DPO", line, [measured(2, 0.7)], method="PPO")
        covered += claim.found.low <= 0.3 <= claim.found.high
        narrow += abs(claim.found.value - 0.3) <= half(claim.found) * 2 / 3

    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
    assert narrow / 2000 < 0.86


def test_the_spread_between_seeds_is_that_of_all_groups() -> None:
    groups = [[mean(1.0, 1.0), mean(1.2, 1.0)], [mean(5.0, 1.0), mean(5.0, 1.0)], [mean(2.0, 1.0), mean(2.4, 1.0)]]
    found = over_seeds(groups)

    spread = math.sqrt((2 * 0.1**2 + 0 + 2 * 0.2**2) / 3)
    assert [one.value for one in found] == pytest.approx([1.1, 5.0, 2.2])
    assert [one.between for one in found] == pytest.approx([student_95(3) * spread / math.sqrt(2)] * 3)
    expected = math.hypot(HALF, student_95(3) * spread / math.sqrt(2))
    assert [half(one.estimate) for one in found] == pytest.approx([expected] * 3)
    assert [one.between for one in over_seeds([[mean(1.0)], [mean(9.0)]])] == [0.0, 0.0]


def test_seeds_that_err_on_different_prompts_are_surer_together() -> None:
    """Two trainings, each wrong about prompts of its own."""
    other = np.where(np.arange(PROMPTS) % 4 < 2, 1.0, -1.0)
    (found,) = over_seeds([[mean(1.0, 1.0), mean(1.0, 1.0, wave=other)]])

    assert half(found.estimate) == pytest.approx(HALF / math.sqrt(2))


def test_the_spread_may_grow_with_what_is_measured() -> None:
    small, large = over_seeds([[mean(0.1), mean(0.2)], [mean(9.0), mean(11.0)]], relative=True)

    spread = math.sqrt((2 * 0.05**2 + 2 * 0.1**2) / 2)
    factor = student_95(2) / math.sqrt(2)
    assert small.between == pytest.approx(factor * spread)
    assert large.between == pytest.approx(factor * spread * 10)


@pytest.mark.parametrize(("freedom", "expected"), [(4, 2.776), (8, 2.306), (30, 2.042)])
def test_students_quantile(freedom: int, expected: float) -> None:
    assert student_95(freedom) == pytest.approx(expected, rel=0.02)
