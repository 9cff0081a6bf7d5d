"""Scores by the tokens that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_train.data.known import UNIT_SCHEMA, KnownScores, token_keys
from dpo_train.data.pairs import PAIR_SCHEMA
from dpo_train.data.shards import write_shard

Ids = Sequence[int]


def _pairs(*rows: tuple[Ids, Ids, Ids, Sequence[Ids] | None]) -> pa.Table:
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "other_ids")
    columns = [
        pa.array(column, PAIR_SCHEMA.field(name).type)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    ]
    return pa.table(columns, names=names)


def _unit(path: Path, keys: Sequence[int], *, firsts: Sequence[float]) -> Path:
    """Scores of pairs whose first log-prob tells them apart; the third answer is there for even keys."""
    rows = [
        {
            "key": key,
            "pair_id": "any",
            "chosen_logps": [first, -1.0],
            "rejected_logps": [-2.0],
            "other_logps": [[-3.0]] if key % 2 == 0 else [],
        }
        for key, first in zip(keys, firsts, strict=True)
    ]
    write_shard(pa.Table.from_pylist(rows, UNIT_SCHEMA), path)
    return path


def _keys(*keys: int) -> np.ndarray:
    return np.array(keys, np.uint64)


PAIR = ([1, 2], [3], [4, 5], [[6, 7], [8]])
PINNED = 4583928293404643843
"""blake2b over the int32 2 1 2 2 (lengths of the parts, number of others), 1 2 3 4 5, 2 1 (their lengths), 6 7 8."""


def test_key_is_of_the_tokens_alone() -> None:
    """The same in any process and version of this file, pinned by a literal; ids and texts do not count."""
    table = _pairs(PAIR)
    with_id = table.append_column("pair_id", pa.array(["x"]))
    assert token_keys(table).tolist() == token_keys(with_id).tolist() == [PINNED]
    assert token_keys(table).dtype == np.uint64


@pytest.mark.parametrize(
    "other",
    [
        ([1, 2, 3], [], [4, 5], [[6, 7], [8]]),
        ([1], [2, 3], [4, 5], [[6, 7], [8]]),
        ([1, 2], [3, 4], [5], [[6, 7], [8]]),
        ([1, 2], [3], [4, 5], [[6], [7, 8]]),
        ([1, 2], [3], [4, 5], [[6, 7, 8]]),
        ([1, 2], [3], [4, 5], [[6, 7], [9]]),
        ([1, 2], [3], [4, 5, 6], [[7], [8]]),
        ([1, 2], [3], [4, 5], None),
    ],
)
def test_borders_count(other: tuple[Ids, Ids, Ids, Sequence[Ids] | None]) -> None:
    """The same tokens in the same order under other borders, another token, and a pair instead of a ranking."""
    first, second = token_keys(_pairs(PAIR, other))
    assert first != second


def test_pair_has_one_key_however_its_table_is_cut() -> None:
    """Slices, chunks, and a missing, null or empty list of further answers; nothing has no keys."""
    plain = ([9], [8, 7], [6])
    table = _pairs((*plain, None), PAIR, (*plain, []), PAIR)
    keys = token_keys(table)
    assert keys[0] == keys[2]
    assert keys[1] == keys[3]
    assert token_keys(table.slice(1, 2)).tolist() == keys[1:3].tolist()
    assert token_keys(pa.concat_tables([table.slice(2), table.slice(1, 0), table])).tolist() == [*keys[2:], *keys]
    assert token_keys(table.slice(2, 1).drop_columns(["other_ids"])).tolist() == [keys[0]]
    assert token_keys(table.slice(0, 0)).tolist() == []


def test_scores_come_in_the_order_asked_from_wherever_they_lie(tmp_path: Path) -> None:
    """Keys 5, 2 in one file and 9, 4 in the other, of which 9 is not wanted; 2 is asked for twice."""
    known = KnownScores(_keys(4, 2, 5, 2, 7))
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    _unit(one, (5, 2), firsts=(-0.5, -0.25))
    _unit(two, (9, 4), firsts=(-9.0, -4.0))
    known.add(_keys(5, 2), np.array([0, 1], np.int32), lambda: one)
    known.add(_keys(9, 4), np.array([0, 1], np.int32), lambda: two)
    assert known.has(_keys(2, 4, 5, 7, 9, 1000)).tolist() == [True, True, True, False, False, False]
    scores = known.scores(_keys(2, 4, 5, 2))
    assert scores["chosen_logps"].to_pylist() == [[-0.25, -1.0], [-4.0, -1.0], [-0.5, -1.0], [-0.25, -1.0]]
    assert scores["other_logps"].to_pylist() == [[[-3.0]], [[-3.0]], [], [[-3.0]]]
    assert len(known.scores(_keys())) == 0


def test_units_that_cannot_be_read_are_removed(tmp_path: Path) -> None:
    """Cut, full of zeros, and of other columns: the note names the file; the sound one is known."""
    folder = tmp_path / "units"
    folder.mkdir()
    sound, cut, zeros, foreign = (folder / f"{name}.parquet" for name in ("a", "b", "c", "d"))
    for key, path in enumerate((sound, cut, zeros)):
        _unit(path, (key,), firsts=(-1.0,))
    cut.write_bytes(cut.read_bytes()[:-20])
    zeros.write_bytes(bytes(zeros.stat().st_size))
    write_shard(pa.table({"pair_id": ["x"]}), foreign)
    told: list[str] = []
    known = KnownScores(_keys(0, 1, 2))
    known.add_units(str(tmp_path), "units", tell=told.append)
    assert known.has(_keys(0, 1, 2)).tolist() == [True, False, False]
    assert [path.name for path in folder.iterdir()] == ["a.parquet"]
    assert all(path.name in note for path, note in zip((cut, zeros, foreign), told, strict=True))


def test_nothing_wanted_is_nothing_known() -> None:
    """An output without pairs."""
    known = KnownScores(_keys())
    known.add(_keys(1), np.zeros(1, np.int32), Path)
    assert known.has(_keys(1)).tolist() == [False]
