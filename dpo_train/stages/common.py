"""What all stages share: where an output goes, and the digests of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_train.artifacts import Artifact, Output, Summary, identity, produce
from dpo_train.config import RunConfig
from dpo_train.data.folder import model_folder, weights_digest


def make(
    config: RunConfig,
    stage: str,
    content: Mapping[str, Any],
    inputs: Mapping[str, str],
    body: Callable[[Output], Summary],
    *,
    output: Path | None,
    resumable: bool = False,
) -> Artifact:
    """``produce`` at the output's address in the store, or in the folder that the user named."""
    target = output or Path(config.store) / stage / identity(stage, content, inputs)
    return produce(stage, content, inputs, target, body, resumable=resumable)


def compute_dtype(config: RunConfig) -> str:
    """bfloat16 on GPUs, else float32: log-probs differ between the two by up to 0.4 nats an answer."""
    if config.compute.device == "auto":
        from dpo_train.model.load import select_device

        return "bfloat16" if select_device("auto").type == "cuda" else "float32"
    return "bfloat16" if config.compute.device == "cuda" else "float32"


def model_digest(config: RunConfig) -> str:
    """Digest of the base model's folder."""
    return weights_digest(model_folder(config.model.path))
