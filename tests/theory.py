"""Policies so small that every sum of the theory can be written out, in float64: no sampling, no learning rate.

A world has X prompts and Y possible answers to each. A policy is a table of log-probs [X, Y]: its own parameters
(``torch.log_softmax``), or what a policy that writes token by token gives to whole answers (``Sequences``).

X: prompts, Y: answers, P: ordered pairs of answers, R: rankings, K: ranked answers, S: prefixes, N: next tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_train.core.loss import preference_loss

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class World:
    """What is wanted, and where training starts: both float64 [X, Y], the reference as natural log-probs."""

    rewards_XY: Tensor
    reference_XY: Tensor


def random_world(seed: int, *, prompts: int = 3, answers: int = 5) -> World:
    """Rewards of standard deviation 1; a reference whose answers differ by some nats."""
    generator = torch.Generator().manual_seed(seed)
    rewards_XY, logits_XY = torch.randn(2, prompts, answers, generator=generator, dtype=torch.float64)
    return World(rewards_XY=rewards_XY, reference_XY=torch.log_softmax(2 * logits_XY, -1))


def closed_form(world: World, beta: float | Tensor) -> Tensor:
    """log of reference x exp(reward / beta) / Z (arXiv 2305.18290, equation 4): [X, Y]."""
    return world.reference_XY + world.rewards_XY / beta - log_partition(world, beta)[:, None]


def log_partition(world: World, beta: float | Tensor) -> Tensor:
    """log Z of each prompt: [X]."""
    return torch.log((torch.exp(world.reference_XY) * torch.exp(world.rewards_XY / beta)).sum(-1))


def expected_reward(policy_XY: Tensor, world: World) -> Tensor:
    """Of answers that the policy writes, per prompt: [X]."""
    return (torch.exp(policy_XY) * world.rewards_XY).sum(-1)


def kl(policy_XY: Tensor, other_XY: Tensor) -> Tensor:
    """KL(policy || other) of each prompt, nats: [X]."""
    return (torch.exp(policy_XY) * (policy_XY - other_XY)).sum(-1)


def bradley_terry(rewards_XY: Tensor) -> Tensor:
    """P(i preferred to j) = exp(r_i) / (exp(r_i) + exp(r_j)), equation 1: [X, Y, Y]."""
    exponentials_XY = torch.exp(rewards_XY)
    return exponentials_XY[:, :, None] / (exponentials_XY[:, :, None] + exponentials_XY[:, None, :])


def ordered_pairs(answers: int) -> tuple[Tensor, Tensor]:
    """Every (chosen, rejected) of two different answers, as numbers of answers: two of [P]."""
    chosen, rejected = zip(*itertools.permutations(range(answers), 2), strict=True)
    return torch.tensor(chosen), torch.tensor(rejected)


def pair_losses(policy_XY: Tensor, reference_XY: Tensor, **options: Any) -> Tensor:
    """The engine's loss of every ordered pair, answers being one token long: [X, P]."""
    chosen_P, rejected_P = ordered_pairs(policy_XY.shape[1])
    sides = [logps_XY[:, side].flatten() for logps_XY in (policy_XY, reference_XY) for side in (chosen_P, rejected_P)]
    one = torch.ones_like(sides[0])
    result = preference_loss(*sides, chosen_lengths_P=one, rejected_lengths_P=one, **options)
    return result.losses_P.view(len(policy_XY), -1)


def expected_loss(policy_XY: Tensor, reference_XY: Tensor, preference_XYY: Tensor, **options: Any) -> Tensor:
    """The loss over the exact distribution of labels, every couple of answers being shown equally often.

    Args:
        preference_XYY: the probability that the first is preferred. Rows and columns may be weighed to show some
            couples more often than others.
        options: of ``preference_loss``.
    """
    chosen_P, rejected_P = ordered_pairs(policy_XY.shape[1])
    return (preference_XYY[:, chosen_P, rejected_P] * pair_losses(policy_XY, reference_XY, **options)).sum()


def plackett_luce(rewards_XY: Tensor, rankings: Sequence[Sequence[int]]) -> Tensor:
    """Probability of each ranking of some of the answers (equation 18), best first: [X, R]."""
    columns = []
    for ranking in rankings:
        weights_XK = torch.exp(rewards_XY[:, list(ranking)])
        columns.append(torch.stack([weights_XK[:, k] / weights_XK[:, k:].sum(-1) for k in range(len(ranking))]).prod(0))
    return torch.stack(columns, dim=1)


