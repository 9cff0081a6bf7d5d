"""What the sweep's picture shows: the gain against how far the policy has moved for it. Pure.

As in arXiv 2305.18290, figure 2. Colour says beta, shape says the other parameters, a hollow mark is over a budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from dpo_train.config import SelectConfig
from dpo_train.evaluate.trials import (
    Choice,
    Parameter,
    Setting,
    Trial,
    is_within,
    pool,
    pool_estimates,
    setting_name,
    shown,
)
from dpo_train.findings import Estimate

METRICS = {
    "accuracy": "accuracy on validation pairs",
    "reward": "mean reward of sampled answers",
    "win_rate": "win rate against the reference",
}
KL = "KL(policy || reference), nats per answer"
NUMBER = "number of the setting (no KL was measured)"

_SHAPES = ("o", "s", "^", "D", "v")
_COLOURS = ((74, 132, 189), (176, 85, 154), (201, 119, 43))
"""From the first beta to the last; each stands out from white and from black (3 to 1)."""
_MOST_LEGEND = 8


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A setting that came to its end."""

    name: str
    x: Estimate
    y: Estimate
    seeds: tuple[tuple[float, float], ...]
    """(x, y) of each seed; empty where there is one."""
    is_chosen: bool
    is_within: bool
    """The budgets."""
    is_frontier: bool
    """No other setting within the budgets has more of the metric at a smaller x."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Accuracy of a setting by step; its interval where it has several seeds."""

    name: str
    steps: tuple[int, ...]
    accuracy: tuple[Estimate, ...]
    has_seeds: bool


@dataclass(frozen=True, kw_only=True)
class Way:
    """A setting's way over the picture: KL and metric by step, where both were measured, up to where it ended."""

    name: str
    steps: tuple[int, ...]
    kl: tuple[Estimate, ...]
    metric: tuple[Estimate, ...]
    has_seeds: bool
    is_stopped: bool
    """It ends at a rung of halving, without a mark."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a setting is drawn everywhere."""

    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn."""

    x_label: str
    y_label: str
    marks: tuple[Mark, ...]
    curves: tuple[Curve, ...]
    """Empty where no trial was measured on its way."""
    ways: tuple[Way, ...]
    """Of settings of which more is known than a mark shows."""
    budget: float | None
    """Of the KL, where that is what x is."""
    looks: dict[str, Look]
    """By the name of the setting."""
    colours: tuple[tuple[str, str], ...]
    """(words, colour) for the legend."""
    shapes: tuple[tuple[str, str], ...]
    """(words, shape); empty where there is one."""

    @property
    def all_x(self) -> list[Estimate]:
        """All that the first chart's x axis has to show."""
        return [*(mark.x for mark in self.marks), *(kl for way in self.ways for kl in way.kl)]

    @property
    def all_y(self) -> list[Estimate]:
        """The same of y."""
        return [*(mark.y for mark in self.marks), *(found for way in self.ways for found in way.metric)]


def picture(trials: Sequence[Trial], choice: Choice | None, config: SelectConfig) -> Picture:
    """Settings as marks, and their curves by step."""
    settings = pool(trials, config.metric)
    has_kl = any(trial.kl is not None for trial in trials)
    marks = []
    for number, setting in enumerate(settings, start=1):
        x = setting.kl if has_kl else Estimate(value=number, low=number, high=number, n=1)
        if x is not None and all(map(math.isfinite, (x.value, setting.metric.value))):
            marks.append(_mark(setting, x, choice, config, has_kl=has_kl))
    names = list(dict.fromkeys(setting_name(trial) for trial in sorted(trials, key=lambda trial: trial.name)))
    looks, colours, shapes = _looks({setting_name(trial): trial for trial in trials}, names)
    return Picture(
        x_label=KL if has_kl else NUMBER,
        y_label=METRICS[config.metric],
        marks=_with_frontier(marks) if has_kl else tuple(marks),
        curves=_curves(trials),
        ways=_ways(trials, config.metric) if has_kl else (),
        budget=config.max_kl if has_kl else None,
        looks=looks,
        colours=colours,
        shapes=shapes,
    )


def _mark(setting: Setting, x: Estimate, choice: Choice | None, config: SelectConfig, *, has_kl: bool) -> Mark:
    def place(trial: Trial) -> tuple[float, float]:
        found: Estimate = getattr(trial, config.metric)
        return (trial.kl.value if has_kl and trial.kl is not None else x.value), found.value

    return Mark(
        name=setting.name,
        x=x,
        y=setting.metric,
        seeds=tuple(map(place, setting.trials)) if len(setting.trials) > 1 else (),
        is_chosen=choice is not None and choice.trial in setting.trials,
        is_within=is_within(setting, config),
        is_frontier=False,
    )


