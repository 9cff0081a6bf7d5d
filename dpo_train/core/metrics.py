"""What a step says about its pairs, as sums that ranks can add.

P: pairs, A: answer tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_train.core.loss import PreferenceLoss

NAMES = (
    "loss",
    "rewards/accuracy",
    "rewards/margin",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "drift/chosen",
    "drift/rejected",
    "kl",
)
"""The order of ``pair_sums``. ``drift`` is log(policy / reference) per answer: it shows both answers falling."""


def pair_sums(
    result: PreferenceLoss, chosen_logps_P: Tensor, rejected_logps_P: Tensor, kl_P: Tensor, beta: float
) -> Tensor:
    """Sum over pairs of each of ``NAMES``, then the number of pairs: float64 [len(NAMES) + 1].

    A tie (equal rewards) counts as half right, so that an untrained policy has accuracy 0.5.
    """
    margin_P = result.chosen_rewards_P - result.rejected_rewards_P
    columns = (
        result.losses_P,
        accuracy_per_pair(margin_P),
        margin_P,
        result.chosen_rewards_P,
        result.rejected_rewards_P,
        chosen_logps_P,
        rejected_logps_P,
        result.chosen_rewards_P / beta,
        result.rejected_rewards_P / beta,
        kl_P,
        torch.ones_like(margin_P),
    )
    return torch.stack([column.detach().double().sum() for column in columns])


def accuracy_per_pair(margin_P: Tensor) -> Tensor:
    """1 where the chosen answer has the larger reward, 0 where the rejected has, 0.5 for a tie."""
    return (margin_P > 0).to(margin_P.dtype) + 0.5 * (margin_P == 0).to(margin_P.dtype)


def kl_per_token(policy_logps_A: Tensor, reference_logps_A: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from single tokens: q/p - 1 - log(q/p), never negative (Schulman's "k3").

    It is unbiased for tokens that the policy itself would write; on the data's answers it is a gauge of how far the
    policy has moved, not the KL. Ratios are capped at e^20.
    """
    log_ratio_A = (reference_logps_A - policy_logps_A).detach().clamp(max=20.0)
    return torch.expm1(log_ratio_A) - log_ratio_A


def means(sums: Tensor) -> dict[str, float]:
    """Means by name from added ``pair_sums``. Zero pairs give an empty dict."""
    *totals, count = sums.tolist()
    return {name: total / count for name, total in zip(NAMES, totals, strict=True)} if count else {}
