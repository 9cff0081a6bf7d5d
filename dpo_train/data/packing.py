"""Pairs to rows of at most so many tokens."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: indices of the items of each row.

    Args:
        lengths: tokens of each item.
        row_tokens: most tokens of a row. An item longer than that gets a row of its own.

    Returns:
        rows of indices; every index once. Deterministic: equal lengths stay in order.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        place = next((r for r, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([index])
            room.append(row_tokens - length)
        else:
            rows[place].append(index)
            room[place] -= length
    return rows
