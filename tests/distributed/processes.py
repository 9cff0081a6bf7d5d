"""Real gloo processes for tests: each does its work in a group and leaves what it returns in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpo_train.train.ranks import Ranks


def spawn(world_size: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(*args, ranks)`` returned on each rank."""
    folder.mkdir(parents=True)
    mp.spawn(_rank, args=(world_size, folder, work, *args), nprocs=world_size)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: Path, work: Callable[..., Any], *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world_size)
    try:
        torch.save(work(*args, Ranks.current()), folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()