def _with_frontier(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """In the order of x, those marked that have more of the metric than all before them."""
    found, most = [], -math.inf
    for mark in sorted(marks, key=lambda mark: (mark.x.value, -mark.y.value, mark.name)):
        is_frontier = mark.is_within and mark.y.value > most
        most = max(most, mark.y.value) if mark.is_within else most
        found.append(dataclasses.replace(mark, is_frontier=is_frontier))
    return tuple(found)


def _by_setting(trials: Sequence[Trial]) -> list[tuple[str, list[Trial]]]:
    """Finished, stopped and failed ones, in the order of seeds."""
    grouped: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.seed, trial.name)):
        grouped.setdefault(setting_name(trial), []).append(trial)
    return sorted(grouped.items())


def _curves(trials: Sequence[Trial]) -> tuple[Curve, ...]:
    curves = []
    for name, members in _by_setting(trials):
        by_step: dict[int, list[Estimate]] = {}
        for point in (point for trial in members for point in trial.points if point.accuracy is not None):
            assert point.accuracy is not None
            by_step.setdefault(point.step, []).append(point.accuracy)
        pooled = {step: pool_estimates(by_step[step]) for step in sorted(by_step)}
        found = {step: estimate for step, estimate in pooled.items() if estimate is not None}
        curves.append(Curve(name=name, steps=tuple(found), accuracy=tuple(found.values()), has_seeds=len(members) > 1))
    return tuple(curves) if any(len(curve.steps) > 1 for curve in curves) else ()


def _ways(trials: Sequence[Trial], metric: str) -> tuple[Way, ...]:
    ways = []
    for name, members in _by_setting(trials):
        by_step: dict[int, list[tuple[Estimate, Estimate]]] = {}
        for point in (point for trial in members for point in trial.points):
            value: Estimate | None = getattr(point, metric)
            if _is_there(point.kl) and _is_there(value):
                by_step.setdefault(point.step, []).append((point.kl, value))
        is_stopped = any(trial.stopped is not None for trial in members)
        if len(by_step) <= (0 if is_stopped else 1):
            continue
        steps = sorted(by_step)
        kl, found = ([pool_estimates([both[k] for both in by_step[step]]) for step in steps] for k in (0, 1))
        ways.append(
            Way(
                name=name,
                steps=tuple(steps),
                kl=tuple(filter(None, kl)),
                metric=tuple(filter(None, found)),
                has_seeds=len(members) > 1,
                is_stopped=is_stopped,
            )
        )
    return tuple(ways)


def _is_there(found: Estimate | None) -> TypeGuard[Estimate]:
    return found is not None and all(map(math.isfinite, (found.value, found.low, found.high)))


def _looks(
    settings: dict[str, Trial], names: Sequence[str]
) -> tuple[dict[str, Look], tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """By setting its look, and what colours and shapes mean."""
    parameters = {name: settings[name].parameters for name in names}
    keys = sorted({key for each in parameters.values() for key in each}, key=lambda key: (key != "beta", key))
    first = keys[0] if keys else ""
    values = sorted({each.get(first, "") for each in parameters.values()}, key=_sort_key)
    colours = {value: _colour(place / max(1, len(values) - 1)) for place, value in enumerate(values)}
    rests = {
        name: ", ".join(f"{key}={shown(value)}" for key, value in each.items() if key != first)
        for name, each in parameters.items()
    }
    kinds = sorted(set(rests.values()))
    shapes = {kind: _SHAPES[place % len(_SHAPES)] for place, kind in enumerate(kinds)}
    looks = {name: Look(colour=colours[parameters[name].get(first, "")], shape=shapes[rests[name]]) for name in names}
    step = max(1, math.ceil(len(values) / _MOST_LEGEND))
    return (
        looks,
        tuple((f"{first}={shown(value)}", colours[value]) for value in values[::step]) if first else (),
        tuple(shapes.items()) if 1 < len(kinds) <= len(_SHAPES) else (),
    )


def _sort_key(value: Parameter) -> tuple[bool, float, str]:
    return (True, 0.0, value) if isinstance(value, str) else (False, float(value), "")


def _colour(share: float) -> str:
    """Between the colours, 0 being the first."""
    part = min(int(share * (len(_COLOURS) - 1)), len(_COLOURS) - 2)
    rest = share * (len(_COLOURS) - 1) - part
    mixed = (round(a + rest * (b - a)) for a, b in zip(_COLOURS[part], _COLOURS[part + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def limits(estimates: Iterable[Estimate], *others: float) -> tuple[float, float]:
    """From where to where an axis goes: over all values, and over their intervals as far as twice the values' range.

    Two seeds have an interval of 12.7 standard errors, beside which everything else would be a dot.
    """
    found = [one for one in estimates if all(map(math.isfinite, (one.value, one.low, one.high)))]
    values = [*(estimate.value for estimate in found), *others]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.5 * (high - low) or max(abs(estimate.high - estimate.low) for estimate in found) or 0.1
    low = max(low - room, min([low, *(estimate.low for estimate in found)]))
    high = min(high + room, max([high, *(estimate.high for estimate in found)]))
    edge = 0.06 * (high - low) or room  # a single value without an interval has an axis too
    return low - edge, high + edge
