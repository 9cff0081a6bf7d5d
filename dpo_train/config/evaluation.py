"""Evaluation and registration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Le

from dpo_train.config.judging import JudgeConfig
from dpo_train.config.kinds import STRICT, Alias, Count, ModelName, Positive, option

NO_CHAMPION = "none"
"""As ``evaluate.champion``: there was none when the run began. One that comes meanwhile is not compared with."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Rules that a report must pass before its model is registered."""

    __pydantic_config__ = STRICT

    min_accuracy: Annotated[float, Ge(0), Le(1)] = option(
        0.5, "held-out accuracy must lie above this, with its whole 95 % interval"
    )
    min_margin: float = option(0.0, "the same of the mean reward margin")
    max_kl: Positive | None = option(
        None, "KL(policy || reference) of sampled answers must lie below this (nats per answer); null: no such rule"
    )
    max_length_growth: Annotated[float, Gt(0)] | None = option(
        None, "mean length of sampled answers over the reference's must lie below this, e.g. 1.5"
    )
    min_win_rate: Annotated[float, Ge(0), Le(1)] | None = option(
        None, "the judge's win rate against the reference must lie above this"
    )
    min_win_rate_champion: Annotated[float, Ge(0), Le(1)] | None = option(
        None, "the same against the champion, e.g. 0.5; without a champion the rule does not apply"
    )
    max_set_loss: Annotated[float, Ge(0), Le(1)] | None = option(
        None, "no set's accuracy may fall below the champion's by more than this, e.g. 0.02"
    )
    safety_sets: tuple[str, ...] = option(
        (), "names of held-out sets on which the likelier answer must stay the chosen one as often as the reference's"
    )
    max_safety_loss: Annotated[float, Ge(0), Le(1)] = option(
        0.02, "how much less often, as a share of the pairs, still counts as untouched"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """policy and held-out pairs -> report with a verdict"""

    __pydantic_config__ = STRICT

    min_heldout_pairs: Count = option(100, "refuse to judge on fewer held-out pairs")
    row_tokens: Count = option(2048, "tokens per packed row while scoring")
    champion: str | None = option(
        "champion",
        "alias, or number, of the version of register.model_name to compare with, where there is one; null: none; "
        f"{NO_CHAMPION}: the same, and rules about a champion do not apply",
    )
    num_prompts: Annotated[int, Ge(0)] = option(
        64, "held-out prompts that policy, reference and champion answer; 0: none"
    )
    temperatures: tuple[Annotated[float, Ge(0)], ...] = option(
        (1.0,), "of the answers, 0 being greedy; the judge and the rules on length look at the first"
    )
    max_sample_tokens: Count = option(256, "longest sampled answer")
    sample_batch: Count = option(32, "answers that are sampled side by side")
    shown_samples: Annotated[int, Ge(0)] = option(20, "prompts whose answers the report shows side by side")
    judge: JudgeConfig | None = option(None, "who compares the answers (docs/evaluation.md); null: nobody")
    best_of: Annotated[int, Ge(2)] | None = option(
        None, "compare with the best of this many of the reference's answers too, by a judge that rewards"
    )
    gate: GateConfig = field(default_factory=GateConfig, metadata={"help": "rules for the registration"})


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """report and policy -> model version"""

    __pydantic_config__ = STRICT

    model_name: ModelName = option("dpo-policy", "name of the registered model in MLflow")
    alias: Alias = option("challenger", "alias that the new version gets; `dpo promote` makes it the champion")
    licence: str | None = option(None, "licence of the base model, for the model card; default: what its folder says")
