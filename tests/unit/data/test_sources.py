"""Files to raw records, in blocks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.data import sources
from dpo_train.data.pairs import PreferencePair, Rejection
from dpo_train.data.sources import list_files, plan_blocks, read_block
from dpo_train.data.validate import validate
from dpo_train.errors import DataError
from tests.unit.data.records import JSON, RECORD


def _read(*files: Path) -> list[tuple[int, Any]]:
    return [item for block in plan_blocks(list(files)) for item in read_block(block)]


def test_files_of_a_folder_are_listed_by_name(tmp_path: Path) -> None:
    """.jsonl and .parquet at any depth, in an order that does not depend on the disk; other files are left alone."""
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.parquet", "sub/c.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert [f.relative_to(tmp_path).as_posix() for f in list_files(tmp_path)] == ["a.parquet", "b.jsonl", "sub/c.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "There is no data at"), ("notes.txt", "notes.txt"), ("empty", "an empty folder")],
)
def test_nothing_to_read_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    """A missing path, a file of another kind, and a folder without data files."""
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        list_files(tmp_path / name)


def test_files_without_a_record_are_an_error(tmp_path: Path) -> None:
    """An empty file has no block, and no block at all is nothing to train on."""
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        plan_blocks([tmp_path / "a.jsonl"])


def test_damaged_parquet_names_the_file(tmp_path: Path) -> None:
    """The reader's message is kept."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        plan_blocks([tmp_path / "a.parquet"])


def test_blocks_cut_a_file_without_losing_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven lines in blocks of three: 3 + 3 + 1, each line once with its number."""
    monkeypatch.setattr(sources, "BLOCK_RECORDS", 3)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"n": {n}}}\n' for n in range(1, 8)))
    blocks = plan_blocks([file])
    assert [[line for line, _ in read_block(block)] for block in blocks] == [[1, 2, 3], [4, 5, 6], [7]]
    assert _read(file) == [(n, {"n": n}) for n in range(1, 8)]


def test_blank_lines_crlf_bom_and_a_missing_last_newline_do_not_matter(tmp_path: Path) -> None:
    """Lines keep their number in the file, so that an editor finds them."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n  \n{"n": 4}')
    assert _read(file) == [(1, {"n": 1}), (4, {"n": 4})]


@pytest.mark.parametrize(
    "line", [b"{", b"\xff\xfe{}", b"{} {}", b"'single'", b"[" * 100_000, b"1" * 5_000], ids=lambda line: line[:9]
)
def test_undecodable_line_is_a_rejection_and_its_neighbours_are_read(tmp_path: Path, line: bytes) -> None:
    """Broken JSON, other encodings, deep nesting and endless numbers cost one record, not the run."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    records = _read(file)
    assert records[0] == (1, {"n": 1})
    assert records[2] == (3, {"n": 3})
    assert isinstance(records[1][1], Rejection)
    assert records[1][1].reason == "undecodable"


def test_parquet_row_groups_are_blocks_with_row_numbers(tmp_path: Path) -> None:
    """Five rows in groups of two: 2 + 2 + 1."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b", "c", "d", "e"]}), file, row_group_size=2)
    blocks = plan_blocks([file])
    assert [[line for line, _ in read_block(block)] for block in blocks] == [[1, 2], [3, 4], [5]]
    assert _read(file)[4] == (5, {"prompt": "e"})


def test_parquet_and_jsonl_give_the_same_pairs(tmp_path: Path) -> None:
    """A list of messages in Parquet's structs is read like the one in JSON."""
    records = [{"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(records[0]))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    pairs = [validate(record) for file in ("a.jsonl", "a.parquet") for _, record in _read(tmp_path / file)]
    assert isinstance(pairs[0], PreferencePair)
    assert pairs[0] == pairs[1]


def _check_every_line_has_one_storable_outcome(lines: list[bytes], group_key: str | None) -> None:
    """records = used + rejected, and whichever it is can be written to Parquet."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.jsonl")
        file.write_bytes(b'"first"\n' + b"\n".join(lines))
        records = _read(file)
    expected = [1, *(number for number, line in enumerate(lines, 2) if line.strip())]
    assert [number for number, _ in records] == expected
    for _, record in records:
        outcome = validate(record, group_key)
        if isinstance(outcome, PreferencePair):
            texts = [outcome.chosen, outcome.rejected, outcome.group, outcome.pair_id]
            texts += [text for m in outcome.prompt for text in (m.role, m.content)]
            assert outcome.chosen != outcome.rejected
        else:
            texts = [outcome.reason, outcome.detail]
            assert outcome.reason
        pa.array(texts, pa.string())


@given(
    lines=st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")), max_size=5),
    group_key=st.sampled_from([None, "group"]),
)
def test_arbitrary_bytes_are_used_or_rejected_never_lost(lines: list[bytes], group_key: str | None) -> None:
    """Whatever stands in a line, it ends as one outcome with its line number."""
    _check_every_line_has_one_storable_outcome(lines, group_key)


@given(records=st.lists(RECORD | JSON, max_size=4), group_key=st.sampled_from([None, "group"]))
def test_arbitrary_json_is_used_or_rejected_never_lost(records: list[Any], group_key: str | None) -> None:
    """The same for any JSON value, plausible or not, lone surrogates in keys and values included."""
    _check_every_line_has_one_storable_outcome([json.dumps(record).encode() for record in records], group_key)
