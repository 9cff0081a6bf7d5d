"""Every format and compression gives the records that were written, each once, with its line."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import pickle
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_train.config import SourceConfig
from dpo_train.data.pairs import Rejection
from dpo_train.data.sources import Block, BlockReader, base, json_stream, plan, read_block, sample
from dpo_train.errors import DataError

Records = list[tuple[int, Any]]

TEXT = st.text(max_size=12) | st.sampled_from(
    ['say "hi"', "a\r\nb", "a,b;\tc", "\x00", "\U0001f600 \u00e9", "\\", "\\u0041"]
)
MESSAGE = st.fixed_dictionaries({"role": TEXT, "content": TEXT | st.none()})
# One schema, because Arrow has one; nulls and nesting included.
RECORD = st.fixed_dictionaries(
    {
        "prompt": st.lists(MESSAGE, max_size=2),
        "chosen": TEXT,
        "note": TEXT | st.none(),
        "score": st.floats(0, 9) | st.none(),
    }
)
SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("chosen", pa.string()),
        ("note", pa.string()),
        ("score", pa.float64()),
    ]
)
# Sixteen formats share what one test tries.
FEWER = settings(max_examples=settings.default.max_examples // 3)
GOOD = b'{"n": 1}'


def read(path: Path | str, **options: Any) -> Records:
    """Lines and values of all blocks of a path, as the stage numbers them: relative lines follow the block before."""
    found: Records = []
    offset = 0
    for block in plan(SourceConfig(path=str(path), **options), 0):
        reader = BlockReader(block)
        offset = 0 if block.first_line else offset
        found += [(record.line + offset, record.value) for record in reader]
        offset += reader.lines
    return found


def numbered(values: Iterable[Any]) -> Records:
    """Values with their place, from 1."""
    return list(enumerate(values, 1))


def outcomes(records: Records) -> list[Any]:
    """Values, of rejections the reason."""
    return [value.reason if isinstance(value, Rejection) else value for _, value in records]


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def jsonl(records: list[Any], *, ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records).encode()


def write_table(path: Path, records: list[Any], rows: int = 2) -> None:
    """A Parquet file, an Arrow file or an Arrow stream, of groups of so many rows."""
    table = pa.Table.from_pylist(records, schema=SCHEMA)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
        return
    new = pa.ipc.new_stream if path.name.startswith("stream") else pa.ipc.new_file
    with new(str(path), SCHEMA) as writer:
        writer.write_table(table, max_chunksize=rows)


WRITERS: dict[str, Callable[[Path, list[Any]], object]] = {
    "a.jsonl": lambda path, records: path.write_bytes(jsonl(records)),
    "escaped.jsonl": lambda path, records: path.write_bytes(jsonl(records, ascii_only=True)),
    "crlf.jsonl": lambda path, records: path.write_bytes(b"\xef\xbb\xbf" + jsonl(records).replace(b"\n", b"\r\n")),
    "a.jsonl.gz": lambda path, records: path.write_bytes(gzip.compress(jsonl(records), mtime=0)),
    "members.jsonl.gz": lambda path, records: path.write_bytes(
        b"".join(gzip.compress(jsonl([r]), mtime=0) for r in records)
    ),
    "a.jsonl.zst": lambda path, records: path.write_bytes(zst(jsonl(records))),
    "frames.jsonl.zst": lambda path, records: path.write_bytes(b"".join(zst(jsonl([r])) for r in records)),
    "array.json": lambda path, records: path.write_text(json.dumps(records, ensure_ascii=False)),
    "indented.json": lambda path, records: path.write_text("\ufeff" + json.dumps(records, indent=2)),
    "lines.json": lambda path, records: path.write_bytes(jsonl(records)),
    "joined.json": lambda path, records: path.write_text(" ".join(json.dumps(r, indent=1) for r in records)),
    "array.json.gz": lambda path, records: path.write_bytes(gzip.compress(json.dumps(records).encode(), mtime=0)),
    "array.json.zst": lambda path, records: path.write_bytes(zst(json.dumps(records).encode())),
    "a.parquet": write_table,
    "file.arrow": write_table,
    "stream.arrow": write_table,
}


@pytest.mark.parametrize("name", WRITERS)
@FEWER
@given(
    records=st.lists(RECORD, min_size=1, max_size=5), block_bytes=st.integers(1, 90), window_bytes=st.integers(1, 40)
)
def test_every_format_gives_the_records_that_were_written(
    name: str, records: list[Any], block_bytes: int, window_bytes: int
) -> None:
    """Each record once and with its line, wherever blocks and windows end: blocks of a few bytes cut every line."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(base, "BLOCK_BYTES", block_bytes),
        mock.patch.object(json_stream, "WINDOW_BYTES", window_bytes),
    ):
        path = Path(folder, name)
        WRITERS[name](path, records)
        assert read(path) == numbered(records)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@given(rows=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5))
