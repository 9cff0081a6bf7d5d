"""Held-out preferences: accuracy and margin of the implicit reward, with confidence intervals.

P: pairs, G: groups, R: resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo_train.artifacts import Estimate

Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
Z_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Estimates over held-out pairs, and what they came from."""

    accuracy: Estimate
    margin: Estimate
    chosen_reward: Estimate
    rejected_reward: Estimate
    margins_P: Floats


def measure(
    policy: tuple[Floats, Floats], reference: tuple[Floats, Floats], groups: Sequence[str], *, beta: float, seed: int
) -> Preferences:
    """Accuracy (ties count half), margin and rewards.

    Args:
        policy: summed log-probs of the chosen and of the rejected answers, float64 [P] each.
        reference: the same under the reference.
        groups: for each pair the group it belongs to. Pairs of one group are not independent, so intervals resample
            groups (cluster bootstrap).
        beta: of the training, in reward = beta * log(policy / reference).
        seed: of the resampling.
    """
    chosen_P, rejected_P = (beta * (p - r) for p, r in zip(policy, reference, strict=True))
    margins_P = chosen_P - rejected_P
    right_P = (margins_P > 0) + 0.5 * (margins_P == 0)
    values = {"accuracy": right_P, "margin": margins_P, "chosen_reward": chosen_P, "rejected_reward": rejected_P}
    estimates = {name: cluster_bootstrap(value, groups, seed=seed) for name, value in values.items()}
    if len(set(right_P.tolist())) == 1:
        # All right or all wrong: resampling sees no spread, though the next pair might differ.
        estimates["accuracy"] = wilson(float(right_P.sum()), len(set(groups)), n=len(right_P))
    return Preferences(margins_P=margins_P, **estimates)


def cluster_bootstrap(values_P: Floats, groups: Sequence[str], *, seed: int) -> Estimate:
    """Mean with its 95 % percentile interval over resampled groups."""
    _, group_P = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums_G = np.bincount(group_P, weights=values_P)
    sizes_G = np.bincount(group_P).astype(np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):  # 500 resamples of 10,000 groups are 40 MB
        picks_RG = generator.integers(0, len(sums_G), size=(min(500, RESAMPLES - start), len(sums_G)))
        means[start : start + 500] = sums_G[picks_RG].sum(1) / sizes_G[picks_RG].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value=float(values_P.mean()), low=float(low), high=float(high), n=len(values_P))


def wilson(successes: float, trials: int, *, n: int) -> Estimate:
    """Wilson's score interval (1927) of a proportion over ``trials`` independent groups; ``n`` is what is reported."""
    share = min(1.0, successes / n)
    centre = (share + Z_95**2 / (2 * trials)) / (1 + Z_95**2 / trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2)) / (1 + Z_95**2 / trials)
    return Estimate(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n)
