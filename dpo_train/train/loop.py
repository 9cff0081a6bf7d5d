"""The training's cadence: resume, step, evaluate, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_train.config import TrainConfig
from dpo_train.core.metrics import means
from dpo_train.data.batches import num_steps, step_pairs
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import RunError
from dpo_train.metrics_file import METRICS_FILE, History
from dpo_train.model.load import Policy
from dpo_train.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from dpo_train.train.optimizer import build_optimizer, learning_rate
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import evaluate_pairs, train_step

FIRST_DRIFT_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}
"""Of an answer's mean log-prob, plus as many nats. Measured in fp32: 4e-7. Other packings in bf16: 4e-4."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a training needs besides the policy: data, cadence, and where its state goes."""

    config: TrainConfig
    train_pairs: Sequence[TokenPair]
    validation_pairs: Sequence[TokenPair]
    data_digest: str
    seed: int
    identity: str
    folder: Path
    report: Callable[..., None] = lambda *_, **__: None

    @property
    def total_steps(self) -> int:
        """All epochs, or ``max_steps`` if that is less."""
        steps = num_steps(len(self.train_pairs), self.config.batch_pairs, self.config.epochs)
        return min(steps, self.config.max_steps or steps)

    def batch(self, step: int) -> list[TokenPair]:
        """The pairs of one step, over all ranks."""
        config = self.config
        indices = step_pairs(
            len(self.train_pairs),
            config.batch_pairs,
            step,
            epochs=config.epochs,
            seed=self.seed,
            data_digest=self.data_digest,
        )
        return [self.train_pairs[index] for index in indices]


def fit(policy: Policy, job: Fit, ranks: Ranks) -> None:
    """Trains to the end, from the latest checkpoint of the same identity if there is one.

    The first rank appends one line per step to ``metrics.jsonl``; after a resume the lines of steps that are done again
    are dropped first, so that each step stands there once.
    """
    config = job.config
    optimizer = build_optimizer(policy.trainable().values(), config)
    start = latest_checkpoint(job.folder, job.identity, policy, optimizer)
    history = History(job.folder / METRICS_FILE, start) if ranks.is_first else None
    clock = time.perf_counter()
    pairs_done = 0
    for step in range(start, job.total_steps):
        batch = job.batch(step)
        rate = learning_rate(config, step, job.total_steps)
        result = train_step(policy, optimizer, batch, config, ranks, step=step, learning_rate=rate)
        metrics = means(result.sums)
        if step == 0:
            _check_first_drift(metrics, policy.device.type)
        pairs_done += len(batch)
        seconds = time.perf_counter() - clock
        metrics |= {"grad_norm": result.grad_norm, "learning_rate": rate, "pairs_per_second": pairs_done / seconds}
        last = step + 1 == job.total_steps
        if job.validation_pairs and (last or (step + 1) % config.evaluate_steps == 0):
            sums = evaluate_pairs(policy, job.validation_pairs, config, ranks)
            metrics |= {f"validation/{name}": value for name, value in means(sums).items()}
        if history is not None:
            history.append(step, metrics)
            job.report(step + 1, job.total_steps, "steps", **metrics)
        # The last step is saved as well: were saving the policy to fail, nothing is trained again.
        if ranks.is_first and (last or (step + 1) % config.checkpoint_steps == 0):
            save_checkpoint(job.folder, Checkpoint(step + 1, job.identity, policy, optimizer))
        ranks.barrier()


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
