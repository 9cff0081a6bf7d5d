"""What a loss needs to know of pairs, row by row or for a whole batch over all ranks.

P: pairs, K: answers of the longest ranking among them, two where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_train.config import TrainConfig
from dpo_train.core.loss import PreferenceLoss, preference_loss, wpo_weights
from dpo_train.core.metrics import kl_per_token, pair_sums
from dpo_train.core.router import RouterSums
from dpo_train.data.batches import rank_rows
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy
from dpo_train.model.rows import Row, build_row
from dpo_train.model.score import row_logps
from dpo_train.model.shard import reshard
from dpo_train.train.ranks import Ranks


class Measured(NamedTuple):
    """Each a float tensor [P]; the policy's log-probs carry gradients if the policy does.

    Where rankings are among the pairs, those of RANKED have a column for each answer but the best, [P, K - 1]; a length
    of 0 says that there is none. Metrics are always those of the best answer against the second.

    With ``ld_alpha`` the loss sees weighted sums; rewards and all other metrics are always those of whole answers.
    """

    chosen_logps_P: Tensor
    rejected_logps_P: Tensor
    reference_chosen_logps_P: Tensor
    reference_rejected_logps_P: Tensor
    whole_chosen_logps_P: Tensor
    whole_rejected_logps_P: Tensor
    chosen_ratio_P: Tensor
    rejected_ratio_P: Tensor
    chosen_lengths_P: Tensor
    rejected_lengths_P: Tensor
    weights_P: Tensor
    kl_P: Tensor

    def losses(self, config: TrainConfig, *, weighted: bool = True) -> Tensor:
        """The configured loss of each pair [P]. For a loss over a batch these must be all of the step's.

        Unweighted it can be compared between policies: WPO's weights fall with the policy's own log-probs.
        """
        is_ranked = self.rejected_lengths_P.ndim == 2
        result = preference_loss(
            self.chosen_logps_P,
            self.rejected_logps_P,
            self.reference_chosen_logps_P,
            self.reference_rejected_logps_P,
            kind=config.loss,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            chosen_lengths_P=self.chosen_lengths_P,
            rejected_lengths_P=self.rejected_lengths_P,
            rejected_exists_PK=self.rejected_lengths_P > 0 if is_ranked else None,
            weights_P=self.weights_P if config.wpo and weighted else None,
            divergence=config.divergence,
            divergence_alpha=config.divergence_alpha,
            simpo_margin=config.simpo_margin,
            discopop_tau=config.discopop_tau,
            unlikelihood_alpha=config.unlikelihood_alpha,
        )
        return result.losses_P

    def sums(self, losses_P: Tensor, config: TrainConfig) -> Tensor:
        """The pairs' metrics, added up (core/metrics.py)."""
        result = PreferenceLoss(losses_P, config.beta * self.chosen_ratio_P, config.beta * self.rejected_ratio_P)
        return pair_sums(result, self.whole_chosen_logps_P, self.whole_rejected_logps_P, self.kl_P, config.beta)


RANKED = ("rejected_logps_P", "reference_rejected_logps_P", "rejected_lengths_P")
"""What the loss over rankings wants to know of every answer."""


class RankRow(NamedTuple):
    """Indices of a row's pairs, and whether the row counts; one that does not only keeps other ranks company."""

    indices: list[int]
    counts: bool


def rows_of_rank(policy: Policy, pairs: Sequence[TokenPair], row_tokens: int, ranks: Ranks) -> list[RankRow]:
    """This rank's rows of indices into ``pairs``. With a sharded policy all ranks get equally many.

    Sharded weights are gathered by all ranks at once, so a rank that has run out of pairs repeats the shortest one, and
    multiplies what comes of it by zero.
    """
    return _rows_of_rank(policy, [pair.num_tokens for pair in pairs], row_tokens, ranks)


def _rows_of_rank(policy: Policy, lengths: Sequence[int], row_tokens: int, ranks: Ranks) -> list[RankRow]:
    everyone = rank_rows(lengths, row_tokens, ranks.num_shares)
    mine = [RankRow(row, True) for row in everyone[ranks.share]]
    if policy.sharded:
        missing = max(map(len, everyone)) - len(mine)
        mine += [RankRow([lengths.index(min(lengths))], False)] * missing
    return mine


