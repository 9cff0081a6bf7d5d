"""pairs -> the model that later stages align, fine-tuned on the chosen answers"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, mirror
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.adapter import adapter_folder, check_shape
from dpo_train.data.folder import MODEL_FOLDER, model_folder
from dpo_train.data.shards import TOKENS, Split
from dpo_train.progress import Reporter
from dpo_train.stages.check import check_model_reads, check_rows
from dpo_train.stages.common import make, model_digest
from dpo_train.stages.executor import Executor
from dpo_train.stages.train import CADENCE, discard_checkpoints, run_training, training_job
from dpo_train.train.job import CHECKPOINT_FOLDER


def sft(config: RunConfig, pairs: Artifact, executor: Executor, *, output: Path | str | None = None) -> Artifact:
    """Makes ``model/``, a whole model folder, and ``metrics.jsonl`` with one line per step.

    ``record.details["enabled"]`` says whether there is a model: without ``sft.enabled`` nothing is trained.
    ``record.details["model"]`` is its digest, by which later outputs name it.

    Raises:
        ConfigError: a prompt with its chosen answer does not fit into a row.
        ModelError: the model does not read the pairs, or cannot be trained.
        RunError: the loss is not finite, or a worker died for good.
    """
    if not config.sft.enabled:
        return make(config, "sft", {"enabled": False}, {}, lambda _: Summary(details={"enabled": False}), output=output)
    content = {key: value for key, value in to_dict(config.sft).items() if key not in CADENCE}
    content["seed"] = config.seed
    inputs = {"pairs": pairs.record.digest, "model": model_digest(config)}
    reporter = Reporter.from_environment("sft")

    def body(out: Output) -> Summary:
        splits = {name: Split(pairs, name) for name in ("train", "validation")}
        if config.model.adapter is not None and config.sft.lora is not None:
            check_shape(adapter_folder(config.model.adapter), config.sft.lora)
        for split in splits.values():
            _check(config, split)
        origin = {"config": content, "inputs": inputs}
        job = training_job(config, config.sft, pairs, out, origin=origin, reporter=reporter)
        history = run_training(executor, job, out)
        metrics = {name: value for name, value in history[-1].items() if name != "step"}
        return Summary(
            counts={"steps": len(history), "validation_pairs": splits["validation"].num_pairs},
            metrics={**metrics, "first_loss": history[0]["loss"]},
            details={"enabled": True, "model": _digest(config, out)},
        )

    artifact = make(config, "sft", content, inputs, body, output=output, resumable=True, scratch=(CHECKPOINT_FOLDER,))
    discard_checkpoints(artifact, reporter)
    return artifact


def with_model_of(home: str, config: RunConfig) -> RunConfig:
    """The config of all later stages, whose model is the one in this output of ours."""
    # An adapter that the model had is merged into it.
    model = dataclasses.replace(config.model, path=storage.join(home, MODEL_FOLDER), adapter=None)
    return dataclasses.replace(config, model=model)


def _check(config: RunConfig, split: Split) -> None:
    """What can be seen before a model is loaded."""
    folder = model_folder(config.model.path)
    for table in split.tables(TOKENS):
        check_model_reads(table, folder)
        check_rows(table, config.sft.row_tokens, "sft.row_tokens", chosen_alone=True)


def _digest(config: RunConfig, out: Output) -> str:
    """What later stages will call the model that was made, maybe on another machine."""
    sizes = {name: size for name, size in out.files().items() if name.startswith(f"{MODEL_FOLDER}/")}
    mirror(out.home).fetch_all(sizes)
    return model_digest(with_model_of(str(out.path), config))
