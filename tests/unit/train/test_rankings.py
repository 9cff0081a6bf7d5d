"""Plackett-Luce over whole rankings: packed rows against plain sequences and the paper's formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_train.config import TrainConfig
from dpo_train.core.metrics import NAMES, means
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy
from dpo_train.train.measure import measure_all, measure_row
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import StepResult, evaluate_pairs, train_step
from tests.tiny import random_rankings, tiny_policy, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write

CONFIG = TrainConfig(loss="plackett_luce", beta=0.7, row_tokens=90, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def rankings(model_folder: Path) -> list[TokenPair]:
    """Of 2, 3, 4, 5, 2, 3 and 4 answers, with the base's log-probs as reference."""
    return with_reference(tiny_policy(model_folder, lora=False, trainable=False), random_rankings(7))


def _moved(folder: Path) -> Policy:
    policy = tiny_policy(folder, lora=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in policy.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def _step(policy: Policy, pairs: Sequence[TokenPair], config: TrainConfig = CONFIG, rate: float = 0.0) -> StepResult:
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=123.0)
    return train_step(policy, optimizer, pairs, config, Ranks(), step=3, learning_rate=rate)


def _gradient(policy: Policy) -> torch.Tensor:
    parameters = policy.trainable().values()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def _plain_losses(policy: Policy, pairs: Sequence[TokenPair], beta: float) -> list[torch.Tensor]:
    """Equation 20 of the DPO paper, each answer alone after its prompt in a forward of its own."""
    losses = []
    for pair in pairs:
        rewards = []
        references = (pair.reference_chosen_logps, pair.reference_rejected_logps, *pair.reference_other_logps)
        for ids, reference in zip(pair.answer_ids, references, strict=True):
            whole = torch.from_numpy(np.concatenate([pair.prompt_ids, ids])).long()
            logps = torch.log_softmax(policy.model(input_ids=whole[None]).logits[0, :-1], dim=-1)
            logp = logps.gather(1, whole[1:, None])[len(pair.prompt_ids) - 1 :].sum()
            rewards.append(beta * (logp - float(np.sum(reference, dtype=np.float64))))
        places = (torch.logsumexp(torch.stack(rewards[k:]), 0) - rewards[k] for k in range(len(rewards)))
        losses.append(torch.stack(list(places)).sum())
    return losses


