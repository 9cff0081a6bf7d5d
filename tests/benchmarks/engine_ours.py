"""Our engine, called as a training calls it: scored pairs, ``train_step``, one learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - here, so that it counts as imported, not as loaded

from dpo_train.config import ModelConfig, TrainConfig
from dpo_train.core.metrics import means
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy, load_policy
from dpo_train.model.score import score_pairs
from dpo_train.model.transforms import Checkpointing, transform_layers
from dpo_train.train.optimizer import build_optimizer
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import train_step
from tests.benchmarks.engine_turns import Spec, Turns


def run(spec: Spec, turns: Turns) -> None:
    """Scores the reference, then trains."""
    turns.imported()
    policy, config = load(spec), config_of(spec)
    scored, seconds = reference(policy, spec, turns)
    optimizer = build_optimizer(policy.trainable().values(), config)
    turns.ready(reference_seconds=seconds)
    step = 0
    while turns.wait():
        turns.done(one_step(policy, optimizer, scored[step % len(scored)], config, step))
        step += 1


def load(spec: Spec) -> Policy:
    """All weights are trained; layers are compiled or checkpointed as a training does it."""
    policy = load_policy(ModelConfig(path=str(spec.model)), device=torch.device(spec.device), trainable=True)
    checkpointing: Checkpointing = "full" if spec.checkpointing else "off"
    transform_layers(policy, checkpointing=checkpointing, compile=spec.compiled, row_tokens=spec.row_tokens)
    return policy


def config_of(spec: Spec) -> TrainConfig:
    return TrainConfig(
        beta=spec.beta, learning_rate=spec.learning_rate, weight_decay=0.0, max_grad_norm=1.0, warmup_steps=0,
        schedule="constant", batch_pairs=len(spec.batches[0]), row_tokens=spec.row_tokens,
    )  # fmt: skip


def reference(policy: Policy, spec: Spec, turns: Turns) -> tuple[list[list[TokenPair]], float]:
    """The batches with the untrained policy's log-probs, and what they took; kernels are warm by then."""
    score_pairs(policy, spec.batches[0], spec.row_tokens)
    start = turns.now()
    found = iter(score_pairs(policy, spec.pairs, spec.row_tokens))
    seconds = turns.now() - start
    return [[with_reference(pair, next(found)) for pair in batch] for batch in spec.batches], seconds


def with_reference(pair: TokenPair, logps: Sequence[Any]) -> TokenPair:
    return replace(pair, reference_chosen_logps=logps[0], reference_rejected_logps=logps[1])


def one_step(
    policy: Policy, optimizer: torch.optim.Optimizer, pairs: Sequence[TokenPair], config: TrainConfig, step: int
) -> float:
    """The step's mean loss."""
    result = train_step(policy, optimizer, pairs, config, Ranks(), step=step, learning_rate=config.learning_rate)
    return means(result.sums)["loss"]
