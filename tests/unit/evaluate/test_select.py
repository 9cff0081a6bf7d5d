"""Choosing beta: one standard error, ties to the larger beta."""

from __future__ import annotations

import pytest

from dpo_train.errors import RunError
from dpo_train.evaluate.select import Trial, choose_beta


def test_larger_beta_wins_within_one_standard_error() -> None:
    """n = 100, best 0.80: the standard error is 0.04. 0.77 is as good, 0.75 is not."""
    trials = [
        Trial(beta=0.05, accuracy=0.80, n=100),
        Trial(beta=0.1, accuracy=0.77, n=100),
        Trial(beta=0.5, accuracy=0.75, n=100),
    ]

    beta, reasons = choose_beta(trials)

    assert beta == 0.1
    assert "within one standard error (0.040)" in reasons["0.05"]
    assert "more than one standard error" in reasons["0.5"]


def test_failed_trials_are_passed_over_with_their_reason() -> None:
    """A diverged trial loses, and the record says why."""
    trials = [Trial(beta=0.01, failure="NonFiniteLossError: step 3"), Trial(beta=0.1, accuracy=0.6, n=50)]

    assert choose_beta(trials) == (0.1, {"0.01": "failed: NonFiniteLossError: step 3"})


def test_no_finished_trial_is_a_failed_run() -> None:
    """All failing fails the stage, with every reason."""
    with pytest.raises(RunError, match=r"beta 0.1: a; beta 0.2: b"):
        choose_beta([Trial(beta=0.1, failure="a"), Trial(beta=0.2, failure="b")])
