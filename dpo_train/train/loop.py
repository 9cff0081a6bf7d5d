"""The training's cadence: resume, step, evaluate, checkpoint, stop."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from dpo_train.artifacts import local_copy, mirror
from dpo_train.config import FitConfig, SftConfig
from dpo_train.data.batches import num_steps, step_pairs
from dpo_train.data.pairs import TokenPair
from dpo_train.data.shards import PairSequence
from dpo_train.disk import write_atomically
from dpo_train.errors import NonFiniteLossError, PreemptedError
from dpo_train.metrics_file import METRICS_FILE, History
from dpo_train.model.load import Policy
from dpo_train.train.checkpoint import Checkpoints
from dpo_train.train.dpo import Dpo
from dpo_train.train.job import pause_note
from dpo_train.train.optimizer import build_optimizer, learning_rate
from dpo_train.train.ranks import Ranks
from dpo_train.train.sft import Sft
from dpo_train.train.speed import Speed
from dpo_train.train.state import VALIDATION, TrainingState


class Method(Protocol):
    """What a training does with its pairs: ``dpo.Dpo`` or ``sft.Sft``. All ranks call each method with the same pairs.

    Metrics are means over all of them, with a ``loss`` among them, and the same on every rank.
    """

    def step(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        pairs: Sequence[TokenPair],
        ranks: Ranks,
        *,
        step: int,
        learning_rate: float,
    ) -> dict[str, float]:
        """Updates the policy on one batch, and says what it was like before."""

    def evaluate(self, policy: Policy, pairs: Sequence[TokenPair], ranks: Ranks) -> dict[str, float]:
        """The same without an update."""

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """What a person should be told about a step, once in a training."""


def method_of(config: FitConfig) -> Method:
    """The config's kind says what its steps are."""
    return Sft(config) if isinstance(config, SftConfig) else Dpo(config)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a training needs besides the policy: data, cadence, and where its state goes."""

    config: FitConfig
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
    pause_at: int | None = None
    """Stop after so many steps."""

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

    def is_over(self, state: TrainingState) -> bool:
        """Whether the training has come to its end."""
        return state.is_over(self.total_steps, self.config)

    def must_stop(self, state: TrainingState) -> bool:
        """Whether it has, or is to pause here."""
        return self.is_over(state) or (self.pause_at is not None and state.step >= self.pause_at)

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


def fit(policy: Policy, job: Fit, ranks: Ranks) -> bool:
    """Trains to the end, from the latest checkpoint of the same origin if there is one; or until it is to pause.

    A training that was paused and goes on is bit for bit an unbroken one: its schedule is that of its whole length, and
    what is measured at a pause leaves no trace in it.

    The first rank appends one line per step to ``metrics.jsonl``; after a resume the lines of steps that are done again
    are dropped first, so that each step stands there once.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite.
        RunError: what the method finds at a step, such as a policy that does not start as its reference.
        PreemptedError: this machine is about to go; everything is saved.

    Returns:
        whether it has come to its end.
    """
    config, total, method = job.config, job.total_steps, method_of(job.config)
    optimizer = build_optimizer(policy.trainable().values(), config)
    checkpoints = Checkpoints(job.home, job.origin, policy, optimizer, ranks)
    state = checkpoints.resume()
    history = History(local_copy(job.home) / METRICS_FILE, state.step) if ranks.is_first else None
    speed = Speed(policy, config, ranks)
    while not job.must_stop(state):
        step = state.step
        batch = job.batch(step)
        rate = learning_rate(config, step, total)
        with speed.step(batch):
            metrics = method.step(policy, optimizer, batch, ranks, step=step, learning_rate=rate)
        metrics |= {"learning_rate": rate} | speed.metrics()
        state = _after_step(replace(state, step=step + 1), policy, job, ranks, method, metrics)
        if history is not None:
            history.append(step, metrics)
            job.report(step + 1, total, "steps", **metrics)
        _save(checkpoints, state, job, ranks, history)
    checkpoints.finish()
    if not job.is_over(state):
        _note_pause(state, policy, job, ranks, method)
        return False
    if config.keep == "best" and state.best_step is not None:
        checkpoints.load_parameters(state.best_step)
    return True


def _note_pause(state: TrainingState, policy: Policy, job: Fit, ranks: Ranks, method: Method) -> None:
    """Leaves what the validation pairs say of a training that pauses, whole or not at all."""
    assert job.pause_at is not None
    metrics = _measured(policy, job, ranks, method, state.step) if job.validation_pairs else {}
    if ranks.is_first:
        note, shared = pause_note(job.pause_at), mirror(job.home)
        write_atomically(shared.path / note, json.dumps({"step": state.step, "metrics": metrics}))
        shared.publish(note)


def _measured(policy: Policy, job: Fit, ranks: Ranks, method: Method, step: int) -> dict[str, float]:
    """The validation pairs' metrics under ``validation/``."""
    found = {VALIDATION + name: value for name, value in method.evaluate(policy, job.validation_pairs, ranks).items()}
    if not math.isfinite(found[VALIDATION + "loss"]):
        raise NonFiniteLossError(
            f"The loss on the validation pairs is not finite after {step} steps",
            fix=f"lower {job.config.section}.learning_rate, or look at these pairs",
        )
    return found


def _after_step(
    state: TrainingState, policy: Policy, job: Fit, ranks: Ranks, method: Method, metrics: dict[str, float]
) -> TrainingState:
    """Measures the validation pairs if it is time to, and tells a person what should be told."""
    config = job.config
    if job.validation_pairs and (state.step == job.total_steps or state.step % config.evaluate_steps == 0):
        metrics |= _measured(policy, job, ranks, method, state.step)
        state = state.evaluated(state.step, metrics, config)
    if not state.warned and (warning := method.warning(metrics)) is not None:
        if ranks.is_first:
            job.tell(f"warning (step {state.step}): {warning}")
        state = replace(state, warned=True)
    return state


def _save(checkpoints: Checkpoints, state: TrainingState, job: Fit, ranks: Ranks, history: History | None) -> None:
    """Saves when it is time to. What must not be lost is waited for: the end, the best weights, the last words."""
    config = job.config
    checkpoints.poll()
    preempted = ranks.any(job.is_preempted())
    is_best = config.keep == "best" and state.best_step == state.step
    # The last step is saved as well: were saving the policy to fail, nothing is trained again.
    must = job.must_stop(state) or is_best or preempted
    if must or state.step % config.checkpoint_steps == 0:
        if history is not None:
            history.sync()
        checkpoints.save(state, wait=must)
    if preempted and not job.is_over(state):
        raise PreemptedError(
            f"This machine is about to be taken away; the training is saved after {state.step} steps",
            fix="run the same command again",
        )
