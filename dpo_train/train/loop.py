"""The training's cadence: resume, step, evaluate, checkpoint, stop."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_train.artifacts import local_copy
from dpo_train.config import TrainConfig
from dpo_train.core.metrics import means
from dpo_train.data.batches import num_steps, step_pairs
from dpo_train.data.pairs import TokenPair
from dpo_train.data.shards import PairSequence
from dpo_train.errors import NonFiniteLossError, PreemptedError, RunError
from dpo_train.metrics_file import METRICS_FILE, History
from dpo_train.model.load import Policy
from dpo_train.train.checkpoint import Checkpoints
from dpo_train.train.optimizer import build_optimizer, learning_rate
from dpo_train.train.ranks import Ranks
from dpo_train.train.speed import Speed
from dpo_train.train.state import VALIDATION, TrainingState
from dpo_train.train.step import evaluate_pairs, train_step

FIRST_DRIFT_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
"""Of an answer's mean log-prob, plus as many nats. Measured in fp32: 4e-7. Other packings in bf16: 4e-4."""

COLLAPSE = 0.25
"""Share of the reference's log-prob by which the chosen answers may fall before a person is told."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a training needs besides the policy: data, cadence, and where its state goes."""

    config: TrainConfig
    train_pairs: Sequence[TokenPair]
    validation_pairs: Sequence[TokenPair]
    seed: int
    origin: Mapping[str, Any]
    home: str
    """The training's output, here or at s3://."""
    report: Callable[..., None] = lambda *_, **__: None
    tell: Callable[[str], None] = lambda _: None
    is_preempted: Callable[[], bool] = lambda: False
    """Asked after every step, on every rank."""

    @property
    def total_steps(self) -> int:
        """All epochs, or ``max_steps`` if that is less."""
        steps = num_steps(len(self.train_pairs), self.config.batch_pairs, self.config.epochs)
        return min(steps, self.config.max_steps or steps)

    @functools.cached_property
    def _pair_ids_digest(self) -> str:
        """Of the pairs and nothing else: another version of the code, or another folder, gives the same order."""
        if isinstance(self.train_pairs, PairSequence):
            return self.train_pairs.ids_digest
        return hashlib.sha256("\n".join(pair.pair_id for pair in self.train_pairs).encode()).hexdigest()

    def batch(self, step: int) -> list[TokenPair]:
        """The pairs of one step, over all ranks."""
        config = self.config
        indices = step_pairs(
            len(self.train_pairs),
            config.batch_pairs,
            step,
            epochs=config.epochs,
            seed=self.seed,
            pair_ids_digest=self._pair_ids_digest,
        )
        return [self.train_pairs[index] for index in indices]


def fit(policy: Policy, job: Fit, ranks: Ranks) -> None:
    """Trains to the end, from the latest checkpoint of the same origin if there is one.

    The first rank appends one line per step to ``metrics.jsonl``; after a resume the lines of steps that are done again
    are dropped first, so that each step stands there once.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite.
        RunError: the policy does not start as its reference.
        PreemptedError: this machine is about to go; everything is saved.
    """
    config, total = job.config, job.total_steps
    optimizer = build_optimizer(policy.trainable().values(), config)
    checkpoints = Checkpoints(job.home, job.origin, policy, optimizer, ranks)
    state = checkpoints.resume()
    history = History(local_copy(job.home) / METRICS_FILE, state.step) if ranks.is_first else None
    speed = Speed(policy, config, ranks)
    while not state.is_over(total, config):
        step = state.step
        batch = job.batch(step)
        rate = learning_rate(config, step, total)
        with speed.step(batch):
            result = train_step(policy, optimizer, batch, config, ranks, step=step, learning_rate=rate)
        metrics = means(result.sums) | {"grad_norm": result.grad_norm, "learning_rate": rate} | speed.metrics()
        if result.aux_loss is not None:
            metrics["router/aux_loss"] = result.aux_loss
        if step == 0:
            _check_first_drift(metrics, policy.device.type)
        state = _after_step(replace(state, step=step + 1), policy, job, ranks, metrics)
        if history is not None:
            history.append(step, metrics)
            job.report(step + 1, total, "steps", **metrics)
        _save(checkpoints, state, job, ranks, history)
    checkpoints.finish()
    if config.keep == "best" and state.best_step is not None:
        checkpoints.load_parameters(state.best_step)


def _after_step(
    state: TrainingState, policy: Policy, job: Fit, ranks: Ranks, metrics: dict[str, float]
) -> TrainingState:
    """Measures the validation pairs if it is time to, and looks after the chosen answers."""
    config = job.config
    if job.validation_pairs and (state.step == job.total_steps or state.step % config.evaluate_steps == 0):
        sums = evaluate_pairs(policy, job.validation_pairs, config, ranks)
        metrics |= {VALIDATION + name: value for name, value in means(sums).items()}
        if not math.isfinite(metrics[VALIDATION + "loss"]):
            raise NonFiniteLossError(
                f"The loss on the validation pairs is not finite after {state.step} steps",
                fix="lower train.learning_rate, or look at these pairs",
            )
        state = state.evaluated(state.step, metrics, config)
    if not state.warned and _collapses(metrics):
        if ranks.is_first:
            job.tell(
                f"warning: the chosen answers' log-prob has fallen by {-metrics['drift/chosen']:.1f} nats "
                f"(step {state.step}), more than a quarter: raise train.beta, lower train.learning_rate, or add an SFT "
                "term, train.loss={sigmoid: 1.0, sft: 0.1}"
            )
        state = replace(state, warned=True)
    return state


def _save(checkpoints: Checkpoints, state: TrainingState, job: Fit, ranks: Ranks, history: History | None) -> None:
    """Saves when it is time to. What must not be lost is waited for: the end, the best weights, the last words."""
    config = job.config
    checkpoints.poll()
    preempted = ranks.any(job.is_preempted())
    is_best = config.keep == "best" and state.best_step == state.step
    # The last step is saved as well: were saving the policy to fail, nothing is trained again.
    must = state.is_over(job.total_steps, config) or is_best or preempted
    if must or state.step % config.checkpoint_steps == 0:
        if history is not None:
            history.sync()
        checkpoints.save(state, wait=must)
    if preempted and not state.is_over(job.total_steps, config):
        raise PreemptedError(
            f"This machine is about to be taken away; the training is saved after {state.step} steps",
            fix="run the same command again",
        )


def _collapses(metrics: Mapping[str, float]) -> bool:
    reference = metrics["logps/chosen"] - metrics["drift/chosen"]
    return metrics["drift/chosen"] < -COLLAPSE * abs(reference)


def _check_first_drift(metrics: Mapping[str, float], device: str) -> None:
    """Before the first update policy and reference are one: each side's mean log-ratio is zero.

    The loss would be a worse measure: its distance from ln 2 grows with beta, noise included.
    """
    for side in ("chosen", "rejected"):
        drift, logps = metrics[f"drift/{side}"], metrics[f"logps/{side}"]
        if not abs(drift) <= FIRST_DRIFT_TOLERANCE[device] * (1 + abs(logps)):
            raise RunError(
                "The first step shows that the policy does not start as its reference",
                got=f"a mean log-prob of {logps:.4f} for the {side} answers, {drift:.4f} off the reference's",
                expected="no difference",
                fix="score the reference again with these weights and this tokenizer",
            )
