"""Which trial wins: budgets, one standard error, the simplest; and why the others lost."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_train.config import SelectConfig
from dpo_train.errors import RunError, StoreError
from dpo_train.evaluate.trials import (
    NUMBERS,
    Point,
    Trial,
    pool,
    pool_estimates,
    select,
    shown,
)
from dpo_train.evaluate.trials_file import from_dict, to_dict
from dpo_train.findings import Estimate

ACCURACY = SelectConfig()


def estimate(value: float, half: float = 0.1, n: int = 100) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def trial(right: str, *, beta: float = 0.1, seed: int = 0, **fields: Any) -> Trial:
    """``right``: for each pair, a group of its own, "1" or "0"."""
    values = [float(digit) for digit in right]
    mean = sum(values) / len(values)
    parameters = {"beta": beta, **fields.pop("parameters", {})}
    name = ",".join(f"{key}={value}" for key, value in parameters.items())
    return Trial(
        name=f"{name},seed={seed}" if seed else name,
        parameters=parameters,
        seed=seed,
        accuracy=fields.pop("accuracy", estimate(mean, n=len(values))),
        deviations={"accuracy": tuple((value - mean) / len(values) for value in values)},
        **fields,
    )


def failed(beta: float, reason: str = "NonFiniteLossError: step 3") -> Trial:
    return Trial(name=f"beta={beta}", parameters={"beta": beta}, seed=0, failure=reason)


def test_standard_error_is_that_of_the_difference_on_the_same_pairs() -> None:
    """10 pairs: 0.8 and 0.7 differ in one pair. Differences 1, nine 0: their mean is 0.1, and its standard error
    sqrt(10 / 9 * (0.9^2 + 9 * 0.1^2)) / 10 = 0.1, as large as the difference: as good, and the larger beta wins."""
    choice = select([trial("1111111100", beta=0.05), trial("1111111000", beta=0.1)], ACCURACY)

    assert choice.trial.name == "beta=0.1"
    assert choice.why_not == {
        "beta=0.05": "accuracy 0.800 is as good as 0.700 of beta=0.1 (within one standard error of the best, 0.100), "
        "but less careful: its beta is smaller"
    }


def test_difference_that_shows_on_the_same_pairs_decides() -> None:
    """0.8 and 0.6, two pairs apart in the same direction: the standard error sqrt(10 / 9 * 1.6) / 10 = 0.133 is less
    than 0.2, though each accuracy by itself has one of 0.13 to 0.15."""
    choice = select([trial("1111111100", beta=0.05), trial("1111110000", beta=0.1)], ACCURACY)

    assert choice.trial.name == "beta=0.05"
    assert choice.why_not["beta=0.1"] == (
        "accuracy 0.600 is 0.200 below the best, 0.800 of beta=0.05: more than one standard error (0.133)"
    )


def test_same_accuracy_on_other_pairs_is_no_certainty() -> None:
    """0.8 on some pairs against 0.6 on others: 4 pairs one way, 2 the other. sqrt(10 / 9 * (6 - 10 * 0.04)) / 10 =
    0.249 is more than the difference of 0.2."""
    assert select([trial("1111111100", beta=0.05), trial("0011110011", beta=0.1)], ACCURACY).trial.name == "beta=0.1"


@pytest.mark.parametrize(
    ("simpler", "other", "word"),
    [
        ({"learning_rate": 1e-5}, {"learning_rate": 1e-4}, "learning rate is larger"),
        ({"epochs": 1}, {"epochs": 3}, "epochs is larger"),
        ({"lora.rank": 4}, {"lora.rank": 16}, "LoRA rank is larger"),
        ({"learning_rate": 1e-5, "epochs": 3}, {"learning_rate": 1e-4, "epochs": 1}, "learning rate is larger"),
    ],
)
def test_ties_go_to_the_smaller_learning_rate_then_epochs_then_rank(
    simpler: dict[str, float], other: dict[str, float], word: str
) -> None:
    """Equal beta, equal accuracy: what moves the policy less."""
    trials = [trial("1110", parameters=simpler), trial("1110", parameters=other)]

    choice = select(trials, ACCURACY)

    assert choice.trial is trials[0]
    assert choice.why_not[trials[1].name].endswith(f"but less careful: its {word}")


def test_settings_of_different_losses_are_told_apart_by_the_metric_alone() -> None:
    """No loss is simpler than another: of two that are as good, the better one."""
    trials = [trial("1110", parameters={"loss": "ipo"}), trial("1111", parameters={"loss": "sigmoid"})]

    choice = select(trials, ACCURACY)

    assert choice.trial is trials[1]
    assert choice.why_not[trials[0].name].startswith("accuracy 0.750 is as good as 1.000")
    assert choice.why_not[trials[0].name].endswith("but no simpler and no better")


def test_budgets_shut_out_the_best() -> None:
    """KL 12 of 10 and 1.8 times the length of 1.5: the reason says by how much. Of those within, one reaches over."""
    trials = [
        trial("1111111111", beta=0.01, kl=estimate(12, 3), length_ratio=estimate(1.2)),
        trial("1111111111", beta=0.02, kl=estimate(8, 3), length_ratio=estimate(1.8)),
        trial("1111100000", beta=0.1, kl=estimate(8, 3), length_ratio=estimate(1.2)),
    ]

    choice = select(trials, SelectConfig(max_kl=10, max_length_growth=1.5))

    assert choice.trial is trials[2]
    assert choice.why_not == {
        "beta=0.01": "KL 12.000: over the budget of 10 by 2.000",
        "beta=0.02": "growth in length 1.800: over the budget of 1.5 by 0.300",
    }
    assert choice.notes == (
        "KL 8.000 of beta=0.1 is within the budget of 10, but its 95 % interval (5.000 to 11.000) reaches over it",
    )


def test_no_trial_within_the_budgets_names_the_nearest() -> None:
    """The message has what to compare with the budget."""
    trials = [trial("11", beta=0.1, kl=estimate(12)), trial("11", beta=0.5, kl=estimate(7.5))]

    with pytest.raises(RunError, match=r"KL 7\.500 at least \(that of beta=0\.5\).*KL of at most 5.*larger betas"):
        select(trials, SelectConfig(max_kl=5))


def test_budget_of_what_was_not_measured_is_not_met() -> None:
    """Without samples there is no KL."""
    with pytest.raises(RunError, match=r"Got: KL not measured"):
        select([trial("11")], SelectConfig(max_kl=5))


def test_failed_and_stopped_trials_lose_with_their_reason() -> None:
    """A diverged trial and one that halving stopped, however good it was."""
    stopped = trial("1111", beta=0.5, stopped="at step 40: 5th of 8 by rewards/accuracy")

    choice = select([failed(0.01), stopped, trial("1000", beta=0.1)], ACCURACY)

    assert choice.trial.name == "beta=0.1"
    assert choice.why_not == {
        "beta=0.01": "failed: NonFiniteLossError: step 3",
        "beta=0.5": "stopped at step 40: 5th of 8 by rewards/accuracy",
    }


def test_all_failing_is_a_failed_run() -> None:
    """With every reason."""
    with pytest.raises(RunError, match=r"Every trial of the sweep failed.*beta=0.1: failed: a; beta=0.2: failed: b"):
        select([failed(0.2, "b"), failed(0.1, "a")], ACCURACY)


def test_metric_that_no_trial_has_is_an_error() -> None:
    """Nothing else is taken in its place."""
    with pytest.raises(RunError, match=r"with a win rate to select on.*beta=0.1: it has no win rate"):
        select([trial("11")], SelectConfig(metric="win_rate"))


def test_seeds_of_a_setting_count_by_their_mean() -> None:
    """beta 0.1: 1.0 and 0.5, mean 0.75; beta 0.05: 0.8 twice. The spread of beta 0.1, sd 0.354 / sqrt(2) = 0.25, alone
    makes 0.05 no difference; the first seed stands for the chosen setting."""
    trials = [
        trial("1111100000", seed=1),
        trial("1111111111", seed=0),
        trial("1111111100", beta=0.05, seed=0),
        trial("1111111100", beta=0.05, seed=1),
    ]

    choice = select(trials, ACCURACY)

    assert choice.trial is trials[1]
    assert choice.why_not["beta=0.1,seed=1"] == "another seed of the chosen setting, beta=0.1"
    assert choice.why_not["beta=0.05"] == choice.why_not["beta=0.05,seed=1"]
    assert choice.why_not["beta=0.05"].startswith("accuracy 0.800 is as good as 0.750 of beta=0.1")


def test_seed_that_is_itself_outside_the_budget_does_not_stand_for_its_setting() -> None:
    """KL 12 and 6, mean 9 of at most 10: the second seed's policy is within, the first one's is not."""
    trials = [trial("1110", seed=seed, kl=estimate(kl)) for seed, kl in enumerate((12, 6))]

    assert select(trials, SelectConfig(max_kl=10)).trial is trials[1]


def test_pooled_interval_joins_the_pairs_and_the_seeds() -> None:
    """0.6 and 0.8 with halves of 0.05: mean 0.7; Student's with one degree of freedom 12.7062 * 0.1 = 1.27062; the
    root of the sum of squares is 1.27160. One seed stays as it is, and a seed without the number leaves none."""
    found = pool_estimates([estimate(0.6, 0.05), estimate(0.8, 0.05)])

    assert found is not None
    assert (found.value, found.n) == (pytest.approx(0.7), 100)
    assert found.high - found.value == pytest.approx(1.27160, abs=1e-4)
    assert found.value - found.low == pytest.approx(1.27160, abs=1e-4)
    assert pool_estimates([estimate(0.6)]) == estimate(0.6)
    assert pool_estimates([estimate(0.6), None]) is None


def test_trials_json_gives_back_what_was_written() -> None:
    """Through text, estimates, points and deviations and all."""
    measured = {name: estimate(0.1 * place) for place, name in enumerate(NUMBERS)}
    points = (Point(step=20, **measured, deviations={"kl": (0.25, -0.25), "reward": (1e-7, -1e-7)}), Point(step=40))
    whole = trial("110", seed=1, steps=40, kl=estimate(3.2), points=points)
    trials = (whole, failed(0.01))
    choice = select(trials, ACCURACY)

    read = from_dict(json.loads(json.dumps(to_dict(trials, choice, ACCURACY), allow_nan=False)))

    assert read == (trials, choice)
    assert from_dict(to_dict((), None, ACCURACY)) == ((), None)


def test_number_that_is_not_finite_is_none_in_the_file() -> None:
    """JSON has no infinity: a reward without bounds, and a KL on the way that is no number."""
    whole = trial(
        "110", reward=estimate(math.inf), points=(Point(step=20, accuracy=estimate(0.5), kl=estimate(math.nan)),)
    )

    (read,), _ = from_dict(json.loads(json.dumps(to_dict([whole], None, ACCURACY), allow_nan=False)))

    assert read == dataclasses.replace(whole, reward=None, points=(Point(step=20, accuracy=estimate(0.5)),))


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1"), (1.0, "1"), (2e-05, "2e-05"), (0.1234567, "0.1234567"), (3, "3"), ("ipo", "ipo")]
)
def test_values_are_shown_with_all_their_digits(value: float | str, text: str) -> None:
    """Two betas that differ in the seventh digit are two settings."""
    assert shown(value) == text


def test_seeds_that_failed_are_noted_of_the_winner() -> None:
    """One of two diverged: the setting counts by the other one, and the choice says so."""
    choice = select([trial("1111"), dataclasses.replace(failed(0.1), seed=1, name="beta=0.1,seed=1")], ACCURACY)

    assert choice.notes == ("1 of 2 seeds of beta=0.1 failed; the others speak for it",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"schema_version": 0}, "another schema version"), ({"trials": [{}]}, "damaged"), ({"chosen": "x"}, "damaged")],
)
def test_damaged_trials_json_is_refused(changes: dict[str, Any], message: str) -> None:
    """With what to do."""
    with pytest.raises(StoreError, match=f"{message}.*run the sweep again"):
        from_dict({**to_dict([trial("11")], None, ACCURACY), **changes})


BITS = st.text("01", min_size=6, max_size=6)


@st.composite
def sweeps(draw: st.DrawFn) -> list[Trial]:
    """Trials of up to 4 betas with up to 3 seeds each, measured on the same 6 pairs."""
    betas = draw(st.lists(st.sampled_from((0.01, 0.05, 0.1, 0.5)), min_size=1, unique=True))
    return [
        trial(draw(BITS), beta=beta, seed=seed, kl=estimate(draw(st.floats(-0.5, 9.0))))
        for beta in betas
        for seed in range(draw(st.integers(1, 3)))
    ]


@settings(max_examples=60, deadline=None)
@given(sweeps(), st.randoms(use_true_random=False))
def test_order_of_trials_changes_nothing(trials: list[Trial], order: random.Random) -> None:
    """Workers finish in any order."""
    shuffled = list(trials)
    order.shuffle(shuffled)

    assert select(shuffled, ACCURACY) == select(trials, ACCURACY)


@settings(max_examples=60, deadline=None)
@given(sweeps())
def test_failed_trial_changes_nothing_but_its_own_line(trials: list[Trial]) -> None:
    """Even where it is a seed of the chosen setting."""
    before = select(trials, ACCURACY)
    broken = dataclasses.replace(failed(0.1), name="broken")

    after = select([*trials, broken], ACCURACY)

    assert after.trial == before.trial
    assert after.why_not == {**before.why_not, "broken": "failed: NonFiniteLossError: step 3"}


@settings(max_examples=60, deadline=None)
@given(sweeps())
def test_every_loser_has_a_reason_and_the_winner_is_never_beaten_in_earnest(trials: list[Trial]) -> None:
    """Whoever is better than the winner is less careful; the budget is kept; no one is left out."""
    config = SelectConfig(max_kl=5)
    within = [setting for setting in pool(trials, "accuracy") if setting.kl is not None and setting.kl.value <= 5]
    if not within:
        with pytest.raises(RunError, match="within the budgets"):
            select(trials, config)
        return

    choice = select(trials, config)

    assert {choice.trial.name, *choice.why_not} == {each.name for each in trials}
    assert choice.trial.name not in choice.why_not
    assert all(choice.why_not.values())
    (chosen,) = [setting for setting in within if choice.trial in setting.trials]
    beta = float(chosen.trials[0].parameters["beta"])
    better = [setting for setting in within if setting.metric.value > chosen.metric.value]
    assert all(float(setting.trials[0].parameters["beta"]) < beta for setting in better)
    assert math.isfinite(chosen.spread)
