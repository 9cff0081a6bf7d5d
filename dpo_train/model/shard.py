"""FSDP2: each rank holds a share of every weight, gathers a layer's weights while it computes, and keeps a share of the
gradient (arXiv 2304.11277)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dpo_train.errors import ModelError
from dpo_train.model.load import Policy

DATA, TENSOR = "data", "tensor"
"""Dimensions of the mesh of ranks. Over the first weights are sharded and rows divided; over the second matrices of
layers are cut (model/tensor_parallel.py)."""


def shard(policy: Policy, mesh: DeviceMesh | None = None) -> None:
    """Shards the policy in place over a mesh's ``DATA``, or over all ranks of the default process group.

    Gradients are added over ranks, not averaged: every row's loss is divided by the global number of pairs already.
    From here on every rank must do the same number of forwards and backwards.

    Raises:
        ModelError: the model does not say which of its modules are layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if mesh is None:
        mesh = init_device_mesh(policy.device.type, (torch.distributed.get_world_size(),), mesh_dim_names=(DATA,))
    # No dtypes of its own: autocast decides what is computed in bf16, as it does for the reference and the evaluation.
    # FSDP2's param_dtype would turn norms and the residual stream into bf16 as well.
    dtypes = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in layers(policy):
        fully_shard(layer, mesh=mesh[DATA], mp_policy=dtypes)
    fully_shard(policy.packed, mesh=mesh[DATA], mp_policy=dtypes)
    for module in policy.packed.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    policy.sharded = True


def reshard(policy: Policy) -> None:
    """After forwards without a backward: only a backward would give the last gathered weights back, and until then
    ``policy.trainable()`` names whole copies that no optimiser knows. Does nothing to a policy that is not sharded."""
    if policy.sharded:
        root: Any = policy.packed
        root.reshard()
        # FSDP2 remembers the order of those forwards, and the next backward would gather a layer in vain.
        if hasattr(root, "reset_iter_state"):  # torch 2.13
            root.reset_iter_state()


def layers(policy: Policy) -> list[nn.Module]:
    """The modules that are gathered one after another, in order.

    Raises:
        ModelError: the model does not say which they are.
    """
    names = set(getattr(policy.model, "_no_split_modules", None) or ())
    # FSDP2 gives a module that it has sharded a class of its own.
    found = [module for module in policy.model.modules() if type(module).__name__.removeprefix("FSDP") in names]
    if not found:
        raise ModelError(
            f"{type(policy.model).__name__} does not say which modules are its layers",
            fix="set compute.shard, compute.activation_checkpointing and compute.compile to off",
        )
    return found


def local(tensor: Tensor) -> Tensor:
    """This rank's share, or the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's share lies in the whole tensor, by dimension; all of it if the tensor is whole.

    Everything is cut as ``torch.chunk`` does. The mesh's last dimension cuts first: FSDP2 cuts what tensor parallelism
    has left of a matrix, though its dimension stands before the other's.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for dim, placement in reversed(list(enumerate(tensor.placements))):
            if isinstance(placement, Replicate):
                continue
            cut: Any = placement
            start, stop = bounds[cut.dim]
            size = -(-(stop - start) // mesh.size(dim))
            first = min(start + mesh.get_local_rank(dim) * size, stop)
            bounds[cut.dim] = first, min(first + size, stop)
    return tuple(slice(start, stop) for start, stop in bounds)


def is_cut(tensor: Tensor, dimension: str) -> bool:
    """Whether the ranks along a dimension of the mesh hold different shares."""
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    return any(
        name == dimension and not isinstance(placement, Replicate)
        for name, placement in zip(names, tensor.placements, strict=True)
    )


def like(tensor: Tensor, share: Tensor) -> Tensor:
    """A share as a part of a whole that is sharded as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return share
    return DTensor.from_local(
        share, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; all ranks must ask at once."""
    if not isinstance(tensor, DTensor):
        return tensor
    # One dimension of the mesh after the other: torch warns of being asked for two at once.
    for dim in range(tensor.device_mesh.ndim - 1):
        tensor = tensor.redistribute(placements=[Replicate()] * (dim + 1) + list(tensor.placements[dim + 1 :]))
    return tensor.full_tensor()


def whole_state(policy: Policy, *, keep: bool) -> dict[str, Any]:
    """What ``save_policy`` writes, whole and on the CPU; empty without ``keep``. All ranks must ask at once.

    A rank that does not keep it holds a single weight at a time.
    """
    module: nn.Module = policy.model if policy.adapters is None else policy.adapters
    names = set(policy.trainable()) if policy.adapters is not None else None
    state: dict[str, Any] = {}
    done: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        # Under adapters only they are written, and they stand under a longer name there.
        if names is not None and not any(name.endswith(trained) for trained in names):
            continue
        # Tied weights are gathered once and stay one tensor, of which one copy is written.
        if id(tensor) not in done:
            full = whole(tensor).detach()
            done[id(tensor)] = full.cpu() if keep else full.new_empty(0)
        if keep:
            state[name] = done[id(tensor)]
    return state
