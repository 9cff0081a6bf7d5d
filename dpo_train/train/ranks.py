"""The ranks of a training, whether there is one or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks. With one rank nothing is communicated."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """From torch.distributed's default group, or a single rank if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds up the gradients of all ranks, in one message. A rank without a gradient contributes zeros."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        if self.world_size > 1:
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
            gradients = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank; every rank gets the same answer."""
        return bool(self.sum(_scalar(float(flag))))

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
