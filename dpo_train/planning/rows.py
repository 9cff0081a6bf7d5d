"""The fullest row that a rank will meet, as the engine packs pairs (data/batches.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpo_train.data.batches import rank_rows
from dpo_train.data.pairs import TokenPair
from dpo_train.model.rows import Row, build_row
from dpo_train.planning.workload import Workload


@dataclass(frozen=True, kw_only=True)
class FullRow:
    """One row, and how many a rank does in a step."""

    tokens: int
    lengths: tuple[tuple[int, int, int], ...]
    """Tokens of prompt, chosen and rejected of each pair."""
    per_step: int

    def build(self) -> Row:
        """Of zeros."""
        zeros = np.zeros(max(map(max, self.lengths)), np.int32)
        pairs = [
            TokenPair(str(number), zeros[:prompt], zeros[:chosen], zeros[:rejected])
            for number, (prompt, chosen, rejected) in enumerate(self.lengths)
        ]
        return build_row(pairs)


def fullest_row(
    workload: Workload, row_tokens: int, *, pairs: int | None, num_shares: int = 1, padded: bool = False
) -> FullRow:
    """The row.

    Args:
        workload: lengths of pairs; where they are all alike, rows are no longer than so many of them.
        row_tokens: as configured.
        pairs: of a step, over all shares; None: as many as there are (scoring).
        num_shares: what a step's pairs are divided among.
        padded: rows are filled up to ``row_tokens``, for compiled layers.
    """
    prompt, answer = max(1, round(workload.prompt_tokens)), max(1, round(workload.answer_tokens))
    pair = prompt + 2 * answer
    if pairs is None:
        per_step, tokens = 2, max(pair, row_tokens // pair * pair)
    else:
        ranks = rank_rows([pair] * pairs, row_tokens, num_shares)
        per_step, tokens = max(map(len, ranks)), pair * max(len(row) for rows in ranks for row in rows)
    if not workload.is_even and per_step > 1:
        tokens = max(tokens, row_tokens)
    if padded:
        tokens = -(-tokens // row_tokens) * row_tokens
    tokens = max(tokens, workload.longest_pair or 0)
    return FullRow(tokens=tokens, lengths=tuple(_filled(tokens, prompt, answer)), per_step=per_step)


def prompts_row(prompt_tokens: int, count: int) -> FullRow:
    """Prompts side by side, as generation begins with them; an answer token each, for a row must have some."""
    lengths = ((max(1, prompt_tokens), 1, 1),) * count
    return FullRow(tokens=sum(map(sum, lengths)), lengths=lengths, per_step=1)


def _filled(tokens: int, prompt: int, answer: int) -> list[tuple[int, int, int]]:
    """Pairs of these lengths, and one of about their proportions that fills the row."""
    pair = prompt + 2 * answer
    found, left = [(prompt, answer, answer)] * (tokens // pair), tokens % pair
    if left > 2:
        part = max(1, min(left * answer // pair, (left - 1) // 2))
        found.append((left - 2 * part, part, part))
    elif left:
        found[-1] = (prompt + left, answer, answer)
    return found
