"""What a sweep tries: settings from a grid, from chance, or from Optuna, and how they are called."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from dpo_train.config import LogUniform, RunConfig
from dpo_train.config.sweeping import LORA_RANK
from dpo_train.errors import ConfigError, MissingPackageError
from dpo_train.evaluate.trials import Parameter, shown

Parameters = Mapping[str, Parameter]
"""A setting: what is varied, by train's key."""

ROUND = 4
"""Settings that Optuna proposes at a time. Always as many, so that what it proposes does not depend on the machine."""
_ATTEMPTS = 100
"""Draws for one more setting that is new, before the space counts as used up."""


def name_of(parameters: Parameters) -> str:
    """As people read it: "beta=0.1,learning_rate=0.0002"."""
    return ",".join(f"{key}={shown(value)}" for key, value in parameters.items())


def with_parameters(config: RunConfig, parameters: Parameters) -> RunConfig:
    """The config whose training has these settings. A LoRA's alpha stays, so that its scale is alpha / rank."""
    plain: dict[str, Any] = {key: value for key, value in parameters.items() if key != LORA_RANK}
    if LORA_RANK in parameters:
        assert config.train.lora is not None, "refused when the config is read"
        plain["lora"] = dataclasses.replace(config.train.lora, rank=int(parameters[LORA_RANK]))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **plain))


def fixed_settings(config: RunConfig) -> list[Parameters]:
    """All settings of a grid or of a random search, none twice; the same for the same seed.

    Raises:
        ConfigError: the space holds fewer than ``sweep.trials``.
    """
    space, wanted = config.sweep.space, config.sweep.trials
    if config.sweep.search == "grid":
        return _combinations(space)
    assert wanted is not None, "refused when the config is read"
    generator = np.random.Generator(np.random.PCG64(config.seed))
    drawn = ({key: _draw(values, generator) for key, values in space.items()} for _ in itertools.count())
    return list(itertools.islice(_new(drawn, wanted), wanted))


def _combinations(space: Mapping[str, Any]) -> list[Parameters]:
    """Of a space of lists, each once."""
    found = (dict(zip(space, each, strict=True)) for each in itertools.product(*space.values()))
    return list({name_of(one): one for one in found}.values())


def _draw(values: tuple[Any, ...] | LogUniform, generator: np.random.Generator) -> Parameter:
    if not isinstance(values, LogUniform):
        chosen: Parameter = values[int(generator.integers(len(values)))]
        return chosen
    return _rounded(math.exp(generator.uniform(math.log(values.low), math.log(values.high))), values)


def _rounded(value: float, within: LogUniform) -> float:
    """Three digits: what is written and what is trained are the same."""
    return min(max(float(f"{value:.3g}"), within.low), within.high)


def _new(drawn: Iterator[Parameters], wanted: int) -> Iterator[Parameters]:
    """Those that were not there yet."""
    seen: set[str] = set()
    for _ in range(wanted * _ATTEMPTS):
        if (name := name_of(one := next(drawn))) not in seen:
            seen.add(name)
            yield one
    raise ConfigError(
        "The sweep's space is too small for sweep.trials",
        got=f"{len(seen)} different settings",
        expected=wanted,
        fix="widen its ranges, or lower sweep.trials",
    )


def optuna_settings(config: RunConfig, try_all: Callable[[list[Parameters]], list[float | None]]) -> None:
    """Has Optuna propose ``sweep.trials`` settings, ROUND at a time, each round by what the others found.

    Args:
        try_all: given settings, what is to be maximised of each; None of one that failed or is outside the budgets.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingPackageError(
            "Optuna is not installed", fix="pip install 'dpo-train[optuna]', or set sweep.search=random"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    wanted = config.sweep.trials
    assert wanted is not None, "refused when the config is read"
    # TPE begins with random ones, by default ten: of few trials that would be all.
    sampler = optuna.samplers.TPESampler(seed=config.seed % 2**32, n_startup_trials=min(10, max(ROUND, wanted // 3)))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    seen: set[str] = set()
    while len(seen) < wanted:
        proposed = _proposed(study, config, seen, min(ROUND, wanted - len(seen)))
        if not proposed:
            return  # all that there is has been tried
        seen |= proposed.keys()
        values = try_all([setting for _, setting in proposed.values()])
        for (trial, _), value in zip(proposed.values(), values, strict=True):
            study.tell(trial, value, state=optuna.trial.TrialState.FAIL if value is None else None)


def _proposed(study: Any, config: RunConfig, seen: Collection[str], count: int) -> dict[str, tuple[Any, Parameters]]:
    """By name up to ``count`` settings that were not tried yet, each with Optuna's trial; none: there are no more."""
    import optuna

    space = config.sweep.space
    distributions = {key: _distribution(values) for key, values in space.items()}
    found: dict[str, tuple[Any, Parameters]] = {}
    for _ in range(_ATTEMPTS):
        if len(found) == count:
            return found
        trial = study.ask(distributions)
        setting = {
            key: _rounded(trial.params[key], values) if isinstance(values, LogUniform) else trial.params[key]
            for key, values in space.items()
        }
        if (name := name_of(setting)) in {*seen, *found}:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        found[name] = trial, setting
    if not found and (other := _untried(config, seen)) is not None:
        study.enqueue_trial(dict(other))
        found[name_of(other)] = study.ask(distributions), other
    return found


def _untried(config: RunConfig, seen: Collection[str]) -> Parameters | None:
    """A setting that was not tried yet, by chance: TPE, sure of some few, proposes them again and again, and the rest
    of a small space would be left out."""
    generator = np.random.Generator(np.random.PCG64([config.seed, len(seen)]))
    space = config.sweep.space
    if config.sweep.ranges:
        drawn = ({key: _draw(values, generator) for key, values in space.items()} for _ in range(_ATTEMPTS))
        return next((one for one in drawn if name_of(one) not in seen), None)
    left = [one for one in _combinations(space) if name_of(one) not in seen]
    return left[int(generator.integers(len(left)))] if left else None


def _distribution(values: tuple[Any, ...] | LogUniform) -> Any:
    import optuna

    if isinstance(values, LogUniform):
        return optuna.distributions.FloatDistribution(values.low, values.high, log=True)
    return optuna.distributions.CategoricalDistribution(values)
