"""What all readers share: blocks, records, and the two sizes that bound memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_train.data.pairs import Rejection

BLOCK_BYTES = 4 * 2**20
"""A block of plain JSON lines or of an Arrow file: some thousand records, seconds of work for a worker."""

MAX_RECORD_BYTES = 32 * 2**20
"""A record that is larger is rejected without being held: no answer is as long, a file that lost its line ends is."""


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a source that one worker reads by itself; plain values only, so that it fits in a row of a table.

    ``start`` and ``stop`` count bytes (jsonl: the block owns the lines that start there), row groups (parquet), record
    batches (arrow, arrow_stream) or rows (hub). Files that cannot be cut (json, csv, tsv, compressed) are 0 to their
    size.
    """

    dataset: int
    """Place of the source in the config."""
    name: str
    """The file as people know it: its path below the source's root."""
    path: str
    kind: str
    """jsonl, json, csv, tsv, parquet, arrow, arrow_stream or hub."""
    compression: str
    """gz, zst or empty."""
    start: int
    stop: int
    size_bytes: int
    """Bytes of the file that are read for it, for progress."""
    first_line: int
    """Number of its first line from 1; 0: not known, lines then count from the block's start."""


class Record(NamedTuple):
    """One raw record, or why it cannot be decoded."""

    line: int
    """From 1; a line of a text file, the place among the records elsewhere."""
    value: Any
    size_bytes: int


Reader = Callable[[Block], Generator[Record, None, int]]
"""Yields a block's records, and returns how many lines it holds, blank ones included."""


def too_large(size_bytes: int) -> Rejection:
    """A record above MAX_RECORD_BYTES."""
    return Rejection("record_too_large", f"{size_bytes} bytes, at most {MAX_RECORD_BYTES} are read")


# What a text file begins with that is none, or is written in another way.
_BEGINNINGS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip: name the file .gz",
    b"\x28\xb5\x2f\xfd": "zstd: name the file .zst",
    b"PAR1": "Parquet: name the file .parquet",
}


def not_utf8(error: UnicodeDecodeError) -> str:
    """Which byte of a text is no UTF-8, and what the text looks like instead."""
    raw = bytes(error.object)
    like = next((words for start, words in _BEGINNINGS.items() if raw.startswith(start)), "")
    what = f"byte 0x{raw[error.start]:02x} at position {error.start} is not UTF-8"
    return f"{what}: this looks like {like}" if like else what


def undecodable(detail: str) -> Rejection:
    """A record that cannot be decoded; the detail is one short line that UTF-8 can hold."""
    return Rejection("undecodable", detail.encode(errors="backslashreplace").decode().replace("\n", " ")[:200])
