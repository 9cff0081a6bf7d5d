"""Attention in a packed row in which two answers share one prompt.

T: tokens of a row, P: pairs, K: answers of the longest ranking, two where there is none, H: heads, D: size of a head,
L: tokens of a prompt with one answer. A row is a sequence of pairs; a pair is prompt, chosen, rejected. Each token
carries the index of its pair (-1: padding) and its part. A token sees itself and what stands before it in its pair, but
the rejected answer does not see the chosen one. The further answers of a ranking are parts 3, 4, ... and see no other
answer either. Positions restart after the prompt (model/rows.py), so each answer is computed exactly as if it alone
followed the prompt. A sliding window counts positions, which in a shared row are not places.

The rule stands here three times: as a predicate over two places (dense and block masks are made of it), and as
attention per pair, which does no work that the rule forbids and is what CPUs run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PROMPT, CHOSEN, REJECTED = 0, 1, 2


def visible(
    pair_T: Tensor, part_T: Tensor, positions_T: Tensor, *, window: int | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The rule: whether the query at one place sees the key at another.

    Args:
        pair_T: int [T], index of the pair, -1 for padding.
        part_T: int [T], PROMPT, CHOSEN, REJECTED, or more for further answers.
        positions_T: int [T], position of each token in its own sequence.
        window: a query sees the last so many positions, its own included; None: all of them.

    Returns:
        a function of places of queries and of keys (int, any shapes that broadcast) to bool.
    """

    def sees(query: Tensor, key: Tensor) -> Tensor:
        pair = pair_T[query]
        found = (pair == pair_T[key]) & (pair >= 0) & (query >= key)
        found = found & ((part_T[key] == PROMPT) | (part_T[query] == part_T[key]))
        if window is not None:
            found = found & (positions_T[query] - positions_T[key] < window)
        # Padding sees itself: a softmax over nothing would be NaN.
        return found | (query == key)

    return sees


def shared_prompt_mask(pair_T: Tensor, part_T: Tensor, positions_T: Tensor, *, window: int | None = None) -> Tensor:
    """The rule for every two places.

    Returns:
        bool [1, 1, T, T], indexed [batch, head, query, key], as ``scaled_dot_product_attention`` takes it.
    """
    order_T = torch.arange(len(pair_T), device=pair_T.device)
    return visible(pair_T, part_T, positions_T, window=window)(order_T[:, None], order_T[None, :])[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers that are added to attention scores: 0 where visible, the lowest number elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def pair_attention(
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    lengths: Sequence[Sequence[int]],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention pair by pair: its work and memory are the sum over pairs of their own, whatever the row's length.

    Args:
        query_1HTD: float [1, H, T, D]; keys and values may have fewer heads that divide H (grouped queries).
        lengths: of each pair the tokens of its prompt and of its answers, in the row's order; what remains of the row
            is padding.
        window: as in ``visible``.
        scale: of the scores; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        float [1, H, T, D]; zeros at padding.
    """
    heads, num_tokens = query_1HTD.shape[1:3]
    key_1HTD, value_1HTD = (_repeated(x_1HTD, heads) for x_1HTD in (key_1HTD, value_1HTD))
    # The chosen answer goes with its prompt; every further answer is a run of its own.
    runs = [run for prompt, first, *others in lengths for run in (prompt + first, *(n for n in others if n))]
    padding = num_tokens - sum(runs)
    assert padding >= 0, "the pairs are longer than the row"
    # One split whose backward is one concatenation: slices would each make a gradient of the row's size.
    pieces = [torch.split(x_1HTD, [*runs, padding], dim=2) for x_1HTD in (query_1HTD, key_1HTD, value_1HTD)]
    run = zip(*pieces, strict=True)
    causal = functools.partial(_attend, window=window, scale=scale, softcap=softcap)
    found = []
    for prompt, _, *others in lengths:
        query, key, value = next(run)
        found.append(causal(query, key, value))
        shared = [x_1HLD[:, :, :prompt] for x_1HLD in (key, value)]
        for answer_query, *answer in itertools.islice(run, sum(n > 0 for n in others)):
            key, value = (torch.cat(both, dim=2) for both in zip(shared, answer, strict=True))
            found.append(causal(answer_query, key, value))
    found.append(torch.zeros_like(next(run)[0]))
    return torch.cat(found, dim=2)


def attend(
    query_1HAD: Tensor,
    key_1HLD: Tensor,
    value_1HLD: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention with a soft cap on its scores or without; equally many heads.

    Args:
        mask: bool, or float that is added to the scores; None: all is visible.
    """
    if softcap is None:
        return F.scaled_dot_product_attention(query_1HAD, key_1HLD, value_1HLD, attn_mask=mask, scale=scale)
    scale = query_1HAD.shape[-1] ** -0.5 if scale is None else scale
    scores = softcap * torch.tanh((query_1HAD * scale) @ key_1HLD.transpose(-1, -2) / softcap)
    if mask is not None:
        scores = scores + (additive(mask, scores.dtype) if mask.dtype == torch.bool else mask)
    exact = torch.promote_types(scores.dtype, torch.float32)  # sums over bf16 would lose the tail
    return torch.softmax(scores, dim=-1, dtype=exact).to(value_1HLD.dtype) @ value_1HLD


def _attend(
    query_1HAD: Tensor,
    key_1HLD: Tensor,
    value_1HLD: Tensor,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of the last A of L tokens."""
    num_queries, num_keys = query_1HAD.shape[2], key_1HLD.shape[2]
    if num_queries == num_keys and softcap is None and (window is None or num_keys <= window):
        # The kernel for whole sequences skips what lies above the diagonal.
        return F.scaled_dot_product_attention(query_1HAD, key_1HLD, value_1HLD, is_causal=True, scale=scale)
    place = torch.arange(num_keys, device=query_1HAD.device)
    distance = place[num_keys - num_queries :, None] - place[None, :]
    mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return attend(query_1HAD, key_1HLD, value_1HLD, mask[None, None], scale=scale, softcap=softcap)


def _repeated(x_1HTD: Tensor, heads: int) -> Tensor:
    """Keys or values once for each head that reads them."""
    times = heads // x_1HTD.shape[1]
    return x_1HTD if times == 1 else x_1HTD.repeat_interleave(times, dim=1)
