"""One optimiser step, and the same sums without an update for evaluation. No input or output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_train.config import TrainConfig
from dpo_train.core.loss import preference_loss
from dpo_train.core.metrics import NAMES, pair_sums
from dpo_train.data.batches import rank_rows
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import NonFiniteLossError
from dpo_train.model.load import Policy
from dpo_train.model.score import build_row, reference_logps, row_logps
from dpo_train.train.ranks import Ranks


class StepResult(NamedTuple):
    """Sums over the step's pairs and all ranks (core/metrics.py), and the gradient's norm before clipping."""

    sums: Tensor
    grad_norm: float


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
        NonFiniteLossError: some row's loss is NaN or infinite; nothing was updated.
    """
    parameters = list(policy.trainable().values())
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=policy.device)
    for row_pairs in _rows_of_rank(pairs, config.row_tokens, ranks):
        losses, row_sums = _row_loss(policy, row_pairs, config)
        torch.autograd.backward(losses / len(pairs))
        sums += row_sums
    ranks.sum(sums)
    if not bool(torch.isfinite(sums[0])):
        _raise_non_finite(policy, pairs, config, ranks, step)
    ranks.sum_gradients(parameters)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    if not bool(torch.isfinite(grad_norm)):
        raise NonFiniteLossError(
            f"The gradient is not finite at step {step}",
            got=f"norm {float(grad_norm)}",
            fix="lower train.learning_rate, or look at this step's pairs",
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return StepResult(sums, float(grad_norm))


@torch.no_grad()
def evaluate_pairs(policy: Policy, pairs: Sequence[TokenPair], config: TrainConfig, ranks: Ranks) -> Tensor:
    """Sums over all pairs and ranks, without an update."""
    sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=policy.device)
    for row_pairs in _rows_of_rank(pairs, config.row_tokens, ranks):
        sums += _row_loss(policy, row_pairs, config)[1]
    return ranks.sum(sums)


def _rows_of_rank(pairs: Sequence[TokenPair], row_tokens: int, ranks: Ranks) -> list[list[TokenPair]]:
    rows = rank_rows([pair.num_tokens for pair in pairs], row_tokens, ranks.world_size)[ranks.rank]
    return [[pairs[index] for index in row] for row in rows]


def _row_loss(policy: Policy, row_pairs: Sequence[TokenPair], config: TrainConfig) -> tuple[Tensor, Tensor]:
    logps = row_logps(policy, build_row(row_pairs))
    reference_chosen_P, reference_rejected_P = (part.to(policy.device) for part in reference_logps(row_pairs))
    result = preference_loss(
        logps.chosen_P,
        logps.rejected_P,
        reference_chosen_P,
        reference_rejected_P,
        kind=config.loss,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )
    return result.losses_P.sum(), pair_sums(result, logps.chosen_P, logps.rejected_P, config.beta)


@torch.no_grad()
def _raise_non_finite(policy: Policy, pairs: Sequence[TokenPair], config: TrainConfig, ranks: Ranks, step: int) -> None:
    """Finds the culprits by scoring this rank's rows pair by pair; only runs when a step has already failed."""
    bad = [
        pair.pair_id
        for row in _rows_of_rank(pairs, config.row_tokens, ranks)
        for pair in row
        if not bool(torch.isfinite(_row_loss(policy, [pair], config)[0]))
    ]
    found = [f"{pair_id} (rank {rank})" for rank, ids in enumerate(ranks.gather(bad)) for pair_id in ids]
    raise NonFiniteLossError(
        f"The loss is not finite at step {step}",
        got=f"pairs {', '.join(found)}" if found else "finite losses when the pairs are scored one by one",
        fix="lower train.learning_rate, or look at these pairs",
    )
