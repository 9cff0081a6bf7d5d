"""Parts of a set of pairs that have something in common: where they come from, lengths, strength of the preference.

Each function gives (name, [P] whether a pair belongs); nothing where there would be fewer than two parts.

P: pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpo_train.evaluate.statistics import Floats, equal_mass

Parts = list[tuple[str, npt.NDArray[np.bool_]]]

MAX_ORIGINS = 20
STRENGTH_BINS = 4
UNKNOWN_ORIGIN = "(unknown)"


def by_origin(origins: Sequence[str]) -> Parts:
    """The largest origins, largest first; "" is shown as unknown."""
    counts = Counter(origins)
    largest = sorted(counts, key=lambda origin: (-counts[origin], origin))[:MAX_ORIGINS]
    origin_P = np.array(origins, dtype=object)
    return _two_or_more([(origin or UNKNOWN_ORIGIN, origin_P == origin) for origin in largest])


def by_length(differences_P: Floats) -> Parts:
    """By chosen minus rejected tokens: each direction halved at its median, and equal lengths."""
    shorter, longer = _halves(-differences_P, "shorter"), _halves(differences_P, "longer")
    return _two_or_more([*shorter, ("equally long", differences_P == 0), *reversed(longer)])


def by_strength(strengths_P: Floats) -> Parts:
    """Quarters of the known strengths, weakest first; equal strengths stay together."""
    known = ~np.isnan(strengths_P)
    if not known.any():
        return []
    bin_P = np.full(len(strengths_P), -1)
    bin_P[known] = equal_mass(strengths_P[known], STRENGTH_BINS)
    parts: Parts = []
    for index in range(int(bin_P.max()) + 1):
        inside = strengths_P[bin_P == index]
        low, high = f"{inside.min():.4g}", f"{inside.max():.4g}"
        parts.append((low if low == high else f"{low} to {high}", bin_P == index))
    return _two_or_more(parts)


def _halves(excess_P: Floats, direction: str) -> Parts:
    """The pairs with the larger half of all excesses above 0, then those with the smaller half."""
    above = np.sort(excess_P[excess_P > 0])
    if not len(above):
        return []
    middle = above[len(above) // 2]
    is_large, is_small = excess_P >= middle, (excess_P > 0) & (excess_P < middle)
    if not is_small.any():
        return [(f"chosen {direction}", is_large)]
    return [
        (f"chosen {direction} by {middle:.0f} or more", is_large),
        (f"chosen {direction} by less than {middle:.0f}", is_small),
    ]


def _two_or_more(parts: Parts) -> Parts:
    there = [(name, inside) for name, inside in parts if inside.any()]
    return there if len(there) > 1 else []
