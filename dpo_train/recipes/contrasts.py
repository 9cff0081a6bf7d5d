"""Differences between policies that answered the same prompts with the same noise, over seeds and at equal KL.

What each prompt adds to the error of every mean is known, so that a difference has the error of the difference: what a
prompt does to both is no part of it. The error of a KL counts where rewards are compared at equal KL.

    trainings of a setting --over_seeds--> Mean --> Dot: KL and reward --above_at_equal, combined--> Claim

G: prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from dpo_train.errors import RunError
from dpo_train.evaluate.statistics import Floats, student_95
from dpo_train.findings import Estimate
from dpo_train.recipes.results import Claim, Point


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over prompts."""

    value: float
    deviations_G: Floats
    """What each prompt adds to its error: (its value - mean) / n, and 0 if it has none. They add up to 0."""
    n: int
    """Prompts that have a value; 0 of a number that is known and not measured."""
    between: float = 0.0
    """Half of the 95 % interval that the spread between seeds alone gives it."""

    @classmethod
    def of(cls, values_G: Floats) -> Mean:
        """Of one value a prompt; NaN is none.

        Raises:
            RunError: there are fewer than two, which say nothing about their spread.
        """
        is_there_G = ~np.isnan(values_G)
        n = int(is_there_G.sum())
        value = float(values_G[is_there_G].mean()) if n else 0.0
        return cls.measured(value, np.where(is_there_G, values_G - value, 0.0) / max(1, n), n)

    @classmethod
    def measured(cls, value: float, deviations_G: Floats, n: int) -> Mean:
        """The same where the mean and its deviations are known.

        Raises:
            RunError: as above.
        """
        if n < 2:
            raise RunError(
                "Too few answers have a number to take a mean of",
                got=f"{n} of {len(deviations_G)}",
                expected="2, better all of them",
                fix="look at evaluate.judge, if it is a reward that they lack; at the policy, if it is a KL",
            )
        return cls(value=value, deviations_G=deviations_G, n=n)

    @classmethod
    def known(cls, value: float, prompts: int) -> Mean:
        """A number that was not measured."""
        return cls(value=value, deviations_G=np.zeros(prompts), n=0)

    @property
    def estimate(self) -> Estimate:
        """With its 95 % interval."""
        return combined([(1.0, "", self)])


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A policy's place in the plane of KL (``x``) and reward (``y``)."""

    setting: str
    """Dots of one setting are the same trainings at other steps: their seeds err together."""
    step: int | None
    """After which it was measured; None: it has not been trained in steps."""
    x: Mean
    y: Mean

    @property
    def label(self) -> str:
        """Of the dot, among those of all methods."""
        return self.setting if self.step is None else f"{self.setting}, step {self.step}"

    @property
    def point(self) -> Point:
        """For a figure."""
        return Point(label=self.label, x=self.x.estimate if self.x.n else self.x.value, y=self.y.estimate)


Term = tuple[float, str, Mean]
"""Weight, the trainings whose seeds its mean shares, and the mean."""


def combined(terms: Iterable[Term]) -> Estimate:
    """A weighted sum of means over the same prompts, with its 95 % interval: paired by prompt; the spread between seeds
    comes on top, one training's in full and different trainings' independent of each other."""
    terms = list(terms)
    value = sum(weight * mean.value for weight, _, mean in terms)
    deviations_G = np.sum([weight * mean.deviations_G for weight, _, mean in terms], axis=0)
    n = min(mean.n for _, _, mean in terms if mean.n)
    between: dict[str, float] = {}
    for weight, trainings, mean in terms:
        between[trainings] = between.get(trainings, 0.0) + abs(weight) * mean.between
    paired = math.sqrt(n / (n - 1) * float(np.square(deviations_G).sum()))
    half = math.hypot(student_95(n - 1) * paired, *between.values())
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def over_seeds(groups: Sequence[Sequence[Mean]], settings: Sequence[str], scales: Sequence[float]) -> list[Mean]:
    """The mean of each group's means, which differ in their seed alone.

    Two seeds say little about the spread between seeds, and many groups of two say enough: it is taken to be in
    proportion to the groups' scales. What the noise of answers makes seeds differ by is no part of it, because the
    deviations have that. Groups of one setting are the same trainings at other steps, and count once for how well the
    spread is known; so do settings of a small scale for little (Satterthwaite 1946).
    """
    square, known = 0.0, dict.fromkeys(settings, 0.0)
    freedoms = dict.fromkeys(settings, 0)
    for group, setting, scale in zip(groups, settings, scales, strict=True):
        square += _spread(group)
        known[setting] += (len(group) - 1) * scale**2
        freedoms[setting] = max(freedoms[setting], len(group) - 1)
    half = 0.0
    if (total := sum(known.values())) > 0:
        freedom = total**2 / sum(known[name] ** 2 / freedoms[name] for name in known if freedoms[name])
        half = student_95(max(1.0, freedom)) * math.sqrt(max(0.0, square) / total)
    return [
        _average(group, between=half * scale / math.sqrt(len(group)))
        for group, scale in zip(groups, scales, strict=True)
    ]


