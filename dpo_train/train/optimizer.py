"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dpo_train.config import FitConfig


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    """AdamW, or RMSprop as in the DPO paper (appendix B). The learning rate is set at every step.

    Both go once over all weights: AdamW in one kernel, of which torch has none for RMSprop. Weights that are cut over
    different meshes of ranks go apart, because no operation takes both.
    """
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    of_mesh = [{"params": group} for group in groups.values()]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(of_mesh, lr=config.learning_rate, foreach=True)
    return torch.optim.AdamW(of_mesh, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: FitConfig, step: int, total_steps: int) -> float:
    """The rate of a step (from 0): linear warm-up, then constant, or linear or cosine towards zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    # The last step still moves: the decay would reach zero one step after it.
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    factor = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * factor
