"""One optimiser step: the loss of the global batch, whatever the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_train.config import TrainConfig
from dpo_train.core.metrics import means
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import NonFiniteLossError
from dpo_train.model.load import Policy, parameter_state
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import StepResult, evaluate_pairs, train_step
from tests.tiny import random_pairs, tiny_policy, with_reference

# beta 1 and no clipping to speak of, so that gradients are as they were computed.
CONFIG = TrainConfig(beta=1.0, row_tokens=64, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def pairs(model_folder: Path) -> list[TokenPair]:
    """Seven pairs with the base's log-probs as reference."""
    return with_reference(tiny_policy(model_folder, lora=False, trainable=False), random_pairs(7))


def _moved(folder: Path) -> Policy:
    """A policy away from its reference, where every pair has another slope."""
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
    return torch.cat([p.grad.flatten() for p in policy.trainable().values()])


def _plain_loss(policy: Policy, pairs: Sequence[TokenPair]) -> torch.Tensor:
    """Equation 7 of the DPO paper, mean over pairs, from a plain forward of each answer."""
    losses = []
    for pair in pairs:
        ratios = []
        for ids, reference in (
            (pair.chosen_ids, pair.reference_chosen_logps),
            (pair.rejected_ids, pair.reference_rejected_logps),
        ):
            whole = torch.from_numpy(np.concatenate([pair.prompt_ids, ids])).long()
            logps = torch.log_softmax(policy.model(input_ids=whole[None]).logits[0, :-1], dim=-1)
            logp = logps.gather(1, whole[1:, None])[len(pair.prompt_ids) - 1 :].sum()
            ratios.append(logp - float(np.sum(reference, dtype=np.float64)))
        losses.append(-torch.log(torch.sigmoid(ratios[0] - ratios[1])))
    return torch.stack(losses).mean()


def test_first_step_has_loss_ln_2(model_folder: Path, pairs: list[TokenPair]) -> None:
    """Policy = reference: loss ln 2, margins of zero to fp32's rounding."""
    metrics = means(_step(tiny_policy(model_folder), pairs).sums)
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert metrics["rewards/margin"] == pytest.approx(0.0, abs=1e-4)


