"""CSV with a header, or the same with tabs: each row becomes a record of texts, an empty cell an empty text."""

from __future__ import annotations

import csv
from collections.abc import Generator, Sequence
from typing import Any, BinaryIO

from dpo_train.data.pairs import Rejection
from dpo_train.data.sources import base
from dpo_train.data.sources.base import Block, Record, not_utf8, too_large, undecodable
from dpo_train.data.sources.lines import BOM
from dpo_train.data.sources.streams import open_block
from dpo_train.errors import DataError

_DELIMITERS = {"csv": ",", "tsv": "\t"}
_NO_END = "unexpected end of data"  # in the words of Python's reader
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def read_csv(block: Block) -> Generator[Record, None, int]:
    """The rows below the header; ``line`` is the line of the file in which a row starts.

    Raises:
        DataError: the header is missing, or not that of a file with commas (.tsv: with tabs); the text is not UTF-8; a
            quotation mark without its end swallows all that follows.
    """
    # The limit counts characters, and belongs to the process.
    csv.field_size_limit(max(csv.field_size_limit(), base.MAX_RECORD_BYTES))
    with open_block(block) as stream:
        lines = _Lines(stream, block.name)
        delimiter = _DELIMITERS[block.kind]
        rows = csv.reader(lines, strict=True, delimiter=delimiter)
        header = _header(rows, block.name, delimiter)
        while True:
            lines.start_row()
            first = lines.count + 1
            value = _next_value(rows, lines, header, block.name)
            if value is None:
                return lines.count
            if value:
                yield Record(first, value, lines.row_bytes)


class _Lines:
    """Lines of text for the CSV reader, which stop where a row gets too large."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.count = 0
        self.start_row()

    def start_row(self) -> None:
        """A new row starts with the next line."""
        self.row_bytes = 0
        self._quotes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        limit = base.MAX_RECORD_BYTES
        raw = self._stream.readline(limit + 1)
        if not raw:
            raise StopIteration
        self._add(raw)
        if self.row_bytes > limit + 1 or (self.row_bytes > limit and raw[-1] != 10):
            self._skip_row(raw)
            raise _TooLargeError
        if self.count == 1:
            raw = raw.removeprefix(BOM)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self._not_utf8(not_utf8(error)) from None
        if self.count == 1 and "\0" in text:
            raise self._not_utf8("NUL bytes, as UTF-16 has them")
        return text

    def _not_utf8(self, got: str) -> DataError:
        # Row by row, the records with accents would be lost and no others.
        return DataError(f"{self._name} is not UTF-8 text: line {self.count}", got=got, fix="save it as UTF-8")

    def _add(self, raw: bytes) -> None:
        self.count += 1
        self.row_bytes += len(raw)
        self._quotes += raw.count(b'"')

    def _skip_row(self, raw: bytes) -> None:
        """A row ends with a line after which the number of its quotes is even.

        Raises:
            csv.Error: no line is such an end.
        """
        while raw:
            if raw[-1] == 10 and self._quotes % 2 == 0:
                return
            ended = raw[-1] == 10
            raw = self._stream.readline(2**20)
            self.count += ended and bool(raw)
            self.row_bytes += len(raw)
            self._quotes += raw.count(b'"')
        if self._quotes % 2:
            raise csv.Error(_NO_END)


class _TooLargeError(Exception):
    """A row above MAX_RECORD_BYTES, of which the lines are skipped."""


def _header(rows: Any, name: str, delimiter: str) -> list[str]:
    marks = _NAMES[delimiter]
    fix = f"write it as UTF-8 with {marks}, and the names of the columns in its first line"
    try:
        header: list[str] = next(rows, [])
    except (csv.Error, _TooLargeError) as error:
        raise DataError(f"The first line of {name} is no CSV header: {_words(error)}", fix=fix) from None
    if not any(cell.strip() for cell in header):
        raise DataError(f"{name} has no header", got="an empty first line", fix=fix)
    repeated = sorted({cell for cell in header if header.count(cell) > 1})
    if repeated:
        raise DataError(f"{name} has two columns of one name", got=repeated, fix="rename one of them")
    other = next((mark for mark in _NAMES if len(header) == 1 and mark in header[0]), None)
    if other:
        raise DataError(
            f"The columns of {name} are divided by {other!r}", got=repr(header[0][:200]), expected=marks, fix=fix
        )
    return header


def _words(error: csv.Error | _TooLargeError) -> str:
    said = str(error)
    if isinstance(error, _TooLargeError):
        return f"it is larger than {base.MAX_RECORD_BYTES} bytes"
    if said == _NO_END:
        return "a quotation mark opens a cell and none closes it"
    if said.startswith("new-line character"):
        return "a carriage return that no line feed follows"
    return "text behind a closing quotation mark" if "expected after" in said else said


def _next_value(rows: Any, lines: _Lines, header: Sequence[str], name: str) -> dict[str, str] | Rejection | None:
    """The next row as a record or a Rejection; nothing for a blank line, None at the end of the file."""
    first = lines.count + 1
    try:
        row: list[str] = next(rows)
    except StopIteration:
        return None
    except csv.Error as error:
        if str(error) == _NO_END:
            raise DataError(
                f"{name} is damaged: in the row of line {first} {_words(error)}",
                got=f"a cell that takes all up to the file's end, line {lines.count}",
                fix=f"close the quotation mark in line {first}; within a cell write two for one",
            ) from None
        where = f" in lines {first} to {lines.count}" if lines.count > first else ""
        return undecodable(f"no row of cells{where}: {_words(error)}")
    except _TooLargeError:
        return too_large(lines.row_bytes)
    if not row or (len(row) == 1 < len(header) and not row[0].strip()):
        return {}
    if len(row) != len(header):
        return undecodable(f"a row of {len(row)} cells below a header of {len(header)}")
    return dict(zip(header, row, strict=True))
