"""Which pairs a step trains on: a pure function of (pair ids, seed, batch size, step), never of the machine."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpo_train.data.packing import pack


def num_steps(num_pairs: int, batch_pairs: int, epochs: int) -> int:
    """Steps that show every pair ``epochs`` times; the last batch may be smaller."""
    return math.ceil(num_pairs * epochs / batch_pairs)


def step_pairs(
    num_pairs: int, batch_pairs: int, step: int, *, epochs: int, seed: int, pair_ids_digest: str
) -> npt.NDArray[np.int64]:
    """Indices of the pairs of one step (counted from 0).

    The epochs' permutations stand one after the other, and a batch is the next ``batch_pairs`` of them: no pair is left
    out where an epoch ends.
    """
    start, stop = step * batch_pairs, min((step + 1) * batch_pairs, num_pairs * epochs)
    first, last = start // num_pairs, (stop - 1) // num_pairs
    order = [_permutation(num_pairs, epoch, seed, pair_ids_digest) for epoch in range(first, last + 1)]
    offset = first * num_pairs
    return np.concatenate(order)[start - offset : stop - offset]


def rank_rows(lengths: Sequence[int], row_tokens: int, world_size: int) -> list[list[list[int]]]:
    """Rows of each rank: packed over the whole batch, then the longest row to the rank with the fewest tokens.

    Returns:
        for each rank its rows of indices into ``lengths``. A rank may get none.
    """
    # Rows no longer than an even share: a batch that fills one row and a bit would leave all ranks but one waiting.
    total = sum(lengths)
    rows_per_rank = max(1, math.ceil(total / (world_size * row_tokens)))
    even_share = math.ceil(total / (world_size * rows_per_rank) * 1.05)
    rows = pack(lengths, min(row_tokens, even_share))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for index in sorted(range(len(rows)), key=lambda r: -sizes[r]):
        rank = load.index(min(load))
        ranks[rank].append(rows[index])
        load[rank] += sizes[index]
    return ranks


@functools.lru_cache(maxsize=2)  # a batch needs one or two epochs' order, and the next batch the same
def _permutation(num_pairs: int, epoch: int, seed: int, pair_ids_digest: str) -> npt.NDArray[np.int64]:
    key = hashlib.sha256(f"{pair_ids_digest}:{seed}:{epoch}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big"))).permutation(num_pairs)
