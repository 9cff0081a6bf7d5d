"""What a loss is told about pairs, against plain sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_train.config import TrainConfig
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy
from dpo_train.train.measure import measure_all, measure_row
from dpo_train.train.ranks import Ranks
from tests.tiny import random_pairs, tiny_policy, with_reference

CONFIG = TrainConfig(beta=0.5, row_tokens=64)


@pytest.fixture(scope="module")
def policy(model_folder: Path) -> Policy:
    """A policy away from its reference."""
    policy = tiny_policy(model_folder, lora=False)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return policy


@pytest.fixture(scope="module")
def pairs(model_folder: Path) -> list[TokenPair]:
    """Answers of 1 to 7 tokens, scored by the reference."""
    return with_reference(tiny_policy(model_folder, lora=False, trainable=False), random_pairs(5))


def _plain(policy: Policy, pair: TokenPair, side: str) -> tuple[Tensor, Tensor]:
    """Log-prob of each token of an answer, and log of the sum of p squared beside it."""
    ids = torch.from_numpy(np.concatenate([pair.prompt_ids, getattr(pair, f"{side}_ids")])).long()
    with torch.no_grad():
        logps = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0, :-1].double(), dim=-1)
    logps = logps[len(pair.prompt_ids) - 1 :]
    answer = ids[len(pair.prompt_ids) :, None]
    return logps.gather(1, answer).squeeze(1), torch.logsumexp(2 * logps, dim=-1)


def _reference(pair: TokenPair, side: str) -> Tensor:
    return torch.from_numpy(np.asarray(getattr(pair, f"reference_{side}_logps"), dtype=np.float64))


def test_ld_alpha_weighs_both_models_tokens_beyond_the_shared_length(policy: Policy, pairs: list[TokenPair]) -> None:
    """The loss sees weighted sums of policy and reference; rewards and log-probs stay those of whole answers."""
    measured, _ = measure_row(policy, pairs, replace(CONFIG, ld_alpha=0.25))
    losses = measured.losses(replace(CONFIG, ld_alpha=0.25)).tolist()
    sums = measured.sums(measured.losses(CONFIG), CONFIG).tolist()
    margins = []
    for pair, loss in zip(pairs, losses, strict=True):
        shared = min(len(pair.chosen_ids), len(pair.rejected_ids))
        ratios, whole = [], []
        for side in ("chosen", "rejected"):
            ratio = _plain(policy, pair, side)[0] - _reference(pair, side)
            ratios.append((ratio[:shared].sum() + 0.25 * ratio[shared:].sum()).item())
            whole.append(ratio.sum().item())
        assert loss == pytest.approx(math.log1p(math.exp(-0.5 * (ratios[0] - ratios[1]))), rel=1e-4)
        margins.append(0.5 * (whole[0] - whole[1]))
    assert sums[2] == pytest.approx(sum(margins), rel=1e-4)
    assert losses != pytest.approx(measure_row(policy, pairs, CONFIG)[0].losses(CONFIG).tolist(), rel=1e-3)


def test_wpo_weighs_a_pair_by_the_policys_own_probabilities(policy: Policy, pairs: list[TokenPair]) -> None:
    """exp of the mean over tokens of log p - log sum p^2, for both answers; a comparison of policies leaves it out."""
    config = replace(CONFIG, wpo=True)
    measured, _ = measure_row(policy, pairs, config)
    plain = measure_row(policy, pairs, CONFIG)[0].losses(CONFIG)
    for index, pair in enumerate(pairs):
        sides = [_plain(policy, pair, side) for side in ("chosen", "rejected")]
        weight = math.exp(sum((logps - squares).mean().item() for logps, squares in sides))
        assert measured.weights_P[index].item() == pytest.approx(weight, rel=1e-4)
        assert measured.losses(config)[index].item() == pytest.approx(weight * plain[index].item(), rel=1e-4)
    assert torch.equal(measured.losses(config, weighted=False), plain)


def test_kl_is_a_mean_over_both_answers(policy: Policy, pairs: list[TokenPair]) -> None:
    """Per answer the sum over its tokens of q/p - 1 - log(q/p)."""
    measured, _ = measure_row(policy, pairs, CONFIG)
    for index, pair in enumerate(pairs):
        d = [_reference(pair, side) - _plain(policy, pair, side)[0] for side in ("chosen", "rejected")]
        wanted = sum((torch.expm1(x) - x).sum().item() for x in d) / 2
        assert measured.kl_P[index].item() == pytest.approx(wanted, rel=1e-3)


def test_all_pairs_are_measured_in_their_order(policy: Policy, pairs: list[TokenPair]) -> None:
    """In rows of one pair or many, entry i is pair i."""
    alone = [measure_row(policy, [pair], CONFIG)[0] for pair in pairs]
    together, _ = measure_all(policy, pairs, CONFIG, Ranks())
    for index, one in enumerate(alone):
        got = torch.stack([column[index] for column in together])
        wanted = torch.stack([column[0] for column in one]).detach()
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
