"""scored pairs -> policy"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard, mirror
from dpo_train.config import FitConfig, RunConfig, to_dict
from dpo_train.data.shards import TOKENS, Split
from dpo_train.errors import ConfigError, StoreError
from dpo_train.identity import identity
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.stages.check import check_rankings, check_reference, check_rows
from dpo_train.stages.common import check_same_model, make, model_digest, storage_options
from dpo_train.stages.executor import Executor
from dpo_train.train.job import CHECKPOINT_FOLDER, POLICY_NOTE, TrainJob, pause_note
from dpo_train.train.state import kept_line

CADENCE = ("checkpoint_steps",)
"""Options that change when something is saved, never what is trained."""


class Paused(Exception):  # noqa: N818 - nothing is wrong
    """A training stands where it was told to pause; the same call with a later ``pause_at``, or none, goes on."""

    def __init__(self, step: int, metrics: Mapping[str, float]) -> None:
        """``metrics``: of the validation pairs, under ``validation/``."""
        super().__init__(f"paused after {step} steps")
        self.step, self.metrics = step, metrics


def train(
    config: RunConfig,
    scored: Artifact,
    executor: Executor,
    *,
    output: Path | str | None = None,
    reporter: Reporter | None = None,
    pause_at: int | None = None,
) -> Artifact:
    """Makes ``adapter/`` or ``model/``, and ``metrics.jsonl`` with one line per step.

    Args:
        reporter: where progress goes; a trial reports as the sweep, from a worker that does not know the environment.
        pause_at: stop after so many steps if it is not over by then; the output stays incomplete.

    Raises:
        Paused: it stands at ``pause_at``.
        RunError: the loss is not finite, a worker died for good, or the policy does not start as its reference.
    """
    section, content, inputs = config.train, _content(config), _inputs(config, scored)
    check_same_model(config, inputs["model"], scored)
    told = reporter or Reporter.from_environment("train")

    def body(out: Output) -> Summary:
        splits = {name: Split(scored, name) for name in ("train", "validation")}
        for split in splits.values():
            for pairs in split.tables(TOKENS):
                check_reference(pairs, scored.home)
                check_rankings(pairs, section)
                check_rows(pairs, section.row_tokens, "train.row_tokens")
        if not splits["validation"].num_pairs and (section.keep == "best" or section.patience is not None):
            raise ConfigError(
                "There are no validation pairs for train.keep=best and train.patience to look at",
                fix="raise prepare.validation_fraction, or leave both out",
            )
        origin = {"config": content, "inputs": inputs}
        job = training_job(config, section, scored, out, origin=origin, reporter=told)
        job = dataclasses.replace(job, pause_at=pause_at)
        history = run_training(executor, job, out)
        kept = kept_line(history, section)
        metrics = {name: value for name, value in kept.items() if name != "step"}
        return Summary(
            counts={"steps": len(history), "validation_pairs": splits["validation"].num_pairs},
            metrics={**metrics, "first_loss": history[0]["loss"]},
            details={"beta": section.beta, "kept_step": int(kept["step"]) + 1},
        )

    artifact = make(config, "train", content, inputs, body, output=output, resumable=True, scratch=(CHECKPOINT_FOLDER,))
    discard_checkpoints(artifact, told)
    return artifact


def train_home(config: RunConfig, scored: Artifact) -> str:
    """Where the output of this training lies, or would lie, in the store."""
    return storage.join(config.store, "train", identity("train", _content(config), _inputs(config, scored)))


def _content(config: RunConfig) -> dict[str, Any]:
    content = {key: value for key, value in to_dict(config.train).items() if key not in CADENCE}
    return {**content, "seed": config.seed}


def _inputs(config: RunConfig, scored: Artifact) -> dict[str, str]:
    return {"scored": scored.record.digest, "model": model_digest(config)}


def training_job(
    config: RunConfig,
    section: FitConfig,
    pairs: Artifact,
    out: Output,
    *,
    origin: Mapping[str, Any],
    reporter: Reporter,
) -> TrainJob:
    """What the ranks of a training of either kind are told."""
    return TrainJob(
        model=config.model,
        device=config.compute.device,
        config=section,
        seed=config.seed,
        origin=origin,
        pairs=pairs.home,
        output=out.home,
        storage=storage_options(config),
        shard=config.compute.shard == "on" or (config.compute.shard == "auto" and section.lora is None),
        tensor_parallel=config.compute.tensor_parallel,
        activation_checkpointing=config.compute.activation_checkpointing,
        compile=config.compute.compile,
        reporter=reporter,
    )


def run_training(executor: Executor, job: TrainJob, out: Output) -> list[dict[str, float]]:
    """Trains to the end, and returns the history, one line per step.

    Raises:
        StoreError: lines are missing.
        Paused: it stands at the job's ``pause_at``.
    """
    executor.run_ranks(job)
    if job.pause_at is not None and (note := _read(storage.join(out.home, pause_note(job.pause_at)))) is not None:
        raise Paused(**json.loads(note))
    out.adopt_noted(POLICY_NOTE)
    history = read_history(mirror(out.home).fetch(METRICS_FILE, size=out.files().get(METRICS_FILE)))
    if not history or [line["step"] for line in history] != list(range(len(history))):
        raise StoreError(f"{out.path / METRICS_FILE} lacks steps", fix=f"remove {out.path} and run again")
    return history


def _read(path: str) -> str | None:
    """A small file here or at s3://, or None."""
    if storage.is_remote(path):
        found = storage.find_bytes(path)
        return None if found is None else found[0].decode()
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else None


def discard_checkpoints(artifact: Artifact, reporter: Reporter) -> None:
    """Only once the record is written: killed before that, a finished training must not begin anew."""
    if not (artifact.reused and storage.is_remote(artifact.home)):
        discard(artifact.home, CHECKPOINT_FOLDER, tell=reporter.message)
