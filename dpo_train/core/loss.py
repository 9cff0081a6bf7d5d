"""Preference losses from log-probs.

P: pairs. ``logps`` are natural logs, summed over the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """Per pair; not reduced, so that any split of a batch sums to the same."""

    losses_P: Tensor
    chosen_rewards_P: Tensor
    rejected_rewards_P: Tensor


def preference_loss(
    policy_chosen_logps_P: Tensor,
    policy_rejected_logps_P: Tensor,
    reference_chosen_logps_P: Tensor,
    reference_rejected_logps_P: Tensor,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Loss and implicit rewards of each pair.

    The implicit reward is beta * log(policy / reference) (arXiv 2305.18290, section 4); it carries no gradient here.

    Args:
        policy_chosen_logps_P: float tensor [P]; the other three alike. Only the policy's need a gradient.
        kind: a key of ``LOSSES``.
        beta: strength of the pull towards the reference.
        label_smoothing: assumed share of wrong labels, in [0, 0.5); sigmoid only.

    Raises:
        ValueError: unknown kind, beta not positive, or smoothing that the loss does not know.
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}; known: {', '.join(LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind != "sigmoid"):
        raise ValueError(f"label_smoothing {label_smoothing} is not possible with the {kind} loss")
    chosen_ratio_P = policy_chosen_logps_P - reference_chosen_logps_P
    rejected_ratio_P = policy_rejected_logps_P - reference_rejected_logps_P
    losses_P = LOSSES[kind](chosen_ratio_P - rejected_ratio_P, beta, label_smoothing)
    return PreferenceLoss(losses_P, beta * chosen_ratio_P.detach(), beta * rejected_ratio_P.detach())


def sigmoid(ratio_difference_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO, equation 7 of arXiv 2305.18290; with smoothing cDPO (Mitchell, "A note on DPO with noisy preferences").

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)
    """
    logits_P = beta * ratio_difference_P
    return -(1 - label_smoothing) * F.logsigmoid(logits_P) - label_smoothing * F.logsigmoid(-logits_P)


def hinge(ratio_difference_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """SLiC's ranking loss (arXiv 2305.10425), on log-ratios as in arXiv 2309.06657: max(0, 1 - beta h)."""
    del label_smoothing
    return torch.relu(1 - beta * ratio_difference_P)


def ipo(ratio_difference_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """IPO, equation 17 of arXiv 2310.12036: (h - 1 / (2 beta))^2, on summed log-ratios as there."""
    del label_smoothing
    return (ratio_difference_P - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}
