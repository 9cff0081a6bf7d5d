"""Successive halving (arXiv 1603.06560, algorithm 1 with one bracket): which trials go on, and how far. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def rungs(count: int, factor: int | None) -> list[Rung]:
    """For ``count`` settings of which 1/factor go on at each rung; None: all to their end.

    Each rung but the first costs (1 - 1/factor) of a whole training, and the first 1/factor^(rungs - 1) of one for each
    setting: eight settings halved cost 8/8 + 4/8 + 2/4 + 1/2 = 2.5 trainings.
    """
    if factor is None:
        return [Rung(end=Fraction(1), keep=count)]
    left = [count]
    while left[-1] > 1:
        left.append(math.ceil(left[-1] / factor))
    last = len(left) - 1
    keeps = [*left[1:], 1]
    return [Rung(end=Fraction(1, factor ** (last - place)), keep=keep) for place, keep in enumerate(keeps)]


def pause_step(total: int, end: Fraction) -> int | None:
    """Steps after which a training of ``total`` steps pauses at the end of a rung; None: it goes to its own end."""
    return None if end == 1 else max(1, round(total * end))


def ranked(values: Mapping[str, float], settings: Sequence[Parameters], metric: str) -> list[str]:
    """Names of settings, best first; of equally good ones the more careful: larger beta, then smaller learning rate,
    fewer epochs, smaller rank. A setting without a value is left out."""
    known = [setting for setting in settings if name_of(setting) in values]
    sign = 1 if metric == "loss" else -1
    return [name_of(one) for one in sorted(known, key=lambda one: (sign * values[name_of(one)], *_careful(one)))]


def _careful(setting: Parameters) -> tuple[float | str, ...]:
    less = (float(setting.get(key, 0)) for key in ("learning_rate", "epochs", "lora.rank"))
    return (-float(setting.get("beta", 0)), *less, name_of(setting))
