"""What the papers prove about the losses, on policies small enough for exact sums (tests/theory.py).

Equations, lemmas and theorems without a paper's number are those of arXiv 2305.18290. The optimum is always that of
the engine's own loss; the closed forms and preference probabilities are written out anew.

X: prompts, Y: answers, P: ordered pairs of answers.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dpo_train.core.loss import preference_loss
from tests.theory import (
    Sequences,
    World,
    assert_same_policy,
    bradley_terry,
    closed_form,
    expected_loss,
    expected_ranking_loss,
    expected_reward,
    kl,
    log_partition,
    minimum,
    ordered_pairs,
    pair_losses,
    plackett_luce,
    random_world,
    slope,
    trained,
)  # fmt: skip

BETAS = (0.1, 0.5, 2.0)
SEEDS = (0, 1, 2)


# The optimum


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_optimum_of_dpo_is_the_closed_form(seed: int, beta: float) -> None:
    """Equation 4: on Bradley-Terry labels the least loss is at reference x exp(reward / beta) / Z."""
    world = random_world(seed)
    assert_same_policy(trained(world, bradley_terry(world.rewards_XY), beta=beta), closed_form(world, beta))


@pytest.mark.parametrize("beta", BETAS)
def test_optimum_of_a_policy_that_writes_tokens_is_the_closed_form(beta: float) -> None:
    """Equation 4 for whole answers, though each of seven is a product of next-token probabilities that others share."""
    texts = Sequences()
    logits_XSN = texts.random_logits(0)
    reference_XY = texts.logps(logits_XSN)
    assert torch.allclose(torch.exp(reference_XY).sum(-1), torch.ones(2, dtype=torch.float64))
    world = World(rewards_XY=random_world(1, prompts=2, answers=7).rewards_XY, reference_XY=reference_XY)
    labels_XYY = bradley_terry(world.rewards_XY)
    found_XSN = minimum(lambda x: expected_loss(texts.logps(x), reference_XY, labels_XYY, beta=beta), logits_XSN)
    assert_same_policy(texts.logps(found_XSN), closed_form(world, beta))


def test_optimum_does_not_depend_on_which_couples_are_shown() -> None:
    """Each answer compared with its neighbour alone, some couples 1000 times as often as others: the same optimum."""
    world = random_world(3)
    shown_YY = torch.zeros(5, 5, dtype=torch.float64)
    for first, how_often in enumerate((1.0, 100.0, 3.0, 0.1)):
        shown_YY[first, first + 1] = shown_YY[first + 1, first] = how_often
    labels_XYY = shown_YY * bradley_terry(world.rewards_XY)
    assert_same_policy(trained(world, labels_XYY, beta=0.5), closed_form(world, 0.5))


@pytest.mark.parametrize("beta", BETAS)
def test_optimum_earns_more_than_any_other_policy(beta: float) -> None:
    """Equation 3: E[reward] - beta KL falls by exactly beta KL(other || optimum), for policies near and far."""
    world = random_world(4)
    best_XY = trained(world, bradley_terry(world.rewards_XY), beta=beta)

    def objective(policy_XY: Tensor) -> Tensor:
        return expected_reward(policy_XY, world) - beta * kl(policy_XY, world.reference_XY)

    generator = torch.Generator().manual_seed(0)
    for scale in (1e-2, 0.1, 1.0, 5.0):
        for start_XY in (best_XY, world.reference_XY, torch.zeros_like(best_XY)):
            noise_XY = scale * torch.randn(start_XY.shape, generator=generator, dtype=torch.float64)
            other_XY = torch.log_softmax(start_XY + noise_XY, -1)
            lost_X = objective(best_XY) - objective(other_XY)
            assert (lost_X > 0).all()
            torch.testing.assert_close(lost_X, beta * kl(other_XY, best_XY), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_larger_beta_means_less_kl_and_less_reward(seed: int) -> None:
    """Along the closed form both fall in beta, and the frontier's slope dE[reward] / dKL is beta itself."""
    world = random_world(seed)
    before = None
    for beta in (0.05, 0.1, 0.3, 1.0, 3.0, 10.0):
        variable = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
        policy_XY = closed_form(world, variable)
        now = torch.stack([expected_reward(policy_XY, world), kl(policy_XY, world.reference_XY)])
        assert before is None or (now < before).all()
        before = now
        for reward, distance in now.T:
            (by_reward,) = torch.autograd.grad(reward, variable, retain_graph=True)
            (by_kl,) = torch.autograd.grad(distance, variable, retain_graph=True)
            assert by_reward.item() == pytest.approx(beta * by_kl.item(), rel=1e-6)


# The reward


@pytest.mark.parametrize("beta", BETAS)
def test_implicit_reward_is_the_reward_up_to_the_prompt(beta: float) -> None:
    """Theorem 1 and equation 5: beta log(policy / reference) = reward - beta log Z(prompt), by the engine's rewards."""
    world = random_world(5)
    policy_XY = trained(world, bradley_terry(world.rewards_XY), beta=beta)
    best_X = policy_XY[:, :1].expand_as(policy_XY).flatten()
    sides = (policy_XY.flatten(), best_X, world.reference_XY.flatten(), best_X)
    implicit_XY = preference_loss(*sides, beta=beta).chosen_rewards_P.view_as(policy_XY)
    expected_XY = world.rewards_XY - beta * log_partition(world, beta)[:, None]
    torch.testing.assert_close(implicit_XY, expected_XY, rtol=0.0, atol=1e-6 * beta)


