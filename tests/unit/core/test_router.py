"""The load-balancing loss as sums that rows and ranks can add."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_train.core.router import aux_loss, router_sums

LAYERS = [torch.randn(7, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def test_one_expert_that_gets_everything_costs_the_number_of_experts() -> None:
    """Top 1 of 4, always the first with probability 1: 4 x 1 x 1; an even router costs top_k."""
    certain = torch.tensor([[100.0, 0.0, 0.0, 0.0]] * 3)
    assert aux_loss(*router_sums([certain], 1)).item() == pytest.approx(4.0, rel=1e-6)
    even = torch.eye(4) * 1e-6  # each expert is preferred once, by next to nothing
    assert aux_loss(*router_sums([even], 1)).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_value_is_that_of_transformers(top_k: int) -> None:
    """Over two layers of seven tokens."""
    wanted = load_balancing_loss_func(tuple(LAYERS), 4, top_k)
    assert aux_loss(*router_sums(LAYERS, top_k)).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_shares_of_rows_add_up_to_the_whole_with_its_gradient() -> None:
    """Three tokens in one row and four in another, each with the counts of all seven."""
    whole = [layer.clone().requires_grad_() for layer in LAYERS]
    sums = router_sums(whole, 2)
    aux_loss(*sums).backward()
    parts = [layer.clone().requires_grad_() for layer in LAYERS]
    for rows in (slice(0, 3), slice(3, 7)):
        row = router_sums([layer[rows] for layer in parts], 2)
        aux_loss(sums.chosen_E, row.probability_E, sums.total).backward()
    for got, wanted in zip(parts, whole, strict=True):
        assert wanted.grad.norm() > 1e-3
        assert torch.allclose(got.grad, wanted.grad, rtol=1e-5, atol=1e-8)
