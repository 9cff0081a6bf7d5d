"""The trials of a sweep as they are told: what each found, and when it ran."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_train.artifacts import Artifact
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Follower
from dpo_train.tracking.run_log import RunLog

TRIALS_FILE = "trials.json"

Line = Mapping[str, float]
"""Of a ``metrics.jsonl``."""

_NAMES = {
    "accuracy": "validation/accuracy",
    "margin": "validation/margin",
    "kl": "samples/kl",
    "length_ratio": "samples/length_ratio",
    "reward": "judge/reward",
    "win_rate": "judge/win_rate",
}
"""A trial's estimates by the names that the evaluation has for them."""


def tell_trials(run: RunLog, artifact: Artifact, events: Path, *, batch_pairs: int) -> None:
    """A run for each trial of the sweep, the failed ones as well.

    Args:
        events: file of what the sweep has reported, from which it is known when each trial ran.
        batch_pairs: pairs of a step, over all ranks.
    """
    if TRIALS_FILE not in artifact.record.files:
        return
    content = json.loads(artifact.file(TRIALS_FILE).read_text(encoding="utf-8"))
    # The sweep names a trial's folder by its name, with other signs for those that a path cannot hold.
    curves = {_plain(Path(file).parent.name): file for file in artifact.record.files if file.endswith(METRICS_FILE)}
    times = step_times(events)
    for trial in content["trials"]:
        name = trial["name"]
        curve = curves.get(_plain(name))
        history = read_history(artifact.file(curve)) if curve else []
        run.trial(
            name,
            parameters={f"train.{key}": str(value) for key, value in trial["parameters"].items()}
            | {"seed": str(trial["seed"])},
            metrics=dict(_numbers(trial)),
            curve=(artifact.home, curve) if curve else None,
            span=span_of(history, times, batch_pairs),
            tags=_tags(trial, content["why_not"]),
            failure=trial["failure"],
        )


def step_times(events: Path) -> dict[tuple[tuple[str, float], ...], float]:
    """When (seconds since 1970) each step of a sweep's trainings was reported, by its numbers.

    The bar of a sweep counts the steps of all trials, so that an event does not say whose step it is; but its numbers,
    speed among them, are those of one line in one trial's ``metrics.jsonl``.
    """
    try:
        found = Follower(events).new()
    except ValueError:  # a damaged line
        return {}
    return {
        _numbers_of(event["metrics"]): event["time"]
        for event in found
        if event["stage"] == "sweep" and event["kind"] == "progress"
    }


def span_of(
    history: Sequence[Line], times: Mapping[tuple[tuple[str, float], ...], float], batch_pairs: int
) -> tuple[int, int] | None:
    """From the beginning of a trial's first step to the end of its last, in milliseconds since 1970.

    Of a trial that was interrupted, only the steps since then are known; None: none of them.
    """
    known = [(time, line) for line in history if (time := times.get(_numbers_of(line))) is not None]
    if not known:
        return None
    first, line = known[0]
    began = first - batch_pairs / line["pairs_per_second"] if line.get("pairs_per_second") else first
    return int(began * 1000), int(known[-1][0] * 1000)


def _numbers_of(line: Line) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, value) for name, value in line.items() if name != "step"))


def _tags(trial: Mapping[str, Any], why_not: Mapping[str, str]) -> dict[str, str]:
    name, beta = trial["name"], trial["parameters"].get("beta")
    return {
        "dpo.chosen": str(name not in why_not).lower(),
        "dpo.why_not": str(why_not.get(name, "")),
        "dpo.stopped": str(trial["stopped"] or ""),
        "dpo.seed": str(trial["seed"]),
        **({"dpo.beta": f"{beta:g}"} if beta is not None else {}),
    }


def _numbers(trial: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """A trial's estimates, with their bounds; what is not finite is null in the file."""
    yield "trained/steps", float(trial["steps"])
    for key, name in _NAMES.items():
        if (estimate := trial.get(key)) is not None:
            for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
                if estimate[part] is not None:
                    yield name + suffix, estimate[part]


def _plain(name: str) -> str:
    return re.sub(r"[^\w.,]", "-", name)
