"""Intervals over groups of pairs, differences of two models, rank correlation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_train.evaluate.statistics import (
    Floats,
    Means,
    cluster_bootstrap,
    cluster_share,
    difference,
    equal_mass,
    number_groups,
    paired,
    sign_flip,
    spearman,
    student_95,
    wilson,
)
from dpo_train.findings import Estimate, Paired

Z = 1.959963984540054


def each_alone(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def test_bootstrap_interval_of_independent_values_is_the_normal_one() -> None:
    """For 400 values the percentile interval is the mean -+ 1.96 standard errors, to a few per cent."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)

    found = cluster_bootstrap(values, each_alone(400), seed=0)

    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_copies_within_a_group_do_not_narrow_the_interval() -> None:
    """Every value four times in one group: the same bounds as without the copies; only the pairs are counted."""
    values = np.random.default_rng(2).normal(size=100)
    groups = each_alone(100)

    once = cluster_bootstrap(values, groups, seed=0)
    four = cluster_bootstrap(np.repeat(values, 4), [g for g in groups for _ in range(4)], seed=0)

    assert (four.low, four.high) == pytest.approx((once.low, once.high))
    assert (once.n, four.n) == (100, 400)


def test_interval_is_seeded() -> None:
    """The same seed gives the same bounds to the bit; another seed does not."""
    values = np.random.default_rng(3).normal(size=30)

    assert cluster_bootstrap(values, each_alone(30), seed=4) == cluster_bootstrap(values, each_alone(30), seed=4)
    assert cluster_bootstrap(values, each_alone(30), seed=4) != cluster_bootstrap(values, each_alone(30), seed=5)


@settings(max_examples=10, deadline=None)
@given(names=st.permutations(range(12)))
def test_names_of_groups_change_nothing(names: list[int]) -> None:
    """Twelve groups of two pairs under other names: the same bounds to the bit."""
    values = np.random.default_rng(6).normal(size=24)

    before = cluster_bootstrap(values, [str(i // 2) for i in range(24)], seed=0)
    after = cluster_bootstrap(values, [f"group {names[i // 2]}" for i in range(24)], seed=0)

    assert before == after


def coverage(draw: Callable[[np.random.Generator], Floats], truth: float, group_P: np.ndarray, kind: str) -> float:
    """How many of 1,000 intervals, each over new data, hold the truth."""
    generator = np.random.default_rng(7)
    columns = {str(i): draw(generator) for i in range(1000)}
    means = Means(columns, group_P, seed=0)
    found: list[Estimate] = [getattr(means, kind)(name) for name in columns]
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in found]))


@pytest.mark.parametrize("groups", [3, 9, 10, 30, 100])
def test_interval_of_a_mean_holds_the_truth_as_often_as_it_says(groups: int) -> None:
    """Normal values, three of each group, which share half their variance: 95 % for three groups as for a hundred.

    1,000 intervals scatter by 0.7 %. The plain percentile interval would hold it in 90 % of the cases with 10 groups.
    """

    def draw(generator: np.random.Generator) -> Floats:
        return (generator.normal(1.0, 1.0, size=(groups, 1)) + generator.normal(size=(groups, 3))).ravel()

    assert 0.93 <= coverage(draw, 1.0, np.repeat(np.arange(groups), 3), "mean") <= 0.97


@pytest.mark.parametrize(("share", "groups"), [(0.7, 20), (0.7, 100), (0.95, 100), (0.5, 9)])
def test_interval_of_a_share_holds_the_truth_as_often_as_it_says(share: float, groups: int) -> None:
    """Also near 1, where few are wrong, and over nine groups. Counts are discrete, so that 95 % cannot be hit."""

    def draw(generator: np.random.Generator) -> Floats:
        return (generator.random(groups) < share).astype(np.float64)

    assert coverage(draw, share, np.arange(groups), "share") >= 0.93


def test_wilson_interval_by_hand() -> None:
    """10 of 10: the lower bound is n / (n + z^2) = 10 / 13.84."""
    found = wilson(10, 10, n=10)

    assert found.value == 1.0
    assert found.low == pytest.approx(10 / (10 + Z**2))
    assert found.high == pytest.approx(1.0)


