"""Files to raw records, in blocks that workers read on their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train.artifacts import digest_path, is_hidden
from dpo_train.data.pairs import Rejection
from dpo_train.errors import DataError, first_line

SUFFIXES = (".jsonl", ".parquet")
BLOCK_RECORDS = 512


@dataclass(frozen=True, slots=True)
class Block:
    """A run of records of one file: bytes of a JSONL file, or one row group of a Parquet file.

    ``records`` counts lines, blank ones included.
    """

    path: str
    first_line: int
    start: int
    stop: int
    records: int


def list_files(path: Path) -> list[Path]:
    """The data files at a path, in the order of their names.

    Raises:
        DataError: nothing is there, or nothing that we can read.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        found = (file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}"))
        files = sorted(file for file in found if file.is_file() and not is_hidden(file, path))
    else:
        raise DataError(f"There is no data at {path}", fix="set prepare.path to a file or a folder")
    wrong = [file.name for file in files if file.suffix not in SUFFIXES]
    if wrong or not files:
        raise DataError(f"No data file at {path}", got=wrong or "an empty folder", expected=" or ".join(SUFFIXES))
    return files


def data_digest(path: Path) -> str:
    """Digest of the raw data's content.

    Raises:
        DataError: a file cannot be read.
    """
    try:
        return digest_path(path)[:32]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", fix="check that it is whole and yours") from None


def plan_blocks(files: list[Path]) -> list[Block]:
    """Cuts files into blocks of about BLOCK_RECORDS records (JSONL) or row groups (Parquet).

    Raises:
        DataError: a file cannot be opened, or all are empty.
    """
    blocks: list[Block] = []
    for file in files:
        try:
            blocks += _parquet_blocks(file) if file.suffix == ".parquet" else _jsonl_blocks(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read: {first_line(error)}") from None
    if not blocks:
        raise DataError(f"The data at {', '.join(map(str, files))} is empty", expected="at least one record")
    return blocks


def read_block(block: Block) -> Iterator[tuple[int, Any]]:
    """(line, record) for each record; an undecodable one is a Rejection. Lines count from 1; blank ones are skipped."""
    if block.path.endswith(".parquet"):
        try:
            records = pq.ParquetFile(block.path).read_row_group(block.start).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{block.path}, row group {block.start}, is damaged: {first_line(error)}") from None
        yield from enumerate(records, block.first_line)
        return
    with Path(block.path).open("rb") as stream:
        stream.seek(block.start)
        content = stream.read(block.stop - block.start)
    for line, raw in enumerate(content.split(b"\n"), block.first_line):
        if raw.strip():
            yield line, _parse_line(raw)


def _parse_line(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return Rejection("undecodable", f"not UTF-8 JSON: {error}"[:200])


def _jsonl_blocks(file: Path) -> Iterator[Block]:
    start = position = 0
    first_line = 1
    line = 0
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, 1):
            position += len(raw)
            if line % BLOCK_RECORDS == 0:
                yield Block(str(file), first_line, start, position, BLOCK_RECORDS)
                start, first_line = position, line + 1
    if position > start:
        yield Block(str(file), first_line, start, position, line - first_line + 1)


def _parquet_blocks(file: Path) -> Iterator[Block]:
    parquet = pq.ParquetFile(file)
    first = 1
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if rows:
            yield Block(str(file), first, group, group + 1, rows)
        first += rows
