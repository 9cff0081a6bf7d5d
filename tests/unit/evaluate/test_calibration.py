"""Reliability bars and the expected calibration error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_train.evaluate.calibration import calibrate
from dpo_train.evaluate.statistics import Floats, Means
from dpo_train.findings import Bin, Estimate


def error(margins: Floats, right: Floats) -> Estimate:
    calibration, groups = calibrate(margins, right), np.arange(len(margins))
    return calibration.error(Means(calibration.gaps, groups, seed=0), groups)


def logit(confidence: float) -> float:
    return math.log(confidence / (1 - confidence))


def test_bars_and_error_by_hand() -> None:
    """50 pairs of confidence 0.6, 30 of them right, and 50 of 0.9, 40 right: gaps 0 and 0.1, error 0.05.

    The wrong ones have a margin below 0: what counts is the confidence in the answer that the policy prefers.
    """
    margins = np.concatenate(
        [np.repeat([logit(0.6), -logit(0.6)], [30, 20]), np.repeat([logit(0.9), -logit(0.9)], [40, 10])]
    )
    right = (margins > 0).astype(np.float64)

    bins = calibrate(margins, right).bins

    assert [(bar.confidence, bar.accuracy, bar.n) for bar in bins] == [
        (pytest.approx(0.6), pytest.approx(0.6), 50),
        (pytest.approx(0.9), pytest.approx(0.8), 50),
    ]
    assert error(margins, right).value == pytest.approx(0.05)


def test_untrained_policy_is_calibrated() -> None:
    """Every margin is 0: confidence 0.5, and a tie is half right."""
    assert calibrate(np.zeros(60), np.full(60, 0.5)).bins == (
        Bin(low=0.5, high=0.5, confidence=0.5, accuracy=0.5, n=60),
    )
    assert error(np.zeros(60), np.full(60, 0.5)) == Estimate(value=0.0, low=0.0, high=0.0, n=60)


@pytest.mark.parametrize(("pairs", "bars"), [(60, 1), (200, 4), (5000, 10)])
def test_bars_grow_with_pairs(pairs: int, bars: int) -> None:
    """Fifty pairs a bar, at most ten bars, all about as full."""
    margins = np.random.default_rng(0).normal(size=pairs)

    sizes = [bar.n for bar in calibrate(margins, (margins > 0) * 1.0).bins]

    assert len(sizes) == bars
    assert max(sizes) - min(sizes) <= 1


def test_few_groups_leave_the_error_open() -> None:
    """Nine pairs."""
    found = error(np.ones(9), np.ones(9))

    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize("slope", [1.0, 0.3, 0.0])
def test_interval_holds_the_true_error(slope: float) -> None:
    """25 samples of 150 pairs whose chance to be right is sigmoid(slope x |margin|): calibrated for slope 1, where the
    value itself is 0.05 by noise alone, and overconfident below."""
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(25):
        sizes = np.abs(generator.normal(size=150))
        right = generator.random(150) < 1 / (1 + np.exp(-slope * sizes))
        found = error(np.where(right, sizes, -sizes), right.astype(np.float64))
        truth = float(np.mean(1 / (1 + np.exp(-sizes)) - 1 / (1 + np.exp(-slope * sizes))))
        hits += found.low <= truth <= found.high

    assert hits >= 22
