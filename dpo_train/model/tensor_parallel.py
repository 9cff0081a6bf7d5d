"""Tensor parallelism (arXiv 1909.08053, section 3): the ranks that share a row each compute some of a layer's heads and
some of its hidden units, and add up what these contribute.

    mesh      data x tensor; ranks of a tensor group are neighbours, and work on the same rows
    colwise   a linear's outputs are divided: queries, keys, values, the MLP's way up
    rowwise   its inputs are, and the ranks' outputs added: attention's output, the MLP's way down
    norms over heads   of each rank's own heads; the gradients of their weights are added

Which is which the model itself says (transformers' ``tp_plan``). Embeddings and vocabulary matrix stay whole over a
tensor group. FSDP2 then shards everything over the mesh's other dimension (model/shard.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dpo_train.errors import ConfigError, ModelError
from dpo_train.model.load import Policy
from dpo_train.model.shard import DATA, TENSOR, layers

HEAD_NORM = "replicated_with_grad_allreduce"


def build_mesh(device: torch.device, tensor_parallel: int) -> DeviceMesh:
    """All ranks of the default process group as data x tensor. All must ask at once.

    Raises:
        ConfigError: the ranks cannot be divided so.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world_size % tensor_parallel:
        raise ConfigError(
            "The training's workers cannot be divided into groups for tensor parallelism",
            got=f"{world_size} workers, compute.tensor_parallel={tensor_parallel}",
            fix="set compute.workers to a multiple of compute.tensor_parallel",
        )
    shape = world_size // tensor_parallel, tensor_parallel
    return init_device_mesh(device.type, shape, mesh_dim_names=(DATA, TENSOR))


def parallelize(policy: Policy, mesh: DeviceMesh) -> None:
    """Cuts the layers' matrices among the ranks of a tensor group, in place; to be done before FSDP2 shards them.

    Args:
        policy: without adapters. Its weights may be on the meta device; where they are not, each rank has all of them.
        mesh: of one dimension: this rank's tensor group.

    Raises:
        ModelError: the model has no plan, its plan has a style that is not known here, or its sizes are no multiples of
            the number of ranks.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    if policy.adapters is not None:
        raise ModelError("Adapters are not trained with tensor parallelism", fix="set compute.tensor_parallel=1")
    styles = {layer: _styles(policy, name, layer, mesh.size()) for name, layer in _named_layers(policy)}
    if not any(styles.values()):
        raise _refusal(policy, "no plan for its layers (tp_plan)")
    for layer, of_layer in styles.items():
        parallelize_module(layer, mesh, of_layer, src_data_rank=None)


def _named_layers(policy: Policy) -> Iterator[tuple[str, nn.Module]]:
    found = set(layers(policy))
    return ((name, module) for name, module in policy.model.named_modules() if module in found)


def _styles(policy: Policy, layer_name: str, layer: nn.Module, size: int) -> dict[str, Any]:
    """Of each module of a layer that the plan names, its style for torch."""
    _check_heads(policy, size)
    known, found = _known_styles(), {}
    for name, part in (*layer.named_modules(), *layer.named_parameters()):
        style = policy.model.tp_plan.get(re.sub(r"\d+", "*", f"{layer_name}.{name}"))
        if style is None:
            continue
        is_fit = isinstance(part, nn.Linear) if style != HEAD_NORM else isinstance(part, nn.Module)
        if style not in known or not is_fit:
            raise _refusal(policy, f"the plan {style} for {layer_name}.{name}", f"linears and {', '.join(known)}")
        _check_width(policy, f"{layer_name}.{name}", part, style, size)
        found[name] = known[style]
    return found


def _known_styles() -> dict[str, Any]:
    """What transformers' names mean, in torch's terms."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    return {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        # Where heads are not told apart before something is done to all of them, each rank has all of them.
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
        # A rank's heads are said to be its part of some dimension, so that the weight's gradient is added up. Heads are
        # dimension 1 or 2; nothing but the last, over which the norm goes, would make a difference.
        HEAD_NORM: SequenceParallel(sequence_dim=2, use_local_output=True),
    }


def _check_heads(policy: Policy, size: int) -> None:
    config = policy.model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (heads := getattr(config, name, None) or 0) % size:
            raise _refusal(policy, f"{name}={heads}", f"a multiple of compute.tensor_parallel={size}")


def _check_width(policy: Policy, name: str, part: Any, style: str, size: int) -> None:
    if style != HEAD_NORM:
        width = part.out_features if style.startswith("colwise") else part.in_features
        if width % size:
            raise _refusal(policy, f"{name} of width {width}", f"a multiple of compute.tensor_parallel={size}")


def _refusal(policy: Policy, got: str, expected: str | None = None) -> ModelError:
    return ModelError(
        f"The model in {policy.folder} ({type(policy.model).__name__}) cannot be trained with tensor parallelism",
        got=got,
        expected=expected,
        fix="set compute.tensor_parallel=1, or to a number that divides its heads and widths",
    )
