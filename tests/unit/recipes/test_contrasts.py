"""Differences between policies that answered the same prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_train.errors import RunError
from dpo_train.evaluate.statistics import student_95
from dpo_train.findings import Estimate
from dpo_train.recipes.contrasts import Dot, Mean, above_at_equal, combined, over_seeds

PROMPTS = 52
WAVE = np.where(np.arange(PROMPTS) % 2, 1.0, -1.0)
OTHER_WAVE = np.where(np.arange(PROMPTS) % 4 < 2, 1.0, -1.0)
HALF = student_95(PROMPTS - 1) / math.sqrt(PROMPTS - 1)
"""Of the interval of a mean of numbers that deviate as the wave does."""


def mean(value: float, spread: float = 0.0, *, wave: np.ndarray = WAVE) -> Mean:
    return Mean.of(value + spread * wave)


def dot(x: float, y: float, spread: float = 0.0, *, setting: str = "a", x_spread: float = 0.0) -> Dot:
    return Dot(setting=setting, step=round(10 * x), x=mean(x, x_spread), y=mean(y, spread))


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
    one = Mean(value=1.0, deviations_G=np.zeros(PROMPTS), n=PROMPTS, between=0.3)

    assert half(combined([(0.5, "a", one), (0.5, "a", one)])) == pytest.approx(0.3)
    assert half(combined([(0.5, "a", one), (0.5, "b", one)])) == pytest.approx(math.hypot(0.15, 0.15))


def test_answers_without_a_reward_say_nothing() -> None:
    """The interval of three numbers is Student's of three, however many answers have none."""
    found = Mean.of(np.array([1.0, np.nan, 3.0, np.nan, 2.0]))

    assert (found.value, found.estimate.n) == (2.0, 3)
    assert found.deviations_G == pytest.approx([-1 / 3, 0.0, 1 / 3, 0.0, 0.0])
    assert half(found.estimate) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    for few in ([np.nan, np.nan], [np.nan, 1.0]):
        with pytest.raises(RunError, match="Too few answers"):
            Mean.of(np.array(few))


START = dot(0, 0.0, 0.3, setting="SFT")
LINE = (dot(4, 2.0, 0.4), dot(2, 1.0, 0.3))


def test_a_method_is_compared_at_its_own_places() -> None:
    """Half a unit of reward a nat of KL; the prompts do to all of them the same."""
    below = [dot(1, 0.1, 0.1, setting="b"), dot(3, 1.1, 0.1, setting="b"), dot(9, 5.0, setting="b")]
    (claim,) = above_at_equal("DPO", START, LINE, below, method="PPO")

    assert claim.text == "DPO above PPO at equal KL (mean over 2 of 3 points)"
    assert claim.found.value == pytest.approx(0.4)
    assert half(claim.found) == pytest.approx(((0.3 - 0.1) + (0.35 - 0.1)) / 2 * HALF)
    assert above_at_equal("DPO", START, LINE, below[2:], method="PPO") == []


def test_every_setting_goes_its_own_way_from_the_start() -> None:
    """At a KL of 1 two ways pass, at 0.5 and at 1; at 3 one alone, at 1.5."""
    steep = dot(2, 2.0, setting="steep")
    for x, expected in ((1, 0.75), (3, 1.5)):
        (claim,) = above_at_equal("DPO", START, [*LINE, steep], [dot(x, 0.0, setting="b")], method="PPO")
        assert claim.found.value == pytest.approx(expected)


def test_a_kl_that_errs_moves_along_the_line() -> None:
    """By 0.5 of reward a nat. Where the line's own KL errs alike nothing moves."""
    start, line = dot(0, 0.0), [dot(2, 1.0, x_spread=0.2)]
    (alone,) = above_at_equal("DPO", start, line, [dot(2, 0.5)], method="PPO")
    (alike,) = above_at_equal("DPO", start, line, [dot(2, 0.5, x_spread=0.2)], method="PPO")

    assert half(alone.found) == pytest.approx(0.5 * 0.2 * HALF)
    assert half(alike.found) == pytest.approx(0, abs=1e-12)


def test_a_known_kl_is_a_number_and_no_surer_than_it_is() -> None:
    """Best-of-N's, whose reward is measured."""
    found = Dot(setting="best of 2", step=None, x=Mean.known(0.2, PROMPTS), y=mean(1.0, 1.0))
    (claim,) = above_at_equal("DPO", START, LINE, [found], method="best-of-N")

    assert (found.label, found.point.x, found.point.y.n) == ("best of 2", 0.2, PROMPTS)
    assert claim.found.n == PROMPTS


def test_an_interval_at_equal_kl_covers_the_truth() -> None:
    """2,000 experiments on a line and a method 0.3 below it: the truth is within 95 % of the intervals, and few of them
    would hold it if they were two thirds as wide."""
    generator = np.random.Generator(np.random.PCG64(0))
    covered, narrow = 0, 0
    for _ in range(2000):
        common = generator.normal(0, 2, size=PROMPTS)

        def measured(x: float, y: float, common: np.ndarray = common) -> Dot:
            own = generator.normal(0, 1, size=(2, PROMPTS))
            return Dot(setting=f"{x}", step=0, x=Mean.of(x + own[0]), y=Mean.of(y + common + own[1]))

        start, line = measured(0, 0.0), [measured(4, 2.0)]
        (claim,) = above_at_equal("DPO", start, line, [measured(2, 0.7)], method="PPO")
        covered += claim.found.low <= 0.3 <= claim.found.high
        narrow += abs(claim.found.value - 0.3) <= half(claim.found) * 2 / 3

    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
    assert narrow / 2000 < 0.86