def test_loss_and_gradient_equal_plain_sequences(model_folder: Path, rankings: list[TokenPair]) -> None:
    """2 to 5 answers in one batch, 1e-5 relative, in one row, in a few and with each ranking alone."""
    policy = _moved(model_folder)
    loss = torch.stack(_plain_losses(policy, rankings, 0.7)).mean()
    loss.backward()
    wanted = _gradient(policy)
    for row_tokens in (10_000, 90, 1):
        config = replace(CONFIG, row_tokens=row_tokens)
        result = _step(policy, rankings, config)
        assert means(result.sums)["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert (_gradient(policy) - wanted).norm() <= 1e-5 * wanted.norm()
        assert evaluate_pairs(policy, rankings, config, Ranks()).tolist() == pytest.approx(
            result.sums.tolist(), rel=1e-5
        )
    # A last answer left out, or two that change places, is no rounding.
    other = replace(rankings[3], other_ids=rankings[3].other_ids[::-1],
                    reference_other_logps=rankings[3].reference_other_logps[::-1])  # fmt: skip
    _step(policy, [*rankings[:3], other, *rankings[4:]])
    assert (_gradient(policy) - wanted).norm() > 1e-3 * wanted.norm()


def test_ranking_of_two_is_dpo(model_folder: Path, rankings: list[TokenPair]) -> None:
    """A batch of pairs gives the loss, gradient and metrics of sigmoid, and so do pairs beside longer rankings."""
    pairs = [replace(ranking, other_ids=(), reference_other_logps=()) for ranking in rankings]
    ours, theirs = _moved(model_folder), _moved(model_folder)
    sums = _step(ours, pairs).sums
    assert sums.tolist() == pytest.approx(_step(theirs, pairs, replace(CONFIG, loss="sigmoid")).sums.tolist(), rel=1e-6)
    assert (_gradient(ours) - _gradient(theirs)).norm() <= 1e-6 * _gradient(theirs).norm()

    losses = measure_row(ours, rankings, CONFIG)[0].losses(CONFIG)
    sigmoid = measure_row(ours, pairs, CONFIG)[0].losses(replace(CONFIG, loss="sigmoid"))
    is_pair = torch.tensor([not ranking.other_ids for ranking in rankings])
    assert is_pair.tolist() == [True, False, False, False, True, False, False]
    assert torch.allclose(losses[is_pair], sigmoid[is_pair], rtol=1e-5)
    assert (losses[~is_pair] > sigmoid[~is_pair] + 0.1).all()


def test_metrics_are_those_of_the_best_against_the_second(model_folder: Path, rankings: list[TokenPair]) -> None:
    """All but the loss are the numbers of the pairs without their further answers."""
    pairs = [replace(ranking, other_ids=(), reference_other_logps=()) for ranking in rankings]
    policy = _moved(model_folder)
    ranked, paired = (_step(policy, some).sums.tolist() for some in (rankings, pairs))
    assert NAMES[0] == "loss"
    assert ranked[0] > paired[0] + 1
    assert ranked[1:] == pytest.approx(paired[1:], rel=1e-4, abs=1e-5)


def test_policy_that_is_its_reference_has_every_order_equally_likely(
    model_folder: Path, rankings: list[TokenPair]
) -> None:
    """K answers have K! orders: the loss is ln K!, the sum of ln(K - k)."""
    measured, _ = measure_row(tiny_policy(model_folder), rankings, CONFIG)
    wanted = [math.log(math.factorial(len(ranking.answer_ids))) for ranking in rankings]
    assert measured.losses(CONFIG).tolist() == pytest.approx(wanted, rel=1e-4)


def test_all_rankings_are_measured_in_their_order(model_folder: Path, rankings: list[TokenPair]) -> None:
    """Rows of pairs and rows of long rankings end in one table, with a length of 0 where there is no answer."""
    policy = _moved(model_folder)
    together, _ = measure_all(policy, rankings, replace(CONFIG, row_tokens=1), Ranks())
    assert together.rejected_logps_P.shape == (7, 4)
    assert (together.rejected_lengths_P > 0).sum(1).tolist() == [1, 2, 3, 4, 1, 2, 3]
    with torch.no_grad():
        wanted = [loss.item() for loss in _plain_losses(policy, rankings, 0.7)]
    assert together.losses(CONFIG).tolist() == pytest.approx(wanted, rel=1e-5)
    pairs = [ranking for ranking in rankings if not ranking.other_ids]
    assert {tuple(column.shape) for column in measure_all(policy, pairs, CONFIG, Ranks())[0]} == {(2,)}


def test_experts_balance_over_rankings_too(tmp_path: Path) -> None:
    """The router's first pass measures rankings: the same step in rows of any length."""
    folder = write(tmp_path, FAMILIES["mixtral"])
    frozen = tiny_policy(folder, lora=False, trainable=False)
    rankings = with_reference(frozen, random_rankings(5, vocabulary=VOCABULARY))
    config = replace(CONFIG, router_aux_loss=0.5)
    whole, policy = tiny_policy(folder, lora=False), tiny_policy(folder, lora=False)
    wanted = _step(whole, rankings, replace(config, row_tokens=10_000))
    found = _step(policy, rankings, replace(config, row_tokens=1))
    assert found.aux_loss == pytest.approx(wanted.aux_loss, rel=1e-5)
    assert (_gradient(policy) - _gradient(whole)).norm() <= 1e-5 * _gradient(whole).norm()


def test_another_loss_never_leaves_answers_out_silently(model_folder: Path, rankings: list[TokenPair]) -> None:
    """Stages refuse this before; should rankings get here all the same, nothing is trained."""
    with pytest.raises(ValueError, match="several rejected answers are for the plackett_luce loss alone"):
        _step(tiny_policy(model_folder), rankings, replace(CONFIG, loss="sigmoid"))
