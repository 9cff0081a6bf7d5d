"""Low-rank adapters on a model (arXiv 2106.09685), through PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dpo_train.config import LoraConfig
from dpo_train.errors import ModelError, first_line


def fresh_adapter(model: Any, lora: LoraConfig, seed: int) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    # With tied weights the input embedding is the same matrix; merging its adapter would change the output as well.
    matrix = model.get_output_embeddings().weight
    head = [name for name, module in model.named_modules() if getattr(module, "weight", None) is matrix]
    modules = [name for name, _ in model.named_modules()]
    named = [] if isinstance(targets, str) else targets
    # PEFT itself objects only if none of the names fits.
    if missing := [t for t in named if not any(_is_meant(t, name) for name in modules)]:
        raise ModelError("The model has no such module", got=f"train.lora.target_modules: {', '.join(missing)}")
    if any(_is_meant(target, name) for target in named for name in head):
        raise ModelError(
            "LoRA on the vocabulary matrix is not supported: log-probs use it without its adapter",
            got=f"train.lora.target_modules={targets}",
            fix="leave the output embedding out",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_config = PeftLoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        try:
            return get_peft_model(model, peft_config)
        except ValueError as error:
            raise ModelError(f"The adapters do not fit the model: {first_line(error)}") from None


def _is_meant(target: str, module: str) -> bool:
    """A target names a module by its whole name or its end, as PEFT reads it."""
    return module == target or module.endswith(f".{target}")


def load_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))


def strip_paths(file: Path) -> None:
    """An adapter's config names the machine's path of its base; the training's record says better what the base was."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = None
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
