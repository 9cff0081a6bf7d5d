"""The end of every step, whatever its loss: one update from all gradients, or an error that names the culprits.

W: weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dpo_train.config import FitConfig
from dpo_train.data.batches import rank_rows
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import NonFiniteLossError, RunError
from dpo_train.model.load import Policy
from dpo_train.model.shard import TENSOR, is_cut, local
from dpo_train.train.ranks import Ranks


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    ranks: Ranks,
    *,
    step: int,
    learning_rate: float,
) -> float:
    """Adds up the ranks' gradients, clips them and moves the weights; returns the norm before clipping.

    Raises:
        NonFiniteLossError: the gradient is not finite; nothing was updated.
        RunError: the model's plan for tensor parallelism is not whole.
    """
    parameters = list(policy.trainable().values())
    if policy.sharded:  # FSDP2 has added the gradients during the backward passes
        grad_norm = _clip_shares(parameters, config.max_grad_norm, ranks)
    else:
        ranks.sum_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    if not bool(torch.isfinite(grad_norm)):
        raise NonFiniteLossError(
            f"The gradient is not finite at step {step}",
            got=f"norm {float(grad_norm)}",
            fix=f"lower {config.section}.learning_rate, or look at this step's pairs",
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return float(grad_norm)


@torch.no_grad()
def _clip_shares(parameters: Sequence[torch.nn.Parameter], max_norm: float, ranks: Ranks) -> Tensor:
    """What ``clip_grad_norm_`` does, also where weights are cut over different dimensions of the mesh of ranks.

    Raises:
        RunError: ranks of a tensor group would move weights that all of them hold apart.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    shares = [local(gradient) for gradient in gradients]
    norms_W = torch.stack(list(torch._foreach_norm(shares))).double()
    cut_W = torch.tensor([is_cut(gradient, TENSOR) for gradient in gradients], device=norms_W.device)
    # What all ranks of a tensor group hold is counted by one of them.
    counted_W = norms_W if ranks.is_first_of_share else norms_W * cut_W
    square, apart = ranks.sum_everywhere(torch.stack([counted_W.square().sum(), _num_apart(norms_W[~cut_W], ranks)]))
    if apart > 0:
        raise RunError(
            "Ranks that compute a row together have other gradients of weights that they all hold: the model's plan "
            "(tp_plan) leaves out a module that sees a part of the heads or of the hidden units",
            fix="set compute.tensor_parallel=1",
        )
    norm: Tensor = square.sqrt().float()
    torch._foreach_mul_(shares, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def _num_apart(norms_W: Tensor, ranks: Ranks) -> Tensor:
    """Of gradients that all ranks of a tensor group have, how many differ by more than the order of sums explains."""
    if ranks.ranks_per_share == 1 or not len(norms_W):
        return norms_W.new_zeros(())
    most_W, minus_least_W = ranks.max_of_share(torch.stack([norms_W, -norms_W]))
    apart_W: Tensor = most_W + minus_least_W > 1e-2 * most_W + 1e-6 * most_W.max()
    return apart_W.double().sum()


@torch.no_grad()
def raise_non_finite(
    pairs: Sequence[TokenPair],
    is_finite: Callable[[TokenPair], bool],
    config: FitConfig,
    ranks: Ranks,
    *,
    step: int,
) -> NoReturn:
    """Finds the culprits pair by pair; only runs when a step has already failed.

    Every rank measures every pair: sharded weights allow nothing else, and a failed run has the time.

    Raises:
        NonFiniteLossError: always; it names the pairs whose loss ``is_finite`` denies, and on which ranks they are.
    """
    rows_by_share = rank_rows([pair.num_tokens for pair in pairs], config.row_tokens, ranks.num_shares)
    first_of = [share * ranks.ranks_per_share for share in range(ranks.num_shares)]
    rank_of = {i: rank for rank, rows in zip(first_of, rows_by_share, strict=True) for row in rows for i in row}
    found = [f"{pair.pair_id} (rank {rank_of[index]})" for index, pair in enumerate(pairs) if not is_finite(pair)]
    raise NonFiniteLossError(
        f"The loss is not finite at step {step}",
        got=f"pairs {', '.join(found)}" if found else "finite losses when the pairs are scored one by one",
        fix=f"lower {config.section}.learning_rate, or look at these pairs",
    )