def test_csv_gives_the_cells_that_were_written(suffix: str, rows: list[tuple[str, str, str]]) -> None:
    """Commas, quotes, new lines within cells and empty texts are kept; a row's line is where it starts."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["prompt", "chosen", "rejected"])
    expected: Records = []
    for row in rows:
        line = text.getvalue().count("\n") + 1
        expected.append((line, dict(zip(("prompt", "chosen", "rejected"), row, strict=True))))
        writer.writerow(row)
    content = text.getvalue().encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.csv{suffix}")
        path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zst}[suffix](content))  # type: ignore[operator]
        assert read(path) == expected


def test_blocks_are_plain_rows_and_say_what_they_hold(tmp_path: Path) -> None:
    """Three lines of 9 bytes in blocks of 10: bytes 0-10 hold the lines at 0 and 9, 10-20 that at 18, 20-27 none."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD + b"\n" + GOOD + b"\n")
    with mock.patch.object(base, "BLOCK_BYTES", 10):
        blocks = plan(SourceConfig(path=str(file)), 3)

    assert blocks[1] == Block(3, "a.jsonl", str(file), "jsonl", "", 10, 20, 10, 0)
    assert [(block.first_line, len(list(read_block(block)))) for block in blocks] == [(1, 2), (0, 1), (0, 0)]
    table = pa.Table.from_pylist([dataclasses.asdict(block) for block in blocks])
    assert [Block(**row) for row in table.to_pylist()] == blocks == pickle.loads(pickle.dumps(blocks))


def test_a_line_that_starts_with_its_block_belongs_to_it(tmp_path: Path) -> None:
    """Lines of 9 bytes in blocks of 9: one each."""
    file = tmp_path / "a.jsonl"
    file.write_bytes((GOOD + b"\n") * 3)
    with mock.patch.object(base, "BLOCK_BYTES", 9):
        counts = [len(list(read_block(block))) for block in plan(SourceConfig(path=str(file)), 0)]
    assert counts == [1, 1, 1]


def test_lines_of_a_reader_count_blank_ones(tmp_path: Path) -> None:
    """Four lines, two of them records; the last has no new line."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n\r\n   \n" + GOOD)
    (block,) = plan(SourceConfig(path=str(file)), 0)
    reader = BlockReader(block)
    assert [(record.line, record.size_bytes) for record in reader] == [(1, 9), (4, 8)]
    assert reader.lines == 4


def test_row_groups_and_record_batches_are_blocks(tmp_path: Path) -> None:
    """Five rows in groups of two: 2 + 2 + 1, of Parquet with their lines, as its footer counts them."""
    records = [{"prompt": [], "chosen": text, "note": None, "score": None} for text in "abcde"]
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        write_table(tmp_path / name, records)
        with mock.patch.object(base, "BLOCK_BYTES", 1):
            blocks = plan(SourceConfig(path=str(tmp_path / name)), 0)
        assert [[record.value["chosen"] for record in read_block(block)] for block in blocks] == [
            ["a", "b"],
            ["c", "d"],
            ["e"],
        ]
        assert [block.first_line for block in blocks] == ([1, 3, 5] if name == "a.parquet" else [1, 0, 0])


UNDECODABLE = {
    "broken": b"{",
    "two values": b"{} {}",
    "single quotes": b"{'a': 1}",
    "latin-1": b'{"a": "\xe9"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "nul": b'{"a": "\x00"}',
    "nul bytes only": b"\x00\x00\x00",
    "lone surrogate": b'{"a": ["\\ud800"]}',
    "lone surrogate behind an escaped backslash": b'{"a": "\\\\ud83d\\ude00"}',
    "encoded surrogate": b'{"a": "\xed\xa0\x80"}',
    "surrogate in a key": b'{"\\udfff": 1}',
    "repeated key": b'{"chosen": "a", "chosen": "b"}',
    "repeated nested key": b'{"a": [{"b": 1, "b": 1}]}',
    "repeated key that is a surrogate": b'{"\\ud800": 1, "\\ud800": 1}',
    "deep": b"[" * 100_000,
    "endless number": b"1" * 5_000,
}


@pytest.mark.parametrize("line", UNDECODABLE.values(), ids=UNDECODABLE)
def test_undecodable_line_is_a_rejection_and_its_neighbours_are_read(tmp_path: Path, line: bytes) -> None:
    """It costs one record, not the run; its detail can be stored."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    records = read(file)
    assert outcomes(records) == [{"n": 1}, "undecodable", {"n": 1}]
    assert [number for number, _ in records] == [1, 2, 3]
    detail = records[1][1].detail
    assert detail
    assert "\n" not in detail.encode().decode()


