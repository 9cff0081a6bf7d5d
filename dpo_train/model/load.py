"""Policies from model folders, with or without adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_train.config import LoraConfig, ModelConfig
from dpo_train.data.folder import model_folder
from dpo_train.errors import ModelError, first_line
from dpo_train.model.adapters import fresh_adapter, load_adapter, strip_paths
from dpo_train.model.forward import PackedForward
from dpo_train.model.layout import Layout, layout_of

ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"


@dataclass
class Policy:
    """A causal language model whose adapters, if any, can be switched off to give the reference.

    ``model`` is the plain Hugging Face model: adapters are injected into its modules.
    """

    model: Any
    adapters: Any | None
    folder: Path
    device: torch.device

    sharded: bool = False
    """Each rank holds a share of every weight (model/shard.py); all ranks must then do the same forwards."""

    @property
    def vocabulary(self) -> int:
        """Rows of the output embedding."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def packed(self) -> PackedForward:
        """The forward over packed rows; with FSDP2 the module that holds all weights."""
        return PackedForward(self.model, self.layout, self.device)

    @cached_property
    def layout(self) -> Layout:
        """Which masks its layers take, and how it makes logits."""
        return layout_of(self.model, self.folder)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; fp32 always (see docs/architecture.md, decision 5)."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy computes what its untrained base does. Only with adapters."""
        if self.adapters is None:
            raise ModelError("A fully fine-tuned policy does not hold its reference", fix="load the base model instead")
        with self.adapters.disable_adapter():
            yield


def select_device(name: str) -> torch.device:
    """ "cpu", "cuda" (this process's GPU), or "auto": the GPU if there is one.

    Raises:
        ModelError: "cuda" is asked for and this process sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("No GPU is to be seen here", got="compute.device=cuda", fix="set compute.device=auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def load_policy(
    config: ModelConfig,
    *,
    device: torch.device,
    lora: LoraConfig | None = None,
    trainable: bool = False,
    seed: int = 0,
    weights: Path | None = None,
    frozen_base: bool = True,
) -> Policy:
    """Loads the base model, and on it either fresh adapters or the trained weights of an earlier stage.

    Args:
        config: the base model.
        device: where it goes.
        lora: shape of fresh adapters (zero update, so that the policy starts as its reference).
        trainable: whether gradients are wanted; without, everything is frozen.
        seed: of the adapters' first factor.
        weights: output folder of a training (holding ``adapter/`` or ``model/``) to load instead.
        frozen_base: whether the run's trainings are of adapters, so that the base's weights are never changed. The
            reference of a full training must be computed in the dtype that the training starts in.

    Raises:
        ModelError: the folder is no causal language model, or an adapter's target module does not exist.
    """
    folder = model_folder(config.path)
    if weights is not None and (weights / MODEL_FOLDER).is_dir():
        folder = weights / MODEL_FOLDER
    if weights is not None and not any((weights / name).is_dir() for name in (ADAPTER_FOLDER, MODEL_FOLDER)):
        raise ModelError(f"There are no trained weights in {weights}", expected=f"{ADAPTER_FOLDER}/ or {MODEL_FOLDER}/")
    full_training = trainable and lora is None
    whole = full_training or not frozen_base or (weights is not None and (weights / MODEL_FOLDER).is_dir())
    # A base under adapters is never updated, so it may be bf16. Weights that are or were trained have fp32 masters,
    # also when they are measured: what is evaluated is what gets registered.
    dtype = torch.bfloat16 if device.type == "cuda" and not whole else torch.float32
    model = _load_base(folder, config, dtype).to(device)
    layout_of(model, folder)  # refuses what cannot be masked
    adapters = None
    if weights is not None and (weights / ADAPTER_FOLDER).is_dir():
        adapters = load_adapter(model, weights / ADAPTER_FOLDER)
    elif lora is not None:
        adapters = fresh_adapter(model, lora, seed)
    # eval() for good: with dropout the policy would differ from its reference before the first step.
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and (full_training or "lora_" in name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Policy(model=model, adapters=adapters, folder=folder, device=device)


def save_policy(policy: Policy, target: Path, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
    """Writes ``adapter/`` (adapters alone) or ``model/`` (a whole model folder), as safetensors.

    Args:
        state: the weights, of a policy that is sharded (``shard.whole_state``); default: the policy's own.
    """
    if policy.adapters is not None:
        policy.adapters.save_pretrained(target / ADAPTER_FOLDER, safe_serialization=True, state_dict=state)
        strip_paths(target / ADAPTER_FOLDER / "adapter_config.json")
    else:
        policy.model.save_pretrained(target / MODEL_FOLDER, safe_serialization=True, state_dict=state)
        tokenizer.save_pretrained(target / MODEL_FOLDER)


def merged_model(config: ModelConfig, weights: Path) -> Any:
    """The trained policy as a plain model on the CPU, adapters merged into the base weights."""
    policy = load_policy(config, device=torch.device("cpu"), weights=weights)
    return policy.adapters.merge_and_unload() if policy.adapters is not None else policy.model


def parameter_state(policy: Policy) -> dict[str, Tensor]:
    """Trainable parameters as detached CPU tensors."""
    return {name: p.detach().cpu().clone() for name, p in policy.trainable().items()}


def load_parameter_state(policy: Policy, state: dict[str, Tensor]) -> None:
    """Writes ``parameter_state`` back in place."""
    parameters = policy.trainable()
    if parameters.keys() != state.keys():
        raise ModelError("The checkpoint holds other parameters than the policy trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def _load_base(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error
