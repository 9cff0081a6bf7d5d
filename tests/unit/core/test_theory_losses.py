"""Where other objectives than DPO's have their optimum, if they have one (tests/theory.py).

Where DPO's lies is in test_theory.py. X: prompts, Y: answers, P: ordered pairs of answers.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dpo_train.core.loss import preference_loss
from dpo_train.objective import DIVERGENCES
from tests.theory import (
    Loss,
    World,
    assert_same_policy,
    bradley_terry,
    closed_form,
    expected_loss,
    expected_reward,
    kl,
    pair_losses,
    random_world,
    slope,
    trained,
)  # fmt: skip

BETAS = (0.1, 0.5, 2.0)


# Without the weight


def _descended(losses_of: dict[str, Loss], start: Tensor, *, steps: int, rate: float) -> dict[str, Tensor]:
    """Where plain gradient descent is after so many steps."""
    found = {}
    for name, loss_of in losses_of.items():
        point = start
        for _ in range(steps):
            point = point - rate * slope(loss_of, point)
        found[name] = point
    return found


def test_unlikelihood_is_the_gradient_without_its_weight() -> None:
    """With alpha 1, beta times its gradient is DPO's divided by s(r_l - r_w), whatever the policy."""
    world, beta = random_world(8, prompts=1), 0.3
    policy_XY = random_world(9, prompts=1).reference_XY
    rewards_Y = beta * (policy_XY - world.reference_XY)[0]
    for pair, (chosen, rejected) in enumerate(itertools.permutations(range(5), 2)):
        dpo, bare = (
            slope(lambda x, o=options, i=pair: pair_losses(x, world.reference_XY, **o)[0, i], policy_XY)
            for options in ({"beta": beta}, {"kind": "unlikelihood"})
        )
        expected = beta * torch.sigmoid(rewards_Y[rejected] - rewards_Y[chosen]) * bare
        torch.testing.assert_close(dpo, expected, rtol=1e-10, atol=1e-14)


