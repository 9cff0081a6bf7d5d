"""Our engine with one technique left out, on the same pairs with the same losses.

Where the engine itself cannot do without, the step is written here, of the engine's pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_train.model.forward as engine_forward
from dpo_train.config import TrainConfig
from dpo_train.core.logprobs import token_logprobs
from dpo_train.data.packing import pack
from dpo_train.data.pairs import Logps, TokenPair
from dpo_train.model.load import Policy
from dpo_train.model.rows import Row, build_row
from dpo_train.model.score import row_logps, score_pairs
from dpo_train.train.optimizer import build_optimizer
from tests.benchmarks import engine_ours
from tests.benchmarks.engine_turns import Spec, Turns

Step = Callable[[Sequence[TokenPair], int], float]

DESCRIPTIONS = {
    "": "nothing left out",
    "shared prompt": "each answer is a sequence of its own, with its prompt",
    "packing": "one pair a row",
    "answer tokens": "every token meets the vocabulary matrix, in chunks",
    "chunks": "the answers' logits and their softmax are stored",
    "answer tokens and chunks": "every token's logits and their softmax are stored",
    "cached reference": "a second model scores each batch in the step",
    "attention per pair": "one dense mask over the row, transformers' sdpa",
}


def run(spec: Spec, turns: Turns) -> None:
    """As engine_ours.run, with ``spec.leave_out`` left out."""
    turns.imported()
    policy, config = engine_ours.load(spec), engine_ours.config_of(spec)
    scored, seconds = engine_ours.reference(policy, spec, turns)
    step_of = {
        "": _plain,
        "shared prompt": _unshared,
        "packing": _unpacked,
        "answer tokens": _every_token,
        "chunks": _stored,
        "answer tokens and chunks": _whole,
        "cached reference": _uncached,
        "attention per pair": _dense,
    }[spec.leave_out](policy, config, spec)
    turns.ready(reference_seconds=seconds)
    step = 0
    while turns.wait():
        turns.done(step_of(scored[step % len(scored)], step))
        step += 1


def _plain(policy: Policy, config: TrainConfig, _: Spec) -> Step:
    optimizer = build_optimizer(policy.trainable().values(), config)
    return lambda pairs, step: engine_ours.one_step(policy, optimizer, pairs, config, step)


def _unpacked(policy: Policy, config: TrainConfig, spec: Spec) -> Step:
    # A pair that is longer than a row gets a row of its own.
    return _plain(policy, replace(config, row_tokens=1), spec)


def _uncached(policy: Policy, config: TrainConfig, spec: Spec) -> Step:
    frozen = engine_ours.load(spec)
    for parameter in frozen.model.parameters():
        parameter.requires_grad_(False)
    train = _plain(policy, config, spec)

    def step_of(pairs: Sequence[TokenPair], step: int) -> float:
        scores = score_pairs(frozen, pairs, config.row_tokens)
        scored = [engine_ours.with_reference(pair, logps) for pair, logps in zip(pairs, scores, strict=True)]
        return train(scored, step)

    return step_of


def _unshared(policy: Policy, config: TrainConfig, _: Spec) -> Step:
    def lengths(pair: TokenPair) -> int:
        return pair.num_tokens + len(pair.prompt_ids)

    def ratios(pairs: Sequence[TokenPair]) -> Tensor:
        row = build_row([alone for pair in pairs for alone in _answers_alone(pair)]).to(policy.device)
        return row.answer_sums(row_logps(policy, row).token_logps_A - _reference(row))[:, 0].view(-1, 2)

    return _own_step(policy, config, lengths, ratios)


def _answers_alone(pair: TokenPair) -> list[TokenPair]:
    no_ids, no_logps = np.empty(0, np.int32), np.empty(0, np.float32)
    sides: list[tuple[Any, Logps | None]] = [
        (pair.chosen_ids, pair.reference_chosen_logps),
        (pair.rejected_ids, pair.reference_rejected_logps),
    ]
    return [TokenPair(pair.pair_id, pair.prompt_ids, ids, no_ids, logps, no_logps) for ids, logps in sides]


def _every_token(policy: Policy, config: TrainConfig, _: Spec) -> Step:
    def ratios(pairs: Sequence[TokenPair]) -> Tensor:
        row = build_row(pairs).to(policy.device)
        num_answers = len(row.target_A)
        # Places that predict no answer token follow, with whatever target.
        others = torch.ones_like(row.input_ids_T, dtype=torch.bool).index_fill(0, row.source_A, False).nonzero()[:, 0]
        sources = torch.cat([row.source_A, others])
        targets = torch.cat([row.target_A, row.input_ids_T[others]])
        logps = row_logps(policy, replace(row, source_A=sources, target_A=targets)).token_logps_A
        return row.answer_sums(logps[:num_answers] - _reference(row))

    return _own_step(policy, config, lambda pair: pair.num_tokens, ratios)


def _stored(policy: Policy, config: TrainConfig, spec: Spec) -> Step:
    _store_logits()
    return _plain(policy, config, spec)


def _whole(policy: Policy, config: TrainConfig, spec: Spec) -> Step:
    _store_logits()
    return _every_token(policy, config, spec)


def _store_logits() -> None:
    """From here on, in this process, autograd keeps the row's log-softmax."""

    def stored(hidden_AD: Tensor, weight_VD: Tensor, targets_A: Tensor, **_: Any) -> Tensor:
        logits_AV = F.linear(hidden_AD, weight_VD).float()
        return torch.log_softmax(logits_AV, dim=-1).gather(1, targets_A[:, None]).squeeze(1)

    assert hasattr(engine_forward, "token_logprobs"), "the engine's forward takes its log-probs from elsewhere"
    engine_forward.token_logprobs = stored


