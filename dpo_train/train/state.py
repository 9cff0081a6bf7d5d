"""Where a training stands, apart from weights and optimiser: pure, small, saved with every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dpo_train.config import FitConfig

VALIDATION = "validation/"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """After ``step`` steps."""

    step: int = 0
    best_step: int | None = None
    """Steps after which the best validation value was measured."""
    best_value: float | None = None
    stale: int = 0
    """Evaluations since then."""
    warned: bool = False
    """A person has been told what the method warns of."""

    def evaluated(self, step: int, metrics: Mapping[str, float], config: FitConfig) -> TrainingState:
        """After the validation pairs were measured; ``metrics`` has them under ``validation/``."""
        value = metrics[VALIDATION + config.best_metric]
        if self.best_value is None or _is_better(value, self.best_value, config.best_metric):
            return replace(self, best_step=step, best_value=value, stale=0)
        return replace(self, stale=self.stale + 1)

    def is_over(self, total_steps: int, config: FitConfig) -> bool:
        """All steps are done, or nothing has got better for too long."""
        return self.step >= total_steps or (config.patience is not None and self.stale >= config.patience)


def kept_line(history: Sequence[Mapping[str, float]], config: FitConfig) -> Mapping[str, float]:
    """The line of ``metrics.jsonl`` of the weights that a training leaves: its last, or its best."""
    if config.keep == "last":
        return history[-1]
    state, kept = TrainingState(), history[-1]
    for line in history:
        if VALIDATION + config.best_metric in line:
            state = state.evaluated(int(line["step"]) + 1, line, config)
            kept = line if state.stale == 0 else kept
    return kept


def _is_better(value: float, best: float, metric: str) -> bool:
    return value < best if metric == "loss" else value > best
