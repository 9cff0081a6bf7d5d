"""Preference losses against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_train.core.loss import LOSSES, PreferenceLoss, preference_loss

# Policy -10 and -12, reference -11 and -11: log-ratios +1 and -1, so h = 2. At beta 0.1 the logit is 0.2.
LOGPS = (-10.0, -12.0, -11.0, -11.0)


def _loss(*logps: float, **options: object) -> tuple[PreferenceLoss, torch.Tensor, torch.Tensor]:
    chosen, rejected, reference_chosen, reference_rejected = (torch.tensor([x], dtype=torch.float64) for x in logps)
    chosen.requires_grad_()
    rejected.requires_grad_()
    return preference_loss(chosen, rejected, reference_chosen, reference_rejected, **options), chosen, rejected


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing", "loss", "slope"),
    [
        # ln(1 + e^-0.2); slope -0.1 x sigmoid(-0.2) = -0.1 x 0.4501660027
        ("sigmoid", 0.1, 0.0, 0.5981388693815918, -0.04501660026875221),
        # ln(1 + e^-1); slope -0.5 x sigmoid(-1) = -0.5 x 0.2689414214
        ("sigmoid", 0.5, 0.0, 0.31326168751822286, -0.13447071068499755),
        # 0.9 x 0.5981388694 + 0.1 x (0.5981388694 + 0.2); slope 0.1 x (-0.9 x 0.4501660027 + 0.1 x 0.5498339973)
        ("sigmoid", 0.1, 0.1, 0.6181388693815918, -0.03501660026875221),
        # 1 - 0.1 x 2
        ("hinge", 0.1, 0.0, 0.8, -0.1),
        # 1 - 1 x 2 is negative: past the margin nothing pulls any more
        ("hinge", 1.0, 0.0, 0.0, 0.0),
        # (2 - 1 / 0.2)^2 = (-3)^2; slope 2 x -3
        ("ipo", 0.1, 0.0, 9.0, -6.0),
        # (2 - 1 / 1)^2; slope 2 x 1: beyond 1 / (2 beta) IPO pulls back
        ("ipo", 0.5, 0.0, 1.0, 2.0),
    ],
)
def test_loss_and_slope_are_the_closed_form(
    kind: str, beta: float, smoothing: float, loss: float, slope: float
) -> None:
    """The loss and its derivative by both log-probs; the two derivatives are opposite."""
    result, chosen, rejected = _loss(*LOGPS, kind=kind, beta=beta, label_smoothing=smoothing)
    result.losses_P.sum().backward()
    assert result.losses_P.item() == pytest.approx(loss, rel=1e-12, abs=1e-15)
    assert chosen.grad.item() == pytest.approx(slope, rel=1e-12, abs=1e-15)
    assert rejected.grad.item() == pytest.approx(-slope, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_policy_that_equals_its_reference_has_loss_ln_2(beta: float) -> None:
    """With log-ratios of zero the DPO loss is ln 2 whatever beta, and its slope -beta / 2."""
    result, chosen, _ = _loss(-7.0, -30.0, -7.0, -30.0, beta=beta)
    result.losses_P.sum().backward()
    assert result.losses_P.item() == pytest.approx(math.log(2), rel=1e-12)
    assert chosen.grad.item() == pytest.approx(-beta / 2, rel=1e-12)


@pytest.mark.parametrize(("kind", "start"), [("hinge", 1.0), ("ipo", 25.0)])
def test_other_losses_start_at_their_known_value(kind: str, start: float) -> None:
    """Hinge starts at 1 and IPO at 1 / (2 beta)^2 = 25 for beta 0.1."""
    assert _loss(-7.0, -30.0, -7.0, -30.0, kind=kind, beta=0.1)[0].losses_P.item() == pytest.approx(start, rel=1e-12)


def test_smoothed_loss_is_lowest_at_the_assumed_confidence() -> None:
    """cDPO with smoothing e has its minimum where sigmoid(beta h) = 1 - e: at e = 0.2 and beta 1, h = ln 4."""
    result, chosen, _ = _loss(math.log(4), 0.0, 0.0, 0.0, beta=1.0, label_smoothing=0.2)
    result.losses_P.sum().backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-15)


def test_rewards_are_beta_times_the_log_ratio_without_gradient() -> None:
    """Rewards of +1 and -1 times 0.1; they are for reading, not for training."""
    result, _, _ = _loss(*LOGPS, beta=0.1)
    assert result.chosen_rewards_P.item() == pytest.approx(0.1, rel=1e-12)
    assert result.rejected_rewards_P.item() == pytest.approx(-0.1, rel=1e-12)
    assert not result.chosen_rewards_P.requires_grad
    assert not result.rejected_rewards_P.requires_grad


def test_swapping_the_answers_swaps_the_preference() -> None:
    """h becomes -h: the loss is ln(1 + e^0.2) = 0.5981388694 + 0.2."""
    chosen, rejected, reference_chosen, reference_rejected = LOGPS
    result, _, _ = _loss(rejected, chosen, reference_rejected, reference_chosen, beta=0.1)
    assert result.losses_P.item() == pytest.approx(0.7981388693815918, rel=1e-12)


def test_loss_is_per_pair_and_not_reduced() -> None:
    """Each pair's loss is that pair's alone, so that any split of a batch sums to the same."""
    columns = [torch.tensor(values) for values in ([-10.0, -7.0], [-12.0, -7.0], [-11.0, -7.0], [-11.0, -7.0])]
    losses = preference_loss(*columns, beta=0.1).losses_P
    assert losses.tolist() == pytest.approx([0.59813887, math.log(2)], rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("h", [-1e4, 1e4])
def test_huge_ratios_stay_finite_in_fp32(kind: str, h: float) -> None:
    """No exp overflows: at h = -1e4 and beta 1 the DPO loss is 1e4 with slope -1."""
    chosen = torch.tensor([h], requires_grad=True)
    zero = torch.zeros(1)
    loss = preference_loss(chosen, zero, zero, zero, kind=kind, beta=1.0).losses_P
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(chosen.grad).all()
    if kind == "sigmoid":
        assert loss.item() == pytest.approx(max(0.0, -h), rel=1e-6)
        assert chosen.grad.item() == pytest.approx(-1.0 if h < 0 else 0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpo"}, "unknown loss 'dpo'; known: sigmoid, hinge, ipo"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": float("nan")}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1"),
        ({"label_smoothing": 0.1, "kind": "ipo"}, "not possible with the ipo loss"),
        ({"label_smoothing": 0.1, "kind": "hinge"}, "not possible with the hinge loss"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    """An option that would be ignored or divide by zero is an error."""
    with pytest.raises(ValueError, match=message):
        _loss(*LOGPS, **options)
