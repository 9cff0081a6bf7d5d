"""The gate's verdict, a pure function of estimates and rules."""

from __future__ import annotations

import math

import pytest

from dpo_train.artifacts import Estimate
from dpo_train.config import GateConfig
from dpo_train.evaluate.gate import judge


def estimate(value: float, low: float) -> Estimate:
    return Estimate(value=value, low=low, high=value, n=200)


@pytest.mark.parametrize(
    ("accuracy_low", "margin", "min_accuracy", "learned", "passed"),
    [
        (0.61, 0.2, 0.5, True, True),
        (0.61, 0.2, 0.7, True, False),
        (0.50, 0.2, 0.5, False, False),
        (0.61, 0.0, 0.5, False, False),
        (0.61, -0.1, 0.5, False, False),
        (0.45, 0.2, 0.4, False, False),
        (math.nan, 0.2, 0.5, False, False),
        (0.61, math.nan, 0.5, False, False),
    ],
)
def test_verdict(accuracy_low: float, margin: float, min_accuracy: float, learned: bool, passed: bool) -> None:
    """Bounds must lie strictly above their limits; chance is the bar for having learned, whatever the rules say."""
    verdict = judge(estimate(0.7, accuracy_low), estimate(margin, margin), GateConfig(min_accuracy=min_accuracy))

    assert (verdict.learned, verdict.passed) == (learned, passed)


def test_every_rule_says_what_was_found_and_asked() -> None:
    """A person sees why."""
    verdict = judge(estimate(0.7, 0.6), estimate(0.1, 0.05), GateConfig(min_accuracy=0.65, min_margin=0.01))

    assert verdict.rules == (
        {"rule": "accuracy lower bound", "found": 0.6, "must_exceed": 0.65, "passed": False},
        {"rule": "mean margin", "found": 0.1, "must_exceed": 0.01, "passed": True},
    )
