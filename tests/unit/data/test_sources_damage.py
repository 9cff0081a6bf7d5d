"""Files that are damaged as a whole, and tables of which a row cannot be read."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.config import SourceConfig
from dpo_train.data.sources import plan
from dpo_train.errors import DataError
from tests.unit.data.test_sources import GOOD, jsonl, outcomes, read, write_table, zst


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


_LINES = jsonl([{"n": i, "text": str(i**9)} for i in range(2000)])
_GZ = gzip.compress(_LINES, mtime=0)
_ZST = zst(_LINES)
DAMAGED = {
    "cut.jsonl.gz": _GZ[:-200],
    "cut_in_the_checksum.jsonl.gz": _GZ[:-3],
    "wrong_checksum.jsonl.gz": _flipped(_GZ, len(_GZ) - 6),
    "flipped.jsonl.gz": _flipped(_GZ, len(_GZ) // 2),
    "followed.jsonl.gz": _GZ + b"more",
    "not.jsonl.gz": GOOD,
    "not.csv.gz": b"a,b\n1,2\n",
    "cut.json.gz": gzip.compress(b"[" + b"1," * 5000, mtime=0)[:-4],
    "cut.jsonl.zst": _ZST[:-5],
    "followed.jsonl.zst": _ZST + b"more",
    "not.jsonl.zst": GOOD,
    "zero.parquet": b"",
    "short.parquet": b"PAR1 nonsense",
    "zero.arrow": b"",
    "not.arrow": b"nonsense" * 20,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_container_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    """How much is lost cannot be counted, so nothing of it is used."""
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(DataError, match=name) as caught:
        read(tmp_path / name)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("share", [0.4, 0.999])
def test_cut_table_is_an_error(tmp_path: Path, name: str, share: float) -> None:
    """In the middle, or just before its end."""
    write_table(tmp_path / name, [{"prompt": [], "chosen": "a" * 900, "note": None, "score": None}] * 20)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        read(tmp_path / name)


def test_arrow_stream_that_is_cut_between_two_batches_is_an_error(tmp_path: Path) -> None:
    """Only the mark at its end, 8 bytes, is missing."""
    file = tmp_path / "stream.arrow"
    write_table(file, [{"prompt": [], "chosen": "a", "note": None, "score": None}] * 4)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="does not end properly"):
        read(file)


def test_damaged_row_group_is_named(tmp_path: Path) -> None:
    """The footer is whole and the second row group is not; pages with checksums are checked."""
    file = tmp_path / "a.parquet"
    table = pa.table({"a": [str(i) for i in range(200)]})
    pq.write_table(table, file, row_group_size=100, write_page_checksum=True, use_dictionary=False, compression="none")
    content = file.read_bytes()
    at = content.index(b"150")
    file.write_bytes(content[:at] + b"X" + content[at + 1 :])
    with pytest.raises(DataError, match=r"a\.parquet, row group 1, cannot be read"):
        read(file)


def test_a_cell_that_python_cannot_hold_costs_its_row(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 in a column of text."""
    text = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": text}), tmp_path / "a.parquet")
    assert outcomes(read(tmp_path / "a.parquet")) == [{"a": "a"}, "undecodable", {"a": "c"}]


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    """One of them would be lost."""
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"two columns of one name.*\['a'\]"):
        plan(SourceConfig(path=str(tmp_path / "a.parquet")), 0)
