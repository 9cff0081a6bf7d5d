"""Which beta of a sweep to train with. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_train.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A finished trial: its beta and the validation accuracy over ``n`` pairs; or the reason why it failed."""

    beta: float
    accuracy: float = math.nan
    margin: float = math.nan
    n: int = 0
    failure: str | None = None


def choose_beta(trials: Sequence[Trial]) -> tuple[float, dict[str, str]]:
    """The largest beta whose validation accuracy lies within one standard error of the best.

    A larger beta keeps the policy nearer to its reference, so among trials that the data cannot tell apart it is the
    more careful choice (the one-standard-error rule, Breiman et al. 1984).

    Returns:
        beta, and for every other beta the reason why it was not taken.

    Raises:
        RunError: no trial succeeded.
    """
    finished = [trial for trial in trials if trial.failure is None and math.isfinite(trial.accuracy)]
    if not finished:
        raise RunError("Every trial of the sweep failed", got="; ".join(f"beta {t.beta}: {t.failure}" for t in trials))
    best = max(finished, key=lambda trial: (trial.accuracy, trial.beta))
    error = math.sqrt(best.accuracy * (1 - best.accuracy) / best.n)
    near = [trial for trial in finished if trial.accuracy >= best.accuracy - error]
    chosen = max(near, key=lambda trial: trial.beta)
    reasons = {}
    for trial in trials:
        if trial is chosen:
            continue
        if trial not in finished:
            reasons[f"{trial.beta:g}"] = f"failed: {trial.failure}"
        elif trial in near:
            reasons[f"{trial.beta:g}"] = f"no better than beta {chosen.beta:g} within one standard error ({error:.3f})"
        else:
            reasons[f"{trial.beta:g}"] = f"accuracy {trial.accuracy:.3f}, more than one standard error below the best"
    return chosen.beta, reasons