@pytest.mark.parametrize("line", [b'{"a": "\\ud83d\\ude00"}', b'{"a": "\\\\ud800"}', b'{"a": "\\u0000"}'])
def test_escapes_that_mean_a_character_are_kept(tmp_path: Path, line: bytes) -> None:
    """A pair of surrogates, a backslash before letters, an escaped NUL."""
    (tmp_path / "a.jsonl").write_bytes(line)
    assert read(tmp_path / "a.jsonl") == [(1, json.loads(line))]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "array.json", "joined.json", "a.csv", "a.parquet", "stream.arrow"]
)
def test_too_large_record_is_a_rejection_and_its_neighbours_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One record of 5,000 bytes where 1,000 are allowed, with quotes, brackets and new lines that might confuse."""
    monkeypatch.setattr(base, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(base, "BLOCK_BYTES", 700)
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", 64)
    small = {"prompt": [], "chosen": "a", "note": None, "score": None}
    records = [small, {**small, "chosen": '"]}\\,\n' * 800}, {**small, "chosen": "c"}]
    if name == "a.csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["chosen", "note"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
        (tmp_path / name).write_bytes(text.getvalue().encode())
    else:
        WRITERS[name](tmp_path / name, records)
    found = read(tmp_path / name)
    assert [value.reason if isinstance(value, Rejection) else value["chosen"] for _, value in found] == [
        "a",
        "record_too_large",
        "c",
    ]
    assert [line for line, _ in found] == ([2, 3, 804] if name == "a.csv" else [1, 2, 3])


def test_sample_is_the_first_decodable_records(tmp_path: Path) -> None:
    """Over the borders of blocks and files; fewer if there are fewer."""
    (tmp_path / "a.jsonl").write_bytes(b'{broken\n{"n": 1}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"n": 2}\n{"n": 3}\n')
    blocks = plan(SourceConfig(path=str(tmp_path)), 0)
    assert sample(blocks, 2) == [{"n": 1}, {"n": 2}]
    assert sample(blocks, 9) == [{"n": 1}, {"n": 2}, {"n": 3}]


@given(
    lines=st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")), max_size=5),
    block_bytes=st.integers(1, 50),
)
def test_arbitrary_lines_are_each_a_value_or_a_rejection(lines: list[bytes], block_bytes: int) -> None:
    """Whatever stands in a line, it is one record with its number, and blank lines are none."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(base, "BLOCK_BYTES", block_bytes):
        file = Path(folder, "a.jsonl")
        file.write_bytes(b'"first"\n' + b"\n".join(lines))
        numbers = [number for number, _ in read(file)]
    expected = [number for number, line in enumerate(lines, 2) if line.removeprefix(b"\xef\xbb\xbf").strip()]
    assert numbers == [1, *expected]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow"])
@FEWER
@given(content=st.binary(min_size=1, max_size=80) | st.text('[]{},:"\\ 1an\n\ufeff', min_size=1).map(str.encode))
def test_arbitrary_files_end_in_records_or_a_data_error(name: str, content: bytes) -> None:
    """Never in another exception, and never in an endless loop."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(json_stream, "WINDOW_BYTES", 7):
        (Path(folder) / name).write_bytes(content)
        try:
            lines = [line for line, _ in read(Path(folder) / name)]
        except DataError:
            return
    assert lines == sorted(set(lines))
