"""Low-rank adapters on a model (arXiv 2106.09685), through PEFT: fresh ones, or one that was trained before."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpo_train.config import LoraConfig
from dpo_train.data.adapter import ADAPTER_WEIGHTS, adapter_config
from dpo_train.errors import ConfigError, ModelError, first_line

_OTHER = "other"
"""PEFT's name for the adapter that ``switched`` puts beside the policy's own, which is "default"."""
_SETS = ("target_modules", "exclude_modules", "target_parameters")


def fresh_adapter(model: Any, lora: LoraConfig, seed: int) -> Any:
    """Adapters whose update is zero, so that the model computes what it did.

    Raises:
        ModelError: a target names no module, or one whose adapter log-probs would not see.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    # PEFT itself objects only if none of the names fits.
    modules_named(model, [] if isinstance(targets, str) else targets, "lora.target_modules")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_config = PeftLoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        try:
            adapters = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ModelError(f"The adapters do not fit the model: {first_line(error)}") from None
    _refuse_embeddings(model, f"lora.target_modules={targets}")
    return adapters


def load_adapter(model: Any, folder: Path) -> Any:
    """An adapter from its folder, all of it and nothing else.

    Raises:
        ModelError: it belongs to another model, or stands on an embedding or the vocabulary matrix.
    """
    from peft import PeftModel

    stored = _stored(folder)
    with torch.random.fork_rng(devices=[]):  # PEFT draws weights before it reads them
        try:
            adapters = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        except Exception as error:
            raise _unfit(folder, first_line(error)) from error
    _check_loaded(adapters, folder, stored, "default")
    _refuse_embeddings(model, str(folder))
    return adapters


def _stored(folder: Path) -> set[str]:
    """Names of the weights in an adapter's file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {first_line(error)}") from None


def _check_loaded(adapters: Any, folder: Path, stored: set[str], name: str) -> None:
    """PEFT only warns of weights that it finds no place for, and of places that it finds no weights for."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(adapters, adapter_name=name, save_embedding_layers=False))
    if odd := sorted(stored - wanted) or sorted(wanted - stored):
        where = "the model has no place for" if stored - wanted else "the adapter lacks"
        raise _unfit(folder, f"{len(odd)} weights that {where}, such as {odd[0]}")


def _unfit(folder: Path, got: str) -> ModelError:
    return ModelError(
        f"The adapter in {folder} does not fit the model", got=got, fix="set model.path to the model it was trained on"
    )


def check_targets(model: Any, lora: LoraConfig, folder: Path) -> None:
    """Whether a model's adapter, loaded from the folder, sits where ``lora`` says; its default says nothing.

    Raises:
        ConfigError: it sits elsewhere.
        ModelError: a target names no module.
    """
    if isinstance(lora.target_modules, str):
        return
    meant = set(modules_named(model, lora.target_modules, "lora.target_modules"))
    if odd := sorted(meant ^ set(_adapted(model))):
        raise ConfigError(
            f"The adapter in {folder} has other target modules, and is trained as it is",
            got=f"lora.target_modules={list(lora.target_modules)}, which differ in {len(odd)} modules such as {odd[0]}",
            expected=f"{adapter_config(folder).get('target_modules')}",
            fix="leave lora.target_modules out",
        )


@contextmanager
def switched(adapters: Any, folder: Path) -> Iterator[None]:
    """Inside, the model has the folder's adapter instead of its own. Loaded when it is first asked for."""
    own, layers = adapters.active_adapter, list(_adapted(adapters.get_base_model()).values())
    is_trained = any(p.requires_grad for layer in layers for p in layer.parameters())
    if _OTHER not in adapters.peft_config:
        with torch.random.fork_rng(devices=[]):
            adapters.load_adapter(str(folder), adapter_name=_OTHER, torch_device=str(adapters.device))
        _check_loaded(adapters, folder, _stored(folder), _OTHER)
    adapters.set_adapter(_OTHER, inference_mode=True)
    try:
        yield
    finally:
        adapters.set_adapter(own, inference_mode=not is_trained)


def modules_named(model: Any, targets: Sequence[str], option: str) -> dict[str, Any]:
    """The modules that targets mean, by name.

    Raises:
        ModelError: a target means none.
    """
    modules = dict(model.named_modules())
    if missing := [target for target in targets if not any(_is_meant(target, name) for name in modules)]:
        raise ModelError("The model has no such module", got=f"{option}: {', '.join(missing)}")
    return {name: module for name, module in modules.items() if any(_is_meant(target, name) for target in targets)}


def _is_meant(target: str, module: str) -> bool:
    """A target names a module by its whole name or its end, as PEFT reads it."""
    return module == target or module.endswith(f".{target}")


def _adapted(model: Any) -> dict[str, Any]:
    """The modules that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _refuse_embeddings(model: Any, got: str) -> None:
    # With tied weights the input embedding is the same matrix; merging its adapter would change the output as well.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    matrix = _plain(head).weight
    names = {name: _plain(module) for name, module in _adapted(model).items()}
    if blind := [name for name, module in names.items() if getattr(module, "weight", None) is matrix]:
        raise ModelError(
            "LoRA on the vocabulary matrix is not supported: log-probs use it without its adapter",
            got=f"{got}, which means {', '.join(blind)}",
            fix="leave the output embedding out",
        )
    if whole := [name for name, module in names.items() if module is _plain(embedding)]:
        raise ModelError(
            "LoRA on the input embedding is not supported: PEFT would write the whole embedding with every adapter",
            got=f"{got}, which means {', '.join(whole)}",
            fix="leave the input embedding out",
        )


def _plain(module: Any) -> Any:
    """The module below its adapter, if it has one."""
    while hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    return module


def strip_paths(file: Path) -> None:
    """An adapter's config names the machine's path of its base; the training's record says better what the base was.

    So does PEFT's model card, which says nothing else. Names of modules are a set in PEFT, whose order changes from
    process to process.
    """
    file.with_name("README.md").unlink(missing_ok=True)
    content = json.loads(file.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = None
    for key in _SETS:
        if isinstance(names := content.get(key), Iterable) and not isinstance(names, str):
            content[key] = sorted(names)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
