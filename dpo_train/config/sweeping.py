"""The choice of beta, and of more if asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Gt

from dpo_train.config.kinds import STRICT, Count, Positive, option
from dpo_train.config.training import Loss

LORA_RANK = "lora.rank"


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """values between two bounds, each order of magnitude equally likely"""

    __pydantic_config__ = STRICT

    low: Positive = option(help="smallest value")
    high: Positive = option(help="largest value")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which trial wins: the simplest within one standard error of the best, among those within the budgets."""

    __pydantic_config__ = STRICT

    metric: Literal["accuracy", "reward", "win_rate"] = option(
        "accuracy",
        "of the validation pairs; or of answers to their prompts: mean reward by evaluate.judge (function or reward "
        "model), or its win rate against the reference",
    )
    max_kl: Positive | None = option(None, "a trial whose KL(policy || reference) exceeds this loses (nats/answer)")
    max_length_growth: Annotated[float, Gt(0)] | None = option(
        None, "the same of the mean length of its answers over the reference's, e.g. 1.5"
    )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """scored pairs -> the beta (and more) to train with, chosen on validation pairs"""

    __pydantic_config__ = STRICT

    betas: tuple[Positive, ...] | LogUniform = option(
        (), "betas to try, as a list or as {low: 0.01, high: 1}; empty: no sweep, train.beta is used"
    )
    learning_rates: tuple[Positive, ...] | LogUniform = option((), "learning rates to try; empty: train's")
    losses: tuple[Loss, ...] = option((), "losses to try; empty: train's")
    epochs: tuple[Count, ...] = option((), "numbers of epochs to try; empty: train's")
    lora_ranks: tuple[Count, ...] = option((), "LoRA ranks to try; empty: train's")
    search: Literal["grid", "random", "optuna"] = option(
        "grid", "all combinations; random ones; or those that Optuna's TPE proposes (dpo-train[optuna])"
    )
    trials: Count | None = option(None, "how many combinations random and optuna try")
    seeds: Count = option(1, "trainings of each combination, which differ in their seed alone")
    halving: Annotated[int, Gt(1)] | None = option(
        None, "stop trials early: at each rung only the best 1/n go on (successive halving); null: all train to the end"
    )
    halve_on: Literal["loss", "rewards/accuracy", "rewards/margin"] = option(
        "rewards/accuracy", "what halving compares, on the validation pairs"
    )
    max_steps: Count | None = option(None, "steps of a trial; default: as long as the training")
    num_prompts: Annotated[int, Gt(-1)] = option(
        16, "validation prompts that each trial answers, for its KL and lengths; 0: none"
    )
    kl_points: Count = option(
        1,
        "after how many equal parts of its steps a trial answers them, and the judge is asked of its answers where "
        "select.metric is reward or win_rate; 1: at its end (and at halving's rungs, where an endpoint is not asked)",
    )
    select: SelectConfig = field(default_factory=SelectConfig, metadata={"help": "which trial wins"})
    use: Literal["settings", "policy"] = option(
        "settings", "what the training takes: the winner's settings, or the winner's policy itself"
    )

    @property
    def space(self) -> dict[str, tuple[Any, ...] | LogUniform]:
        """What is varied, by train's key: its values in order, each once, or their range; empty: no sweep."""
        given: dict[str, tuple[Any, ...] | LogUniform] = {
            "beta": self.betas,
            "learning_rate": self.learning_rates,
            "loss": self.losses,
            "epochs": self.epochs,
            LORA_RANK: self.lora_ranks,
        }
        return {
            key: values if isinstance(values, LogUniform) else tuple(sorted(set(values)))
            for key, values in given.items()
            if values
        }

    @property
    def ranges(self) -> dict[str, LogUniform]:
        """Those of the space that are ranges."""
        return {key: values for key, values in self.space.items() if isinstance(values, LogUniform)}
