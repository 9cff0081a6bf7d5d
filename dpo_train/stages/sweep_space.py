"""What a sweep tries: settings from a grid, from chance, or from Optuna, and how they are called."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
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
        values = [each for each in space.values() if not isinstance(each, LogUniform)]
        found = {
            name_of(one): one for one in (dict(zip(space, each, strict=True)) for each in itertools.product(*values))
        }
        return list(found.values())
    assert wanted is not None, "refused when the config is read"
    generator = np.random.Generator(np.random.PCG64(config.seed))
    drawn = ({key: _draw(values, generator) for key, values in space.items()} for _ in itertools.count())
    return list(itertools.islice(_new(drawn, wanted), wanted))


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
    distributions = {key: _distribution(values) for key, values in config.sweep.space.items()}
    seen: set[str] = set()
    while len(seen) < wanted:
        asked: dict[str, Any] = {}
        settings: dict[str, Parameters] = {}
        for _ in range(_ATTEMPTS):
            if len(settings) == min(ROUND, wanted - len(seen)):
                break
            trial = study.ask(distributions)
            setting = {
                key: _rounded(trial.params[key], values) if isinstance(values, LogUniform) else trial.params[key]
                for key, values in config.sweep.space.items()
            }
            if (name := name_of(setting)) in seen | settings.keys():
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            asked[name], settings[name] = trial, setting
        if not settings:
            return  # all that there is has been tried
        seen |= settings.keys()
        for name, value in zip(settings, try_all(list(settings.values())), strict=True):
            failed = optuna.trial.TrialState.FAIL
            study.tell(asked[name], value, state=failed if value is None else None)


def _distribution(values: tuple[Any, ...] | LogUniform) -> Any:
    import optuna

    if isinstance(values, LogUniform):
        return optuna.distributions.FloatDistribution(values.low, values.high, log=True)
    return optuna.distributions.CategoricalDistribution(values)
