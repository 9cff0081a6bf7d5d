"""Pairs to rows of at most so many tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.data.packing import pack

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@pytest.mark.parametrize(
    ("lengths", "row_tokens", "rows"),
    [
        ([5, 3, 4, 2], 7, [[0, 3], [2, 1]]),  # 5 + 2, 4 + 3
        ([2, 2, 2], 4, [[0, 1], [2]]),  # equal lengths stay in order
        ([3, 9, 3], 6, [[1], [0, 2]]),  # 9 is longer than a row and gets its own
        ([], 6, []),
    ],
)
def test_longest_first_into_the_first_row_with_room(lengths: list[int], row_tokens: int, rows: list[list[int]]) -> None:
    """First-fit decreasing, worked by hand."""
    assert pack(lengths, row_tokens) == rows


@given(lengths=LENGTHS, row_tokens=st.integers(1, 60))
def test_every_item_stands_in_exactly_one_row(lengths: list[int], row_tokens: int) -> None:
    """A partition of the indices, without empty rows."""
    rows = pack(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(rows)


@given(lengths=LENGTHS, row_tokens=st.integers(1, 60))
def test_no_row_is_longer_than_the_limit_unless_one_item_is(lengths: list[int], row_tokens: int) -> None:
    """Only a single item may exceed the limit."""
    for row in pack(lengths, row_tokens):
        assert len(row) == 1 or sum(lengths[i] for i in row) <= row_tokens


@given(lengths=LENGTHS, row_tokens=st.integers(1, 60))
def test_no_two_rows_could_be_one(lengths: list[int], row_tokens: int) -> None:
    """First fit wastes little: any two rows together exceed the limit."""
    sizes = sorted(sum(lengths[i] for i in row) for row in pack(lengths, row_tokens))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > row_tokens
