"""FSDP2: each rank holds a share of every weight, gathers a layer's weights while it computes, and keeps a share of the
gradient (arXiv 2304.11277)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo_train.errors import ModelError
from dpo_train.model.load import Policy


def shard(policy: Policy) -> None:
    """Shards the policy in place over all ranks of the default process group.

    Gradients are added over ranks, not averaged: every row's loss is divided by the global number of pairs already.
    From here on every rank must do the same number of forwards and backwards.

    Raises:
        ModelError: the model does not say which of its modules are layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(policy.device.type, (torch.distributed.get_world_size(),))
    # No dtypes of its own: autocast decides what is computed in bf16, as it does for the reference and the evaluation.
    # FSDP2's param_dtype would turn norms and the residual stream into bf16 as well.
    dtypes = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in _layers(policy):
        fully_shard(layer, mesh=mesh, mp_policy=dtypes)
    fully_shard(policy.packed, mesh=mesh, mp_policy=dtypes)
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


def _layers(policy: Policy) -> list[nn.Module]:
    names = set(getattr(policy.model, "_no_split_modules", None) or ())
    layers = [module for module in policy.model.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"{type(policy.model).__name__} does not say which modules are its layers, so it cannot be sharded",
            fix="set compute.shard=false",
        )
    return layers


def local(tensor: Tensor) -> Tensor:
    """This rank's share, or the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_start(tensor: Tensor) -> int:
    """First row of this rank's share in the whole tensor; FSDP2 shards rows as ``torch.chunk`` does."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    rows_per_rank = -(-tensor.shape[0] // mesh.size())
    return min(mesh.get_local_rank() * rows_per_rank, tensor.shape[0])


def like(tensor: Tensor, share: Tensor) -> Tensor:
    """A share as a part of a whole that is sharded as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return share
    return DTensor.from_local(
        share, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; all ranks must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
