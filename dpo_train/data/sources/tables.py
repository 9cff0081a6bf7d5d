"""Parquet row groups and Arrow record batches, turned into Python values a few rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train import storage
from dpo_train.data.sources import base
from dpo_train.data.sources.base import Block, Record, not_utf8, too_large, undecodable
from dpo_train.data.sources.streams import BUFFER_BYTES, open_raw, reading, request_bytes
from dpo_train.errors import DataError, first_line

BATCH_ROWS = 512
BATCH_BYTES = 8 * 2**20
"""As Python values a batch is some times larger than in Arrow."""

ARROW_MAGIC = b"ARROW1"
# The end-of-stream mark, which every Arrow writer leaves when it is done.
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def parquet_groups(name: str, path: str) -> list[tuple[int, int]]:
    """Rows and bytes of each row group, from the footer.

    Raises:
        DataError: no Parquet file, or two columns have one name.
    """
    with reading(name), _parquet_file(path) as file:
        check_columns(name, file.schema_arrow)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        return [(group.num_rows, _stored_bytes(group)) for group in groups]


def read_parquet(block: Block) -> Generator[Record, None, int]:
    """The rows of the block's row groups, numbered from the block's first line."""
    group = block.start
    with reading(block.name, f", row group {group},"), _parquet_file(block.path, request_bytes(block)) as file:
        metadata = file.metadata.row_group(group)
        row_bytes = metadata.total_byte_size // max(metadata.num_rows, 1)
        rows = min(BATCH_ROWS, max(1, BATCH_BYTES // max(row_bytes, 1)))
        batches = file.iter_batches(batch_size=rows, row_groups=[group], use_threads=False)
        return (yield from read_batches(batches, block.first_line or 1))


@contextlib.contextmanager
def _parquet_file(path: str, request: int = BUFFER_BYTES) -> Iterator[pq.ParquetFile]:
    # A local row group is read through a small buffer, so that its size does not matter; from a bucket it comes in few
    # large requests, and is held.
    remote = storage.is_remote(path)
    options = {"pre_buffer": True} if remote else {"pre_buffer": False, "buffer_size": BUFFER_BYTES}
    with open_raw(path, request) as raw, pq.ParquetFile(raw, page_checksum_verification=True, **options) as file:
        yield file


def _stored_bytes(group: Any) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def arrow_batches(name: str, path: str, size_bytes: int) -> tuple[str, int]:
    """The kind of an Arrow file, and how many record batches it has; 0 for a remote stream, which is read as one.

    Raises:
        DataError: no Arrow file, or two columns have one name.
    """
    with reading(name):
        if _has_magic(path):
            with _arrow_input(path) as source, pa.ipc.open_file(source) as file:
                check_columns(name, file.schema)
                return "arrow", file.num_record_batches
        _check_stream_end(name, path, size_bytes)
        if storage.is_remote(path):
            return "arrow_stream", 0
        with _arrow_input(path) as source:
            messages = pa.ipc.MessageReader.open_stream(source)
            return "arrow_stream", sum(message.type == "record batch" for message in messages)


def read_arrow(block: Block) -> Generator[Record, None, int]:
    """The rows of record batches of an Arrow file; ``start`` and ``stop`` count batches."""
    with (
        reading(block.name),
        _arrow_input(block.path, request_bytes(block)) as source,
        pa.ipc.open_file(source) as file,
    ):
        batches = (file.get_batch(i) for i in range(block.start, block.stop))
        return (yield from read_batches(batches, block.first_line or 1))


def read_arrow_stream(block: Block) -> Generator[Record, None, int]:
    """The same of an Arrow stream. Batches before the block are passed over, which costs nothing in mapped memory."""
    with (
        reading(block.name),
        _arrow_input(block.path, request_bytes(block)) as source,
        pa.ipc.open_stream(source) as stream,
    ):
        check_columns(block.name, stream.schema)
        if storage.is_remote(block.path):
            return (yield from read_batches(stream, 1))
        for _ in range(block.start):
            stream.read_next_batch()
        batches = (stream.read_next_batch() for _ in range(block.start, block.stop))
        return (yield from read_batches(batches, block.first_line or 1))


@contextlib.contextmanager
def _arrow_input(path: str, request: int = BUFFER_BYTES) -> Iterator[pa.NativeFile]:
    if not storage.is_remote(path):
        with pa.memory_map(path) as source:
            yield source
        return
    with open_raw(path, request) as raw, pa.PythonFile(raw, mode="r") as source:
        yield source


def _has_magic(path: str) -> bool:
    with open_raw(path, BUFFER_BYTES) as raw:
        return raw.read(len(ARROW_MAGIC)) == ARROW_MAGIC


def _check_stream_end(name: str, path: str, size_bytes: int) -> None:
    """A stream that is cut between two batches looks whole otherwise."""
    with open_raw(path, BUFFER_BYTES) as raw:
        raw.seek(max(0, size_bytes - len(_STREAM_END)))
        end = raw.read()
    if end != _STREAM_END:
        raise DataError(
            f"{name} cannot be read: its Arrow stream does not end properly",
            got="a file that was cut, or that its writer never closed",
            fix="copy or write it again",
        )


def check_columns(name: str, schema: pa.Schema) -> None:
    """A table with two columns of one name would lose one of them.

    Raises:
        DataError: it has.
    """
    repeated = sorted({column for column in schema.names if schema.names.count(column) > 1})
    if repeated:
        raise DataError(f"{name} has two columns of one name", got=repeated, fix="rename one of them")


def read_batches(batches: Iterable[pa.RecordBatch], first: int) -> Generator[Record, None, int]:
    """Records of the rows of batches, numbered from ``first``; returns how many there are."""
    line = first
    for large in batches:
        for batch in _small_batches(large):
            row_bytes = batch.nbytes // batch.num_rows
            try:
                values = batch.to_pylist() if batch.nbytes <= base.MAX_RECORD_BYTES else None
            except (ValueError, OverflowError, pa.ArrowException):
                values = None
            rows: Iterable[tuple[Any, int]]
            rows = _row_by_row(batch) if values is None else ((value, row_bytes) for value in values)
            for value, size in rows:
                yield Record(line, value, size)
                line += 1
    return line - first


def _small_batches(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    if not batch.num_rows:
        return
    row_bytes = max(1, batch.nbytes // batch.num_rows)
    rows = min(BATCH_ROWS, max(1, BATCH_BYTES // row_bytes))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _row_by_row(batch: pa.RecordBatch) -> Iterator[tuple[Any, int]]:
    """Where one row is too large or holds what Python cannot, the others are still read."""
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        size = row.nbytes
        try:
            value = row.to_pylist()[0] if size <= base.MAX_RECORD_BYTES else too_large(size)
        except (ValueError, OverflowError, pa.ArrowException) as error:
            why = not_utf8(error) if isinstance(error, UnicodeDecodeError) else first_line(error)
            value = undecodable(f"a value that cannot be read: {why}")
        yield value, size