def test_the_spread_between_seeds_is_that_of_all_groups() -> None:
    groups = [[mean(1.0, 1.0), mean(1.2, 1.0)], [mean(5.0, 1.0), mean(5.0, 1.0)], [mean(2.0, 1.0), mean(2.4, 1.0)]]
    found = over_seeds(groups, "abc", [1.0] * 3)

    spread = math.sqrt((2 * 0.1**2 + 0 + 2 * 0.2**2) / 3)
    assert [one.value for one in found] == pytest.approx([1.1, 5.0, 2.2])
    assert [one.between for one in found] == pytest.approx([student_95(3) * spread / math.sqrt(2)] * 3)
    expected = math.hypot(HALF, student_95(3) * spread / math.sqrt(2))
    assert [half(one.estimate) for one in found] == pytest.approx([expected] * 3)
    assert [one.between for one in over_seeds([[mean(1.0)], [mean(9.0)]], "ab", [1.0, 1.0])] == [0.0, 0.0]


def test_seeds_that_err_on_different_prompts_are_surer_together() -> None:
    """Two trainings, each wrong about prompts of its own."""
    (found,) = over_seeds([[mean(1.0, 1.0), mean(1.0, 1.0, wave=OTHER_WAVE)]], "a", [1.0])

    assert half(found.estimate) == pytest.approx(HALF / math.sqrt(2))


def test_what_answers_noise_makes_seeds_differ_by_counts_once() -> None:
    """Their means lie as far apart as such noise puts them, and further."""
    noise = 2 / (PROMPTS - 1)  # of a difference, squared; half of it in squares around the mean
    for squares, left in ((noise / 2, 0.0), (noise / 2 + 0.3, 0.3)):
        apart = math.sqrt(2 * squares)
        (found,) = over_seeds([[mean(1.0, 1.0), mean(1.0 + apart, 1.0, wave=OTHER_WAVE)]], "a", [1.0])
        assert found.between == pytest.approx(student_95(1) * math.sqrt(left) / math.sqrt(2), abs=1e-6)


def test_the_spread_grows_with_the_scale() -> None:
    """The small group says little about it: one degree of freedom, and not two."""
    small, large = over_seeds([[mean(0.1), mean(0.2)], [mean(9.0), mean(11.0)]], "ab", [0.15, 10.0])

    spread = math.sqrt((2 * 0.05**2 + 2 * 1.0**2) / (0.15**2 + 10.0**2))
    factor = student_95(1) / math.sqrt(2)
    assert small.between == pytest.approx(factor * spread * 0.15, rel=1e-2)
    assert large.between == pytest.approx(factor * spread * 10, rel=1e-2)


def test_steps_of_one_training_say_once_how_much_seeds_differ() -> None:
    """Three steps of two seeds: one degree of freedom, and not three."""
    found = over_seeds([[mean(1.0), mean(1.2)]] * 3, "aaa", [1.0] * 3)

    assert [one.between for one in found] == pytest.approx([12.7062 * 0.1 * math.sqrt(2) / math.sqrt(2)] * 3)


@pytest.mark.parametrize("seeds_differ_by", [0.0, 0.2, 1.0])
def test_an_interval_over_seeds_covers_the_truth(seeds_differ_by: float) -> None:
    """1,000 experiments with four settings of two seeds, of which one moves far and one hardly: the differences to a
    model that was not trained are within at least 93 % of the intervals, however much seeds differ."""
    generator = np.random.Generator(np.random.PCG64(0))
    scales, covered = np.array([1.4, 1.0, 0.4, 0.3]), np.zeros(4)
    for _ in range(1000):
        common = generator.normal(0, 2, size=PROMPTS)
        start = Mean.of(common + generator.normal(0, 2, size=PROMPTS))

        def trained(scale: float, common: np.ndarray = common) -> Mean:
            own = generator.normal(0, 2 * min(1, scale), size=PROMPTS)
            return Mean.of(common + scale + seeds_differ_by * scale * generator.normal() + own)

        found = over_seeds([[trained(scale), trained(scale)] for scale in scales], "abcd", scales.tolist())
        gains = [combined([(1.0, "trained", one), (-1.0, "start", start)]) for one in found]
        covered += [gain.low <= scale <= gain.high for gain, scale in zip(gains, scales, strict=True)]

    assert all(covered >= 930)


def test_dots_whose_kls_cannot_be_told_apart_are_one() -> None:
    """A slope of 20 between KLs of 1.00 and 1.01 would be noise over nothing."""
    near = (
        Dot(setting="a", step=1, x=mean(1.0, 0.3), y=mean(0.4)),
        Dot(setting="a", step=2, x=mean(1.01, 0.2), y=mean(0.6)),
    )
    (claim,) = above_at_equal("DPO", dot(0, 0.0), near, [dot(0.5025, 0.0, setting="b")], method="PPO")

    assert claim.found.value == pytest.approx(0.25)
