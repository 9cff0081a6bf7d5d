"""scored pairs -> policy"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dpo_train.artifacts import Artifact, Output, Summary, identity
from dpo_train.config import RunConfig, TrainConfig, to_dict
from dpo_train.errors import ConfigError
from dpo_train.metrics_file import METRICS_FILE, read_history
from dpo_train.progress import Reporter
from dpo_train.stages.common import make, model_digest
from dpo_train.stages.executor import Executor
from dpo_train.train.job import TrainJob

CADENCE = ("checkpoint_steps",)
"""Options that change when something is saved, never what is trained."""


def train(
    config: RunConfig,
    scored: Artifact,
    executor: Executor,
    *,
    beta: float | None = None,
    output: Path | None = None,
    stage_name: str = "train",
) -> Artifact:
    """Makes ``adapter/`` or ``model/``, and ``metrics.jsonl`` with one line per step.

    Args:
        beta: from a sweep; default: ``train.beta``.
        stage_name: whose progress this is (a trial reports as the sweep).

    Raises:
        ConfigError: smoothing with a loss that has none.
        RunError: the loss is not finite, a worker died for good, or the policy does not start as its reference.
    """
    section = config.train if beta is None else dataclasses.replace(config.train, beta=beta)
    check_train_config(section)
    content = {key: value for key, value in to_dict(section).items() if key not in CADENCE}
    content["seed"] = config.seed
    inputs = {"scored": scored.record.digest, "model": model_digest(config)}

    def body(out: Output) -> Summary:
        executor.train(
            TrainJob(
                model=config.model,
                device=config.compute.device,
                config=section,
                seed=config.seed,
                identity=identity("train", content, inputs),
                scored=str(scored.path),
                data_digest=scored.record.digest,
                output=str(out.path),
                reporter=Reporter.from_environment(stage_name),
            )
        )
        history = read_history(out.path / METRICS_FILE)
        last = {name: value for name, value in history[-1].items() if name != "step"}
        return Summary(
            counts={"steps": len(history), "validation_pairs": scored.record.counts.get("pairs/validation", 0)},
            metrics={**last, "first_loss": history[0]["loss"]},
            details={"beta": section.beta},
        )

    return make(config, "train", content, inputs, body, output=output, resumable=True)


def check_train_config(section: TrainConfig) -> None:
    """What the types cannot say.

    Raises:
        ConfigError: options that contradict each other.
    """
    if section.label_smoothing and section.loss != "sigmoid":
        raise ConfigError(
            f"train.label_smoothing has no meaning with the {section.loss} loss",
            got=section.label_smoothing,
            expected="0, or train.loss=sigmoid",
        )
