"""Outcomes of all records to the pairs of each split, and every rejection."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.data.pairs import OUTCOME_SCHEMA, PAIR_SCHEMA, SPLITS
from dpo_train.data.select import counts, select_pairs, split_of

FRACTIONS = {"validation_fraction": 0.2, "heldout_fraction": 0.1}
NO_LIMITS: dict[str, int | None] = {}


def _row(line: int, pair_id: str | None, reason: str | None = None, source: str = "a.jsonl") -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(OUTCOME_SCHEMA.names)
    row.update(source=source, line=line, reason=reason)
    if reason is None:
        split = split_of(str(pair_id), seed=0, **FRACTIONS)
        row.update(pair_id=pair_id, group=pair_id, split=split, truncated_answers=line % 3)
    return row


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, OUTCOME_SCHEMA)


def _used(by_split: dict[str, pa.Table]) -> dict[str, list[str]]:
    return {split: table["pair_id"].to_pylist() for split, table in by_split.items()}


def test_split_shares_are_what_was_asked() -> None:
    """Of 10,000 groups 2,000 +- 160 go to validation and 1,000 +- 120 to held-out: four standard deviations."""
    shares = Counter(split_of(f"g{i}", seed=0, **FRACTIONS) for i in range(10_000))
    assert shares["validation"] == pytest.approx(2000, abs=160)
    assert shares["heldout"] == pytest.approx(1000, abs=120)
    assert sum(shares.values()) == 10_000


def test_split_is_pinned_and_hangs_on_the_seed() -> None:
    """A held-out pair of today must not be trained on after an upgrade: these may never change."""
    splits = [split_of(f"g{i}", seed=0, **FRACTIONS) for i in range(8)]
    assert splits == ["validation", "train", "train", "train", "validation", "heldout", "train", "train"]
    assert [split_of(f"g{i}", seed=1, **FRACTIONS) for i in range(8)] != splits


def test_no_fraction_means_an_empty_split() -> None:
    """At zero nothing goes there, whatever the hash."""
    found = {split_of(f"g{i}", seed=0, validation_fraction=0.0, heldout_fraction=0.0) for i in range(500)}
    assert found == {"train"}


@given(old=st.sets(st.integers(0, 999), max_size=30), new=st.sets(st.integers(1000, 1999), max_size=30))
def test_appended_data_moves_nothing(old: set[int], new: set[int]) -> None:
    """Pairs that were there before keep their split when records are appended."""
    rows = [_row(i, f"p{i}") for i in sorted(old)]
    before, _ = select_pairs(_table(rows), seed=0, limits=NO_LIMITS)
    after, _ = select_pairs(_table(rows + [_row(i, f"p{i}") for i in sorted(new)]), seed=0, limits=NO_LIMITS)
    for split in SPLITS:
        assert set(_used(before)[split]) <= set(_used(after)[split])


@given(
    ids=st.lists(st.none() | st.integers(0, 20), max_size=40),
    limits=st.fixed_dictionaries(dict.fromkeys(SPLITS, st.none() | st.integers(1, 5))),
    seed=st.integers(0, 3),
)
def test_records_are_used_or_rejected_and_order_does_not_matter(
    ids: list[int | None], limits: dict[str, int | None], seed: int
) -> None:
    """records = used + rejected, limits hold, no pair twice, and shuffled blocks give the same tables."""
    rows = [_row(i, None, "empty_prompt") if p is None else _row(i, f"p{p}") for i, p in enumerate(ids, 1)]
    by_split, rejections = select_pairs(_table(rows), seed=seed, limits=limits)
    found = counts(by_split, rejections)
    assert found["records"] == len(rows) == found["used"] + found["rejected"]
    assert found["used"] == sum(found[f"pairs/{split}"] for split in SPLITS)
    assert found["rejected"] == sum(number for name, number in found.items() if name.startswith("rejected/"))
    used_lines = [line for table in by_split.values() for line in table["line"].to_pylist()]
    assert sorted(used_lines + rejections["line"].to_pylist()) == list(range(1, len(rows) + 1))
    used_ids = [pair_id for pair_ids in _used(by_split).values() for pair_id in pair_ids]
    assert len(used_ids) == len(set(used_ids))
    for split, limit in limits.items():
        assert limit is None or len(by_split[split]) <= limit
    Random(seed).shuffle(rows)
    again, rejections_again = select_pairs(_table(rows), seed=seed, limits=limits)
    assert all(again[split].equals(by_split[split]) for split in SPLITS)
    assert rejections_again.equals(rejections)


def test_duplicate_names_the_line_that_is_kept() -> None:
    """The first in the order of files and lines stays, also if its block came last."""
    rows = [_row(9, "p", source="b.jsonl"), _row(5, "p"), _row(2, "p")]
    by_split, rejections = select_pairs(_table(rows), seed=0, limits=NO_LIMITS)
    assert sum(len(table) for table in by_split.values()) == 1
    assert rejections.to_pylist() == [
        {"source": "a.jsonl", "line": 5, "reason": "duplicate", "detail": "of a.jsonl line 2"},
        {"source": "b.jsonl", "line": 9, "reason": "duplicate", "detail": "of a.jsonl line 2"},
    ]


def test_limit_is_a_seeded_choice_and_counted() -> None:
    """Of 50 training pairs 10 stay; another seed takes others; the rest are rejections with their reason."""
    rows = [_row(i, f"p{i}") for i in range(100)]
    limits = {"train": 10, "validation": None, "heldout": None}
    everything, _ = select_pairs(_table(rows), seed=0, limits=NO_LIMITS)
    by_split, rejections = select_pairs(_table(rows), seed=0, limits=limits)
    chosen = _used(by_split)["train"]
    assert len(chosen) == 10
    assert set(chosen) < set(_used(everything)["train"])
    assert chosen != sorted(_used(everything)["train"])[:10]
    assert chosen != _used(select_pairs(_table(rows), seed=1, limits=limits)[0])["train"]
    assert set(rejections["reason"].to_pylist()) == {"over_limit"}
    assert set(rejections["detail"].to_pylist()) == {"train is limited to 10 pairs"}
    assert _used(by_split)["heldout"] == _used(everything)["heldout"]


def test_counts_are_worked_by_hand() -> None:
    """Two pairs (1 + 2 answers cut), one duplicate, two broken records."""
    rows = [_row(1, "p1"), _row(2, "p2"), _row(3, "p1"), _row(4, None, "empty_answer"), _row(5, None, "empty_answer")]
    by_split, rejections = select_pairs(_table(rows), seed=0, limits=NO_LIMITS)
    found = counts(by_split, rejections)
    assert (found["records"], found["used"], found["rejected"]) == (5, 2, 3)
    assert (found["rejected/duplicate"], found["rejected/empty_answer"]) == (1, 2)
    assert found["truncated_answers"] == 3


def test_tables_have_the_layout_of_pairs_and_the_order_of_ids() -> None:
    """So that an output's bytes do not depend on the order of the input."""
    by_split, _ = select_pairs(_table([_row(i, f"p{9 - i}") for i in range(9)]), seed=0, limits=NO_LIMITS)
    for table in by_split.values():
        assert table.schema.equals(PAIR_SCHEMA)
        assert table["pair_id"].to_pylist() == sorted(table["pair_id"].to_pylist())
