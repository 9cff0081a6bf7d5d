"""Sums over pairs that ranks can add."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_train.core.loss import PreferenceLoss
from dpo_train.core.metrics import NAMES, accuracy_per_pair, kl_per_token, means, pair_sums

LOSSES = [0.5, 0.7, 0.9]
CHOSEN_REWARDS = [0.3, -0.1, 0.2]
REJECTED_REWARDS = [0.1, 0.1, 0.2]
CHOSEN_LOGPS = [-10.0, -20.0, -30.0]
REJECTED_LOGPS = [-11.0, -21.0, -31.0]
KL = [0.1, 0.2, 0.6]


def _sums(chosen: slice = slice(None)) -> torch.Tensor:
    result = PreferenceLoss(*(torch.tensor(x[chosen]) for x in (LOSSES, CHOSEN_REWARDS, REJECTED_REWARDS)))
    return pair_sums(
        result,
        torch.tensor(CHOSEN_LOGPS[chosen]),
        torch.tensor(REJECTED_LOGPS[chosen]),
        torch.tensor(KL[chosen]),
        beta=0.1,
    )


def test_means_are_worked_by_hand() -> None:
    """Three pairs: one right, one wrong, one tie. Drift is the reward divided by beta 0.1."""
    assert means(_sums()) == pytest.approx(
        {
            "loss": 0.7,
            "rewards/accuracy": 0.5,
            "rewards/margin": 0.0,
            "rewards/chosen": 0.4 / 3,
            "rewards/rejected": 0.4 / 3,
            "logps/chosen": -20.0,
            "logps/rejected": -21.0,
            "drift/chosen": 4 / 3,
            "drift/rejected": 4 / 3,
            "kl": 0.3,
        },
        rel=1e-6,
        abs=1e-7,
    )


def test_sums_of_parts_add_up_to_the_whole() -> None:
    """Two ranks with one and two pairs: adding their sums is the sum over all three."""
    whole, parts = _sums(), _sums(slice(0, 1)) + _sums(slice(1, 3))
    assert whole[-1] == 3
    assert parts.tolist() == pytest.approx(whole.tolist(), rel=1e-12, abs=1e-12)
    assert len(whole) == len(NAMES) + 1
    assert whole.dtype == torch.float64


def test_tie_counts_half() -> None:
    """An untrained policy has margin 0 everywhere and accuracy 0.5."""
    assert accuracy_per_pair(torch.tensor([2.0, -2.0, 0.0, -0.0, 1e-30])).tolist() == [1.0, 0.0, 0.5, 0.5, 1.0]


def test_no_pairs_have_no_means() -> None:
    """A mean over nothing is left out rather than NaN."""
    assert means(torch.zeros(len(NAMES) + 1, dtype=torch.float64)) == {}


def test_sums_carry_no_gradient() -> None:
    """Metrics are read, never trained on."""
    losses = torch.tensor([0.5], requires_grad=True) * 1
    sums = pair_sums(
        PreferenceLoss(losses, torch.ones(1), torch.zeros(1)), torch.ones(1), torch.ones(1), torch.ones(1), beta=0.1
    )
    assert not sums.requires_grad


def test_kl_of_a_token_is_the_formula_and_never_negative() -> None:
    """q/p = 2: 2 - 1 - ln 2; q/p = 1/2: -1/2 + ln 2; equal: 0; a token that the policy has given up stays finite."""
    policy_A = torch.log(torch.tensor([0.25, 0.5, 0.3, 1e-30]))
    reference_A = torch.log(torch.tensor([0.5, 0.25, 0.3, 0.9]))
    kl_A = kl_per_token(policy_A, reference_A)
    assert kl_A[:3].tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0], rel=1e-5, abs=1e-7)
    assert torch.isfinite(kl_A).all()
    assert (kl_A >= 0).all()


def test_kl_is_unbiased_for_the_policys_own_tokens() -> None:
    """The mean under the policy's distribution is the KL, summed over all three words of a vocabulary."""
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.1, 0.4])
    wanted = (policy * (policy / reference).log()).sum().item()
    assert (policy * kl_per_token(policy.log(), reference.log())).sum().item() == pytest.approx(wanted, rel=1e-5)
