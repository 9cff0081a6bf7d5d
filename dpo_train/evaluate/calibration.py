"""Calibration: whether the policy is right as often as its own margins say.

Bradley-Terry gives the answer with the larger reward the probability sigmoid(|margin|), the confidence. A confidence
of 0.7 is calibrated if 70 % of such pairs are right.

P: pairs, N: bins, R: resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpo_train.evaluate.statistics import FEW_GROUPS, Floats, Ints, Means, equal_mass, percentiles
from dpo_train.findings import Bin, Estimate

MAX_BINS = 10
PAIRS_PER_BIN = 50
"""The error of a bin of 50 pairs scatters by 7 %, all of which an expected error counts as error."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The bars of the reliability plot, and what the resampling needs for the error."""

    bins: tuple[Bin, ...]
    gaps: dict[str, Floats]
    """By bin [P] right minus confidence, 0 outside: the error is the sum of the absolute means of these columns."""

    def error(self, means: Means, group_P: Ints) -> Estimate:
        """The expected calibration error, from resampled means of ``gaps``.

        An absolute value is never below 0, so noise makes it larger: the errors of all resamples of a calibrated model
        lie above 0. So the lower bound takes off what noise alone adds up to, the sum of the absolute deviations of the
        bins. Under ``FEW_GROUPS`` groups the interval is all of 0 to 1.
        """
        value = sum(abs(means.value(name)) for name in self.gaps)
        num_groups = int(group_P.max()) + 1
        low, high = 0.0, 1.0
        if num_groups >= FEW_GROUPS:
            means_RN = np.stack([means.replicates(name) for name in self.gaps], axis=1)
            noise_RN = means_RN - [means.value(name) for name in self.gaps]
            _, noise = percentiles(np.abs(noise_RN).sum(1), num_groups)
            _, top = percentiles(np.abs(means_RN).sum(1), num_groups)
            low, high = max(0.0, value - noise), max(value, top)
        return Estimate(value=value, low=low, high=high, n=len(group_P))


def calibrate(margins_P: Floats, right_P: Floats) -> Calibration:
    """Bins of equally many pairs: margins of DPO at a small beta lie close together, so that bins of equal width would
    put nearly all pairs into the first one, and average out what is wrong within it."""
    confidence_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    bin_P = equal_mass(confidence_P, min(MAX_BINS, max(1, len(margins_P) // PAIRS_PER_BIN)))
    bins, gaps = [], {}
    for index in range(int(bin_P.max()) + 1):
        inside = bin_P == index
        bins.append(
            Bin(
                low=float(confidence_P[inside].min()),
                high=float(confidence_P[inside].max()),
                confidence=float(confidence_P[inside].mean()),
                accuracy=float(right_P[inside].mean()),
                n=int(inside.sum()),
            )
        )
        gaps[f"gap {index}"] = np.where(inside, right_P - confidence_P, 0.0)
    return Calibration(bins=tuple(bins), gaps=gaps)
