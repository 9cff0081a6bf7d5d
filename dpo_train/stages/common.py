"""What all stages share: where an output goes, and the digests of the model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, produce
from dpo_train.config import RunConfig
from dpo_train.data.adapter import adapter_digest, adapter_folder, check_shape
from dpo_train.data.folder import model_folder, weights_digest
from dpo_train.errors import ConfigError, StoreError
from dpo_train.identity import identity


def make(
    config: RunConfig,
    stage: str,
    content: Mapping[str, Any],
    inputs: Mapping[str, str],
    body: Callable[[Output], Summary],
    *,
    output: Path | str | None,
    resumable: bool = False,
    scratch: Sequence[str] = (),
) -> Artifact:
    """``produce`` at the output's address in the store, or in the folder that the user named."""
    target = output or storage.join(config.store, stage, identity(stage, content, inputs))
    return produce(stage, content, inputs, target, body, resumable=resumable, scratch=scratch)


def check_made_from(made: Artifact, name: str, source: Artifact) -> None:
    """Inputs that a person names one by one must belong together.

    Raises:
        StoreError: ``made`` was made from another ``name`` than ``source``.
    """
    if made.record.inputs.get(name) != source.record.digest:
        raise StoreError(
            f"{made.home} was not made from {source.home}",
            got=f"{name} {made.record.inputs.get(name)}",
            expected=source.record.digest,
            fix=f"name the {name} it was made from, or run its stage again",
        )


def check_same_model(config: RunConfig, digest: str, scored: Artifact) -> None:
    """The reference must be the model that is trained, whose digest is given: to take it reads all weights.

    Raises:
        ConfigError: the pairs were scored by another.
    """
    if scored.record.inputs.get("model") != digest:
        model = config.model
        options = {f"model.{name}": getattr(model, name) for name in ("adapter", "quantization", "precision")}
        raise ConfigError(
            f"The pairs in {scored.home} were scored by another model than {model.path}"
            + "".join(f", {name}={value}" for name, value in options.items() if value is not None),
            fix="run score-reference with this model, or name the model that scored them",
        )


def check_same_dtype(config: RunConfig, scored: Artifact) -> None:
    """A policy in fp32 against a reference in bf16 would differ by their rounding.

    Raises:
        ConfigError: the pairs were scored in another precision, or for another kind of training.
    """
    dtype = compute_dtype(config)
    if scored.record.config.get("compute_dtype") != dtype:
        raise ConfigError(
            f"The pairs in {scored.home} were scored in another dtype than the policy would be",
            got=scored.record.config.get("compute_dtype"),
            expected=dtype,
            fix="evaluate as the pairs were scored (compute.device, train.lora), or score them again here",
        )


def check_adapter(config: RunConfig) -> None:
    """The adapter that the model has is trained as it is: what the config says of it must not be something else.

    Raises:
        ModelError: it cannot be trained on.
        ConfigError: ``train.lora`` says otherwise.
    """
    if config.model.adapter is None:
        return
    folder = adapter_folder(config.model.adapter)
    if config.train.lora is not None:
        check_shape(folder, config.train.lora)


def compute_dtype(config: RunConfig) -> str:
    """What log-probs are computed in; between bf16 and fp32 they differ by 0.4 nats RMS at answers of -1000.

    Compute in bf16 is over bf16 weights under adapters and fp32 masters otherwise.
    """
    if not config.model.in_bf16(on_gpu=device_type(config) != "cpu"):
        return "float32"
    return "bfloat16" if config.train.lora is not None else "bfloat16 over float32 weights"


def device_type(config: RunConfig) -> str:
    """ "cpu" or "cuda": what ``compute.device`` means here."""
    if config.compute.device != "auto":
        return config.compute.device
    from dpo_train.model.load import select_device

    return select_device("auto").type


def model_digest(config: RunConfig) -> str:
    """Digest of the model before its training, the reference: its folder, adapter, 4-bit numbers and precision."""
    model = config.model
    parts = [weights_digest(model_folder(model.path))]
    if model.adapter is not None:
        parts.append(f"adapter {adapter_digest(adapter_folder(model.adapter))}")
    if model.quantization is not None:
        parts.append(f"quantization {model.quantization}")
    if model.precision != "auto":
        parts.append(f"precision {model.precision}")
    return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def storage_options(config: RunConfig) -> storage.Options:
    """The config's section as storage wants it."""
    return storage.Options(**dataclasses.asdict(config.storage))
