"""One optimiser step: the loss of the global batch, whatever the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_train.config import TrainConfig
from dpo_train.core.metrics import means
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import NonFiniteLossError
from dpo_train.model.load import Policy, parameter_state
from dpo_train.model.rows import build_row
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import StepResult, evaluate_pairs, train_step
from tests.tiny import random_pairs, tiny_policy, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write

# beta 1 and no clipping to speak of, so that gradients are as they were computed.
CONFIG = TrainConfig(beta=1.0, row_tokens=64, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def pairs(model_folder: Path) -> list[TokenPair]:
    """Seven pairs with the base's log-probs as reference."""
    return with_reference(tiny_policy(model_folder, lora=False, trainable=False), random_pairs(7))


@pytest.fixture(scope="module")
def reordered(pairs: list[TokenPair]) -> list[TokenPair]:
    """The same with a reference that ranks the pairs' differences otherwise than the policy does."""
    shifts = [30.0, -50.0, 80.0, -20.0, 0.0, -90.0, 60.0]
    return [
        replace(pair, reference_chosen_logps=pair.reference_chosen_logps + np.float32(shift / len(pair.chosen_ids)))
        for pair, shift in zip(pairs, shifts, strict=True)
    ]


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
    parameters = policy.trainable().values()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


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


OBJECTIVES: dict[str, dict[str, Any]] = {
    "aot": {"loss": "aot"},
    "aot_unpaired": {"loss": "aot_unpaired", "label_smoothing": 0.1},
    "mixed with aot": {"loss": {"sigmoid": 1.0, "aot": 0.5, "sft": 0.1}},
    "by length": {"loss": "sigmoid_norm"},
    "wpo": {"wpo": True},
    "ld_alpha": {"ld_alpha": 0.3},
    "divergence": {"divergence": "js"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_the_same_in_any_rows(
    model_folder: Path, reordered: list[TokenPair], objective: str
) -> None:
    """Losses over the batch look at all of the step's pairs, whichever row they stand in."""
    config = replace(CONFIG, beta=0.02, **OBJECTIVES[objective])
    plain, whole = _moved(model_folder), _moved(model_folder)
    plain_sums = _step(plain, reordered, replace(CONFIG, beta=0.02)).sums
    wanted = _step(whole, reordered, replace(config, row_tokens=10_000)).sums
    assert (_gradient(plain) - _gradient(whole)).norm() > 1e-2 * _gradient(whole).norm()
    assert abs(plain_sums[0] - wanted[0]) > 1e-3 * abs(wanted[0])
    for row_tokens in (1, 30):
        policy = _moved(model_folder)
        sums = _step(policy, reordered, replace(config, row_tokens=row_tokens)).sums
        assert sums.tolist() == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-6)
        assert (_gradient(policy) - _gradient(whole)).norm() <= 1e-5 * _gradient(whole).norm()
        evaluated = evaluate_pairs(policy, reordered, replace(config, row_tokens=row_tokens), Ranks())
        first = 1 if config.wpo else 0  # a comparison of policies leaves WPO's weights out
        assert evaluated.tolist()[first:] == pytest.approx(wanted.tolist()[first:], rel=1e-5, abs=1e-6)


def test_loss_over_the_batch_is_that_of_one_autograd_graph(model_folder: Path, reordered: list[TokenPair]) -> None:
    """Two passes in rows of one pair against a single backward through the paper's formula over all pairs."""
    config = replace(CONFIG, beta=0.02, loss="aot", row_tokens=1)
    policy = _moved(model_folder)
    loss = means(_step(policy, reordered, config).sums)["loss"]
    two_passes = _gradient(policy)
    policy.model.zero_grad()
    sides = []
    for name in ("chosen", "rejected"):
        logps, reference = [], []
        for pair in reordered:
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, getattr(pair, f"{name}_ids")])).long()
            logps_T = torch.log_softmax(policy.model(input_ids=ids[None]).logits[0, :-1], dim=-1)
            logps.append(logps_T.gather(1, ids[1:, None])[len(pair.prompt_ids) - 1 :].sum())
            reference.append(float(np.sum(getattr(pair, f"reference_{name}_logps"), dtype=np.float64)))
        sides.append((torch.stack(logps), torch.tensor(reference)))
    difference = (sides[0][0] - sides[1][0]).sort().values - (sides[0][1] - sides[1][1]).sort().values
    wanted = -torch.nn.functional.logsigmoid(config.beta * difference).mean()
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert (two_passes - _gradient(policy)).norm() <= 1e-5 * _gradient(policy).norm()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_loss_is_that_of_all_unique_tokens_in_any_rows(tmp_path: Path, family: str) -> None:
    """Against transformers' own function over one row that holds every token once; its gradient on top of DPO's."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    folder = write(tmp_path, FAMILIES[family])
    frozen = tiny_policy(folder, lora=False, trainable=False)
    pairs = with_reference(frozen, random_pairs(5, vocabulary=VOCABULARY))
    config = replace(CONFIG, row_tokens=10_000, router_aux_loss=0.5)
    without, policy = tiny_policy(folder, lora=False), tiny_policy(folder, lora=False)
    assert _step(without, pairs, replace(config, router_aux_loss=0.0)).aux_loss is None
    row, experts = build_row(pairs), policy.layout.experts
    assert experts is not None
    logits = policy.model.get_decoder()(
        input_ids=row.input_ids_T[None], position_ids=row.positions_T[None], use_cache=False, output_router_logits=True,
        attention_mask=policy.layout.masks(row),
    ).router_logits  # fmt: skip
    wanted = load_balancing_loss_func(logits, experts.num_experts, experts.top_k)
    (0.5 * wanted).backward()
    plain, expected = _gradient(without), _gradient(policy) + _gradient(without)
    for row_tokens in (1, 40, 10_000):
        result = _step(policy, pairs, replace(config, row_tokens=row_tokens))
        assert result.aux_loss == pytest.approx(wanted.item(), rel=1e-5)
        assert (_gradient(policy) - expected).norm() <= 1e-5 * expected.norm()
    assert (expected - plain).norm() > 1e-3 * expected.norm()


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


@pytest.mark.parametrize("objective", ["plain", "aot", "wpo"])
def test_device_is_not_waited_for_in_every_row(model_folder: Path, pairs: list[TokenPair], objective: str) -> None:
    """Reading a number back from a GPU stops it until it has caught up: as often for seven rows as for one."""
    waits = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
    counts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[-1] += func in waits
            return func(*args, **(kwargs or {}))

    for row_tokens in (1, 10_000):
        policy = _moved(model_folder)
        counts.append(0)
        with Watch():
            _step(policy, pairs, replace(CONFIG, row_tokens=row_tokens, **OBJECTIVES.get(objective, {})))
    assert counts[0] == counts[1] > 0
