"""scored pairs -> policy"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard, mirror
from dpo_train.config import FitConfig, RunConfig, to_dict
from dpo_train.data.shards import TOKENS, Split
from dpo_train.errors import ConfigError, StoreError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.stages.check import check_rankings, check_reference, check_rows
from dpo_train.stages.common import check_same_model, make, model_digest, storage_options
from dpo_train.stages.executor import Executor
from dpo_train.train.job import CHECKPOINT_FOLDER, POLICY_NOTE, TrainJob
from dpo_train.train.state import kept_line

CADENCE = ("checkpoint_steps",)
"""Options that change when something is saved, never what is trained."""


def train(
    config: RunConfig,
    scored: Artifact,
    executor: Executor,
    *,
    beta: float | None = None,
    output: Path | str | None = None,
    reporter: Reporter | None = None,
) -> Artifact:
    """Makes ``adapter/`` or ``model/``, and ``metrics.jsonl`` with one line per step.

    Args:
        beta: from a sweep; default: ``train.beta``.
        reporter: where progress goes; a trial reports as the sweep, from a worker that does not know the environment.

    Raises:
        RunError: the loss is not finite, a worker died for good, or the policy does not start as its reference.
    """
    section = config.train if beta is None else dataclasses.replace(config.train, beta=beta)
    content = {key: value for key, value in to_dict(section).items() if key not in CADENCE}
    content["seed"] = config.seed
    inputs = {"scored": scored.record.digest, "model": model_digest(config)}

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
    """
    executor.run_ranks(job)
    out.adopt_noted(POLICY_NOTE)
    history = read_history(mirror(out.home).fetch(METRICS_FILE, size=out.files().get(METRICS_FILE)))
    if not history or [line["step"] for line in history] != list(range(len(history))):
        raise StoreError(f"{out.path / METRICS_FILE} lacks steps", fix=f"remove {out.path} and run again")
    return history


def discard_checkpoints(artifact: Artifact, reporter: Reporter) -> None:
    """Only once the record is written: killed before that, a finished training must not begin anew."""
    if not (artifact.reused and storage.is_remote(artifact.home)):
        discard(artifact.home, CHECKPOINT_FOLDER, tell=reporter.message)
