"""The trials of a sweep, and which of them wins. Pure.

trials --pool: seeds of one setting together--> settings --budgets--> those within --one standard error of the best-->
as good --the simplest--> Choice

G: groups of validation pairs, or prompts; the same for all trials of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_train.config import SelectConfig
from dpo_train.errors import RunError
from dpo_train.evaluate.statistics import cluster_bootstrap
from dpo_train.findings import Estimate

Parameter = float | int | str

_CAREFUL = (
    ("beta", -1, "smaller"),
    ("learning_rate", 1, "larger"),
    ("epochs", 1, "larger"),
    ("lora.rank", 1, "larger"),
)
"""What moves the policy less is simpler: by parameter its sign in the order, and the word for what is less careful."""
_ROUNDING = 1e-9
NUMBERS = ("accuracy", "margin", "kl", "length_ratio", "reward", "win_rate")
"""Of a trial, and of each of its points."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is known of a trial after some of its steps; the numbers mean what they mean of a trial."""

    step: int
    accuracy: Estimate | None = None
    margin: Estimate | None = None
    kl: Estimate | None = None
    length_ratio: Estimate | None = None
    reward: Estimate | None = None
    win_rate: Estimate | None = None
    deviations: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """As of a trial, of what is measured on prompts: in the prompts' order, the same for all points and trials."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training with one setting and one seed, and what validation pairs and prompts say of its policy."""

    name: str
    """"beta=0.1", or "beta=0.1,learning_rate=0.0002,seed=1"."""
    parameters: Mapping[str, Parameter]
    """What the sweep varies, by train's keys: "beta", "learning_rate", "loss", "epochs", "lora.rank"."""
    seed: int
    steps: int = 0
    """Optimiser steps that it was trained."""
    accuracy: Estimate | None = None
    margin: Estimate | None = None
    kl: Estimate | None = None
    """KL(policy || reference) in nats per answer, from the policy's own answers at temperature 1."""
    length_ratio: Estimate | None = None
    """Mean length of those answers over the reference's."""
    reward: Estimate | None = None
    win_rate: Estimate | None = None
    """Of those answers by the judge: mean reward, and win rate against the reference's."""
    deviations: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By metric [G] what each group adds to its error: (sum - mean * count of the group) / count of all. Two trials'
    difference has the standard error sqrt(G / (G - 1) * sum((one - other)^2)), clustered and paired.
    """
    points: tuple[Point, ...] = ()
    """In the order of steps."""
    failure: str | None = None
    stopped: str | None = None
    """Where and why it was stopped early: "at step 40: 5th of 8 by rewards/accuracy". Its numbers are of that step."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The finished trials of one setting, which differ in their seed alone, and their numbers together."""

    name: str
    trials: tuple[Trial, ...]
    """In the order of seeds."""
    metric: Estimate
    spread: float
    """Standard error of the metric by the differences between seeds; 0 with one seed."""
    kl: Estimate | None
    length_ratio: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The winner, and of every other trial why it lost."""

    trial: Trial
    why_not: Mapping[str, str]
    """By the trial's name."""
    notes: tuple[str, ...] = ()
    """What to know about the winner."""


def select(trials: Sequence[Trial], config: SelectConfig) -> Choice:
    """The simplest setting within one standard error of the best, among those within the budgets (the rule of one
    standard error: Breiman et al. 1984).

    Seeds of one setting count by their mean. The standard error is that of the difference to the best on the same
    validation pairs or prompts, the spread between seeds included. Simpler: a larger beta, then a smaller learning
    rate, fewer epochs, a smaller rank. A budget looks at the value; an interval that reaches over it is a note.

    Raises:
        RunError: no trial finished, none has the metric, or none is within the budgets.
    """
    settings = pool(trials, config.metric)
    _check_any(trials, settings, config)
    over = {setting.name: excess(setting, config) for setting in settings}
    within = [setting for setting in settings if not over[setting.name]]
    if not within:
        raise _none_within(settings, config)
    best = min(within, key=lambda setting: (-setting.metric.value, _order(setting)))
    errors = {setting.name: _error(best, setting, config.metric) for setting in within}
    good = [s for s in within if best.metric.value - s.metric.value <= errors[s.name] * (1 + _ROUNDING)]
    chosen = min(good, key=_order)
    errors[best.name] = errors[chosen.name]
    # A policy may be outside where the mean over seeds is not.
    trial = min(chosen.trials, key=lambda one: (bool(excess(one, config)), one.seed))
    why_not = {trial.name: _unfinished(trial, config.metric) for trial in trials}
    for setting in settings:
        if setting is chosen:
            why = f"another seed of the chosen setting, {chosen.name}"
        elif over[setting.name]:
            why = over[setting.name]
        else:
            why = _why_not(setting, best, chosen, errors[setting.name], config.metric, is_good=setting in good)
        why_not |= {one.name: why for one in setting.trials}
    del why_not[trial.name]
    return Choice(trial=trial, why_not=dict(sorted(why_not.items())), notes=_notes(chosen, trials, config))


