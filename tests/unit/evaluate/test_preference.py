"""Held-out preferences of sets of pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_train.errors import RunError
from dpo_train.evaluate.preference import ALL_HELDOUT, Heldout, measure
from dpo_train.evaluate.statistics import Floats, difference, wilson
from dpo_train.findings import Estimate, SetFindings

Scores = tuple[Floats, Floats]


def pairs(policy: Scores, reference: Scores | None = None, **given: object) -> Heldout:
    """Pairs of one set, each in a group of its own, of equal length."""
    count = len(policy[0])
    values: dict[str, object] = {
        "groups": [str(i) for i in range(count)],
        "sets": ["help"] * count,
        "origins": [""] * count,
        "strengths_P": np.full(count, np.nan),
        "chosen_lengths_P": np.full(count, 5.0),
        "rejected_lengths_P": np.full(count, 5.0),
        "policy": policy,
        "reference": reference or (np.zeros(count), np.zeros(count)),
        "trained_on": frozenset({"help"}),
    }
    return Heldout(**(values | given))  # type: ignore[arg-type]


def margins(values: Sequence[float]) -> Scores:
    """A policy with these margins over a reference of zeros, at beta 1."""
    return np.array(values, dtype=np.float64), np.zeros(len(values))


def random_pairs(count: int, seed: int = 0, **given: object) -> Heldout:
    generator = np.random.default_rng(seed)
    reference = (generator.normal(-50, 10, count), generator.normal(-50, 10, count))
    policy = (reference[0] + generator.normal(1, 4, count), reference[1] + generator.normal(-1, 4, count))
    lengths = {f"{who}_lengths_P": generator.integers(1, 30, count) * 1.0 for who in ("chosen", "rejected")}
    return pairs(policy, reference, strengths_P=generator.uniform(0, 3, count), **(lengths | given))


def test_rewards_margin_and_accuracy_by_hand() -> None:
    """beta 0.5; log-ratios chosen (2, -1, 1), rejected (0, 1, 1): margins 1, -1, 0; a tie is half right."""
    reference = (np.array([-10.0, -20.0, -30.0]), np.array([-11.0, -21.0, -31.0]))
    policy = (reference[0] + [2, -1, 1], reference[1] + [0, 1, 1])

    found = measure(pairs(policy, reference), beta=0.5, seed=0)

    assert found.margins_P.tolist() == [1.0, -1.0, 0.0]
    assert found.heldout.accuracy.value == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.heldout.margin.value == pytest.approx(0.0)
    assert found.heldout.chosen_reward.value == pytest.approx(0.5 * 2 / 3)
    assert found.heldout.rejected_reward.value == pytest.approx(0.5 * 2 / 3)
    assert found.heldout.accuracy.n == 3


def test_untrained_policy_is_exactly_at_chance() -> None:
    """Policy = reference: every margin is a tie, and the same model is no more likely to choose otherwise."""
    scores = (np.linspace(-5, -1, 50), np.linspace(-9, -2, 50))

    found = measure(pairs(scores, scores), beta=0.1, seed=0).heldout

    assert found.accuracy.value == 0.5
    assert found.accuracy.low <= 0.5 <= found.accuracy.high
    assert found.margin.value == 0.0
    assert found.likelihood.difference == Estimate(value=0.0, low=0.0, high=0.0, n=50)
    assert found.length_bias.correlation is None


def test_all_right_still_has_an_interval() -> None:
    """Twenty right answers in ten groups are not certainty: the bound is that of ten."""
    found = measure(pairs(margins([1.0] * 20), groups=[str(i // 2) for i in range(20)]), beta=1.0, seed=0)

    assert found.heldout.accuracy == wilson(20, 10, n=20)


def test_one_set_stands_alone() -> None:
    """There is nothing to break down, and no champion."""
    found = measure(pairs(margins([1.0, -1.0])), beta=1.0, seed=0)

    assert found.sets == ()
    assert (found.heldout.name, found.heldout.is_trained_on) == ("help", True)
    assert (found.heldout.champion, found.heldout.drop) == (None, None)


def test_set_outside_the_training_shows_its_drop() -> None:
    """Trained on a (40 of 50 right), not on b (20 of 50): held-out is a, and b drops by 0.4."""
    heldout = pairs(
        margins([1.0] * 40 + [-1.0] * 10 + [1.0] * 20 + [-1.0] * 30),
        sets=["b" if i >= 50 else "a" for i in range(100)],
        trained_on=frozenset({"a"}),
    )

    found = measure(heldout, beta=1.0, seed=0)

    a, b = found.sets
    assert (a.name, a.is_trained_on, b.name, b.is_trained_on) == ("a", True, "b", False)
    assert found.heldout == a
    assert (a.accuracy.value, a.drop) == (0.8, None)
    assert b.drop == difference(b.accuracy, a.accuracy)
    assert b.drop is not None
    assert b.drop.value == pytest.approx(-0.4)
    assert len(found.margins_P) == 100


def test_sets_that_are_trained_on_count_together() -> None:
    """a and b are, c is not: held-out are the pairs of a and b, and the drop of c is against these."""
    heldout = pairs(
        margins([1.0, 1.0, -1.0, 1.0, -1.0]), sets=["c", "b", "b", "a", "c"], trained_on=frozenset({"a", "b", "gone"})
    )

    found = measure(heldout, beta=1.0, seed=0)

    assert [part.name for part in found.sets] == ["a", "b", "c"]
    assert (found.heldout.name, found.heldout.accuracy.n) == (ALL_HELDOUT, 3)
    assert found.sets[2].drop is not None
    assert found.sets[2].drop.value == pytest.approx(1 / 2 - 2 / 3)


def test_nothing_is_trained_on() -> None:
    """Then all pairs count, and there is no drop to tell."""
    heldout = pairs(margins([1.0, -1.0]), sets=["a", "b"], trained_on=frozenset())

    found = measure(heldout, beta=1.0, seed=0)

    assert (found.heldout.name, found.heldout.is_trained_on, found.heldout.accuracy.n) == (ALL_HELDOUT, False, 2)
    assert [part.drop for part in found.sets] == [None, None]


def test_length_bias_by_hand() -> None:
    """Longer by 2, 1, 0, -1, -2 with margins 3, 1, 5, -1, -2: of four unequal pairs the policy prefers the longer in
    all, the data in two. So it is right where chosen is longer, and wrong where it is shorter."""
    heldout = pairs(
        margins([3.0, 1.0, 5.0, -1.0, -2.0]),
        chosen_lengths_P=np.array([7.0, 6, 5, 4, 3]),
        rejected_lengths_P=np.full(5, 5.0),
    )

    bias = measure(heldout, beta=1.0, seed=0).heldout.length_bias

    assert bias.prefers_longer == wilson(4, 4, n=4)
    assert bias.data_prefers_longer == wilson(2, 4, n=4)
    assert bias.chosen_longer == wilson(2, 2, n=2)
    assert bias.chosen_shorter == wilson(0, 2, n=2)
    assert bias.correlation is not None
    # Ranks of margins 4 3 5 2 1 against 5 4 3 2 1: squared differences 1 1 4 0 0.
    assert bias.correlation.value == pytest.approx(1 - 6 * 6 / (5 * 24))


def test_champion_is_compared_on_the_same_pairs() -> None:
    """Rewards over the same reference: the champion prefers chosen in the first pair only, the policy in the first
    three. By plain log-probs policy and reference prefer the same."""
    reference = (np.full(4, -10.0), np.full(4, -90.0))
    policy = (reference[0] + [1, 1, 1, -1], reference[1])
    champion = (reference[0] + [1, -1, -1, -1], reference[1])

    found = measure(pairs(policy, reference, champion=champion), beta=0.1, seed=0).heldout

    assert found.champion is not None
    assert (found.champion.better, found.champion.worse) == (2, 0)
    assert found.champion.difference.value == pytest.approx(0.5)
    assert found.champion.p_value == pytest.approx(0.5)
    assert (found.likelihood.better, found.likelihood.worse) == (0, 0)
    assert found.likelihood.difference.low < 0 < found.likelihood.difference.high


def test_slices_hold_their_own_pairs() -> None:
    """Two origins: three pairs, all right, and two, both wrong."""
    found = measure(pairs(margins([1, 2, 3, -1, -2]), origins=["x", "x", "x", "y", "y"]), beta=1.0, seed=0).heldout

    x, y = found.by_origin
    assert (x.name, x.accuracy, x.margin.value) == ("x", wilson(3, 3, n=3), 2.0)
    assert (y.name, y.accuracy, y.margin.value) == ("y", wilson(0, 2, n=2), -1.5)
    assert (found.by_length, found.by_strength) == ((), ())


def numbers(value: object) -> list[float]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [number for field in dataclasses.fields(value) for number in numbers(getattr(value, field.name))]
    if isinstance(value, tuple):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 30), per_group=st.integers(1, 30), same=st.booleans())
def test_every_number_is_finite_and_inside_its_interval(count: int, per_group: int, same: bool) -> None:
    """From a single pair on, in a single group too, and for equal models."""
    heldout = random_pairs(
        count, groups=[str(i // per_group) for i in range(count)], origins=[str(i % 3) for i in range(count)]
    )
    heldout = dataclasses.replace(heldout, champion=heldout.policy if same else heldout.reference)

    found = measure(heldout, beta=0.1, seed=0).heldout

    assert all(math.isfinite(number) for number in numbers(found))
    slices = [*found.by_origin, *found.by_length, *found.by_strength]
    estimates = [found.accuracy, found.margin, found.calibration_error, *(part.accuracy for part in slices)]
    assert all(one.low <= one.value <= one.high for one in [*estimates, *(part.margin for part in slices)])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_swapped_answers_turn_accuracy_around(seed: int) -> None:
    """With chosen and rejected swapped, accuracy a becomes 1 - a and the margin m becomes -m, bounds included."""
    heldout = random_pairs(60, seed)
    swapped = dataclasses.replace(heldout, policy=heldout.policy[::-1], reference=heldout.reference[::-1])

    before, after = (measure(one, beta=0.1, seed=0).heldout for one in (heldout, swapped))

    assert after.accuracy.value == pytest.approx(1 - before.accuracy.value)
    assert after.accuracy.low == pytest.approx(1 - before.accuracy.high, abs=1e-6)
    assert after.margin.value == pytest.approx(-before.margin.value)
    assert after.margin.high == pytest.approx(-before.margin.low)


def renamed(heldout: Heldout) -> SetFindings:
    groups = [f"other {group}" for group in heldout.groups]
    return measure(dataclasses.replace(heldout, groups=groups), beta=0.1, seed=0).heldout


def test_names_of_groups_change_nothing() -> None:
    """All findings are equal to the bit."""
    heldout = random_pairs(40, groups=[str(99 - i // 2) for i in range(40)])

    assert renamed(heldout) == measure(heldout, beta=0.1, seed=0).heldout


def test_log_probs_that_are_not_finite_are_refused() -> None:
    """They would be no wrong answers, but no numbers at all."""
    heldout = random_pairs(20)
    heldout.policy[1][3] = math.nan

    with pytest.raises(RunError, match=r"policy are not finite. Got: 1 of 20 held-out pairs, the first being number 3"):
        measure(heldout, beta=0.1, seed=0)
