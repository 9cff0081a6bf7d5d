"""Ranked and scored answers as one group: a strict order, and a rejection for each answer without a place in it."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_train.config import SourceConfig
from dpo_train.data.formats import candidates
from dpo_train.data.pairs import PreferencePair
from tests.unit.data.records import fixture_records

RANKING = SourceConfig(path="data", pairing="ranking")


def read(record: dict[str, Any], format: str = "ranking", **changes: Any) -> list[Any]:
    """A group as its answers from the best to the worst and its strength, a rejection as (reason, detail)."""
    source = SourceConfig(**{"path": "data", "pairing": "ranking", **changes})
    return [
        ([answer.content for answer in outcome.answers], outcome.strength)
        if isinstance(outcome, PreferencePair)
        else (outcome.reason, outcome.detail)
        for outcome in candidates(record, source, format)
    ]


def scored(*scores: float, **fields: Any) -> dict[str, Any]:
    """Answers a, b, c, ... with these scores."""
    return {"prompt": "q", "answers": list("abcdefgh")[: len(scores)], "scores": list(scores), **fields}


def test_nectar_becomes_one_ranking_a_record() -> None:
    """Ranks 1, 3, 2 in their order; an empty answer is a rejection beside the group; one answer is too few."""
    records = fixture_records("nectar")
    assert read(records[0]) == [(["An oak.", "A fir tree.", "A rose."], 1.0)]
    assert read(records[1]) == [(["Granite.", "Butter."], 2.0), ("empty_answer", "answer 2 of 3")]
    assert [reason for reason, _ in read(records[2])] == ["too_few_answers"]


def test_ultrafeedback_leaves_out_all_but_the_first_of_equal_scores() -> None:
    """Scores 4, 8.5, 1, 8.5: three places, and one rejection for the answer without one."""
    record = fixture_records("ultrafeedback")[0]
    (group, strength), tie = read(record, "ultrafeedback")
    answers = [completion["response"] for completion in record["completions"]]
    assert (group, strength) == ([answers[1], answers[0], answers[2]], 4.5)
    assert tie == ("tie", "an answer that stays has the same rank or score")


@pytest.mark.parametrize(
    ("record", "changes", "outcomes"),
    [
        (scored(1, 5, 1, 5, 3, 1), {}, [(["b", "e", "a"], 2.0), *["tie"] * 3]),
        (scored(2, 2, 2), {}, ["tie"]),
        (scored(4, 3, 2.5, 1), {"min_strength": 1.0}, [(["a", "b", "d"], 1.0), "below_min_strength"]),
        (scored(4, 3.5, 3.2), {"min_strength": 1.0}, ["below_min_strength"]),
        (scored(4, 3, gap=7), {"min_strength": 5.0, "fields": {"strength": "gap"}}, [(["a", "b"], 7.0)]),
        (scored(3, 2, 1) | {"answers": ["a", "b", "a"]}, {}, [(["a", "b"], 1.0), "identical_answers"]),
        (scored(3, 2) | {"answers": ["a", "a"]}, {}, ["identical_answers"]),
        (scored(3, 2, 1) | {"answers": ["a", "\ud800", "c"]}, {}, [(["a", "c"], 2.0), "undecodable"]),
        (scored(3, 2) | {"prompt": "\ud800"}, {}, ["undecodable"]),
        (scored(3, 2, 1), {}, [(["a", "b", "c"], 1.0)]),
    ],
)
def test_answers_without_a_place_are_told(record: dict[str, Any], changes: dict[str, Any], outcomes: list[Any]) -> None:
    """Equal, too near to the one before, said twice or not storable; a record that gives no group is one rejection."""
    found = read(record, **changes)
    assert [item if isinstance(item[0], list) else item[0] for item in found] == outcomes


def test_formats_of_two_answers_do_not_change() -> None:
    """A pair is a ranking of two."""
    record = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert read(record, "pairs") == [(["a", "b"], None)]