def measure_row(
    policy: Policy, pairs: Sequence[TokenPair], config: TrainConfig, *, with_router: bool = False
) -> tuple[Measured, RouterSums | None]:
    """One row of scored pairs."""
    row = build_row(pairs).to(policy.device)
    result = row_logps(policy, row, with_squares=config.wpo, with_router=with_router)
    policy_A, reference_A = result.token_logps_A, row.reference_A
    assert reference_A is not None, "pairs are scored before they are trained on"
    kl_P = row.answer_sums(kl_per_token(policy_A, reference_A))[:, :2].mean(dim=1)
    lengths_PK = row.lengths_PK.float()
    weights_P = torch.ones_like(kl_P)
    if result.log_sum_squares_A is not None:
        aligned_PK = row.answer_sums(policy_A.detach() - result.log_sum_squares_A)
        weights_P = wpo_weights(*aligned_PK[:, :2].unbind(1), *lengths_PK[:, :2].unbind(1))
    policy_PK, reference_PK = (_answer_logps(row, values_A, config) for values_A in (policy_A, reference_A))
    whole_PK = row.answer_sums(policy_A.detach())
    # The same sums as the loss's, so that a policy that is its reference has a ratio of exactly zero.
    ratio_PK = whole_PK - row.answer_sums(reference_A)
    columns = (policy_PK, reference_PK, whole_PK[:, :2], ratio_PK[:, :2], lengths_PK)
    sides = (side_P for each_PK in columns for side_P in _best_and_rest(each_PK))
    return Measured._make((*sides, weights_P, kl_P)), result.router


@torch.no_grad()
def measure_all(
    policy: Policy, pairs: Sequence[TokenPair], config: TrainConfig, ranks: Ranks, *, with_router: bool = False
) -> tuple[Measured, RouterSums | None]:
    """All pairs, on every rank, without gradients; the router's sums are those of all ranks."""
    sizes = [(pair.num_tokens, 1 + len(pair.other_ids)) for pair in pairs]
    num_rejected = max((rejected for _, rejected in sizes), default=1)
    widths = [num_rejected if name in RANKED else 1 for name in Measured._fields]
    table = torch.zeros(len(pairs), sum(widths), device=policy.device)
    routers: list[RouterSums] = []
    for indices, counts in _rows_of_rank(policy, [tokens for tokens, _ in sizes], config.row_tokens, ranks):
        measured, router = measure_row(policy, [pairs[i] for i in indices], config, with_router=with_router)
        if counts:
            table[indices] = torch.cat([_widened(*column) for column in zip(measured, widths, strict=True)], dim=1)
            routers += [router] if router is not None else []
    reshard(policy)
    # Every entry is zero on all ranks but one: the sum is exact.
    ranks.sum(table)
    router = added_routers(policy, routers, ranks) if with_router else None
    return Measured(*(part.squeeze(1) for part in torch.split(table, widths, dim=1))), router


def _best_and_rest(values_PK: Tensor) -> tuple[Tensor, ...]:
    """The best answer's column, and the second's; of rankings all others' [P, K - 1]."""
    return values_PK.unbind(1) if values_PK.shape[1] == 2 else (values_PK[:, 0], values_PK[:, 1:])


def _widened(column: Tensor, width: int) -> Tensor:
    """[P] or [P, K - 1] as [P, width], with zeros where there is nothing."""
    columns = column[:, None] if column.ndim == 1 else column
    return F.pad(columns, (0, width - columns.shape[1]))


def _answer_logps(row: Row, values_A: Tensor, config: TrainConfig) -> Tensor:
    weighted_A = values_A if config.ld_alpha is None else values_A * row.ld_weights(config.ld_alpha)
    return row.answer_sums(weighted_A)


def added_routers(policy: Policy, routers: Sequence[RouterSums], ranks: Ranks) -> RouterSums | None:
    """The sums of all rows and ranks; None if the policy has no experts."""
    experts = policy.layout.experts
    if experts is None:
        return None
    zeros: list[Any] = [torch.zeros(size, device=policy.device) for size in (experts.num_experts,) * 2]
    total = RouterSums(zeros[0], zeros[1], torch.zeros((), device=policy.device))
    for router in routers:
        total = RouterSums(*(mine + its for mine, its in zip(total, router, strict=True)))
    return RouterSums(*(ranks.sum(part) for part in total))
