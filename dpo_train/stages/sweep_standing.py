"""Where each trial of a sweep stands, and whose policy has to be kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_train.config import RunConfig, SelectConfig
from dpo_train.errors import RunError
from dpo_train.evaluate.statistics import Ints
from dpo_train.evaluate.trials import (
    NUMBERS,
    Point,
    Trial,
    excess,
    pool_estimates,
    select,
)
from dpo_train.evaluate.trials_file import point_from_dict, trial_from_dict
from dpo_train.stages.measure_trial import accuracy_of
from dpo_train.stages.sweep_space import Parameters, name_of


@dataclass(kw_only=True)
class Standing:
    """Where one trial stands."""

    name: str
    parameters: Parameters
    seed: int
    training: RunConfig
    home: str
    """Where its training belongs in the store."""
    was_there: bool
    """Somebody had made or begun that output before this sweep: it is never removed."""
    total: int
    """Steps of the whole training."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    """Of the rungs that it has come to."""
    trial: Trial | None = None
    """Set when it has come to an end, whichever."""
    seconds: float = 0.0
    """That it took, of the calls that came to a result."""
    is_removed: bool = False
    """Nothing that this sweep has trained for it is there any more."""

    @property
    def setting(self) -> str:
        """Name of what it shares with its other seeds."""
        return name_of(self.parameters)

    @property
    def is_lost(self) -> bool:
        """It failed, or was stopped."""
        return self.trial is not None and (self.trial.failure is not None or self.trial.stopped is not None)

    def pause(self, result: Mapping[str, Any], sizes_G: Ints) -> None:
        """It stands at a rung. ``sizes_G``: pairs of each validation group."""
        self._count(result)
        accuracy = accuracy_of(self.metrics["validation/rewards/accuracy"], sizes_G)
        self.points = _joined(self.points, [replace(point_from_dict(result["point"]), accuracy=accuracy)])

    def finish(self, result: Mapping[str, Any]) -> None:
        """It has come to its own end. The result may be another sweep's, which called the trial by another name."""
        self._count(result)
        trial = trial_from_dict(result["trial"])
        points = tuple(_joined(self.points, trial.points))
        self.trial = replace(trial, name=self.name, parameters=self.parameters, seed=self.seed, points=points)

    def fail(self, reason: str) -> None:
        """It has no policy to measure."""
        self.trial = replace(self._at_rung(), failure=reason)

    def stop(self, reason: str) -> None:
        """It does not go on from its last rung, whose numbers are then its own."""
        last = self.points[-1]
        self.trial = replace(self._at_rung(), stopped=reason, **_numbers(last), deviations=last.deviations)

    def _count(self, result: Mapping[str, Any]) -> None:
        self.metrics = result["metrics"]
        self.seconds += result["seconds"]

    def _at_rung(self) -> Trial:
        steps = self.points[-1].step if self.points else 0
        return Trial(name=self.name, parameters=self.parameters, seed=self.seed, steps=steps, points=tuple(self.points))


def over_budget(seeds: Sequence[Standing], config: SelectConfig) -> str:
    """By how much a setting is over the budgets where its seeds stand, in words; "" if it is not."""
    measured = [one.trial or Trial(name="", parameters={}, seed=0, **_numbers(one.points[-1])) for one in seeds]
    kl = pool_estimates([each.kl for each in measured])
    ratio = pool_estimates([each.length_ratio for each in measured])
    return excess(replace(measured[0], kl=kl, length_ratio=ratio), config)


def to_keep(standings: Sequence[Standing], config: SelectConfig) -> set[str]:
    """The trials whose policies are kept, by name: the one that would win if no other setting came, and those of
    settings of which other seeds are still to come, because seeds count together."""
    open_settings = {one.setting for one in standings if one.trial is None}
    waiting = {one.name for one in standings if one.setting in open_settings and one.trial and not one.is_lost}
    closed = [one.trial for one in standings if one.setting not in open_settings and one.trial is not None]
    try:
        return waiting | {select(closed, config).trial.name}
    except RunError:
        return waiting


def _joined(before: Sequence[Point], after: Iterable[Point]) -> list[Point]:
    """Each step once; what was measured twice as it was measured last, with the numbers that only the first has."""
    found = {point.step: point for point in before}
    for point in after:
        known = _numbers(found.get(point.step, point))
        measured = {name: estimate for name, estimate in _numbers(point).items() if estimate is not None}
        both = {**found.get(point.step, point).deviations, **point.deviations}
        found[point.step] = replace(point, **{**known, **measured}, deviations=both)
    return [found[step] for step in sorted(found)]


def _numbers(point: Point) -> dict[str, Any]:
    return {name: getattr(point, name) for name in NUMBERS}
