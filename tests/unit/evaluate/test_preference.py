"""Held-out estimates and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_train.evaluate.preference import cluster_bootstrap, measure, wilson


def test_rewards_margin_and_accuracy_by_hand() -> None:
    """beta 0.5; log-ratios chosen (2, -1, 1), rejected (0, 1, 1): margins 1, -1, 0; a tie is half right."""
    reference = (np.array([-10.0, -20.0, -30.0]), np.array([-11.0, -21.0, -31.0]))
    policy = (reference[0] + [2, -1, 1], reference[1] + [0, 1, 1])

    found = measure(policy, reference, ["a", "b", "c"], beta=0.5, seed=0)

    assert found.margins_P.tolist() == [1.0, -1.0, 0.0]
    assert found.accuracy.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.margin.value == pytest.approx(0.0)
    assert found.chosen_reward.value == pytest.approx(0.5 * 2 / 3)
    assert found.rejected_reward.value == pytest.approx(0.5 * 2 / 3)
    assert found.accuracy.n == 3


def test_untrained_policy_is_exactly_at_chance() -> None:
    """Policy = reference: every margin is a tie."""
    scores = (np.linspace(-5, -1, 50), np.linspace(-9, -2, 50))

    found = measure(scores, scores, [str(i) for i in range(50)], beta=0.1, seed=0)

    assert found.accuracy.value == 0.5
    assert found.accuracy.low <= 0.5 <= found.accuracy.high
    assert found.margin.value == 0.0


def test_bootstrap_interval_of_independent_values_is_the_normal_one() -> None:
    """For 400 values the percentile interval is the mean -+ 1.96 standard errors, to a few per cent."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)

    found = cluster_bootstrap(values, [str(i) for i in range(400)], seed=0)

    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_copies_within_a_group_do_not_narrow_the_interval() -> None:
    """Every value four times in one group: as wide as without the copies; taken for independent it would be half."""
    values = np.random.default_rng(2).normal(size=100)
    groups = [str(i) for i in range(100)]

    once = cluster_bootstrap(values, groups, seed=0)
    four = cluster_bootstrap(np.repeat(values, 4), [g for g in groups for _ in range(4)], seed=0)

    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.05)
    assert four.n == 400


def test_interval_is_seeded() -> None:
    """The same seed gives the same bounds to the bit; another seed does not."""
    values = np.random.default_rng(3).normal(size=30)
    groups = [str(i) for i in range(30)]

    assert cluster_bootstrap(values, groups, seed=4) == cluster_bootstrap(values, groups, seed=4)
    assert cluster_bootstrap(values, groups, seed=4) != cluster_bootstrap(values, groups, seed=5)


def test_wilson_interval_by_hand() -> None:
    """10 of 10: the lower bound is n / (n + z^2) = 10 / 13.84."""
    found = wilson(10, 10, n=10)

    assert found.value == 1.0
    assert found.low == pytest.approx(10 / (10 + 1.959963984540054**2))
    assert found.high == pytest.approx(1.0)


def test_all_right_still_has_an_interval() -> None:
    """Twenty right answers in ten groups are not certainty: the bound is that of ten."""
    reference = (np.zeros(20), np.zeros(20))
    policy = (np.ones(20), np.zeros(20))

    found = measure(policy, reference, [str(i // 2) for i in range(20)], beta=1.0, seed=0)

    assert found.accuracy.value == 1.0
    assert found.accuracy.low == pytest.approx(wilson(10, 10, n=10).low)
