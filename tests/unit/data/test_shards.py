"""Pairs in shards: whole, shard by shard, pair by pair."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, produce
from dpo_train.data import shards
from dpo_train.data.pairs import SCORED_SCHEMA, TokenPair, token_pairs
from dpo_train.data.shards import SHARDS_FILE, Split, lengths, list_sums, manifest, shard_name, write_shard
from dpo_train.errors import StoreError


def _table(first: int, count: int) -> pa.Table:
    rows = [
        {
            "pair_id": f"{i:016x}",
            "chosen": "text that no training reads",
            "prompt_ids": list(range(i % 5 + 1)),
            "chosen_ids": [i, i + 1],
            "rejected_ids": [i] * (i % 3 + 1),
            "reference_chosen_logps": [-0.5 * i, -1.0],
            "reference_rejected_logps": [-0.25] * (i % 3 + 1),
        }
        for i in range(first, first + count)
    ]
    return pa.Table.from_pylist([{name: row.get(name) for name in SCORED_SCHEMA.names} for row in rows], SCORED_SCHEMA)


@pytest.fixture
def output(tmp_path: Path) -> Artifact:
    """Three shards of 7, 0 and 5 training pairs."""

    def body(out: Output) -> Summary:
        tables = [_table(0, 7), _table(0, 0), _table(7, 5)]
        made = [write_shard(table, out.path / shard_name("train", i)) for i, table in enumerate(tables)]
        out.write_json(SHARDS_FILE, manifest({"train": made}))
        return Summary()

    return produce("score_reference", {}, {}, tmp_path / "out", body)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Where this test lays files out; the process's options are back after it."""
    before = storage.options()
    storage.use(storage.Options(cache=str(tmp_path / "cache")))
    yield tmp_path / "cache"
    storage.use(before)


def _same(a: TokenPair, b: TokenPair) -> bool:
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "reference_chosen_logps", "reference_rejected_logps")
    return a.pair_id == b.pair_id and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


