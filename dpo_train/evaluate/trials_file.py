"""trials.json: the trials of a sweep and what was chosen of them, as JSON types and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_train.config import SelectConfig
from dpo_train.errors import StoreError
from dpo_train.evaluate.trials import NUMBERS, Choice, Point, Trial
from dpo_train.findings import Estimate

TRIALS_FILE = "trials.json"
SCHEMA_VERSION = 4
"""Goes up when a key of trials.json is renamed, removed or added, or means something else."""


def to_dict(trials: Sequence[Trial], choice: Choice | None, config: SelectConfig) -> dict[str, Any]:
    """The content of trials.json; what is not finite becomes None. Without a choice nothing could be chosen."""
    return {
        "schema_version": SCHEMA_VERSION,
        "select": dataclasses.asdict(config),
        "trials": [trial_to_dict(trial) for trial in trials],
        "chosen": None if choice is None else choice.trial.name,
        "why_not": {} if choice is None else dict(choice.why_not),
        "notes": [] if choice is None else list(choice.notes),
    }


def from_dict(content: Mapping[str, Any]) -> tuple[tuple[Trial, ...], Choice | None]:
    """What ``to_dict`` was given.

    Raises:
        StoreError: of another schema version, or damaged.
    """
    again = "run the sweep again"
    if (version := content.get("schema_version")) != SCHEMA_VERSION:
        raise StoreError(f"{TRIALS_FILE} is of another schema version", got=version, expected=SCHEMA_VERSION, fix=again)
    try:
        trials = tuple(trial_from_dict(trial) for trial in content["trials"])
        if content["chosen"] is None:
            return trials, None
        chosen = next(trial for trial in trials if trial.name == content["chosen"])
        return trials, Choice(trial=chosen, why_not=content["why_not"], notes=tuple(content["notes"]))
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise StoreError(f"{TRIALS_FILE} is damaged: {type(error).__name__}: {error}", fix=again) from None


def trial_to_dict(trial: Trial) -> dict[str, Any]:
    """A trial as JSON types."""
    return {**_to_dict(trial), "points": [point_to_dict(point) for point in trial.points]}


def trial_from_dict(content: Mapping[str, Any]) -> Trial:
    """What ``trial_to_dict`` was given."""
    return Trial(**{**_from_dict(content), "points": tuple(map(point_from_dict, content["points"]))})


def point_to_dict(point: Point) -> dict[str, Any]:
    """A point as JSON types."""
    return _to_dict(point)


def point_from_dict(content: Mapping[str, Any]) -> Point:
    """What ``point_to_dict`` was given."""
    return Point(**_from_dict(content))


def _to_dict(measured: Trial | Point) -> dict[str, Any]:
    """JSON has no infinity: an estimate that is not finite is none. Deviations are a line of the file each."""
    content = {field.name: getattr(measured, field.name) for field in dataclasses.fields(measured)}
    content |= {name: _estimate_to_dict(content[name]) for name in NUMBERS}
    deviations = {metric: " ".join(map(repr, values_G)) for metric, values_G in measured.deviations.items()}
    return {**content, "deviations": deviations}


def _from_dict(content: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: content[name] and Estimate(**content[name]) for name in NUMBERS}
    deviations = {metric: tuple(map(float, text.split())) for metric, text in content["deviations"].items()}
    return {**content, **numbers, "deviations": deviations}


def _estimate_to_dict(found: Estimate | None) -> dict[str, Any] | None:
    if found is None or not all(map(math.isfinite, (found.value, found.low, found.high))):
        return None
    return dataclasses.asdict(found)