def test_without_its_weight_the_margin_grows_for_ever() -> None:
    """Labels that are 80 % certain: DPO stops at logit(0.8) / beta, unlikelihood adds the same to the margin each step.

    By hand: d loss / d (z_w - z_l) is -0.6 a step and logit, so a rate of 0.5 adds 2 x 0.3 nats to the margin.
    """
    reference_XY = torch.log(torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    labels_XYY = torch.tensor([[[0.0, 0.8], [0.2, 0.0]]], dtype=torch.float64)

    def loss_of(kind: str) -> Loss:
        return lambda x: expected_loss(torch.log_softmax(x, -1), reference_XY, labels_XYY, kind=kind, beta=1.0)

    kinds = {kind: loss_of(kind) for kind in ("sigmoid", "unlikelihood")}
    for steps in (100, 400):
        margins = {
            kind: (x[0, 0] - x[0, 1]).item()
            for kind, x in _descended(kinds, reference_XY, steps=steps, rate=0.5).items()
        }
        assert margins["sigmoid"] == pytest.approx(math.log(4), rel=1e-6)
        assert margins["unlikelihood"] == pytest.approx(0.6 * steps, rel=1e-9)


def test_without_its_weight_the_policy_writes_what_nobody_wrote() -> None:
    """Both tokens from one distribution, "ab" preferred to "bb" in 80 %: all mass goes to "aa", which is in no pair.

    DPO stops where log odds of a = logit(0.4) + logit(0.8) / beta, and keeps the chosen answer as likely as it was.
    """
    beta, reference = 2.0, torch.log(torch.tensor([0.4, 0.6], dtype=torch.float64))

    def answers(logits: Tensor) -> Tensor:
        a, b = torch.log_softmax(logits, -1)
        return torch.stack([a + b, b + b])[None]

    labels_XYY = torch.tensor([[[0.0, 0.8], [0.2, 0.0]]], dtype=torch.float64)

    def loss_of(kind: str) -> Loss:
        return lambda x: expected_loss(answers(x), answers(reference), labels_XYY, kind=kind, beta=beta)

    kinds = {kind: loss_of(kind) for kind in ("sigmoid", "unlikelihood")}
    share_of_a = {
        kind: torch.softmax(x, -1)[0].item() for kind, x in _descended(kinds, reference, steps=400, rate=0.5).items()
    }
    odds = 0.4 / 0.6 * 4 ** (1 / beta)
    assert share_of_a["sigmoid"] == pytest.approx(odds / (1 + odds), rel=1e-6)
    assert share_of_a["sigmoid"] * (1 - share_of_a["sigmoid"]) > 0.24  # "ab", which began at 0.4 x 0.6
    assert share_of_a["unlikelihood"] ** 2 > 1 - 1e-12  # "aa"


# Other losses


@pytest.mark.parametrize("beta", BETAS)
def test_ipo_stops_at_its_margin_where_dpo_does_not(beta: float) -> None:
    """Certain labels: IPO's optimum has a margin of 1 / (2 beta) (arXiv 2310.12036); DPO's loss falls for ever."""
    world = random_world(10, answers=2)
    certain_XYY = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64).expand(3, 2, 2)
    ratio_XY = trained(world, certain_XYY, kind="ipo", beta=beta) - world.reference_XY
    margin_X = ratio_XY[:, 0] - ratio_XY[:, 1]
    torch.testing.assert_close(margin_X, torch.full_like(margin_X, 1 / (2 * beta)), rtol=1e-6, atol=0.0)
    zero = torch.zeros(4, dtype=torch.float64)
    margin_P = torch.tensor([1.0, 10.0, 100.0, 300.0], dtype=torch.float64) / beta
    assert (preference_loss(margin_P, zero, zero, zero, beta=beta).losses_P.diff() < 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_optimum_of_ipo_follows_the_share_of_wins(beta: float) -> None:
    """reference x exp(P(answer beats a random one) / beta) / Z (arXiv 2310.12036), for labels that no reward explains.

    Of the first three answers each beats the next in a circle. The random one may be the answer itself, a tie.
    """
    world = random_world(11)
    generator = torch.Generator().manual_seed(0)
    wins_XYY = torch.full((3, 5, 5), 0.5, dtype=torch.float64)
    for winner, loser in ((0, 1), (1, 2), (2, 0), (0, 3), (1, 3), (2, 3), (0, 4), (1, 4), (2, 4), (3, 4)):
        share_X = torch.rand(3, generator=generator, dtype=torch.float64)
        wins_XYY[:, winner, loser] = 0.5 + 0.5 * share_X if winner < 3 and loser < 3 else share_X
        wins_XYY[:, loser, winner] = 1 - wins_XYY[:, winner, loser]
    as_rewards = World(rewards_XY=wins_XYY.mean(-1), reference_XY=world.reference_XY)
    assert_same_policy(trained(world, wins_XYY, kind="ipo", beta=beta), closed_form(as_rewards, beta))


# f of each divergence E[f(policy / reference)] under the reference, u being the quotient (arXiv 2309.16240, table 1).
F_OF = {
    "reverse_kl": lambda u: u * torch.log(u),
    "forward_kl": lambda u: -torch.log(u),
    "js": lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2),
    "alpha": lambda u: 2 + 2 * u - 4 * torch.sqrt(u),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("beta", BETAS)
def test_other_divergences_have_their_own_optimum(divergence: str, beta: float) -> None:
    """f-DPO: the optimum maximises E[reward] - beta D_f: no slope there, and no other policy earns as much."""
    world = random_world(16)
    best_XY = trained(world, bradley_terry(world.rewards_XY), beta=beta, divergence=divergence)

    def objective(logits_XY: Tensor) -> Tensor:
        policy_XY = torch.log_softmax(logits_XY, -1)
        distance_X = (torch.exp(world.reference_XY) * F_OF[divergence](torch.exp(policy_XY - world.reference_XY))).sum(
            -1
        )
        return expected_reward(policy_XY, world) - beta * distance_X

    assert slope(lambda x: objective(x).sum(), best_XY).abs().max() < 1e-7
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-2, 0.1, 1.0, 5.0):
        other_XY = best_XY + scale * torch.randn(best_XY.shape, generator=generator, dtype=torch.float64)
        assert (objective(best_XY) > objective(other_XY)).all()


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("beta", BETAS)
def test_cdpo_stops_at_the_assumed_confidence(beta: float, smoothing: float) -> None:
    """Certain labels, a share e of them assumed wrong: the margin is logit(1 - e) / beta, and no more."""
    world = random_world(12, answers=2)
    certain_XYY = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64).expand(3, 2, 2)
    ratio_XY = trained(world, certain_XYY, beta=beta, label_smoothing=smoothing) - world.reference_XY
    margin_X = ratio_XY[:, 0] - ratio_XY[:, 1]
    expected = math.log((1 - smoothing) / smoothing) / beta
    torch.testing.assert_close(margin_X, torch.full_like(margin_X, expected), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("flipped", [0.05, 0.2, 0.4])
def test_robust_loss_of_flipped_labels_is_the_clean_loss(flipped: float) -> None:
    """rDPO (arXiv 2403.00409): over the flips of each pair, its mean loss and gradient are DPO's without flips."""
    world, policy_XY = random_world(13), random_world(14).reference_XY
    pairs = list(itertools.permutations(range(5), 2))
    back_P = [pairs.index((rejected, chosen)) for chosen, rejected in pairs]

    def flipped_losses(x: Tensor) -> Tensor:
        losses_XP = pair_losses(x, world.reference_XY, kind="robust", beta=0.5, label_smoothing=flipped)
        return (1 - flipped) * losses_XP + flipped * losses_XP[:, back_P]

    clean_XP = pair_losses(policy_XY, world.reference_XY, beta=0.5)
    torch.testing.assert_close(flipped_losses(policy_XY), clean_XP, rtol=1e-12, atol=1e-14)
    found = slope(lambda x: flipped_losses(x)[:, ::3].sum(), policy_XY)
    expected = slope(lambda x: pair_losses(x, world.reference_XY, beta=0.5)[:, ::3].sum(), policy_XY)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("flipped", [0.1, 0.3])
def test_robust_dpo_finds_the_clean_optimum_in_flipped_labels(flipped: float) -> None:
    """Its optimum on noisy labels is equation 4; plain DPO's is more timid: less KL, less reward."""
    world = random_world(15)
    clean_XYY = bradley_terry(world.rewards_XY)
    noisy_XYY = (1 - flipped) * clean_XYY + flipped * clean_XYY.mT
    robust_XY = trained(world, noisy_XYY, kind="robust", beta=0.5, label_smoothing=flipped)
    assert_same_policy(robust_XY, closed_form(world, 0.5))
    plain_XY = trained(world, noisy_XYY, beta=0.5)
    assert (kl(plain_XY, world.reference_XY) < kl(robust_XY, world.reference_XY)).all()
    assert (expected_reward(plain_XY, world) < expected_reward(robust_XY, world)).all()