@pytest.mark.parametrize("held", [True, False])
def test_pair_by_pair_is_what_the_whole_table_holds(
    output: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """From any place, from the end, as a slice; held in memory, and mapped from a file that is laid out once."""
    monkeypatch.setattr(shards, "HELD_BYTES", 1 << 20 if held else 0)
    pairs = Split(output, "train").pairs()
    wanted = token_pairs(_table(0, 12))
    assert len(pairs) == 12
    assert all(_same(pairs[i], wanted[i]) for i in (11, 0, 6, 7, 3))
    assert _same(pairs[-1], wanted[11])
    assert [pair.pair_id for pair in pairs[5:9]] == [pair.pair_id for pair in wanted[5:9]]
    with pytest.raises(IndexError):
        pairs[12]
    laid_out = sorted(file.name for file in cache.rglob("*.arrow"))
    assert laid_out == ([] if held else ["train-00000.arrow", "train-00001.arrow", "train-00002.arrow"])


@pytest.mark.usefixtures("cache")
def test_mapped_file_is_used_again(output: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second rank, or a resumed training, lays nothing out: the shards themselves may be gone."""
    monkeypatch.setattr(shards, "HELD_BYTES", 0)
    first = Split(output, "train").pairs()[3]
    for file in output.path.glob("*.parquet"):
        file.unlink()
    assert _same(Split(output, "train").pairs()[3], first)


def test_shard_is_laid_out_row_group_by_row_group(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 rows in groups of 3, 3 and 1: memory holds one group, and row number is still position."""
    monkeypatch.setattr(shards, "HELD_BYTES", 0)
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 3)

    def body(out: Output) -> Summary:
        out.write_json(SHARDS_FILE, manifest({"train": [write_shard(_table(0, 7), out.path / "train-00000.parquet")]}))
        return Summary()

    pairs = Split(produce("score_reference", {}, {}, tmp_path / "out", body), "train").pairs()
    (file,) = cache.rglob("*.arrow")
    with pa.ipc.open_file(str(file)) as laid_out:
        assert [laid_out.get_batch(i).num_rows for i in range(laid_out.num_record_batches)] == [3, 3, 1]
    wanted = token_pairs(_table(0, 7))
    assert len(pairs) == 7
    assert all(_same(pairs[i], wanted[i]) for i in (6, 0, 2, 3, 5))
    assert pairs.ids_digest == hashlib.sha256("\n".join(f"{i:016x}" for i in range(7)).encode()).hexdigest()


def test_damaged_shard_leaves_nothing_laid_out(output: Artifact, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its footer is sound, a page is not: the file is named, and no part of it is taken for the whole later."""
    monkeypatch.setattr(shards, "HELD_BYTES", 0)
    file = output.path / "train-00000.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:4] + bytes(len(content) // 2 - 4) + content[len(content) // 2 :])
    with pytest.raises(StoreError, match=r"train-00000.parquet cannot be read"):
        Split(output, "train").pairs()
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_ids_digest_is_of_all_ids_in_order(output: Artifact) -> None:
    """The same as over a plain list, which the order of batches hangs on."""
    ids = "\n".join(f"{i:016x}" for i in range(12))
    assert Split(output, "train").pairs().ids_digest == hashlib.sha256(ids.encode()).hexdigest()


def test_split_without_pairs_is_an_empty_sequence(output: Artifact) -> None:
    """Validation pairs may be switched off."""
    split = Split(output, "validation")
    assert (split.num_pairs, len(split.pairs())) == (0, 0)


def test_lengths_are_of_parts_or_of_the_whole_pair() -> None:
    """Pair 4: prompt 5, chosen 2, rejected 2 tokens."""
    table = _table(4, 1)
    assert lengths(table).tolist() == [9]
    assert lengths(table, "prompt").tolist() == [5]
    assert lengths(table, "chosen", "rejected").tolist() == [4]


def test_lengths_count_all_answers_of_a_ranking() -> None:
    """Pair 4 as above with answers of 3 and 1 tokens more, pair 5 (1, 2, 3) with none, in a slice and in two chunks."""
    table = _table(3, 3)
    others = pa.array([[[0]], [[1, 2, 3], [4]], None], SCORED_SCHEMA.field("other_ids").type)
    table = table.set_column(table.column_names.index("other_ids"), "other_ids", others).slice(1)
    assert lengths(table).tolist() == [9 + 4, 6]
    assert lengths(pa.concat_tables([table, table.slice(1)])).tolist() == [9 + 4, 6, 6]
    assert lengths(table, "chosen").tolist() == [2, 2]


def test_lists_are_summed_each_by_itself() -> None:
    """Empty and null lists, also first and last; in a slice and in chunks; in double precision."""
    column = pa.array([[9.0], [], [1.0, 2.0], [], None, [-0.5], [1e8, 1.0, -1e8], []], pa.list_(pa.float32()))
    assert list_sums(pa.chunked_array([column])).tolist() == [9.0, 0.0, 3.0, 0.0, 0.0, -0.5, 1.0, 0.0]
    sliced = pa.chunked_array([column]).slice(1, 5)
    assert list_sums(sliced).tolist() == [0.0, 3.0, 0.0, 0.0, -0.5]
    assert list_sums(pa.chunked_array([column[6:], column[:0], column[:3]])).tolist() == [1.0, 0.0, 9.0, 0.0, 3.0]
    assert list_sums(pa.chunked_array([], column.type)).tolist() == []


@pytest.mark.parametrize("content", [lambda whole: whole[:50], lambda whole: bytes(len(whole))])
def test_damaged_shard_names_its_file_and_what_to_do(output: Artifact, content: Callable[[bytes], bytes]) -> None:
    """Cut short, or of the right size and full of zeros."""
    file = output.path / "train-00000.parquet"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(StoreError, match=r"train-00000.parquet.*run the stage that makes it again"):
        Split(output, "train").table()


def test_unknown_split_is_refused(output: Artifact) -> None:
    """With the names that there are."""
    with pytest.raises(StoreError, match="heldout"):
        Split(output, "test")


def test_pairs_may_be_read_without_their_rejected_answers(output: Artifact) -> None:
    """The same order by the same digest; prompt and chosen answer are whole, and nothing else is there."""
    whole, alone = Split(output, "train").pairs(), Split(output, "train").pairs(chosen_alone=True)
    assert alone.ids_digest == whole.ids_digest
    for pair, rest in zip(whole, alone, strict=True):
        assert (rest.pair_id, rest.num_tokens) == (pair.pair_id, len(pair.prompt_ids) + len(pair.chosen_ids))
        assert np.array_equal(rest.prompt_ids, pair.prompt_ids)
        assert np.array_equal(rest.chosen_ids, pair.chosen_ids)
        assert len(rest.rejected_ids) == 0
        assert rest.reference_chosen_logps is None
