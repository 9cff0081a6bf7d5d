"""What is done to a policy's layers one by one: activation checkpointing and compilation.

Each layer's ``forward`` is replaced on the layer itself, so names of modules and weights stay as they are. FSDP2's
hooks surround the call: they gather the weights before anything is computed, or computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dpo_train.model.load import Policy
from dpo_train.model.shard import layers

Checkpointing = Literal["off", "selective", "full"]

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.higher_order.flex_attention,
}
"""Outputs that selective checkpointing keeps: what costs most to compute again."""


def transform_layers(policy: Policy, *, checkpointing: Checkpointing, compile: bool, row_tokens: int) -> None:
    """Changes how each layer of a policy computes, never what.

    Args:
        checkpointing: what the backward pass finds of a layer's forward: all of it; matrix products and attention; or
            the layer's input alone.
        compile: by ``torch.compile``, each layer by itself: one compilation serves all layers that are alike, and all
            rows, which are padded to one length.
        row_tokens: that length.

    Raises:
        ModelError: the model does not say which modules are its layers.
    """
    if checkpointing == "off" and not compile:
        return
    policy.packed.static_tokens = row_tokens if compile else None
    # On CPUs attention per pair breaks the graph, which a checkpoint around it would not survive.
    steps = [_checkpointed(checkpointing), _compiled(compile)]
    for layer in layers(policy):
        forward: Callable[..., Any] = layer.forward
        for step in steps if policy.device.type == "cuda" else reversed(steps):
            forward = step(forward)
        layer.forward = forward


def _checkpointed(checkpointing: Checkpointing) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if checkpointing == "off":
        return lambda forward: forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if checkpointing == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keeps)
    return lambda forward: functools.partial(checkpoint, forward, **options)


def _compiled(compile: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return functools.partial(torch.compile, dynamic=False) if compile else lambda forward: forward


def _keeps(_context: Any, operation: Any, *_args: Any, **_more: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
