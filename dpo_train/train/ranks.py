"""The ranks of a training, whether there is one or many, and the shares of a batch that are divided among them.

With tensor parallelism several ranks compute one share together: what is said of pairs, such as a loss, is then the
same on all of them, and is added up over one rank of each share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dpo_train.model.shard import DATA, TENSOR


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks. With one rank nothing is communicated."""

    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    """Shares by ranks of a share (model/tensor_parallel.py); None: every rank has a share of its own."""

    @classmethod
    def current(cls, mesh: DeviceMesh | None = None) -> Ranks:
        """From torch.distributed's default group, or a single rank if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), mesh)
        return cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> int:
        """Number of this rank's share of every batch."""
        return self.rank if self.mesh is None else self.mesh.get_local_rank(DATA)

    @property
    def num_shares(self) -> int:
        return self.world_size if self.mesh is None else self.mesh[DATA].size()

    @property
    def ranks_per_share(self) -> int:
        return self.world_size // self.num_shares

    @property
    def is_first_of_share(self) -> bool:
        return self.mesh is None or self.mesh.get_local_rank(TENSOR) == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over shares, in place."""
        if self.num_shares > 1:
            dist.all_reduce(tensor, group=None if self.mesh is None else self.mesh.get_group(DATA))
        return tensor

    def sum_everywhere(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds up the gradients of all shares, in one message. A rank without a gradient contributes zeros."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        if self.num_shares > 1:
            flat = self.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
            gradients = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def max_of_share(self, tensor: Tensor) -> Tensor:
        """The largest of each number on the ranks that have this rank's share, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.mesh.get_group(TENSOR))
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank; every rank gets the same answer."""
        return self.max(float(flag)) > 0

    def max(self, value: float) -> float:
        """The largest of all ranks' values."""
        tensor = _scalar(value)
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def _scalar(value: float) -> Tensor:
    """Where the ranks' backend can send it."""
    on_gpu = dist.is_available() and dist.is_initialized() and "nccl" in dist.get_backend()
    return torch.tensor(value, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
