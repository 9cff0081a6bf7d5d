"""Outcomes of all records to the pairs of each split, and every rejection."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.data.pairs import OUTCOME_SCHEMA, SPLITS
from dpo_train.data.select import Limit, decide, hash64, keys, limits_for, split_of

FRACTIONS = {"validation_fraction": 0.2, "heldout_fraction": 0.1}


def _row(line: int, pair_id: str | None = None, reason: str | None = None, **changes: Any) -> dict[str, Any]:
    """A pair of answers "good" and "bad" to a prompt of its own, unless said otherwise."""
    row: dict[str, Any] = dict.fromkeys(OUTCOME_SCHEMA.names)
    row.update(dataset=0, source="a.jsonl", line=line, candidate=0, reason=reason, prompt_hash=hash64(str(pair_id)))
    if reason is None:
        row.update(pair_id=pair_id, split=split_of(str(pair_id), seed=0, **FRACTIONS), chosen="good", rejected="bad")
        row.update(answers_hash=hash64("bad good"))
    return row | changes


def _decide(rows: list[dict[str, Any]], seed: int = 0, limits: list[Limit] | None = None) -> list[dict[str, Any]]:
    """The rows in the order of the data, as they are decided."""
    decided = decide(pa.Table.from_pylist(rows, OUTCOME_SCHEMA), seed=seed, limits=limits or [])
    verdicts = zip(rows, decided.reasons, decided.details, strict=True)
    found = [row | {"reason": reason, "detail": detail} for row, reason, detail in verdicts]
    return [found[index] for index in decided.order]


def _reasons(rows: list[dict[str, Any]], **options: Any) -> dict[tuple[str, int], str | None]:
    return {(row["source"], row["line"]): row["reason"] for row in _decide(rows, **options)}


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
    """Pairs that were there before are used as before, in the same split, when records are appended."""
    rows = [_row(i, f"p{i}") for i in sorted(old)]
    appended = [_row(i, f"p{i}") for i in sorted(new)]
    after = {row["line"]: row for row in _decide(rows + appended)}
    assert all(after[row["line"]] == row for row in _decide(rows))


@given(ids=st.lists(st.none() | st.integers(0, 20), max_size=40), seed=st.integers(0, 3))
def test_nothing_is_lost_and_order_does_not_matter(ids: list[int | None], seed: int) -> None:
    """Every candidate comes out once, no pair is used twice, and shuffled rows give the same table."""
    rows = [_row(i, None, "empty_prompt") if p is None else _row(i, f"p{p}") for i, p in enumerate(ids, 1)]
    found = _decide(rows)
    assert [row["line"] for row in found] == list(range(1, len(rows) + 1))
    used = [row["pair_id"] for row in found if row["reason"] is None]
    assert sorted(used) == sorted({f"p{p}" for p in ids if p is not None})
    Random(seed).shuffle(rows)
    assert _decide(rows) == found


def test_duplicate_names_the_line_that_is_kept() -> None:
    """The first in the order of sources, files and lines stays, also if its block came last."""
    rows = [_row(9, "p", source="b.jsonl"), _row(1, "p", dataset=1), _row(5, "p"), _row(2, "p")]
    found = {(row["dataset"], row["source"], row["line"]): (row["reason"], row["detail"]) for row in _decide(rows)}
    assert found == {
        (0, "a.jsonl", 2): (None, None),
        (0, "a.jsonl", 5): ("duplicate", "of a.jsonl line 2"),
        (0, "b.jsonl", 9): ("duplicate", "of a.jsonl line 2"),
        (1, "a.jsonl", 1): ("duplicate", "of a.jsonl line 2"),
    }


def test_rankings_that_begin_alike_do_not_contradict_each_other() -> None:
    """Equal best and second answers above other thirds, and a pair of the same two: all stay. A pair the other way
    round contradicts the pair alone."""
    third, fourth = ({"content": text, "extra": ""} for text in ("awful", "worse"))
    same = {"prompt_hash": 7, "split": "train"}
    rows = [
        _row(1, "r1", others=[third], answers_hash=None, **same),
        _row(2, "r2", others=[third, fourth], answers_hash=None, **same),
        _row(3, "p1", others=[], **same),
    ]
    assert list(_reasons(rows).values()) == [None, None, None]
    rows.append(_row(4, "p2", chosen="bad", rejected="good", **same))
    assert list(_reasons(rows).values()) == [None, None, "contradiction", "contradiction"]


def test_contradiction_rejects_both_and_says_where_the_other_stands() -> None:
    """A over B and B over A: neither is used. The same answers to another prompt have nothing to do with it."""
    same = {"prompt_hash": 7, "split": "train"}
    rows = [
        _row(1, "p1", **same),
        _row(2, "p2", chosen="bad", rejected="good", **same),
        _row(3, "p1", **same),
        _row(4, "p3", chosen="bad", rejected="good", prompt_hash=8),
        _row(5, "p4", chosen="good", rejected="awful", **(same | {"answers_hash": hash64("awful good")})),
    ]
    found = {row["line"]: (row["reason"], row["detail"]) for row in _decide(rows)}
    assert found == {
        1: ("contradiction", "a.jsonl line 2 prefers the other answer"),
        2: ("contradiction", "a.jsonl line 1 prefers the other answer"),
        3: ("duplicate", "of a.jsonl line 1"),
        4: (None, None),
        5: (None, None),
    }


@pytest.mark.parametrize(
    ("splits", "reasons"),
    [
        (("train", "heldout"), ("prompt_in_heldout", None)),
        (("validation", "train"), (None, "prompt_in_validation")),
        (("validation", "heldout"), ("prompt_in_heldout", None)),
        (("train", "train"), (None, None)),
    ],
)
def test_a_prompt_stands_in_one_split(splits: tuple[str, str], reasons: tuple[str | None, str | None]) -> None:
    """Pairs of one prompt can come into two splits by their groups; what measures keeps it."""
    rows = [_row(i, f"p{i}", prompt_hash=1, answers_hash=i, split=split) for i, split in enumerate(splits)]
    assert tuple(_reasons(rows).values()) == reasons


def test_equal_pairs_in_two_splits_stay_in_the_one_that_measures() -> None:
    """A pair of a training source that a held-out source holds as well is held out, whichever comes first."""
    for first, second in (("train", "heldout"), ("heldout", "train")):
        rows = [_row(1, "p", dataset=0, split=first), _row(1, "p", dataset=1, split=second)]
        assert {row["split"]: row["reason"] for row in _decide(rows)} == {"heldout": None, "train": "prompt_in_heldout"}


def test_limit_is_a_seeded_choice_and_counted() -> None:
    """Of the training pairs the 10 of lowest key stay; another seed takes others; the rest say why."""
    rows = [_row(i, f"p{i}") for i in range(100)]
    train = [row["pair_id"] for row in rows if row["split"] == "train"]
    chosen = {}
    for seed in (0, 1):
        limits = limits_for({("train", 0): keys(train, seed)}, {"train": 10}, [None])
        found = _decide(rows, seed=seed, limits=limits)
        chosen[seed] = [row["pair_id"] for row in found if row["reason"] is None and row["split"] == "train"]
        assert len(chosen[seed]) == 10
        rest = [(row["reason"], row["detail"]) for row in found if row["reason"] is not None]
        assert set(rest) == {("over_limit", "train is limited to 10 pairs")}
        assert len(rest) == len(train) - 10
    assert chosen[0] != chosen[1] != train[:10]


def test_limit_beyond_what_there_is_rejects_nothing() -> None:
    """Nor does an empty split."""
    assert limits_for({("train", 0): keys(["a", "b"], 0)}, {"train": 2, "heldout": 5}, [None]) == []


@pytest.mark.parametrize(
    ("sizes", "weights", "limit", "kept"),
    [
        ((100, 100), (1.0, 1.0), None, (100, 100)),
        ((100, 100), (3.0, 1.0), None, (100, 33)),
        ((100, 40), (1.0, 1.0), None, (40, 40)),
        ((100, 40), (0.9, 0.1), None, (100, 11)),
        ((100, 100), (3.0, 1.0), 40, (30, 10)),
        ((100, 100, 0), (1.0, 1.0, 5.0), 10, (5, 5, 0)),
        ((100, 100), (1.0, 1.0), 1, (1, 0)),
        ((100, 100, 100), (1.0, 1.0, 1.0), 8, (3, 3, 2)),
    ],
)
def test_weights_give_the_largest_mixture_without_repeats(
    sizes: tuple[int, ...], weights: tuple[float, ...], limit: int | None, kept: tuple[int, ...]
) -> None:
    """100 and 100 pairs at 3 to 1 are 100 and 33; at most 40 of them are 30 and 10. An empty source does not count."""
    rows = [
        _row(line, f"{dataset}-{line}", dataset=dataset, split="train")
        for dataset, size in enumerate(sizes)
        for line in range(size)
    ]
    found = {
        ("train", dataset): keys([row["pair_id"] for row in rows if row["dataset"] == dataset], 0)
        for dataset in range(len(sizes))
    }
    decided = _decide(rows, limits=limits_for(found, {"train": limit}, weights))
    used = [sum(row["dataset"] == d and row["reason"] is None for row in decided) for d in range(len(sizes))]
    assert tuple(used) == kept
    assert {row["reason"] for row in decided} <= {None, "over_weight"}


def test_weights_leave_validation_and_heldout_alone() -> None:
    """They mix what is trained on; what measures stays whole."""
    found = {("train", 0): keys(["a", "b"], 0), ("train", 1): keys(["c"], 0), ("heldout", 1): keys(["d", "e"], 0)}
    assert {limit.split for limit in limits_for(found, {}, [1.0, 1.0])} == {"train"}


def test_every_split_is_asked_for_its_limit() -> None:
    """One limit each where more pairs are there than may stay."""
    found = {(split, 0): keys(["a", "b", "c"], 0) for split in SPLITS}
    limits = limits_for(found, dict.fromkeys(SPLITS, 1), [None])
    assert [(limit.split, limit.highest_key) for limit in limits] == [
        (split, int(min(keys(["a", "b", "c"], 0)))) for split in SPLITS
    ]
