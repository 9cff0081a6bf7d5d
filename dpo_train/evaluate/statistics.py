"""Means, shares, differences and correlations over pairs that come in groups, with 95 % intervals.

Pairs of one group (answers to the same prompt) are not independent, so groups are what is resampled and counted. Where
resampling sees too little spread, because few groups hold what is counted, a closed form takes its place.

P: pairs, G: groups, R: resamples, K: columns, U: different values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from dpo_train.findings import Estimate, Paired

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RESAMPLES = 10_000
RANK_RESAMPLES = 2_000
"""Ranks are made anew in every resample. The bounds then scatter by 3 % of half the interval, instead of 1.4 %."""
FEW_GROUPS = 10
"""Below it the percentiles of resamples are no interval: a share of 0 of 9 would have the width 0."""
Z_95 = 1.959963984540054

_CELLS = 2_000_000  # of a block of resamples: 16 MB as float64
_T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""Student's two-sided 95 % quantiles, 1 to 9 degrees of freedom."""
_ONE_VALUE_95 = 9.68


def number_groups(groups: Sequence[str]) -> Ints:
    """[P] the number of each pair's group, by first appearance: names change nothing, not even the resamples."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


class Means:
    """Means of several columns over the same resamples."""

    def __init__(self, columns: Mapping[str, Floats], group_P: Ints, *, seed: int) -> None:
        """Args:
        columns: by name values [P]; NaN where a pair does not belong to the column.
        group_P: from ``number_groups``.
        """
        self._index = {name: i for i, name in enumerate(columns)}
        values_PK = np.stack(list(columns.values()), axis=1)
        is_there_PK = ~np.isnan(values_PK)
        self._n_K = is_there_PK.sum(0)
        self._sums_GK = _group_sums(np.where(is_there_PK, values_PK, 0.0), group_P)
        self._sizes_GK = _group_sums(is_there_PK.astype(np.float64), group_P)
        self._means_RK = self._resample(seed)

    def _resample(self, seed: int) -> Floats:
        # Many columns hold the same pairs: their sizes are resampled once.
        sizes_GU, size_K = np.unique(self._sizes_GK, axis=1, return_inverse=True)
        both = np.concatenate([self._sums_GK, sizes_GU], axis=1)
        totals = np.concatenate([weights_RG @ both for weights_RG in _weights(len(both), RESAMPLES, seed)])
        sums_RK, sizes_RK = totals[:, : len(size_K)], totals[:, len(size_K) + size_K]
        # A resample may hold no pair of a small slice; it then says nothing, and stands at the mean.
        means_RK = np.broadcast_to(self._sums_GK.sum(0) / np.maximum(self._n_K, 1), sums_RK.shape).copy()
        np.divide(sums_RK, sizes_RK, out=means_RK, where=sizes_RK > 0)
        return means_RK

    def n(self, name: str) -> int:
        """Pairs that belong to a column."""
        return int(self._n_K[self._index[name]])

    def value(self, name: str) -> float:
        """The mean of a column."""
        k = self._index[name]
        return float(self._sums_GK[:, k].sum() / self._n_K[k])

    def replicates(self, name: str) -> Floats:
        """[R] the means of a column over the resamples."""
        return self._means_RK[:, self._index[name]]

    def mean(self, name: str) -> Estimate:
        """Of any numbers. Under ``FEW_GROUPS`` groups by Student's t over groups."""
        value = self.value(name)
        sums_G, sizes_G = self._groups(name)
        if len(sizes_G) >= FEW_GROUPS:
            low, high = percentiles(self.replicates(name), len(sizes_G))
        else:
            low, high = _few_groups(value, sums_G, sizes_G)
        return Estimate(value=value, low=low, high=high, n=self.n(name))

    def share(self, name: str) -> Estimate:
        """Of numbers between 0 and 1. Wilson's interval over groups where under ``FEW_GROUPS`` groups hold anything
        above 0, or anything below 1."""
        sums_G, sizes_G = self._groups(name)
        if min(np.count_nonzero(sums_G > 0), np.count_nonzero(sums_G < sizes_G)) < FEW_GROUPS:
            return wilson(float(sums_G.sum()), effective_groups(sizes_G), n=self.n(name))
        return self.mean(name)

    def _groups(self, name: str) -> tuple[Floats, Floats]:
        k = self._index[name]
        is_there_G = self._sizes_GK[:, k] > 0
        return self._sums_GK[is_there_G, k], self._sizes_GK[is_there_G, k]


def cluster_bootstrap(values_P: Floats, groups: Sequence[str], *, seed: int) -> Estimate:
    """The mean of numbers, by ``Means.mean``."""
    return Means({"": values_P}, number_groups(groups), seed=seed).mean("")


