"""SFT's step: the mean over the chosen answers' tokens of the global batch, whatever the rows, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_train.config import LoraConfig, SftConfig
from dpo_train.core.attention import REJECTED
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import NonFiniteLossError, PreemptedError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.model.load import Policy, parameter_state
from dpo_train.model.rows import build_row
from dpo_train.model.score import row_logps
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks
from dpo_train.train.sft import Sft
from dpo_train.train.speed import NAMES as SPEED_NAMES
from tests.tiny import random_pairs, random_rankings, tiny_policy
from tests.unit.model.families import FAMILIES, VOCABULARY, write

CONFIG = SftConfig(enabled=True, row_tokens=48, max_grad_norm=1e9)
# 14 pairs twice in batches of 4: seven steps, the fourth of which crosses the border of the epochs.
FIT = replace(
    CONFIG, learning_rate=5e-3, schedule="cosine", warmup_steps=2, batch_pairs=4, epochs=2, checkpoint_steps=3,
    evaluate_steps=4,
)  # fmt: skip


def _alone(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    return [pair.chosen_alone for pair in pairs]


@pytest.fixture(scope="module")
def pairs() -> list[TokenPair]:
    """Seven prompts with a chosen answer of 1 to 7 tokens each."""
    return _alone(random_pairs(7))


def _step(
    policy: Policy, pairs: Sequence[TokenPair], config: SftConfig = CONFIG, *, rate: float = 0.0
) -> dict[str, float]:
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=123.0)
    return Sft(config).step(policy, optimizer, pairs, Ranks(), step=3, learning_rate=rate)


def _gradient(policy: Policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.trainable().values()])


def _plain_nll(policy: Policy, pair: TokenPair) -> torch.Tensor:
    """By the model's own forward, over one sequence: nats of the whole answer."""
    ids_T = torch.from_numpy(np.concatenate([pair.prompt_ids, pair.chosen_ids])).long()
    logps_TV = torch.log_softmax(policy.model(input_ids=ids_T[None], use_cache=False).logits[0], dim=-1)
    first = len(pair.prompt_ids)
    return -logps_TV[first - 1 : -1].gather(1, ids_T[first:, None]).sum()


@pytest.mark.parametrize("row_tokens", [1, 30, 1000], ids=["a row each", "several rows", "one row"])
def test_gradient_is_that_of_the_mean_over_all_answer_tokens(
    model_folder: Path, pairs: list[TokenPair], row_tokens: int
) -> None:
    """Against plain sequences, one after the other; a mean of the answers' means would be another gradient."""
    plain, policy = tiny_policy(model_folder, lora=False), tiny_policy(model_folder, lora=False)
    num_tokens = sum(len(pair.chosen_ids) for pair in pairs)
    loss = sum(_plain_nll(plain, pair) for pair in pairs) / num_tokens
    loss.backward()
    metrics = _step(policy, pairs, replace(CONFIG, row_tokens=row_tokens))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["logps/chosen"] == pytest.approx(-loss.item() * num_tokens / 7, rel=1e-6)
    assert metrics["answer_tokens"] == num_tokens
    wanted = _gradient(plain)
    assert (_gradient(policy) - wanted).norm() <= 1e-5 * wanted.norm()
    assert metrics["grad_norm"] == pytest.approx(float(wanted.norm()), rel=1e-5)
    means = tiny_policy(model_folder, lora=False)
    (sum(_plain_nll(means, pair) / len(pair.chosen_ids) for pair in pairs) / len(pairs)).backward()
    assert (_gradient(means) - wanted).norm() > 1e-2 * wanted.norm()


def test_step_moves_against_the_gradient_at_its_rate(model_folder: Path, pairs: list[TokenPair]) -> None:
    """SGD at rate 0.5: the change is minus half the clipped gradient."""
    policy = tiny_policy(model_folder, lora=False)
    before = torch.cat([p.detach().flatten().clone() for p in policy.trainable().values()])
    metrics = _step(policy, pairs, replace(CONFIG, max_grad_norm=0.25), rate=0.5)
    change = torch.cat([p.detach().flatten() for p in policy.trainable().values()]) - before
    assert metrics["grad_norm"] > 0.25
    assert float(change.norm()) == pytest.approx(0.5 * 0.25, rel=1e-4)


def test_evaluation_is_the_loss_without_an_update(model_folder: Path, pairs: list[TokenPair]) -> None:
    """The same numbers, and the weights stay."""
    policy = tiny_policy(model_folder, lora=False)
    before = parameter_state(policy)
    measured = Sft(CONFIG).evaluate(policy, pairs, Ranks())
    assert all(torch.equal(parameter_state(policy)[name], before[name]) for name in before)
    step = _step(policy, pairs)
    assert measured.keys() == {"loss", "logps/chosen"}
    assert measured == pytest.approx({name: step[name] for name in measured}, rel=1e-6)