def _dense(policy: Policy, config: TrainConfig, _: Spec) -> Step:
    policy.model.set_attn_implementation("sdpa")

    def ratios(pairs: Sequence[TokenPair]) -> Tensor:
        row = build_row(pairs).to(policy.device)
        head = policy.model.get_output_embeddings()
        with policy.autocast():
            outputs = policy.model.get_decoder()(
                input_ids=row.input_ids_T[None], position_ids=row.positions_T[None], attention_mask=_dense_mask(row),
                use_cache=False,
            )  # fmt: skip
            logps_A = token_logprobs(outputs.last_hidden_state[0][row.source_A], head.weight, row.target_A)
        return row.answer_sums(logps_A - _reference(row))

    return _own_step(policy, config, lambda pair: pair.num_tokens, ratios)


def _dense_mask(row: Row) -> Tensor:
    """bool [1, 1, T, T]."""
    order_T = torch.arange(len(row.pair_T), device=row.pair_T.device)
    same_pair = row.pair_T[:, None] == row.pair_T[None, :]
    visible_part = (row.part_T[None, :] == 0) | (row.part_T[:, None] == row.part_T[None, :])
    return (same_pair & visible_part & (order_T[:, None] >= order_T[None, :]))[None, None]


def _reference(row: Row) -> Tensor:
    assert row.reference_A is not None
    return row.reference_A


def _own_step(
    policy: Policy,
    config: TrainConfig,
    lengths: Callable[[TokenPair], int],
    ratios: Callable[[Sequence[TokenPair]], Tensor],
) -> Step:
    """A step like the engine's: packed rows, one backward each, clipping, AdamW.

    Args:
        lengths: tokens that a pair takes in a row.
        ratios: of a row's pairs to log-ratios [P, 2] of chosen and rejected.
    """
    parameters = list(policy.trainable().values())
    optimizer = build_optimizer(parameters, config)

    def step_of(pairs: Sequence[TokenPair], _: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for members in pack([lengths(pair) for pair in pairs], config.row_tokens):
            ratios_P2 = ratios([pairs[index] for index in members])
            loss = -F.logsigmoid(config.beta * (ratios_P2[:, 0] - ratios_P2[:, 1])).sum() / len(pairs)
            torch.autograd.backward(loss)
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        return total

    return step_of