def cluster_share(values_P: Floats, groups: Sequence[str], *, seed: int) -> Estimate:
    """The mean of numbers between 0 and 1, by ``Means.share``."""
    return Means({"": values_P}, number_groups(groups), seed=seed).share("")


def percentiles(replicates_R: Floats, num_groups: int) -> tuple[float, float]:
    """The 95 % percentile interval, expanded for few groups (Hesterberg, arXiv 1411.5279, section 4.2): it is as wide
    as Student's instead of the normal distribution's, and makes up for the resamples' variance, (G - 1) / G too small.

    With 10 groups the levels are 0.9 % and 99.1 %; from 1,000 on they are 2.5 % and 97.5 %.
    """
    freedom = num_groups - 1
    level = NormalDist().cdf(-student_95(freedom) * math.sqrt(num_groups / freedom))
    low, high = np.quantile(replicates_R, [level, 1 - level])
    return float(low), float(high)


def student_95(freedom: float) -> float:
    """Student's two-sided 95 % quantile, of at least one degree of freedom; from 9 on by Cornish and Fisher's
    expansion, right to 0.2 %; between whole numbers below its logarithm is nearly straight in 1 / freedom."""
    if freedom < len(_T_95):
        below = int(freedom)
        share = (1 / below - 1 / freedom) * below * (below + 1)
        return float(_T_95[below - 1] ** (1 - share) * _T_95[below] ** share)
    z = Z_95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def effective_groups(sizes_G: Floats) -> float:
    """How many groups of one size say as much as groups of these sizes, where pairs of a group all say the same
    (Kish 1965): (sum of sizes)^2 / sum of squared sizes. Of 40 groups of which one holds half of all pairs, about 4."""
    return float(sizes_G.sum() ** 2 / np.square(sizes_G).sum())


def wilson(successes: float, trials: float, *, n: int) -> Estimate:
    """Wilson's score interval (1927) of a proportion over ``trials`` independent groups; ``n`` is what is reported."""
    share = min(1.0, successes / n)
    centre = (share + Z_95**2 / (2 * trials)) / (1 + Z_95**2 / trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2)) / (1 + Z_95**2 / trials)
    # At both ends the bound is exact, where rounding would leave 3e-17.
    low, high = (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)
    return Estimate(value=share, low=max(0.0, low), high=min(1.0, high), n=n)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """First minus second of two independent estimates, from their own intervals (Zou and Donner 2008,
    doi 10.1002/sim.3095): right where an interval is lopsided, as of shares near 0 and 1."""
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value=value, low=low, high=high, n=first.n)


def paired(differences_P: Floats, group_P: Ints, resampled: Estimate) -> Paired:
    """Two models on the same pairs.

    Args:
        differences_P: of being right (1), wrong (0) or undecided between both answers (0.5), first minus second model.
        group_P: from ``number_groups``.
        resampled: the mean of ``differences_P`` by ``Means.mean``. Where under ``FEW_GROUPS`` groups differ, the
            interval is instead that of two rare events, better and worse, by Wilson: 100 pairs without any difference
            leave room for 3.7 % either way.
    """
    n, num_groups = len(differences_P), effective_groups(np.bincount(group_P).astype(np.float64))
    found = resampled
    if np.count_nonzero(_sums(np.abs(differences_P), group_P)) < FEW_GROUPS:
        better, worse = (float(np.maximum(sign * differences_P, 0).sum()) for sign in (1, -1))
        found = difference(wilson(better, num_groups, n=n), wilson(worse, num_groups, n=n))
    return Paired(
        difference=found,
        p_value=sign_flip(_sums(differences_P, group_P)),
        better=int(np.count_nonzero(differences_P > 0)),
        worse=int(np.count_nonzero(differences_P < 0)),
    )


