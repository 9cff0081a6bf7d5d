"""The auxiliary loss that keeps a mixture of experts balanced, over the unique tokens of a whole step.

N: layers x tokens, E: experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RouterSums(NamedTuple):
    """Sums over layers and tokens, which rows and ranks can add."""

    chosen_E: Tensor
    """How often each expert was among a token's ``top_k``; no gradient."""
    probability_E: Tensor
    """Sum of each expert's probability, with gradient."""
    total: Tensor
    """N, a float scalar."""


def router_sums(router_logits: Sequence[Tensor], top_k: int) -> RouterSums:
    """Sums over a row.

    Args:
        router_logits: for each layer float [tokens, E], before the softmax.
        top_k: experts of a token.
    """
    probability_NE = torch.softmax(torch.cat([logits.float() for logits in router_logits]), dim=-1)
    picks = probability_NE.topk(top_k, dim=-1).indices
    chosen_E = torch.zeros_like(probability_NE[0]).index_add(
        0, picks.flatten(), torch.ones_like(picks.flatten(), dtype=torch.float32)
    )
    return RouterSums(chosen_E.detach(), probability_NE.sum(0), chosen_E.new_tensor(float(len(probability_NE))))


def aux_loss(chosen_E: Tensor, probability_E: Tensor, total: Tensor) -> Tensor:
    """Load balancing (arXiv 2101.03961, equations 4 to 6): E * sum over experts of share chosen * mean probability.

    As transformers does, and unlike the paper, over the tokens of all layers together rather than layer by layer.
    Linear in ``probability_E``: with ``chosen_E`` and ``total`` of the whole step, the values of rows add up to the
    step's, and so do their gradients.
    """
    return len(chosen_E) * torch.sum((chosen_E / total) * (probability_E / total))
