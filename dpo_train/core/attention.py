"""The attention mask of a packed row in which two answers share one prompt.

T: tokens of a row. A row is a sequence of pairs; a pair is prompt, chosen, rejected. Each token carries the index of
its pair (-1: padding) and its part. A token sees itself and what stands before it in its pair, but the rejected answer
does not see the chosen one. The further answers of a ranking are parts 3, 4, ... and see no other answer either.
Positions restart after the prompt (model/score.py), so each answer is computed exactly as if it alone followed the
prompt. A sliding window counts positions, which in a shared row are not places.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROMPT, CHOSEN, REJECTED = 0, 1, 2


def shared_prompt_mask(
    pair_T: Tensor, part_T: Tensor, positions_T: Tensor | None = None, *, window: int | None = None
) -> Tensor:
    """Which key each query may see.

    Args:
        pair_T: int [T], index of the pair, -1 for padding.
        part_T: int [T], PROMPT, CHOSEN, REJECTED, or more for further answers.
        positions_T: int [T], position of each token in its own sequence; needed with a window.
        window: a query sees the last so many positions, its own included; None: all of them.

    Returns:
        bool [1, 1, T, T], indexed [batch, head, query, key], as ``scaled_dot_product_attention`` takes it.
    """
    order_T = torch.arange(len(pair_T), device=pair_T.device)
    same_pair_TT = (pair_T[:, None] == pair_T[None, :]) & (pair_T[None, :] >= 0)
    causal_TT = order_T[:, None] >= order_T[None, :]
    visible_part_TT = (part_T[None, :] == PROMPT) | (part_T[:, None] == part_T[None, :])
    visible_TT = same_pair_TT & causal_TT & visible_part_TT
    if window is not None:
        assert positions_T is not None
        visible_TT &= positions_T[:, None] - positions_T[None, :] < window
    # Padding sees itself: a softmax over nothing would be NaN.
    itself_TT = torch.eye(len(pair_T), dtype=torch.bool, device=pair_T.device)
    return (visible_TT | itself_TT)[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers that are added to attention scores: 0 where visible, the lowest number elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)
