"""Statistics of candidate pairs: exact counts, the same whichever way the parts are added up."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from typing import Any

import pyarrow as pa
import pytest

from dpo_train.data import profile as module
from dpo_train.data.pairs import OUTCOME_SCHEMA
from dpo_train.data.profile import EXCERPT_CHARS, KEPT, UNKNOWN_SOURCE, Profile, excerpt, merge, profile


def kept(line: int, lengths: tuple[int, int, int] = (5, 3, 2), **fields: Any) -> dict[str, Any]:
    """A row of OUTCOME_SCHEMA that is a pair, each with a prompt of its own."""
    ids = {f"{part}_ids": [1] * n for part, n in zip(("prompt", "chosen", "rejected"), lengths, strict=True)}
    return {
        "pair_id": f"{line:016x}",
        "split": "train",
        "prompt": [{"role": "user", "content": "Why?", "extra": ""}],
        "chosen": "Because.",
        "rejected": "No.",
        "dataset": 0,
        "source": "a.jsonl",
        "line": line,
        "candidate": 0,
        "prompt_hash": line,
        **dict.fromkeys(("truncated_prompt", "truncated_chosen", "truncated_rejected"), False),
        **ids,
        **fields,
    }


def rejected(line: int, reason: str = "empty_answer", **fields: Any) -> dict[str, Any]:
    """A row of OUTCOME_SCHEMA that is a rejection, as of a record that could not be read."""
    place = {"dataset": 0, "source": "a.jsonl", "line": line, "candidate": 0}
    return {**place, "reason": reason, "detail": "chosen", **fields}


def profile_of(rows: list[dict[str, Any]], **settings: Any) -> Profile:
    """The profile of rows of OUTCOME_SCHEMA."""
    chosen = {"sources": ("a", "b"), "examples": 3, "redact": False, "seed": 0, **settings}
    return profile(pa.Table.from_pylist(rows, schema=OUTCOME_SCHEMA), **chosen)


ROWS = [
    kept(1, (5, 3, 2), origin="blog", strength=1.0),
    kept(2, (5, 1, 4), split="heldout", origin="blog", strength=2.5, agreement=0.75),
    kept(3, (7, 2, 2), candidate=0, truncated_prompt=True, truncated_chosen=True),
    kept(3, (7, 2, 1), candidate=1, truncated_chosen=True),
    rejected(3, "tie", candidate=2),
    rejected(4, "tie", candidate=0),
    rejected(4, "empty_answer", candidate=1),
    rejected(9, "undecodable", dataset=1, source="b.csv", origin="blog"),
    kept(8, (4, 4, 4), dataset=1, source="b.csv", split="validation"),
]


def test_records_and_pairs_add_up() -> None:
    """Record 3 is used though one of its three pairs is a tie; record 4 is not, with both of its pairs rejected."""
    found = profile_of(ROWS)

    assert found.records == {0: 4, 1: 2}
    assert found.used == {0: 3, 1: 1}
    assert found.cells == {
        (0, KEPT, "heldout"): 1,
        (0, KEPT, "train"): 3,
        (0, "empty_answer", ""): 1,
        (0, "tie", ""): 2,
        (1, KEPT, "validation"): 1,
        (1, "undecodable", ""): 1,
    }
    assert found.origins == {"": (3, 3), "blog": (2, 1)}
    assert (found.prompts, found.max_pairs_of_prompt) == (4, 2)
    assert found.truncated == {"prompt": 1, "chosen": 2, "rejected": 0, "any": 2}


def test_lengths_are_exact_histograms_of_kept_pairs() -> None:
    """By hand from ROWS: five kept pairs, three of them in the training split."""
    lengths = profile_of(ROWS).lengths

    assert lengths["prompt"] == {4: 1, 5: 2, 7: 2}
    assert lengths["pair"] == {10: 3, 11: 1, 12: 1}
    assert lengths["difference"] == {-3: 1, 0: 2, 1: 2}
    assert lengths["train_pair"] == {10: 2, 11: 1}
    assert lengths["train_prompt"] == {5: 1, 7: 2}


def test_strengths_are_counted_to_three_digits_and_unknown_ones_left_out() -> None:
    """float32 holds 0.1 as 0.100000001; it is shown as it was given. NaN is no known strength."""
    rows = [kept(i, strength=value) for i, value in enumerate([0.1, 0.1, 3.0, 1234.4, float("nan"), None, 0.0])]

    assert profile_of(rows).strength == {0.0: 1, 0.1: 2, 3.0: 1, 1230.0: 1}
    assert profile_of(rows).agreement == {}


def test_a_row_of_unknown_source_or_candidate_still_counts() -> None:
    """Nulls are a record each, under a place of their own."""
    found = profile_of([{"reason": "undecodable"}, {"reason": "undecodable"}])

    assert found.records == {UNKNOWN_SOURCE: 2}
    assert found.used == {}
    assert found.cells == {(UNKNOWN_SOURCE, "undecodable", ""): 2}


def many(n: int) -> list[dict[str, Any]]:
    """Seeded rows of every kind."""
    chance = random.Random(0)
    return [
        kept(
            i,
            (chance.randint(1, 9), chance.randint(1, 9), chance.randint(1, 9)),
            dataset=chance.randint(0, 1),
            origin=chance.choice(["blog", "news", ""]),
            strength=chance.choice([None, 0.5, 2.0]),
            split=chance.choice(["train", "validation", "heldout"]),
            truncated_rejected=chance.random() < 0.2,
        )
        if chance.random() < 0.7
        else rejected(i, chance.choice(["tie", "duplicate"]), dataset=chance.randint(0, 1))
        for i in range(n)
    ]


def test_parts_give_the_whole_in_any_order() -> None:
    """Commutative and associative, examples and all: four parts in 24 orders, from the left and in two halves."""
    rows = many(200)
    whole = profile_of(rows)
    parts = [profile_of(rows[start : start + 50]) for start in range(0, 200, 50)]

    for order in itertools.permutations(parts):
        assert functools.reduce(merge, order) == whole
        assert merge(merge(*order[:2]), merge(*order[2:])) == whole


def test_an_empty_part_changes_nothing() -> None:
    """A worker may get no rows at all."""
    whole, empty = profile_of(ROWS), profile_of([])

    assert merge(whole, empty) == merge(empty, whole) == whole
    assert merge(empty, empty) == empty


def test_profiles_of_different_settings_are_not_merged() -> None:
    """Their places mean different sources."""
    with pytest.raises(ValueError, match="different settings"):
        merge(profile_of(ROWS), profile_of(ROWS, sources=("b", "a")))


def test_json_brings_back_the_same_profile() -> None:
    """Keys that are numbers or tuples survive, and so do texts of any kind."""
    rows = [*ROWS, kept(20, prompt=[{"role": "user", "content": '\u202e\x00 "', "extra": ""}], origin="\U0001f600")]
    found = profile_of(rows)

    assert Profile.from_json(found.to_json()) == found
    assert Profile.from_json(profile_of([]).to_json()) == profile_of([])


def test_examples_are_few_of_each_reason_and_source() -> None:
    """At most two each, the same whichever order the rows come in, others with another seed."""
    rows = many(300)
    found = profile_of(rows, examples=2).examples
    kinds = [(item.dataset, item.reason) for item in found]

    assert {kinds.count(kind) for kind in kinds} == {2}
    assert set(kinds) == set(itertools.product((0, 1), (KEPT, "tie", "duplicate")))
    assert profile_of(rows[::-1], examples=2).examples == found
    assert profile_of(rows, examples=2, seed=1).examples != found
    assert profile_of(rows, examples=0).examples == ()


def test_an_example_says_where_it_stands_and_what_it_holds() -> None:
    """Turns with their roles, tool calls of an answer that has no text, lengths where there are any."""
    call = '{"tool_calls":[{"name":"look"}]}'
    row = kept(7, (5, 3, 2), candidate=1, chosen="", chosen_extra=call, prompt=[
        {"role": "system", "content": "Be kind.", "extra": ""}, {"role": "user", "content": "Why?", "extra": ""},
    ])  # fmt: skip

    example, refused = profile_of([row, rejected(8, detail="no chosen")]).examples

    assert (example.source, example.line, example.candidate) == ("a.jsonl", 7, 1)
    assert example.prompt == "system: Be kind.\nuser: Why?"
    assert (example.chosen, example.rejected) == (call, "No.")
    assert example.tokens == (5, 3, 2)
    assert (refused.detail, refused.prompt, refused.tokens) == ("no chosen", "", None)


def test_excerpts_keep_start_and_end_within_the_limit() -> None:
    """300 characters stay as they are; of 301 the middle goes."""
    assert excerpt("x" * EXCERPT_CHARS) == "x" * EXCERPT_CHARS
    cut = excerpt("a" * 200 + "b" * 1000 + "c" * 98)
    assert len(cut) == EXCERPT_CHARS
    assert cut == "a" * 199 + " … " + "c" * 98


def test_origins_without_end_stay_bounded_and_add_up_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit the same origins stay, with exact counts, however the parts are merged."""
    monkeypatch.setattr(module, "MAX_ORIGINS", 5)
    rows = [kept(i, origin=f"site {i % 20}") for i in range(100)]
    whole = profile_of(rows)
    parts = [profile_of(rows[start : start + 10]) for start in range(0, 100, 10)]

    assert len(whole.origins) == 5
    assert set(whole.origins.values()) == {(5, 0)}
    assert functools.reduce(merge, parts).origins == functools.reduce(merge, parts[::-1]).origins == whole.origins