def test_rewards_that_differ_by_the_prompt_are_one() -> None:
    """Lemmas 1 and 2: the same label probabilities, of pairs and rankings, and the same optimum."""
    world = random_world(6)
    shifted = World(rewards_XY=world.rewards_XY + torch.tensor([[-3.0], [0.5], [4.0]]), reference_XY=world.reference_XY)
    rankings = list(itertools.permutations(range(5), 3))
    for labels_of in (bradley_terry, lambda rewards_XY: plackett_luce(rewards_XY, rankings)):
        torch.testing.assert_close(labels_of(shifted.rewards_XY), labels_of(world.rewards_XY), rtol=1e-12, atol=0.0)
    policy_XY = trained(shifted, bradley_terry(shifted.rewards_XY), beta=0.5)
    assert_same_policy(policy_XY, closed_form(world, 0.5))
    assert_same_policy(policy_XY, closed_form(shifted, 0.5))


# The gradient


def _jacobian(texts: Sequences, logits_XSN: Tensor) -> Tensor:
    """d log-prob of each answer to one prompt by every parameter: [Y, S x N]."""
    return torch.autograd.functional.jacobian(lambda x: texts.logps(x)[0], logits_XSN).flatten(1)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_is_weighted_by_how_wrong_the_rewards_are(beta: float) -> None:
    """Section 4: -beta s(r_l - r_w) (d logp_w - d logp_l), of each of 42 pairs and summed over them."""
    texts = Sequences()
    logits_XSN, reference_XY = texts.random_logits(1, prompts=1), texts.logps(texts.random_logits(2, prompts=1))
    chosen_P, rejected_P = ordered_pairs(len(texts.answers))
    rewards_Y = beta * (texts.logps(logits_XSN) - reference_XY)[0]
    weights_P = 1 / (1 + torch.exp(rewards_Y[chosen_P] - rewards_Y[rejected_P]))
    by_answer = _jacobian(texts, logits_XSN)
    expected = -beta * weights_P[:, None] * (by_answer[chosen_P] - by_answer[rejected_P])

    def losses_of(x: Tensor) -> Tensor:
        return pair_losses(texts.logps(x), reference_XY, beta=beta)[0]

    for pair in range(len(chosen_P)):
        found = slope(lambda x, pair=pair: losses_of(x)[pair], logits_XSN).flatten()
        torch.testing.assert_close(found, expected[pair], rtol=1e-10, atol=1e-14)
    batch = slope(lambda x: losses_of(x).sum(), logits_XSN).flatten()
    torch.testing.assert_close(batch, expected.sum(0), rtol=1e-10, atol=1e-13)


# Rankings


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("lengths", [(4,), (2, 4), (3,)])
def test_optimum_of_rankings_is_the_closed_form(lengths: tuple[int, ...], beta: float) -> None:
    """Appendix A.3: on Plackett-Luce labels, whether all four answers are ranked, three, or pairs beside fours."""
    world = random_world(7, prompts=2, answers=4)
    rankings = [ranking for length in lengths for ranking in itertools.permutations(range(4), length)]
    labels_XR = plackett_luce(world.rewards_XY, rankings)

    def loss_of(logits_XY: Tensor) -> Tensor:
        return expected_ranking_loss(torch.log_softmax(logits_XY, -1), world, rankings, labels_XR, beta=beta)

    found_XY = torch.log_softmax(minimum(loss_of, world.reference_XY), -1)
    assert_same_policy(found_XY, closed_form(world, beta))


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_of_a_ranking_is_each_choice_less_what_was_expected(beta: float) -> None:
    """-beta sum over k of (d logp_k - sum over j >= k of w_j d logp_j), w the softmax of the rewards that remain."""
    texts = Sequences()
    logits_XSN, reference_XY = texts.random_logits(3, prompts=1), texts.logps(texts.random_logits(4, prompts=1))
    world = World(rewards_XY=torch.zeros_like(reference_XY), reference_XY=reference_XY)
    rewards_Y = beta * (texts.logps(logits_XSN) - reference_XY)[0]
    by_answer = _jacobian(texts, logits_XSN)
    for ranking in ([6, 0, 3, 1], [2, 5, 4, 3], [0, 1, 2, 3, 4, 5, 6], [5, 2]):
        expected = torch.zeros(by_answer.shape[1], dtype=torch.float64)
        for k in range(len(ranking)):
            weights = torch.exp(rewards_Y[ranking[k:]]) / torch.exp(rewards_Y[ranking[k:]]).sum()
            expected -= beta * (by_answer[ranking[k]] - weights @ by_answer[ranking[k:]])
        one = torch.ones(1, 1, dtype=torch.float64)
        found = slope(
            lambda x, r=ranking, p=one: expected_ranking_loss(texts.logps(x), world, [r], p, beta=beta), logits_XSN
        )
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-10, atol=1e-13)