def _average(means: Sequence[Mean], *, between: float) -> Mean:
    return Mean(
        value=fmean(mean.value for mean in means),
        deviations_G=np.mean([mean.deviations_G for mean in means], axis=0),
        n=min(mean.n for mean in means),
        between=between,
    )


def _spread(group: Sequence[Mean]) -> float:
    """Sum of the squares by which seeds differ from their mean, without what their answers' noise adds to it."""
    values, deviations_KG = np.array([one.value for one in group]), np.array([one.deviations_G for one in group])
    n = min(one.n for one in group)
    noise = n / (n - 1) * np.square(deviations_KG - deviations_KG.mean(axis=0)).sum()
    return float(np.square(values - values.mean()).sum() - noise)


def above_at_equal(name: str, start: Dot, line: Sequence[Dot], others: Sequence[Dot], *, method: str) -> list[Claim]:
    """Whether a method lies above another one's dots, each at its own KL, on the whole; nothing where it never comes
    to the KL of one of them.

    A setting's way goes from the start, whose KL is 0, over its dots, by their KL, in straight lines; dots whose KLs
    cannot be told apart are one, their mean. Its height at a KL is the mean over the settings whose ways pass that KL.
    """
    settings: dict[str, list[Dot]] = {}
    for dot in line:
        settings.setdefault(dot.setting, []).append(dot)
    ways = [[start, *_apart(dots)] for dots in settings.values()]
    compared = []
    for dot in others:
        passing = [found for way in ways if (found := _above(way, dot))]
        if passing:
            compared.append([(weight / len(passing), of, mean) for terms in passing for weight, of, mean in terms])
    if not compared:
        return []
    text = f"{name} above {method} at equal KL (mean over {len(compared)} of {len(others)} points)"
    whole = ((weight / len(compared), of, mean) for terms in compared for weight, of, mean in terms)
    return [Claim(text=text, found=combined(whole))]


def _apart(dots: Sequence[Dot]) -> list[Dot]:
    """A setting's dots by KL, those together whose difference in KL may be the answers' noise alone: a slope between
    them would be noise over nothing. How seeds err does not count, because it moves them all."""
    together: list[list[Dot]] = []
    for dot in sorted(dots, key=lambda dot: dot.x.value):
        means = [replace(each.x, between=0.0) for each in (dot, *(map(_middle, together[-1:])))]
        if together and combined(zip((1.0, -1.0), ("", ""), means, strict=True)).low <= 0:
            together[-1].append(dot)
        else:
            together.append([dot])
    return [_middle(each) for each in together]


def _middle(dots: Sequence[Dot]) -> Dot:
    if len(dots) == 1:
        return dots[0]
    x, y = (
        _average(means, between=fmean(mean.between for mean in means))
        for means in ([dot.x for dot in dots], [dot.y for dot in dots])
    )
    return Dot(setting=dots[0].setting, step=None, x=x, y=y)


def _above(way: Sequence[Dot], dot: Dot) -> list[Term]:
    """A way's height at a dot's KL minus the dot's; empty beside it. A KL that errs moves along the slope."""
    for left, right in itertools.pairwise(way):
        if left.x.value <= dot.x.value <= right.x.value:
            width = right.x.value - left.x.value
            share = (dot.x.value - left.x.value) / width if width else 0.5
            slope = (right.y.value - left.y.value) / width if width else 0.0
            # The weights of KLs add up to 0, and so do they themselves: the dot is where its neighbours' mean is.
            around = ((1 - share, left), (share, right), (-1.0, dot))
            heights = [(weight, f"reward {each.setting}", each.y) for weight, each in around]
            return [*heights, *((-slope * weight, f"KL {each.setting}", each.x) for weight, each in around)]
    return []
