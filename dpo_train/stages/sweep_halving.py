"""Successive halving (arXiv 1603.06560, algorithm 1 with one bracket): which trials go on, and how far. Pure."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dpo_train.stages.sweep_space import Parameters, name_of


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A stretch of all trials that are still there."""

    end: Fraction
    """Share of their steps after which it ends."""
    keep: int
    """How many settings go on from there."""


def rungs(count: int, factor: int | None, parts: int = 1) -> list[Rung]:
    """For ``count`` settings of which 1/factor go on at each rung; None: all to their end.

    Each rung but the first costs (1 - 1/factor) of a whole training, and the first 1/factor^(rungs - 1) of one for each
    setting: eight settings halved cost 8/8 + 4/8 + 2/4 + 1/2 = 2.5 trainings.

    Args:
        parts: all that are there also pause, and go on, at the ends of as many equal parts of their steps.
    """
    left = [count]
    while factor is not None and left[-1] > 1:
        left.append(math.ceil(left[-1] / factor))
    last = len(left) - 1
    keeps = [*left[1:], left[-1]]
    ends = {Fraction(1, (factor or 1) ** (last - place)): keep for place, keep in enumerate(keeps)}
    for end in (Fraction(part, parts) for part in range(1, parts)):
        before = [keep for other, keep in ends.items() if other <= end]
        ends[end] = min([count, *before])
    return [Rung(end=end, keep=ends[end]) for end in sorted(ends)]


def pause_step(total: int, end: Fraction) -> int | None:
    """Steps after which a training of ``total`` steps pauses at the end of a rung; None: it goes to its own end."""
    return None if end == 1 else max(1, round(total * end))


def ranked(
    values: Mapping[str, float], settings: Sequence[Parameters], metric: str, over: Container[str] = ()
) -> list[str]:
    """Names of settings, best first; of equally good ones the more careful: larger beta, then smaller learning rate,
    fewer epochs, smaller rank. A setting without a value is left out, one that is ``over`` a budget comes last."""
    known = [setting for setting in settings if name_of(setting) in values]
    sign = 1 if metric == "loss" else -1

    def key(one: Parameters) -> tuple[bool | float | str, ...]:
        return name_of(one) in over, sign * values[name_of(one)], *_careful(one)

    return [name_of(one) for one in sorted(known, key=key)]


def _careful(setting: Parameters) -> tuple[float | str, ...]:
    less = (float(setting.get(key, 0)) for key in ("learning_rate", "epochs", "lora.rank"))
    return (-float(setting.get("beta", 0)), *less, name_of(setting))