def test_loss_and_gradient_equal_plain_sequences(model_folder: Path, pairs: list[TokenPair]) -> None:
    """Against the paper's equation on unpacked sequences, 1e-5 relative."""
    policy = _moved(model_folder)
    result = _step(policy, pairs)
    packed = _gradient(policy)
    policy.model.zero_grad()
    loss = _plain_loss(policy, pairs)
    loss.backward()
    wanted = _gradient(policy)
    assert abs(loss.item() - math.log(2)) > 0.01
    assert means(result.sums)["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (packed - wanted).norm() <= 1e-5 * wanted.norm()
    assert result.grad_norm == pytest.approx(wanted.norm().item(), rel=1e-5)


def test_micro_batches_of_any_size_give_the_same_step(model_folder: Path, pairs: list[TokenPair]) -> None:
    """All pairs in one row, or each alone: loss and gradient agree to 1e-5 relative."""
    whole = _moved(model_folder)
    loss = means(_step(whole, pairs, replace(CONFIG, row_tokens=10_000)).sums)["loss"]
    for row_tokens in (1, 17, 30, 60):
        policy = _moved(model_folder)
        result = _step(policy, pairs, replace(CONFIG, row_tokens=row_tokens))
        assert means(result.sums)["loss"] == pytest.approx(loss, rel=1e-5)
        assert result.sums[-1] == len(pairs)
        assert (_gradient(policy) - _gradient(whole)).norm() <= 1e-5 * _gradient(whole).norm()


def test_every_pair_counts(model_folder: Path, pairs: list[TokenPair]) -> None:
    """The tolerance above would notice any single pair left out, by a thousand times."""
    whole = _moved(model_folder)
    loss = means(_step(whole, pairs).sums)["loss"]
    for index in range(len(pairs)):
        policy = _moved(model_folder)
        without = means(_step(policy, pairs[:index] + pairs[index + 1 :]).sums)["loss"]
        assert abs(without - loss) > 1e-2 * loss or (
            (_gradient(policy) - _gradient(whole)).norm() > 1e-2 * _gradient(whole).norm()
        )


def test_update_is_the_rate_times_the_gradient(model_folder: Path, pairs: list[TokenPair]) -> None:
    """Plain SGD: the rate of this step is the one that was given, not the optimiser's own."""
    policy = _moved(model_folder)
    before = parameter_state(policy)
    _step(policy, pairs, rate=0.5)
    for name, parameter in policy.trainable().items():
        assert torch.allclose(parameter.detach() - before[name], -0.5 * parameter.grad, atol=1e-6), name
        assert not torch.equal(parameter.detach(), before[name]), name


def test_gradient_is_clipped_to_the_global_norm(model_folder: Path, pairs: list[TokenPair]) -> None:
    """At rate 1 the whole update has norm 0.01; the norm that is reported is the one before."""
    policy = _moved(model_folder)
    before = parameter_state(policy)
    result = _step(policy, pairs, replace(CONFIG, max_grad_norm=0.01), rate=1.0)
    change = torch.cat([(p.detach() - before[name]).flatten() for name, p in policy.trainable().items()])
    assert result.grad_norm > 0.1
    assert change.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_gradients_of_an_earlier_step_are_gone(model_folder: Path, pairs: list[TokenPair]) -> None:
    """Two steps at rate zero have the same gradient."""
    policy = _moved(model_folder)
    first, second = _step(policy, pairs).grad_norm, _step(policy, pairs).grad_norm
    assert second == pytest.approx(first, rel=1e-6)


def test_frozen_base_does_not_move(model_folder: Path, pairs: list[TokenPair]) -> None:
    """Under LoRA a step changes adapters alone."""
    policy = tiny_policy(model_folder)
    frozen = {name: p.clone() for name, p in policy.model.named_parameters() if not p.requires_grad}
    before = parameter_state(policy)
    _step(policy, pairs, rate=1.0)
    assert all(torch.equal(dict(policy.model.named_parameters())[name], value) for name, value in frozen.items())
    assert any(not torch.equal(value, before[name]) for name, value in parameter_state(policy).items())


def test_evaluation_measures_the_same_and_moves_nothing(model_folder: Path, pairs: list[TokenPair]) -> None:
    """The sums of a step at rate zero, without gradients."""
    policy = _moved(model_folder)
    before = parameter_state(policy)
    wanted = _step(policy, pairs).sums
    sums = evaluate_pairs(policy, pairs, CONFIG, Ranks())
    assert sums.tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in parameter_state(policy).items())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_its_pairs_and_updates_nothing(
    model_folder: Path, pairs: list[TokenPair], poison: float
) -> None:
    """One pair whose reference is broken: step, rank and pair are named, the weights stay as they were."""
    broken = replace(pairs[2], reference_chosen_logps=np.full_like(pairs[2].reference_chosen_logps, poison))
    policy = _moved(model_folder)
    before = parameter_state(policy)
    with pytest.raises(NonFiniteLossError, match=r"step 3\. Got: pairs pair-2 \(rank 0\)\.") as caught:
        _step(policy, [*pairs[:2], broken, *pairs[3:]], rate=1.0)
    assert "learning_rate" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in parameter_state(policy).items())


def test_gradient_that_is_not_finite_updates_nothing(model_folder: Path, pairs: list[TokenPair]) -> None:
    """A finite loss can have an infinite gradient; one such step would make every weight NaN for good."""
    policy = _moved(model_folder)
    before = parameter_state(policy)
    first = next(iter(policy.trainable().values()))
    first.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteLossError):
        _step(policy, pairs, rate=1.0)
    assert all(torch.equal(value, before[name]) for name, value in parameter_state(policy).items())
