"""Policies from model folders, with or without adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_train.config import LoraConfig, ModelConfig
from dpo_train.data.adapter import adapter_folder, check_shape
from dpo_train.data.folder import ADAPTER_FOLDER, MODEL_FOLDER, model_folder
from dpo_train.errors import ModelError, first_line
from dpo_train.model.adapters import (
    check_targets,
    fresh_adapter,
    load_adapter,
    modules_named,
    strip_paths,
    switched,
)
from dpo_train.model.attention import install
from dpo_train.model.forward import PackedForward, autocast
from dpo_train.model.layout import Layout, layout_of
from dpo_train.model.quantize import check_stored, load_options, take_rounded
from dpo_train.model.save import write_model

BaseLoader = Callable[[Path, ModelConfig, torch.dtype, torch.device], Any]


@dataclass
class Policy:
    """A causal language model; its adapters, if any, can be taken away to give the reference.

    ``model`` is the plain Hugging Face model: adapters are injected into its modules.
    """

    model: Any
    adapters: Any | None
    folder: Path
    device: torch.device

    start: Path | None = None
    """Folder of the adapter that the model has before it is trained (``model.adapter``), where adapters are trained."""

    bf16: bool = False
    """Computed in bf16, whatever the dtype of its weights."""

    sharded: bool = False
    """Each rank holds a share of every weight (model/shard.py); all ranks must then do the same forwards."""

    @property
    def vocabulary(self) -> int:
        """Rows of the output embedding."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def packed(self) -> PackedForward:
        """The forward over packed rows; with FSDP2 the module that holds all weights."""
        return PackedForward(self.model, self.layout, self.device, bf16=self.bf16)

    @cached_property
    def layout(self) -> Layout:
        """Which masks its layers take, and how it makes logits."""
        return layout_of(self.model, self.folder)

    def autocast(self) -> AbstractContextManager[Any]:
        """What its forwards are computed in."""
        return autocast(self.device, self.bf16)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; fp32 always (see docs/architecture.md, decision 5)."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy computes what it did untrained. Only with adapters."""
        if self.adapters is None:
            raise ModelError("A fully fine-tuned policy does not hold its reference", fix="load the base model instead")
        with self.adapters.disable_adapter() if self.start is None else switched(self.adapters, self.start):
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
    frozen: Sequence[str] = (),
    base: BaseLoader | None = None,
) -> Policy:
    """Loads the model with the adapters that its training begins with, or with the trained weights of an earlier stage.

    Args:
        config: the model, with the adapter that it may have.
        device: where it goes.
        lora: shape of fresh adapters (zero update, so that the policy starts as its reference), where the model has
            no adapter to go on from.
        trainable: whether gradients are wanted; without, everything is frozen.
        seed: of the adapters' first factor.
        weights: output folder of a training (holding ``adapter/`` or ``model/``) to load instead.
        frozen_base: whether the run's trainings are of adapters, so that the base's weights are never changed. The
            reference of a full training must be computed as that training starts: in its dtype, an adapter merged.
        frozen: of a full training, modules that are not trained, by name or its end.
        base: gives the model instead of ``from_pretrained`` (model/sharded.py): of a folder, in a dtype, on a device.

    Raises:
        ModelError: the folder is no causal language model, an adapter does not fit it, or a module does not exist.
        ConfigError: ``lora`` contradicts the adapter that the model has.
        MissingPackageError: ``model.quantization`` without bitsandbytes.
    """
    trained, full_training = _trained(weights), trainable and lora is None
    folder = trained if trained is not None and trained.name == MODEL_FOLDER else model_folder(config.path)
    is_trained_model = folder == trained
    whole = full_training or not frozen_base or is_trained_model
    if whole and config.quantization:
        raise ModelError("Quantised weights cannot be trained", fix="set train.lora, or leave model.quantization out")
    # A base under adapters is never updated, so it may be bf16. Weights that are or were trained have fp32 masters,
    # also when they are measured: what is evaluated is what gets registered.
    bf16 = config.in_bf16(on_gpu=device.type == "cuda")
    dtype = torch.bfloat16 if bf16 and not whole else torch.float32
    model = (base or _load_base)(folder, config, dtype, device)
    layout_of(model, folder)  # refuses what cannot be masked
    start = adapter_folder(config.adapter) if config.adapter and not is_trained_model else None
    adapters = None
    if not is_trained_model:
        adapters = _adapters(model, trained or start, lora if trained is None else None, seed)
    if whole and adapters is not None:
        model, adapters, start = adapters.merge_and_unload(), None, None
    # eval() for good: with dropout the policy would differ from its reference before the first step.
    model.eval()
    held = _held(model, frozen) if full_training else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and parameter not in held and (full_training or "lora_" in name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Policy(model=model, adapters=adapters, folder=folder, device=device, start=start, bf16=bf16)


def _trained(weights: Path | None) -> Path | None:
    """Where a training's output has its weights."""
    if weights is None:
        return None
    for name in (MODEL_FOLDER, ADAPTER_FOLDER):
        if (weights / name).is_dir():
            return weights / name
    raise ModelError(f"There are no trained weights in {weights}", expected=f"{ADAPTER_FOLDER}/ or {MODEL_FOLDER}/")


def _adapters(model: Any, folder: Path | None, lora: LoraConfig | None, seed: int) -> Any | None:
    """Those in the folder, which ``lora`` must not contradict; without a folder fresh ones, or none."""
    if folder is None:
        return None if lora is None else fresh_adapter(model, lora, seed)
    adapters = load_adapter(model, folder)
    if lora is not None:
        check_shape(folder, lora)
        check_targets(model, lora, folder)
    return adapters


def _held(model: Any, frozen: Sequence[str]) -> set[nn.Parameter]:
    """The parameters of modules that are not to be trained.

    A matrix that is input embedding and vocabulary matrix in one is held by either name.

    Raises:
        ModelError: a name means no module, or all weights are meant.
    """
    modules = modules_named(model, frozen, "frozen")
    held = {parameter for module in modules.values() for parameter in module.parameters()}
    if not set(model.parameters()) - held:
        raise ModelError("Every weight is frozen, so there is nothing to train", got=f"frozen: {', '.join(frozen)}")
    return held


def save_policy(policy: Policy, target: Path, tokenizer: Any, state: dict[str, Tensor] | None = None) -> None:
    """Writes ``adapter/`` (adapters alone) or ``model/`` (a whole model folder), as safetensors.

    Args:
        state: the adapters' weights, of a policy that is sharded (``shard.whole_state``); default: the policy's own.
    """
    if policy.adapters is not None:
        policy.adapters.save_pretrained(target / ADAPTER_FOLDER, safe_serialization=True, state_dict=state)
        strip_paths(target / ADAPTER_FOLDER / "adapter_config.json")
    else:
        write_model(policy.model, target / MODEL_FOLDER)
        tokenizer.save_pretrained(target / MODEL_FOLDER)


def merged_model(config: ModelConfig, weights: Path) -> Any:
    """The trained policy as a plain model on the CPU, adapters merged in fp32 into the base weights as they were.

    Of a quantised base these are its 4-bit numbers written out, because it is with those that the policy was trained
    and measured.
    """
    device, config = torch.device("cpu"), replace(config, precision="fp32")
    if config.quantization is None:
        policy = load_policy(config, device=device, weights=weights)
        return policy.adapters.merge_and_unload() if policy.adapters is not None else policy.model
    folder = model_folder(config.path)
    plain = _load_base(folder, replace(config, quantization=None), torch.float32, device)
    take_rounded(plain, _load_base(folder, config, torch.float32, device))
    return load_adapter(plain, weights / ADAPTER_FOLDER).merge_and_unload()


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


def _load_base(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    options = load_options(config, device) if config.quantization else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except Exception as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error
    check_stored(model, folder, wanted=bool(config.quantization))
    install(model)
    return model.to(device)
