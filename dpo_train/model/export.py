"""A trained policy as a plain model folder, which transformers and vLLM load as it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_train.config import ModelConfig
from dpo_train.data.folder import ADAPTER_FOLDER, MODEL_FOLDER
from dpo_train.errors import RunError
from dpo_train.model.load import load_policy, merged_model
from dpo_train.model.save import write_model

_CPU = torch.device("cpu")

ROUNDING = 2e-5
"""Of the logits' norm: what merging changes in fp32 (measured: 1.6e-7 for 2 layers, 1.3e-6 for 30), with some room."""
SHARE = 0.05
"""Of what the training changed in the logits: an adapter that is left out, or scaled wrongly, is off by far more."""


def export_policy(
    config: ModelConfig, weights: Path, folder: Path, tokenizer: Any, *, end_ids: Sequence[int] = ()
) -> None:
    """Writes ``model/``, with adapters merged, and ``adapter/`` as it was trained, if it was one.

    Args:
        config: the model that was trained.
        weights: output folder of the training.
        folder: where both go.
        tokenizer: written beside the weights, with its chat template.
        end_ids: tokens that end answers in the training's data, besides the tokenizer's end of sequence.

    Raises:
        RunError: the folder computes something else than the base with its adapter.
    """
    target = folder / MODEL_FOLDER
    if (weights / MODEL_FOLDER).is_dir():
        shutil.copytree(weights / MODEL_FOLDER, target)
    else:
        shutil.copytree(weights / ADAPTER_FOLDER, folder / ADAPTER_FOLDER)
        _write_merged(config, weights, target)
    tokenizer.save_pretrained(target)
    _end_at(target / "generation_config.json", [tokenizer.eos_token_id, *end_ids])


def _write_merged(config: ModelConfig, weights: Path, target: Path) -> None:
    """One model is in memory at a time; the last is what was written, so that the files are proven and not the plan."""
    config = dataclasses.replace(config, precision="fp32")
    policy = load_policy(config, device=_CPU, weights=weights)
    ids_BT = _some_ids(policy.vocabulary)
    wanted = _logits(policy.model, ids_BT)
    with policy.reference():
        change = wanted - _logits(policy.model, ids_BT)
    # Of a quantised base the merged model is made from the full one, of which the policy holds nothing.
    if config.quantization is None and policy.adapters is not None:
        model = policy.adapters.merge_and_unload()
        del policy
    else:
        del policy
        model = merged_model(config, weights)
    write_model(model, target)
    del model
    plain = dataclasses.replace(config, path=str(target), adapter=None, quantization=None)
    _check_equal(_logits(load_policy(plain, device=_CPU).model, ids_BT), wanted, change)


def _some_ids(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (2, 16), generator=generator)


@torch.no_grad()
def _logits(model: Any, ids_BT: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits.float()
    return logits


def _check_equal(found_BTV: Tensor, wanted_BTV: Tensor, change_BTV: Tensor) -> None:
    """Compares norms per token, and takes the median: a mixture of experts may send single tokens elsewhere."""
    off, size, change = (
        (tensor.norm(dim=-1)).median().item() for tensor in (found_BTV - wanted_BTV, wanted_BTV, change_BTV)
    )
    if not off <= ROUNDING * size + SHARE * change:
        raise RunError(
            "The merged weights do not compute what the base with its adapter does; nothing is registered",
            got=f"logits that differ by {off:.3g}, where they are {size:.3g} and the training changed {change:.3g}",
            expected=f"at most {ROUNDING:g} of their size and {SHARE:g} of the change",
            fix="report this with the model's config.json: a layer of it cannot be merged",
        )


def _end_at(file: Path, wanted: Sequence[int]) -> None:
    """Generation ends at these tokens too, besides what the base says."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if missing := [end for end in dict.fromkeys(wanted) if end not in ends]:
        ends = [*ends, *missing]
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