def test_rows_hold_prompts_and_chosen_answers_alone() -> None:
    """Of pairs and of rankings no other answer is in a row, and what is there is the whole of the two parts."""
    rankings = random_rankings(6)
    row = build_row(_alone(rankings))
    assert max(row.part_T.tolist()) < REJECTED
    assert row.input_ids_T.tolist() == [i for p in rankings for i in (*p.prompt_ids.tolist(), *p.chosen_ids.tolist())]
    assert row.target_A.tolist() == [i for p in rankings for i in p.chosen_ids.tolist()]
    assert row.lengths_PK.tolist() == [[len(pair.chosen_ids), 0] for pair in rankings]
    assert _alone(rankings)[3].num_tokens == len(rankings[3].prompt_ids) + len(rankings[3].chosen_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_rows_without_rejected_answers(tmp_path: Path, family: str) -> None:
    """Log-probs of the chosen answers are those that stand beside rejected ones: in fp32 to 1e-5."""
    folder = write(tmp_path, FAMILIES[family])
    policy = tiny_policy(folder, lora=False, trainable=False)
    pairs = random_pairs(5, vocabulary=VOCABULARY)
    both, alone = build_row(pairs), build_row(_alone(pairs))
    wanted = row_logps(policy, both).token_logps_A[both.part_A < REJECTED]
    torch.testing.assert_close(row_logps(policy, alone).token_logps_A, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_kept_in_balance_by_the_models_own_weight(tmp_path: Path, family: str) -> None:
    """The gradient has the balancing term of the whole step's tokens, in rows of any length."""
    folder = write(tmp_path, FAMILIES[family])
    pairs = _alone(random_pairs(6, vocabulary=VOCABULARY))
    gradients, losses = [], []
    for row_tokens in (1000, 20):
        policy = tiny_policy(folder, lora=False)
        losses.append(_step(policy, pairs, replace(CONFIG, row_tokens=row_tokens))["router/aux_loss"])
        gradients.append(_gradient(policy))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()
    without = tiny_policy(folder, lora=False)
    experts = without.layout.experts
    assert experts is not None
    object.__setattr__(experts, "aux_loss_coef", 0.0)
    assert "router/aux_loss" not in _step(without, pairs)
    assert (_gradient(without) - gradients[0]).norm() > 1e-4 * gradients[0].norm()


def test_loss_that_is_not_finite_names_its_pairs(model_folder: Path, pairs: list[TokenPair]) -> None:
    """A token whose embedding is broken: the pair that holds it is named, and nothing is updated."""
    policy = tiny_policy(model_folder, lora=False)
    odd = replace(pairs[4], chosen_ids=np.array([310, 311], np.int32))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[310] = torch.nan
    before = parameter_state(policy)
    with pytest.raises(NonFiniteLossError, match=r"step 3\. Got: pairs pair-4 \(rank 0\)\..*sft\.learning_rate"):
        _step(policy, [*pairs[:4], odd, *pairs[5:]], rate=1.0)
    now = parameter_state(policy)
    assert all(torch.equal(now[name].nan_to_num(), before[name].nan_to_num()) for name in before)


@pytest.fixture
def job(tmp_path: Path) -> Fit:
    """A training in a folder of its own: fourteen pairs, and four for validation."""
    pairs = _alone(random_pairs(18))
    (tmp_path / "run").mkdir()
    return Fit(
        config=FIT, train_pairs=pairs[:14], validation_pairs=pairs[14:], seed=0, origin={"data": "id"},
        home=str(tmp_path / "run"),
    )  # fmt: skip


def _run(folder: Path, job: Fit) -> dict[str, torch.Tensor]:
    policy = tiny_policy(folder, lora=job.config.lora is not None)
    fit(policy, job, Ranks())
    return parameter_state(policy)


def _history(job: Fit) -> list[dict[str, float]]:
    lines = read_history(Path(job.home) / METRICS_FILE)
    return [{name: value for name, value in line.items() if name not in SPEED_NAMES} for line in lines]


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), None], ids=["lora", "full"])
def test_resumed_training_equals_an_unbroken_one_bit_for_bit(
    model_folder: Path, job: Fit, tmp_path: Path, lora: LoraConfig | None
) -> None:
    """Taken away after step 5 of seven, in the second epoch: weights and history are the same."""
    job = replace(job, config=replace(FIT, lora=lora))
    unbroken = _run(model_folder, job)
    (tmp_path / "broken").mkdir()
    broken = replace(job, home=str(tmp_path / "broken"))
    with pytest.raises(PreemptedError, match="saved after 5 steps"):
        _run(model_folder, replace(broken, is_preempted=_at(5)))
    resumed = _run(model_folder, broken)
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert _history(broken) == _history(job)
    assert len(_history(job)) == 7


def _at(step: int) -> Callable[[], bool]:
    asked = iter(range(1, 1000))
    return lambda: next(asked) == step


def test_history_is_of_answers_and_not_of_pairs(model_folder: Path, job: Fit) -> None:
    """Loss, log-probs and tokens with the step's cadence; no reward, and no warning of a collapse."""
    heard: list[str] = []
    _run(model_folder, replace(job, tell=heard.append))
    history = _history(job)
    assert heard == []
    names = {"step", "loss", "logps/chosen", "answer_tokens", "grad_norm", "learning_rate"}
    validation = {"validation/loss", "validation/logps/chosen"}
    assert [set(line) - names for line in history] == [validation if step in {3, 6} else set() for step in range(7)]
    tokens = [sum(len(pair.chosen_ids) for pair in job.batch(step)) for step in range(7)]
    assert [line["answer_tokens"] for line in history] == tokens


def test_answers_are_learned(model_folder: Path, job: Fit) -> None:
    """Sixty passes over fourteen random answers: from about ln 400 nats a token to less than one."""
    longer: dict[str, Any] = {"epochs": 60, "schedule": "constant", "checkpoint_steps": 999, "evaluate_steps": 999}
    _run(model_folder, replace(job, config=replace(FIT, **longer)))
    history = _history(job)
    assert history[0]["loss"] > 5
    assert history[-1]["loss"] < 1
