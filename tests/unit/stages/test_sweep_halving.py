"""Who goes on at which rung. Numbers by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from dpo_train.stages.sweep_halving import pause_step, ranked, rungs


def test_eight_settings_halved_cost_two_and_a_half_trainings() -> None:
    """8 to 1/8, 4 to 1/4, 2 to 1/2, 1 to the end: 8/8 + 4/8 + 2/4 + 1/2."""
    plan = rungs(8, 2)

    assert [(rung.end, rung.keep) for rung in plan] == [
        (Fraction(1, 8), 4), (Fraction(1, 4), 2), (Fraction(1, 2), 1), (Fraction(1), 1),
    ]  # fmt: skip
    sizes, ends = [8, 4, 2, 1], [0, *(rung.end for rung in plan)]
    assert sum(size * (end - before) for size, before, end in zip(sizes, ends, ends[1:], strict=False)) == Fraction(
        5, 2
    )


@pytest.mark.parametrize(
    ("count", "factor", "keeps"), [(5, 2, [3, 2, 1, 1]), (9, 3, [3, 1, 1]), (1, 2, [1]), (4, None, [4])]
)
def test_odd_numbers_are_rounded_up_and_without_a_factor_all_go_to_the_end(
    count: int, factor: int | None, keeps: list[int]
) -> None:
    """Half of five is three; the last rung ends at the whole length."""
    plan = rungs(count, factor)

    assert [rung.keep for rung in plan] == keeps
    assert plan[-1].end == 1
    assert all(before.end < after.end for before, after in itertools.pairwise(plan))


def test_parts_are_pauses_at_which_all_that_are_there_go_on() -> None:
    """Quarters of four settings that are halved: a quarter and a half are rungs already, at three quarters one is
    left. Without halving all four pause at each."""
    ends = [Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1)]

    assert [(rung.end, rung.keep) for rung in rungs(4, 2, 4)] == list(zip(ends, [2, 1, 1, 1], strict=True))
    assert [(rung.end, rung.keep) for rung in rungs(4, None, 4)] == [(end, 4) for end in ends]
    assert [(rung.end, rung.keep) for rung in rungs(4, 2, 3)] == [
        (Fraction(1, 4), 2), (Fraction(1, 3), 2), (Fraction(1, 2), 1), (Fraction(2, 3), 1), (Fraction(1), 1),
    ]  # fmt: skip


def test_a_training_pauses_after_its_share_of_steps_and_never_before_the_first() -> None:
    """An eighth of 100 steps is 12.5, to the even 12; an eighth of three is still one; the last rung has no pause."""
    assert pause_step(100, Fraction(1, 8)) == 12
    assert pause_step(3, Fraction(1, 8)) == 1
    assert pause_step(100, Fraction(1)) is None


def test_the_best_go_first_and_ties_to_the_more_careful() -> None:
    """Accuracy upwards, the loss downwards; of equal ones the larger beta, then the smaller learning rate."""
    settings = [{"beta": beta, "learning_rate": rate} for beta in (0.1, 0.5) for rate in (1e-4, 1e-5)]
    names = ["beta=0.1,learning_rate=0.0001", "beta=0.1,learning_rate=1e-05"]
    names += ["beta=0.5,learning_rate=0.0001", "beta=0.5,learning_rate=1e-05"]

    assert ranked(dict.fromkeys(names, 0.7), settings, "rewards/accuracy") == names[::-1]
    values = dict(zip(names, (0.9, 0.1, 0.5), strict=False))  # the fourth has failed
    assert ranked(values, settings, "rewards/accuracy") == [names[0], names[2], names[1]]
    assert ranked(values, settings, "loss") == [names[1], names[2], names[0]]


def test_what_is_over_a_budget_comes_last_however_good() -> None:
    """And among those the better one first."""
    settings = [{"beta": beta} for beta in (0.1, 0.2, 0.5)]
    values = {"beta=0.1": 0.9, "beta=0.2": 0.8, "beta=0.5": 0.6}

    assert ranked(values, settings, "rewards/accuracy", {"beta=0.1", "beta=0.2"}) == [
        "beta=0.5",
        "beta=0.1",
        "beta=0.2",
    ]