def expected_ranking_loss(
    policy_XY: Tensor, world: World, rankings: Sequence[Sequence[int]], probability_XR: Tensor, *, beta: float
) -> Tensor:
    """The engine's Plackett-Luce loss of rankings of any lengths, padded with NaN, over their distribution."""
    longest = max(map(len, rankings))
    exists_RK = torch.tensor([[k < len(ranking) for k in range(longest)] for ranking in rankings])
    numbers_RK = torch.tensor([list(ranking) + [0] * (longest - len(ranking)) for ranking in rankings])
    total = policy_XY.new_zeros(())
    for policy_Y, reference_Y, probability_R in zip(policy_XY, world.reference_XY, probability_XR, strict=True):
        policy_RK, reference_RK = (
            torch.where(exists_RK, logps_Y[numbers_RK], torch.nan) for logps_Y in (policy_Y, reference_Y)
        )
        losses_R = preference_loss(
            policy_RK[:, 0], policy_RK[:, 1:], reference_RK[:, 0], reference_RK[:, 1:], kind="plackett_luce",
            beta=beta, rejected_exists_PK=exists_RK[:, 1:],
        ).losses_P  # fmt: skip
        total = total + (probability_R * losses_R).sum()
    return total


class Sequences:
    """A policy that writes token by token: a softmax over the next token for every prefix.

    Answers are all texts over the alphabet up to the longest length, each closed by an end token; at the longest length
    the end is certain. Answers share the parameters of the prefixes that they share.
    """

    def __init__(self, alphabet: str = "ab", longest: int = 2) -> None:
        texts = ["".join(text) for n in range(longest + 1) for text in itertools.product(alphabet, repeat=n)]
        self.answers = texts
        self.prefixes = [text for text in texts if len(text) < longest]
        self.tokens = [*alphabet, ""]
        self._uses_YSN = torch.zeros(len(texts), len(self.prefixes), len(self.tokens), dtype=torch.float64)
        for number, text in enumerate(texts):
            for end, token in enumerate([*text, ""]):
                if end < longest:
                    self._uses_YSN[number, self.prefixes.index(text[:end]), self.tokens.index(token)] = 1

    def logps(self, logits_XSN: Tensor) -> Tensor:
        """Log-probs of whole answers: [X, Y]."""
        return torch.einsum("ysn,xsn->xy", self._uses_YSN, torch.log_softmax(logits_XSN, -1))

    def random_logits(self, seed: int, *, prompts: int = 2) -> Tensor:
        """Float64 [X, S, N]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(prompts, len(self.prefixes), len(self.tokens), generator=generator, dtype=torch.float64)


def minimum(loss_of: Loss, start: Tensor) -> Tensor:
    """Where the loss has no slope any more, found from the start by L-BFGS and made exact by three Newton steps.

    A softmax has a direction that changes nothing; the pseudo-inverse leaves it alone. Fails where there is no minimum.
    """
    point = start.clone().requires_grad_()
    options = {"max_iter": 1000, "history_size": 50, "tolerance_grad": 1e-9, "tolerance_change": 0.0}
    search = torch.optim.LBFGS([point], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        search.zero_grad()
        loss = loss_of(point)
        loss.backward()
        return loss

    search.step(closure)
    flat = point.detach().flatten()

    def of_flat(x: Tensor) -> Tensor:
        return loss_of(x.view(start.shape))

    for _ in range(3):
        curvature = torch.autograd.functional.hessian(of_flat, flat)
        flat = flat - torch.linalg.pinv(curvature, rtol=1e-9, hermitian=True) @ slope(of_flat, flat)
    assert slope(of_flat, flat).abs().max() < 1e-11
    return flat.view(start.shape)


def trained(world: World, preference_XYY: Tensor, **options: Any) -> Tensor:
    """The policy of least expected loss, from the reference on: log-probs [X, Y]."""

    def loss_of(logits_XY: Tensor) -> Tensor:
        return expected_loss(torch.log_softmax(logits_XY, -1), world.reference_XY, preference_XYY, **options)

    return torch.log_softmax(minimum(loss_of, world.reference_XY), -1)


def slope(loss_of: Loss, point: Tensor) -> Tensor:
    """Gradient at a point."""
    point = point.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss_of(point), point)
    return found


def assert_same_policy(policy_XY: Tensor, expected_XY: Tensor) -> None:
    """Every probability to 1e-6 of itself, however rare the answer: 1e-6 in its logarithm."""
    torch.testing.assert_close(policy_XY, expected_XY, rtol=0.0, atol=1e-6)
