"""Differences between policies that answered the same prompts with the same noise, over seeds and at equal KL.

What each prompt adds to the error of every mean is known, so that a difference has the error of the difference: what a
prompt does to both is no part of it. The error of a KL counts where rewards are compared at equal KL.

    trainings of a setting --over_seeds--> Mean --> Dot: KL and reward --above_at_equal, combined--> Claim

G: prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from dpo_train.errors import RunError
from dpo_train.evaluate.statistics import Z_95, Floats
from dpo_train.findings import Estimate
from dpo_train.recipes.results import Claim, Point


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over prompts."""

    value: float
    deviations_G: Floats
    """What each prompt adds to its error: (its value - mean) / number of values, 0 if it has none. They add up to 0;
    all 0: the mean is known exactly."""
    between: float = 0.0
    """Half of the 95 % interval that the spread between seeds alone gives it."""

    @classmethod
    def of(cls, values_G: Floats) -> Mean:
        """Of one value a prompt; NaN is none.

        Raises:
            RunError: there is no value.
        """
        is_there_G = ~np.isnan(values_G)
        if not is_there_G.any():
            raise RunError("The judge rewards none of the answers with a number", fix="mend evaluate.judge")
        value = float(values_G[is_there_G].mean())
        return cls(value=value, deviations_G=np.where(is_there_G, values_G - value, 0.0) / is_there_G.sum())

    @classmethod
    def known(cls, value: float, prompts: int) -> Mean:
        """A number that was not measured."""
        return cls(value=value, deviations_G=np.zeros(prompts))

    @property
    def estimate(self) -> Estimate:
        """With its 95 % interval."""
        return combined([(1.0, "", self)])


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A policy's place in the plane of KL (``x``) and reward (``y``)."""

    label: str
    setting: str
    """Dots of one setting are the same trainings at other steps: their seeds err together."""
    x: Mean
    y: Mean

    @property
    def point(self) -> Point:
        """For a figure."""
        is_known = not self.x.deviations_G.any() and not self.x.between
        return Point(label=self.label, x=self.x.value if is_known else self.x.estimate, y=self.y.estimate)


Term = tuple[float, str, Mean]
"""Weight, the trainings whose seeds its mean shares, and the mean."""


def combined(terms: Iterable[Term]) -> Estimate:
    """A weighted sum of means over the same prompts, with its 95 % interval: paired by prompt; the spread between seeds
    comes on top, one training's in full and different trainings' independent of each other."""
    terms = list(terms)
    value = sum(weight * mean.value for weight, _, mean in terms)
    deviations_G = sum(weight * mean.deviations_G for weight, _, mean in terms)
    count = len(np.atleast_1d(deviations_G))
    between: dict[str, float] = {}
    for weight, trainings, mean in terms:
        between[trainings] = between.get(trainings, 0.0) + abs(weight) * mean.between
    paired = math.sqrt(count / (count - 1) * float(np.square(deviations_G).sum()))
    half = math.hypot(student_95(count - 1) * paired, *between.values())
    return Estimate(value=value, low=value - half, high=value + half, n=count)


def over_seeds(groups: Sequence[Sequence[Mean]], *, relative: bool = False) -> list[Mean]:
    """The mean of each group's means, which differ in their seed alone.

    Two seeds say little about the spread between seeds, and many groups of two say enough: it is taken to be the same
    in all groups (``relative``: in proportion to their means, where these are above 1).
    """
    values = [fmean(one.value for one in group) for group in groups]
    scales = [max(1.0, abs(value)) if relative else 1.0 for value in values]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(
        sum(((one.value - value) / scale) ** 2 for one in group)
        for group, value, scale in zip(groups, values, scales, strict=True)
    )
    half = student_95(freedom) * math.sqrt(squares / freedom) if freedom else 0.0
    return [
        Mean(
            value=value,
            deviations_G=np.mean([one.deviations_G for one in group], axis=0),
            between=half * scale / math.sqrt(len(group)),
        )
        for group, value, scale in zip(groups, values, scales, strict=True)
    ]


def student_95(freedom: int) -> float:
    """Student's two-sided 95 % quantile, right to 2 % from 4 degrees of freedom on (Cornish and Fisher's expansion)."""
    return Z_95 + (Z_95**3 + Z_95) / (4 * freedom) + (5 * Z_95**5 + 16 * Z_95**3 + 3 * Z_95) / (96 * freedom**2)


def above_at_equal(name: str, line: Sequence[Dot], others: Sequence[Dot], *, method: str) -> list[Claim]:
    """Whether the line lies above another method's dots, each at its own KL, on the whole; nothing where no dot has
    two neighbours on the line."""
    compared = [terms for dot in others if (terms := _above(line, dot))]
    if not compared:
        return []
    text = f"{name} above {method} at equal KL (mean over {len(compared)} of {len(others)} points)"
    mean = ((weight / len(compared), of, each) for terms in compared for weight, of, each in terms)
    return [Claim(text=text, found=combined(mean))]


def _above(line: Sequence[Dot], dot: Dot) -> list[Term]:
    """The line's height at a dot's KL minus the dot's; empty beside the line. A KL that errs moves along the slope."""
    ordered = sorted(line, key=lambda each: each.x.value)
    for left, right in itertools.pairwise(ordered):
        if left.x.value <= dot.x.value <= right.x.value:
            width = right.x.value - left.x.value
            share = (dot.x.value - left.x.value) / width if width else 0.5
            slope = (right.y.value - left.y.value) / width if width else 0.0
            neighbours = [(1 - share, left), (share, right)]
            return [*_heights([*neighbours, (-1.0, dot)]), *_shifts(slope, dot, neighbours)]
    return []


def _heights(weighted: Iterable[tuple[float, Dot]]) -> Iterator[Term]:
    return ((weight, f"reward {dot.setting}", dot.y) for weight, dot in weighted)


def _shifts(slope: float, dot: Dot, neighbours: Iterable[tuple[float, Dot]]) -> Iterator[Term]:
    """Their values add up to 0: the dot is where its neighbours' mean is."""
    yield slope, f"KL {dot.setting}", dot.x
    for weight, neighbour in neighbours:
        yield -slope * weight, f"KL {neighbour.setting}", neighbour.x