def test_an_endless_origin_is_cut() -> None:
    """A name is a name, not a document."""
    assert list(profile_of([kept(1, origin="x" * 10_000)]).origins) == ["x" * module.NAME_CHARS]


def test_size_does_not_grow_with_the_rows() -> None:
    """Ten times the rows of the same kinds are hardly more JSON: counts have one digit more, examples stay as few."""
    rows = many(300)
    tenfold = [dict(row, line=row["line"] + 1000 * k) for k in range(10) for row in rows]

    assert len(profile_of(tenfold).to_json()) < 1.1 * len(profile_of(rows).to_json())


SECRET = "sesame-4711"


def secret_rows() -> list[dict[str, Any]]:
    """A pair and rejections with a secret in every field of text that comes from a record."""
    texts = {
        **dict.fromkeys(("group", "tools", "origin", "chosen", "rejected", "chosen_extra", "rejected_extra"), SECRET),
        "prompt": [{"role": SECRET, "content": SECRET, "extra": SECRET}],
        "detail": SECRET,
    }
    return [kept(1, **texts), rejected(2, **texts), rejected(3, "tie", **{**texts, "origin": f"{SECRET} too"})]


def test_redacted_profile_holds_no_text_of_a_record() -> None:
    """Reasons, places and lengths stay; origins are told apart without their names."""
    assert SECRET in profile_of(secret_rows()).to_json()

    found = profile_of(secret_rows(), redact=True)

    assert SECRET not in found.to_json()
    assert sorted(found.origins.values()) == [(0, 1), (1, 1)]
    assert found.examples[0].tokens == (5, 3, 2)
    assert [item.reason for item in found.examples] == [KEPT, "empty_answer", "tie"]
    plain = profile_of(secret_rows())
    same = {item.name for item in dataclasses.fields(Profile)} - {"redact", "origins", "examples"}
    assert all(getattr(found, name) == getattr(plain, name) for name in same)


def test_chunked_tables_are_read_like_whole_ones() -> None:
    """Tables that come from several files have several chunks, some of them empty."""
    tables = [pa.Table.from_pylist(ROWS[a:b], schema=OUTCOME_SCHEMA) for a, b in ((0, 3), (3, 3), (3, 9))]
    chunked = profile(pa.concat_tables(tables), sources=("a", "b"), examples=3, redact=False, seed=0)

    assert chunked == profile_of(ROWS)