def sign_flip(sums_G: Floats) -> float:
    """Two-sided p-value of "no difference": how often the total is as far from 0 when every group's sum, a multiple of
    0.5, has a random sign. Exact for any number of groups; over groups of one pair it is the sign test."""
    units_G = np.rint(2 * sums_G).astype(np.int64)
    sizes_G = np.abs(units_G[units_G != 0])
    if not len(sizes_G):
        return 1.0
    unit = int(np.gcd.reduce(sizes_G))
    total, observed = int(sizes_G.sum()) // unit, abs(int(units_G.sum())) // unit
    chances = np.ones(1)  # of the sum of the sizes with a plus; there are total + 1 such sums
    for size, count in zip(*np.unique(sizes_G // unit, return_counts=True), strict=True):
        plus = np.zeros(size * count + 1)
        plus[::size] = _fair_binomial(int(count))
        chances = np.convolve(chances, plus)
    is_as_far = np.abs(2 * np.arange(total + 1) - total) >= observed
    return min(1.0, float(chances[is_as_far].sum()))


def spearman(first_P: Floats, second_P: Floats, group_P: Ints, *, seed: int) -> Estimate | None:
    """Spearman's rank correlation; None where one of both is the same everywhere.

    Under ``FEW_GROUPS`` groups the interval is all of -1 to 1.
    """
    if np.ptp(first_P) == 0 or np.ptp(second_P) == 0:
        return None
    value = float(_rank_correlations(first_P, second_P, np.ones((1, len(first_P))))[0])
    num_groups = int(group_P.max()) + 1
    low, high = -1.0, 1.0
    if num_groups >= FEW_GROUPS:
        blocks = _weights(num_groups, RANK_RESAMPLES, seed, width=len(first_P))
        found = [_rank_correlations(first_P, second_P, weights_RG[:, group_P]) for weights_RG in blocks]
        low, high = percentiles(np.concatenate(found), num_groups)
    return Estimate(value=value, low=low, high=high, n=len(first_P))


def equal_mass(values_P: Floats, num_bins: int) -> Ints:
    """[P] the bin of each value, 0 and up in the order of values: about as many in each, equal values together."""
    inner = np.quantile(values_P, np.arange(1, num_bins) / num_bins, method="inverted_cdf")
    _, bin_P = np.unique(np.searchsorted(np.unique(inner), values_P), return_inverse=True)
    return bin_P.astype(np.int64)


def _group_sums(values_PK: Floats, group_P: Ints) -> Floats:
    order = np.argsort(group_P, kind="stable")
    starts = np.searchsorted(group_P[order], np.arange(int(group_P.max()) + 1))
    sums_GK: Floats = np.add.reduceat(values_PK[order], starts, axis=0)
    return sums_GK


def _sums(values_P: Floats, group_P: Ints) -> Floats:
    return _group_sums(values_P[:, None], group_P)[:, 0]


def _weights(num_groups: int, resamples: int, seed: int, *, width: int = 0) -> Iterator[Floats]:
    """Blocks [r, G] of how often each resample holds each group. ``width``: of what the caller makes of a row."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, _CELLS // max(num_groups, width))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        picks = generator.integers(0, num_groups, size=(count, num_groups))
        picks += num_groups * np.arange(count)[:, None]
        yield np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape).astype(np.float64)


def _few_groups(value: float, sums_G: Floats, sizes_G: Floats) -> tuple[float, float]:
    """Student's interval of a ratio of sums over groups. One group shows no spread at all; then the interval that
    covers a normal mean of any variance from a single value (Wall, Boen and Tweedie 2001)."""
    num_groups = len(sizes_G)
    if num_groups == 1:
        half = _ONE_VALUE_95 * abs(value)
    else:
        residuals_G = sums_G - value * sizes_G
        variance = num_groups / (num_groups - 1) * float((residuals_G**2).sum()) / float(sizes_G.sum()) ** 2
        half = student_95(num_groups - 1) * math.sqrt(variance)
    return value - half, value + half


def _fair_binomial(count: int) -> Floats:
    """[count + 1] the chances of 0 to ``count`` heads."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    chances: Floats = np.exp(logs[-1] - logs - logs[::-1] - count * math.log(2))
    return chances


def _rank_correlations(first_P: Floats, second_P: Floats, weights_RP: Floats) -> Floats:
    """[R] of pairs that count ``weights_RP`` times; 0 where a resample holds one value only."""
    first_RP, second_RP = _ranks(first_P, weights_RP), _ranks(second_P, weights_RP)
    covariance_R = (weights_RP * first_RP * second_RP).sum(1)
    spread_R = np.sqrt((weights_RP * first_RP**2).sum(1) * (weights_RP * second_RP**2).sum(1))
    found_R: Floats = np.divide(covariance_R, spread_R, out=np.zeros(len(spread_R)), where=spread_R > 0)
    return found_R


def _ranks(values_P: Floats, weights_RP: Floats) -> Floats:
    """[R, P] mid-ranks minus their mean; equal values share a rank."""
    _, value_P = np.unique(values_P, return_inverse=True)
    order = np.argsort(value_P, kind="stable")
    starts = np.searchsorted(value_P[order], np.arange(int(value_P.max()) + 1))
    counts_RU = np.add.reduceat(weights_RP[:, order], starts, axis=1)
    ends_RU = counts_RU.cumsum(1)
    return (ends_RU - counts_RU / 2 - ends_RU[:, -1:] / 2)[:, value_P]
