"""A policy of which no rank ever holds more than its share, from loading to saving.

    skeleton (no weights) -> adapters -> cut (tensor_parallel) -> shard.shard -> each rank reads its share -> check
    each weight in turn: gathered -> file by file on the first rank

``load_policy`` builds on a skeleton as it does on a model: adapters and frozen weights are decided in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from dpo_train.config import LoraConfig, ModelConfig
from dpo_train.data.folder import MODEL_FOLDER
from dpo_train.model.load import Policy, load_policy, save_policy
from dpo_train.model.save import write_model
from dpo_train.model.score import check_layout
from dpo_train.model.shard import TENSOR, reshard, shard, whole, whole_state
from dpo_train.model.skeleton import Skeleton, WholeModelNeededError
from dpo_train.model.tensor_parallel import parallelize


def load_sharded(
    config: ModelConfig,
    *,
    device: torch.device,
    lora: LoraConfig | None = None,
    trainable: bool = True,
    seed: int = 0,
    weights: Path | None = None,
    frozen_base: bool = True,
    frozen: Sequence[str] = (),
    mesh: DeviceMesh | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Policy:
    """A policy, sharded over all ranks of the default process group, and checked. All ranks call at once.

    Arguments are those of ``load_policy``. With a ``mesh`` of ``tensor_parallel.build_mesh`` layers' matrices are cut
    among the ranks of a tensor group. ``tell`` is told where every rank has to load the whole model first.

    Raises:
        ModelError: as ``load_policy``, ``parallelize`` and ``check_layout``; the checkpoint does not fit the model's
            config; or the model does not say which of its modules are layers.
    """
    options: dict[str, Any] = {
        "device": device,
        "lora": lora,
        "trainable": trainable,
        "seed": seed,
        "weights": weights,
        "frozen_base": frozen_base,
        "frozen": frozen,
    }
    policy, skeleton = _load(config, options, tell)
    if skeleton is not None:
        skeleton.drop_memory()
    if mesh is not None:
        parallelize(policy, mesh[TENSOR])
    shard(policy, mesh)
    if skeleton is not None:
        skeleton.fill()
    check_layout(policy)
    reshard(policy)
    return policy


def _load(config: ModelConfig, options: dict[str, Any], tell: Callable[[str], None]) -> tuple[Policy, Skeleton | None]:
    """The policy, on a skeleton unless its weights must be seen before they are cut."""
    skeleton, reason = Skeleton(), None
    if config.quantization is not None:
        reason = "its weights are quantised as they are loaded"
    elif config.adapter is not None and _merges_adapter(options):
        reason = "the adapter that it has is merged into its weights"
    else:
        try:
            return load_policy(config, **options, base=skeleton.build), skeleton
        except WholeModelNeededError as error:
            reason = str(error)
    tell(f"note: every rank loads the whole model before it keeps its share, because {reason}")
    return load_policy(config, **options), None


def _merges_adapter(options: dict[str, Any]) -> bool:
    """Whether ``load_policy`` would merge the adapter that the model has."""
    return (options["trainable"] and options["lora"] is None) or not options["frozen_base"]


def save_sharded(policy: Policy, target: Path, tokenizer: Any, *, keep: bool) -> None:
    """Writes what ``save_policy`` would write of the whole policy, file for file. All ranks call at once; one keeps."""
    if policy.adapters is not None:
        state = whole_state(policy, keep=keep)
        if keep:
            save_policy(policy, target, tokenizer, state)
        return
    write_model(policy.model, target / MODEL_FOLDER, gather=whole, keep=keep)
    if keep:
        tokenizer.save_pretrained(target / MODEL_FOLDER)