@pytest.mark.parametrize("wrong", [0, 1, 9])
def test_share_with_few_wrong_groups_is_wilsons(wrong: int) -> None:
    """Of 100 groups of two pairs up to nine hold a wrong pair: the interval is Wilson's over 100 groups."""
    values = np.ones(200)
    values[: 2 * wrong : 2] = 0.0

    found = cluster_share(values, [str(i // 2) for i in range(200)], seed=0)

    assert found == wilson(200 - wrong, 100, n=200)


def test_group_that_holds_half_of_all_pairs_counts_as_what_it_tells() -> None:
    """39 groups of one pair and one of 39, all right: (39 + 39)^2 / (39 + 39^2) = 3.9 groups of one size. The bound of
    40 groups, 0.912, would be far too good; Wilson's of 3.9 is 3.9 / (3.9 + 1.96^2)."""
    groups = [str(i) for i in range(39)] + ["large"] * 39

    found = cluster_share(np.ones(78), groups, seed=0)

    assert found.low == pytest.approx(3.9 / (3.9 + 1.959964**2))
    assert (found.value, found.high, found.n) == (1.0, 1.0, 78)


def test_share_with_many_of_both_is_resampled() -> None:
    """Ten groups right and ten wrong."""
    values = np.repeat([0.0, 1.0], 10)

    assert cluster_share(values, each_alone(20), seed=0) == cluster_bootstrap(values, each_alone(20), seed=0)


def test_three_groups_have_students_interval() -> None:
    """Means 1, 2, 3 of three groups: standard error 1 / sqrt(3), t of two degrees of freedom 4.3027."""
    found = cluster_bootstrap(np.array([1.0, 2.0, 3.0]), each_alone(3), seed=0)

    assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.3027 / math.sqrt(3))


def test_one_group_says_little() -> None:
    """Two pairs of one group with the mean 2: 2 -+ 9.68 x 2, whatever their own spread."""
    found = cluster_bootstrap(np.array([1.0, 3.0]), ["a", "a"], seed=0)

    assert (found.low, found.high) == pytest.approx((2 - 19.36, 2 + 19.36))


def test_nan_is_outside_the_column() -> None:
    """The mean of 1 and 2 of three groups, the third being outside: that of two groups."""
    means = Means({"all": np.array([1.0, 2.0, 9.0]), "two": np.array([1.0, 2.0, np.nan])}, np.arange(3), seed=0)

    assert (means.n("all"), means.n("two")) == (3, 2)
    assert means.mean("two") == cluster_bootstrap(np.array([1.0, 2.0]), ["a", "b"], seed=0)


def test_column_beside_others_has_the_interval_it_has_alone() -> None:
    """All columns of a set share the resamples."""
    values = np.random.default_rng(8).normal(size=(2, 40))

    together = Means({"a": values[0], "b": values[1]}, np.arange(40), seed=3)

    for name, column in zip("ab", values, strict=True):
        alone = cluster_bootstrap(column, each_alone(40), seed=3)
        assert (together.mean(name).low, together.mean(name).high) == pytest.approx((alone.low, alone.high))


def test_difference_of_independent_estimates_by_hand() -> None:
    """0.9 [0.8, 0.95] - 0.6 [0.56, 0.63]: below sqrt(0.1^2 + 0.03^2), above sqrt(0.05^2 + 0.04^2)."""
    found = difference(Estimate(value=0.9, low=0.8, high=0.95, n=50), Estimate(value=0.6, low=0.56, high=0.63, n=70))

    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - math.sqrt(0.0109))
    assert found.high == pytest.approx(0.3 + math.sqrt(0.0041))
    assert found.n == 50


def compare(differences: Floats) -> Paired:
    groups = np.arange(len(differences))
    return paired(differences, groups, Means({"": differences}, groups, seed=0).mean(""))


def test_no_difference_leaves_room_for_some() -> None:
    """100 pairs on which both models agree: 0 -+ z^2 / (100 + z^2) = 3.7 %, p = 1."""
    found = compare(np.zeros(100))

    assert found.difference.value == 0.0
    assert (found.difference.low, found.difference.high) == pytest.approx((-(Z**2) / (100 + Z**2), Z**2 / (100 + Z**2)))
    assert (found.p_value, found.better, found.worse) == (1.0, 0, 0)


def test_one_loss_looks_worse_than_none() -> None:
    """The lower bound falls with each loss, and makes no leap where resampling takes over at ten."""
    bounds = [compare(-np.repeat([1.0, 0.0], [losses, 100 - losses])).difference.low for losses in range(11)]

    assert all(after < before for before, after in itertools.pairwise(bounds[:10]))
    assert bounds[10] == pytest.approx(bounds[9], abs=0.015)


@pytest.mark.parametrize(("better", "worse"), [(0.0, 0.02), (0.02, 0.05), (0.1, 0.2)])
def test_interval_of_a_difference_holds_the_truth_as_often_as_it_says(better: float, worse: float) -> None:
    """300 times 100 pairs; where one pair in fifty differs, resampling alone holds it in 87 % of the cases."""
    generator = np.random.default_rng(9)
    draws = generator.random((300, 100))
    columns = {str(i): (draw < better) * 1.0 - (draw > 1 - worse) for i, draw in enumerate(draws)}
    means = Means(columns, np.arange(100), seed=0)

    found = [paired(column, np.arange(100), means.mean(name)).difference for name, column in columns.items()]

    assert np.mean([one.low <= better - worse <= one.high for one in found]) >= 0.93


def test_p_value_of_single_pairs_is_the_sign_tests() -> None:
    """Better on 8 and worse on 2 of 10: 2 x (1 + 10 + 45) / 1024."""
    assert sign_flip(np.repeat([1.0, -1.0], [8, 2])) == pytest.approx(2 * 56 / 1024)


def test_p_value_counts_groups() -> None:
    """Eight pairs of one group, all better, are one coin: p = 1. In eight groups they are eight: 2 / 256."""
    assert sign_flip(np.array([8.0])) == 1.0
    assert sign_flip(np.ones(8)) == pytest.approx(2 / 256)


@settings(max_examples=60, deadline=None)
@given(units=st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_p_value_is_that_of_all_signs(units: list[int]) -> None:
    """Enumerated: the share of the 2^G sign patterns whose total is at least as far from 0."""
    sums = np.array(units) / 2
    totals = [abs(float(np.dot(signs, sums))) for signs in itertools.product([1, -1], repeat=len(units))]

    assert sign_flip(sums) == pytest.approx(np.mean(np.array(totals) >= abs(sums.sum())))


def test_p_values_are_even_where_there_is_no_difference() -> None:
    """Of 400 samples of 60 groups of up to three pairs about 5 % come out below 0.05, and never clearly more."""
    generator = np.random.default_rng(10)
    sums = generator.integers(-1, 2, size=(400, 60)) * generator.integers(1, 4, size=(400, 60))

    below = np.mean([sign_flip(row.astype(np.float64)) < 0.05 for row in sums])

    assert 0.02 <= below <= 0.08


def test_p_value_of_many_groups_is_the_normal_one() -> None:
    """5,100 better and 4,900 worse of 10,000: z = (200 - 1) / 100 with the continuity correction, for steps of 2."""
    assert sign_flip(np.repeat([1.0, -1.0], [5100, 4900])) == pytest.approx(math.erfc(1.99 / math.sqrt(2)), rel=1e-3)


def test_rank_correlation_by_hand() -> None:
    """Ranks 1 2 3 4 against 1 2 4 3: 1 - 6 x 2 / (4 x 15) = 0.8. Values between them do not matter."""
    found = spearman(np.array([1.0, 10.0, 11.0, 99.0]), np.array([-3.0, -2.0, 7.0, 0.0]), np.arange(4), seed=0)

    assert found is not None
    assert found.value == pytest.approx(0.8)
    assert (found.low, found.high, found.n) == (-1.0, 1.0, 4)


def test_equal_values_share_a_rank() -> None:
    """1 1 2 against 1 2 3: mid-ranks 1.5 1.5 3 and 1 2 3, correlation 1.5 / sqrt(1.5 x 2)."""
    found = spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]), np.arange(3), seed=0)

    assert found is not None
    assert found.value == pytest.approx(1.5 / math.sqrt(3))


