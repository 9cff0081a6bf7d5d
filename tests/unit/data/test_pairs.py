"""Record types and their layout on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.data.pairs import PAIR_SCHEMA, SCORED_SCHEMA, Message, PreferencePair, token_pairs

CHOSEN, REJECTED = Message("assistant", "c"), Message("assistant", "d")
PAIR = PreferencePair((Message("user", "ab"),), CHOSEN, REJECTED, group="g")


def test_pair_id_is_the_content_alone() -> None:
    """The same pair has the same id in any group, file or process (the literal pins it across versions)."""
    assert PAIR.pair_id == replace(PAIR, group="other").pair_id == "687cffb323bf336a"
    assert PAIR.pair_id == replace(PAIR, strength=1.0, agreement=0.5, origin="web").pair_id


@pytest.mark.parametrize(
    "other",
    [
        replace(PAIR, chosen=REJECTED, rejected=CHOSEN),
        replace(PAIR, chosen=Message("assistant", "c ")),
        replace(PAIR, chosen=Message("assistant", "c", '{"tool_calls": []}')),
        replace(PAIR, tools="[]"),
        replace(PAIR, prompt=(Message("system", "ab"),)),
        replace(PAIR, prompt=(Message("user", "ab", '{"name": "x"}'),)),
        replace(PAIR, prompt=(Message("user", "a"), Message("user", "b"))),
        replace(PAIR, prompt=(Message("user", "a"),), chosen=Message("assistant", "bc")),
    ],
)
def test_other_content_has_another_id(other: PreferencePair) -> None:
    """Swapped answers, a blank, another role, tool calls, tools, and text moved across a border."""
    assert other.pair_id != PAIR.pair_id


def test_id_of_a_ranking_is_that_of_all_its_answers_in_order() -> None:
    """None of these is another: a pair, three rankings over the same answers, tools, an answer with tool calls."""
    a, b = Message("assistant", "a"), Message("assistant", "b")
    rankings = [
        PAIR,
        replace(PAIR, others=(a,)),
        replace(PAIR, others=(a, b)),
        replace(PAIR, others=(b, a)),
        replace(PAIR, others=(a,), tools="[]"),
        replace(PAIR, others=(replace(a, extra="{}"),)),
    ]
    assert len({pair.pair_id for pair in rankings}) == len(rankings)
    assert rankings[2].answers == (CHOSEN, REJECTED, a, b)


def _rankings() -> pa.Table:
    """Rows of 2, 4 and 3 answers, then a null as an unmigrated pair has."""
    others = [[], [[7], [8, 9]], [[1, 2, 3]], None]
    rows = _table(4, scored=True).to_pylist()
    for row, ids in zip(rows, others, strict=True):
        row["other_ids"] = ids
        row["reference_other_logps"] = ids and [[-float(i) for i in answer] for answer in ids]
    return pa.Table.from_pylist(rows, SCORED_SCHEMA)


@pytest.mark.parametrize("start", range(4))
def test_further_answers_read_back_whatever_the_slice(start: int) -> None:
    """Lists in lists have two runs of offsets; a slice moves into both, and chunks begin anew."""
    table = _rankings()
    wanted = [[], [[7], [8, 9]], [[1, 2, 3]], []]
    for found in (
        token_pairs(table.slice(start)),
        token_pairs(pa.concat_tables([table, table]).slice(start, 4))[: 4 - start],
        [token_pairs(table.slice(i, 1))[0] for i in range(start, 4)],
    ):
        assert [[ids.tolist() for ids in pair.other_ids] for pair in found] == wanted[start:]
        assert [[(-logps).tolist() for logps in pair.reference_other_logps] for pair in found] == wanted[start:]
    assert [pair.num_tokens for pair in token_pairs(table)] == [6, 6 + 3, 6 + 3, 6]


def _table(count: int, *, scored: bool) -> pa.Table:
    rows = [
        {
            "pair_id": f"p{i}",
            "prompt_ids": [i],
            "chosen_ids": list(range(i, i + 2)),
            "rejected_ids": list(range(i, i + 3)),
            "reference_chosen_logps": [-0.5 * i, -1.0],
            "reference_rejected_logps": [-0.25 * i, -2.0, -3.0],
        }
        for i in range(count)
    ]
    schema = SCORED_SCHEMA if scored else PAIR_SCHEMA
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema)


def test_token_pairs_read_back_what_a_table_holds() -> None:
    """Ids as int32; unscored pairs have no reference."""
    pairs = token_pairs(_table(3, scored=False))
    assert [p.pair_id for p in pairs] == ["p0", "p1", "p2"]
    assert pairs[2].rejected_ids.tolist() == [2, 3, 4]
    assert pairs[2].prompt_ids.dtype == np.int32
    assert pairs[2].reference_chosen_logps is None
    assert pairs[2].num_tokens == 1 + 2 + 3


def test_scored_pairs_carry_their_reference() -> None:
    """Per-token log-probs as float32, one for each answer token."""
    pair = token_pairs(_table(3, scored=True))[2]
    assert pair.reference_chosen_logps is not None
    assert pair.reference_chosen_logps.tolist() == [-1.0, -1.0]
    assert pair.reference_rejected_logps.tolist() == [-0.5, -2.0, -3.0]
    assert pair.reference_rejected_logps.dtype == np.float32


def test_sliced_and_chunked_tables_read_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A slice has offsets into its parent's values, and row groups come back as chunks."""
    table = _table(9, scored=True)
    pq.write_table(table, tmp_path / "pairs.parquet", row_group_size=2)
    whole = token_pairs(pq.read_table(tmp_path / "pairs.parquet"))
    parts = token_pairs(pa.concat_tables([table.slice(0, 4), table.slice(4)]))
    assert [p.pair_id for p in whole] == [p.pair_id for p in parts] == [f"p{i}" for i in range(9)]
    for index, pair in enumerate(token_pairs(table.slice(4)), 4):
        for reader in (pair, whole[index], parts[index]):
            assert reader.chosen_ids.tolist() == [index, index + 1]
            assert reader.reference_chosen_logps.tolist() == [-0.5 * index, -1.0]


def test_empty_table_has_no_pairs() -> None:
    """A split may be empty."""
    assert token_pairs(_table(0, scored=True)) == []
