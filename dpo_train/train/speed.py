"""How fast a training goes and what it takes: over all ranks, evaluations and checkpoints not counted."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dpo_train.config import FitConfig
from dpo_train.data.batches import rank_rows
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy
from dpo_train.train.ranks import Ranks

NAMES = ("pairs_per_second", "tokens_per_second", "row_fill", "peak_memory_gb", "mfu")
"""What no two runs share. Tokens are those of the pairs, each prompt once, without padding."""

PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165}
"""Dense bf16, from the makers' data sheets; the first name that is part of the device's own counts."""


class Speed:
    """Counts steps. All ranks call each method."""

    def __init__(self, policy: Policy, config: FitConfig, ranks: Ranks) -> None:
        self._policy, self._config, self._ranks = policy, config, ranks
        self._pairs = self._tokens = 0
        self._seconds = 0.0
        self._fill = 0.0
        self._flops_per_token = _flops_per_token(policy)

    @contextmanager
    def step(self, pairs: Sequence[TokenPair]) -> Iterator[None]:
        """Around one training step."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
        lengths = [pair.num_tokens for pair in pairs]
        rows = sum(map(len, rank_rows(lengths, self._config.row_tokens, self._ranks.num_shares)))
        self._pairs += len(pairs)
        self._tokens += sum(lengths)
        self._fill = sum(lengths) / (rows * self._config.row_tokens)

    def metrics(self) -> dict[str, float]:
        """Rates since the start of this process, the last step's filling, and the fullest rank's memory."""
        rate = self._tokens / self._seconds
        found = {
            "pairs_per_second": self._pairs / self._seconds,
            "tokens_per_second": rate,
            "row_fill": self._fill,
            "peak_memory_gb": self._ranks.max(_peak_bytes(self._policy.device)) / 1e9,
        }
        if peak := _peak_flops(self._policy.device):
            found["mfu"] = rate * self._flops_per_token / (peak * self._ranks.world_size)
        return found


def _flops_per_token(policy: Policy) -> float:
    """2 for each weight forward, as much backward to the inputs, and as much again for each weight that is trained."""
    weights: int = sum(p.numel() for p in policy.model.parameters())
    trained: int = sum(p.numel() for p in policy.trainable().values())
    return 4.0 * weights + 2.0 * trained


def _peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def _peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in kilobytes