def pool(trials: Sequence[Trial], metric: str) -> list[Setting]:
    """Finished trials that have the metric, by setting; in an order that is not that of the trials."""
    grouped: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.seed, trial.name)):
        if not _unfinished(trial, metric):
            grouped.setdefault(setting_name(trial), []).append(trial)
    return [_pooled(grouped[name], metric) for name in sorted(grouped)]


def setting_name(trial: Trial) -> str:
    """The trial's name without its seed."""
    return ",".join(f"{key}={shown(value)}" for key, value in trial.parameters.items()) or "the config's own setting"


def shown(value: Parameter) -> str:
    """A parameter's value as people write it."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _unfinished(trial: Trial, metric: str) -> str:
    """Why the trial is no candidate; "" if it is one."""
    if trial.failure is not None:
        return f"failed: {trial.failure}"
    if trial.stopped is not None:
        return f"stopped {trial.stopped}"
    found: Estimate | None = getattr(trial, metric)
    return "" if found is not None and math.isfinite(found.value) else f"it has no {_words(metric)}"


def _pooled(trials: Sequence[Trial], metric: str) -> Setting:
    values = np.array([getattr(trial, metric).value for trial in trials])
    spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    found = pool_estimates([getattr(trial, metric) for trial in trials])
    assert found is not None
    return Setting(
        name=setting_name(trials[0]),
        trials=tuple(trials),
        metric=found,
        spread=spread,
        kl=pool_estimates([trial.kl for trial in trials]),
        length_ratio=pool_estimates([trial.length_ratio for trial in trials]),
    )


def pool_estimates(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """The mean over seeds; None where a seed has none.

    All seeds saw the same pairs, so that their own intervals do not shrink by being many: to their mean half comes that
    of Student's interval over the seeds, as the root of the sum of both squares.
    """
    there = [estimate for estimate in estimates if estimate is not None]
    if len(there) < len(estimates):
        return None
    if len(there) == 1:
        return there[0]
    seeds = [str(number) for number in range(len(there))]
    between = cluster_bootstrap(np.array([estimate.value for estimate in there]), seeds, seed=0)
    down = float(np.mean([estimate.value - estimate.low for estimate in there]))
    up = float(np.mean([estimate.high - estimate.value for estimate in there]))
    return Estimate(
        value=between.value,
        low=between.value - math.hypot(down, between.value - between.low),
        high=between.value + math.hypot(up, between.high - between.value),
        n=there[0].n,
    )


def _error(best: Setting, other: Setting, metric: str) -> float:
    """Standard error of the difference of two settings on the same groups; the spread between seeds comes on top."""
    best_G, other_G = (np.mean([trial.deviations[metric] for trial in each.trials], axis=0) for each in (best, other))
    factor = len(best_G) / max(1, len(best_G) - 1)
    paired = math.sqrt(factor * float(((best_G - other_G) ** 2).sum()))
    return math.hypot(paired, best.spread, other.spread)


def _order(setting: Setting) -> tuple[Any, ...]:
    """The simplest first. Settings that differ in their loss alone: the better one."""
    parameters = setting.trials[0].parameters
    return (
        *(sign * float(parameters.get(key, 0)) for key, sign, _ in _CAREFUL),
        -setting.metric.value,
        setting.name,
    )


def _budgets(setting: Setting | Trial, config: SelectConfig) -> Iterator[tuple[str, float, Estimate | None]]:
    """Of each budget that there is: what it is about, how much it is, and what was found."""
    if config.max_kl is not None:
        yield "KL", config.max_kl, setting.kl
    if config.max_length_growth is not None:
        yield "growth in length", config.max_length_growth, setting.length_ratio


def is_within(setting: Setting, config: SelectConfig) -> bool:
    """Whether the setting is within all budgets."""
    return not excess(setting, config)


def excess(setting: Setting | Trial, config: SelectConfig) -> str:
    """By how much a setting, or one trial of it, is over the budgets, in words; "" if it is within all of them."""
    words = []
    for what, budget, found in _budgets(setting, config):
        if found is None or not math.isfinite(found.value):
            words.append(f"{what} was not measured, so that it cannot be known to be within the budget of {budget:g}")
        elif found.value > budget:
            words.append(
                f"{what} {number(found.value)}: over the budget of {budget:g} by {number(found.value - budget)}"
            )
    return "; ".join(words)


def _notes(chosen: Setting, trials: Sequence[Trial], config: SelectConfig) -> tuple[str, ...]:
    seeds = [trial for trial in trials if setting_name(trial) == chosen.name]
    failed = sum(trial.failure is not None for trial in seeds)
    lost = f"{failed} of {len(seeds)} seeds of {chosen.name} failed; the others speak for it"
    over = tuple(
        f"{what} {number(found.value)} of {chosen.name} is within the budget of {budget:g}, but its 95 % interval "
        f"({number(found.low)} to {number(found.high)}) reaches over it"
        for what, budget, found in _budgets(chosen, config)
        if found is not None and found.high > budget
    )
    return (lost, *over) if failed else over


def _why_not(setting: Setting, best: Setting, chosen: Setting, error: float, metric: str, *, is_good: bool) -> str:
    found = f"{_words(metric)} {number(setting.metric.value)}"
    if not is_good:
        gap = number(best.metric.value - setting.metric.value)
        return (
            f"{found} is {gap} below the best, {number(best.metric.value)} of {best.name}: "
            f"more than one standard error ({number(error)})"
        )
    mine, other = (each.trials[0].parameters for each in (setting, chosen))
    less = [f"its {_words(key)} is {word}" for key, _, word in _CAREFUL if mine.get(key) != other.get(key)]
    careful = f"less careful: {less[0]}" if less else "no simpler and no better"
    return (
        f"{found} is as good as {number(chosen.metric.value)} of {chosen.name} "
        f"(within one standard error of the best, {number(error)}), but {careful}"
    )


def _words(name: str) -> str:
    return name.replace("lora.", "LoRA ").replace("_", " ")


def _check_any(trials: Sequence[Trial], settings: Sequence[Setting], config: SelectConfig) -> None:
    if settings:
        return
    reasons = "; ".join(f"{t.name}: {_unfinished(t, config.metric)}" for t in sorted(trials, key=lambda t: t.name))
    if all(trial.failure is not None for trial in trials):
        raise RunError("Every trial of the sweep failed", got=reasons)
    raise RunError(f"No trial of the sweep came to its end with a {_words(config.metric)} to select on", got=reasons)


def _none_within(settings: Sequence[Setting], config: SelectConfig) -> RunError:
    smallest: dict[str, str] = {}
    budgets = {what: budget for what, budget, _ in _budgets(settings[0], config)}
    for what in budgets:
        found = [
            (estimate.value, setting.name)
            for setting in settings
            for name, _, estimate in _budgets(setting, config)
            if name == what and estimate is not None and math.isfinite(estimate.value)
        ]
        smallest[what] = f"{number(min(found)[0])} at least (that of {min(found)[1]})" if found else "not measured"
    return RunError(
        "No trial of the sweep is within the budgets of sweep.select",
        got="; ".join(f"{what} {found}" for what, found in smallest.items()),
        expected=" and ".join(f"{what} of at most {budget:g}" for what, budget in budgets.items()),
        fix="try larger betas, smaller learning rates or fewer steps, or raise the budgets",
    )


def number(value: float) -> str:
    """Three digits behind the point, fewer of large numbers."""
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"
