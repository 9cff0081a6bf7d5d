"""One optimiser step, and the same sums without an update for evaluation. No input or output.

P: pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_train.config import TrainConfig
from dpo_train.core.metrics import NAMES
from dpo_train.core.router import RouterSums, aux_loss
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy
from dpo_train.objective import is_over_batch
from dpo_train.train.measure import measure_all, measure_row, rows_of_rank
from dpo_train.train.ranks import Ranks
from dpo_train.train.update import raise_non_finite, update


class StepResult(NamedTuple):
    """Sums over the step's pairs and all ranks (core/metrics.py), and the gradient's norm before clipping."""

    sums: Tensor
    grad_norm: float
    aux_loss: float | None
    """Of a mixture of experts, before its coefficient."""


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[TokenPair],
    config: TrainConfig,
    ranks: Ranks,
    *,
    step: int,
    learning_rate: float,
) -> StepResult:
    """Updates the policy on one batch.

    The loss is the mean over the global batch: each row's sum is divided by the global number of pairs, and gradients
    are summed over rows and ranks, so that neither the number of ranks nor the packing changes the step.

    Raises:
        NonFiniteLossError: some pair's loss is NaN or infinite; nothing was updated.
    """
    optimizer.zero_grad(set_to_none=True)
    ahead = _look_ahead(policy, pairs, config, ranks)
    sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=policy.device)
    for indices, counts in rows_of_rank(policy, pairs, config.row_tokens, ranks):
        row_loss, row_sums = _row_loss(policy, pairs, indices, config, ahead)
        torch.autograd.backward(row_loss * (counts / len(pairs)))
        sums += row_sums * counts
    ranks.sum(sums)
    if not bool(torch.isfinite(sums[0])):
        raise_non_finite(pairs, lambda pair: _is_finite(policy, pair, config), config, ranks, step=step)
    grad_norm = update(policy, optimizer, config, ranks, step=step, learning_rate=learning_rate)
    return StepResult(sums, grad_norm, None if ahead.router is None else float(aux_loss(*ahead.router)))


@torch.no_grad()
def evaluate_pairs(policy: Policy, pairs: Sequence[TokenPair], config: TrainConfig, ranks: Ranks) -> Tensor:
    """Sums over all pairs and ranks, without an update."""
    measured, _ = measure_all(policy, pairs, config, ranks)
    return measured.sums(measured.losses(config, weighted=False), config)


@dataclass(frozen=True)
class _Ahead:
    """What must be known of the whole step before any row's gradient can be computed."""

    losses_P: Tensor | None = None
    slopes_P2: Tensor | None = None
    """Derivative of the batch's summed loss by each answer's log-prob."""
    router: RouterSums | None = None
    aux_coef: float = 0.0


def _look_ahead(policy: Policy, pairs: Sequence[TokenPair], config: TrainConfig, ranks: Ranks) -> _Ahead:
    """A first pass without gradients, where pairs or tokens of other rows and ranks decide about a row's gradient.

    Rows may then be done one by one, as for any other loss: memory does not grow with the batch, time by a third.
    """
    experts = policy.layout.experts
    aux_coef = 0.0
    if experts is not None:
        aux_coef = experts.aux_loss_coef if config.router_aux_loss is None else config.router_aux_loss
    over_batch = is_over_batch(config.loss)
    if not over_batch and not aux_coef:
        return _Ahead()
    measured, router = measure_all(policy, pairs, config, ranks, with_router=bool(aux_coef))
    if not over_batch:
        return _Ahead(router=router, aux_coef=aux_coef)
    with torch.enable_grad():
        # Losses over a batch know pairs alone, so each of these is [P].
        leaves = [logps_P.detach().requires_grad_() for logps_P in measured[:2]]
        losses_P = measured._replace(chosen_logps_P=leaves[0], rejected_logps_P=leaves[1]).losses(config)
        slopes = torch.autograd.grad(losses_P.sum(), leaves)
    return _Ahead(losses_P.detach(), torch.stack(slopes, dim=1), router, aux_coef)


def _row_loss(
    policy: Policy, pairs: Sequence[TokenPair], indices: list[int], config: TrainConfig, ahead: _Ahead
) -> tuple[Tensor, Tensor]:
    """A scalar with the row's share of the gradient of (batch size x loss), and the row's metrics."""
    row_pairs = [pairs[index] for index in indices]
    measured, router = measure_row(policy, row_pairs, config, with_router=ahead.router is not None)
    if ahead.slopes_P2 is None or ahead.losses_P is None:
        losses_P = measured.losses(config)
        loss = losses_P.sum()
    else:
        losses_P = ahead.losses_P[indices]
        slopes_P2 = ahead.slopes_P2[indices]
        loss = (slopes_P2[:, 0] * measured.chosen_logps_P + slopes_P2[:, 1] * measured.rejected_logps_P).sum()
    if ahead.router is not None and router is not None:
        # The coefficient's term is no mean over pairs: it is scaled as the caller will divide.
        share = aux_loss(ahead.router.chosen_E, router.probability_E, ahead.router.total)
        loss = loss + len(pairs) * ahead.aux_coef * share
    return loss, measured.sums(losses_P, config)


def _is_finite(policy: Policy, pair: TokenPair, config: TrainConfig) -> bool:
    measured, _ = measure_row(policy, [pair], config)
    return bool(torch.isfinite(measured.losses(config)).all())
