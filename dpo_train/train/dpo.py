"""DPO as the training's loop sees it: its step, its measurement, and what only DPO can go wrong by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dpo_train.config import TrainConfig
from dpo_train.core.metrics import means
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import RunError
from dpo_train.model.load import Policy
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import evaluate_pairs, train_step

FIRST_DRIFT_TOLERANCE, ROUGH_FIRST_DRIFT_TOLERANCE = 1e-4, 1e-2
"""Of an answer's mean log-prob, plus as many nats; the rough one on GPUs and in bf16. Measured in fp32: 4e-7. In bf16,
other packings 4e-4, and on CPUs of two kinds 2e-4."""

COLLAPSE = 0.25
"""Share of the reference's log-prob by which the chosen answers may fall before a person is told."""


@dataclass(frozen=True)
class Dpo:
    """Policy against reference, on scored pairs."""

    config: TrainConfig

    def step(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        pairs: Sequence[TokenPair],
        ranks: Ranks,
        *,
        step: int,
        learning_rate: float,
    ) -> dict[str, float]:
        """As ``loop.Method`` says.

        Raises:
            NonFiniteLossError: some pair's loss, or the gradient, is NaN or infinite.
            RunError: the policy does not start as its reference.
        """
        result = train_step(policy, optimizer, pairs, self.config, ranks, step=step, learning_rate=learning_rate)
        metrics = means(result.sums) | {"grad_norm": result.grad_norm}
        if result.aux_loss is not None:
            metrics["router/aux_loss"] = result.aux_loss
        if step == 0:
            _check_first_drift(metrics, is_rough=policy.bf16 or policy.device.type == "cuda")
        return metrics

    def evaluate(self, policy: Policy, pairs: Sequence[TokenPair], ranks: Ranks) -> dict[str, float]:
        """As ``loop.Method`` says."""
        return means(evaluate_pairs(policy, pairs, self.config, ranks))

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """That the chosen answers collapse, with advice."""
        reference = metrics["logps/chosen"] - metrics["drift/chosen"]
        if not metrics["drift/chosen"] < -COLLAPSE * abs(reference):
            return None
        return (
            f"the chosen answers' log-prob has fallen by {-metrics['drift/chosen']:.1f} nats, more than a quarter: "
            "raise train.beta, lower train.learning_rate, or add an SFT term, train.loss={sigmoid: 1.0, sft: 0.1}"
        )


def _check_first_drift(metrics: Mapping[str, float], *, is_rough: bool) -> None:
    """Before the first update policy and reference are one: each side's mean log-ratio is zero.

    The loss would be a worse measure: its distance from ln 2 grows with beta, noise included.
    """
    tolerance = ROUGH_FIRST_DRIFT_TOLERANCE if is_rough else FIRST_DRIFT_TOLERANCE
    for side in ("chosen", "rejected"):
        drift, logps = metrics[f"drift/{side}"], metrics[f"logps/{side}"]
        if not abs(drift) <= tolerance * (1 + abs(logps)):
            raise RunError(
                "The first step shows that the policy does not start as its reference",
                got=f"a mean log-prob of {logps:.4f} for the {side} answers, {drift:.4f} off the reference's",
                expected="no difference",
                fix="score the reference again with these weights and this tokenizer",
            )