def test_what_never_varies_has_no_rank_correlation() -> None:
    """All lengths equal."""
    assert spearman(np.arange(20.0), np.full(20, 3.0), np.arange(20), seed=0) is None


@pytest.mark.parametrize(("correlation", "count"), [(0.0, 40), (0.6, 40)])
def test_interval_of_a_rank_correlation_holds_the_truth(correlation: float, count: int) -> None:
    """150 samples of normal pairs, whose rank correlation is 6 / pi x arcsin(r / 2)."""
    generator = np.random.default_rng(11)
    truth = 6 / math.pi * math.asin(correlation / 2)
    hits = 0
    for _ in range(150):
        first, noise = generator.normal(size=(2, count))
        second = correlation * first + math.sqrt(1 - correlation**2) * noise
        found = spearman(first, second, np.arange(count), seed=0)
        hits += found is not None and found.low <= truth <= found.high

    assert hits / 150 >= 0.91


def test_rank_correlation_resamples_groups() -> None:
    """Every pair four times in its group: the same interval as once."""
    first, second = np.random.default_rng(12).normal(size=(2, 50))

    once = spearman(first, second, np.arange(50), seed=0)
    four = spearman(np.repeat(first, 4), np.repeat(second, 4), np.repeat(np.arange(50), 4), seed=0)

    assert once is not None
    assert four is not None
    assert (four.value, four.low, four.high) == pytest.approx((once.value, once.low, once.high))


def test_bins_of_equal_mass() -> None:
    """Eight values in four bins of two, in the order of values; equal ones stay together."""
    assert equal_mass(np.array([8.0, 7, 6, 5, 4, 3, 2, 1]), 4).tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    assert equal_mass(np.array([0.5, 0.5, 0.5, 0.9]), 4).tolist() == [0, 0, 0, 1]
    assert equal_mass(np.array([0.5, 0.5]), 10).tolist() == [0, 0]


def test_groups_are_numbered_as_they_appear() -> None:
    """Not by name."""
    assert number_groups(["z", "a", "z", "m"]).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (4, 2.7764), (8, 2.3060), (9, 2.2622), (30, 2.0423)])
def test_students_quantile(freedom: int, expected: float) -> None:
    """As tables have it."""
    assert student_95(freedom) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("freedom", "expected"), [(1.5, 6.0167), (2.3, 3.8072), (5.5, 2.5019)])
def test_students_quantile_between_whole_numbers(freedom: float, expected: float) -> None:
    """By the incomplete beta function: on the careful side, by at most 3 %."""
    assert expected < student_95(freedom) < 1.03 * expected
