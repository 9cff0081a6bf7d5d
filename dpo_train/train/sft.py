"""SFT as the training's loop sees it: the chosen answers' tokens are made likelier (the DPO paper's Preferred-FT).

A: answer tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_train.config import SftConfig
from dpo_train.core.router import RouterSums, aux_loss
from dpo_train.data.pairs import TokenPair
from dpo_train.model.forward import RowLogps
from dpo_train.model.load import Policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import row_logps
from dpo_train.model.shard import reshard
from dpo_train.train.measure import added_routers, rows_of_rank
from dpo_train.train.ranks import Ranks
from dpo_train.train.update import raise_non_finite, update


@dataclass(frozen=True)
class Sft:
    """Mean negative log-likelihood of the chosen answers' tokens, on pairs of which they alone are there.

    A token counts the same whatever answer it is of: each row's sum is divided by the number of answer tokens of the
    whole step, so that neither the number of ranks nor the packing changes the step.
    """

    config: SftConfig

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
        """
        optimizer.zero_grad(set_to_none=True)
        num_tokens, aux_coef = _num_tokens(pairs), _aux_coef(policy)
        router = self._router(policy, pairs, ranks) if aux_coef else None
        nll = _zero(policy)
        for result, counts in self._rows(policy, pairs, ranks, with_router=router is not None):
            row_nll = -result.token_logps_A.sum()
            loss = row_nll / num_tokens
            if router is not None and result.router is not None:
                loss = loss + aux_coef * aux_loss(router.chosen_E, result.router.probability_E, router.total)
            torch.autograd.backward(loss * counts)
            nll += row_nll.detach().double() * counts
        metrics = _means(ranks.sum(nll), pairs)
        if not bool(torch.isfinite(nll)):
            raise_non_finite(pairs, lambda pair: _is_finite(policy, pair), self.config, ranks, step=step)
        grad_norm = update(policy, optimizer, self.config, ranks, step=step, learning_rate=learning_rate)
        metrics |= {"answer_tokens": float(num_tokens), "grad_norm": grad_norm}
        return metrics if router is None else metrics | {"router/aux_loss": float(aux_loss(*router))}

    @torch.no_grad()
    def evaluate(self, policy: Policy, pairs: Sequence[TokenPair], ranks: Ranks) -> dict[str, float]:
        """As ``loop.Method`` says."""
        nll = _zero(policy)
        for result, counts in self._rows(policy, pairs, ranks):
            nll -= result.token_logps_A.sum(dtype=torch.float64) * counts
        reshard(policy)
        return _means(ranks.sum(nll), pairs)

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """Nothing that a validation loss does not tell."""
        del metrics
        return None

    def _rows(
        self, policy: Policy, pairs: Sequence[TokenPair], ranks: Ranks, *, with_router: bool = False
    ) -> Iterator[tuple[RowLogps, bool]]:
        """This rank's rows, and whether each counts."""
        for indices, counts in rows_of_rank(policy, pairs, self.config.row_tokens, ranks):
            row = build_row([pairs[index] for index in indices]).to(policy.device)
            yield row_logps(policy, row, with_router=with_router), counts

    @torch.no_grad()
    def _router(self, policy: Policy, pairs: Sequence[TokenPair], ranks: Ranks) -> RouterSums | None:
        """How the whole step's tokens choose their experts, by a pass ahead of any row's gradient."""
        rows = self._rows(policy, pairs, ranks, with_router=True)
        found = [result.router for result, counts in rows if counts and result.router is not None]
        reshard(policy)
        return added_routers(policy, found, ranks)


def _num_tokens(pairs: Sequence[TokenPair]) -> int:
    return sum(len(pair.chosen_ids) for pair in pairs)


def _aux_coef(policy: Policy) -> float:
    """Weight of a mixture of experts' balancing loss: the model's own."""
    return 0.0 if policy.layout.experts is None else policy.layout.experts.aux_loss_coef


def _zero(policy: Policy) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=policy.device)


def _means(nll: Tensor, pairs: Sequence[TokenPair]) -> dict[str, float]:
    """``loss`` in nats per answer token, ``logps/chosen`` per answer."""
    return {"loss": float(nll) / _num_tokens(pairs), "logps/chosen": -float(nll) / len(pairs)}


def _is_finite(policy: Policy, pair: TokenPair) -> bool:
    row = build_row([pair]).to(policy.device)
    return bool(torch.isfinite(row_logps(policy, row).token_logps_A).all())
