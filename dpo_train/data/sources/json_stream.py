"""JSON files of any size: an array of records, one record, or records one after another; one record in memory."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Generator
from json import JSONDecodeError
from typing import Any, BinaryIO

from dpo_train.data.sources import base
from dpo_train.data.sources.base import Block, Record, not_utf8, too_large, undecodable
from dpo_train.data.sources.json_values import JsonParser, is_object, json_words, why_undecodable
from dpo_train.data.sources.lines import BOM, read_lines
from dpo_train.data.sources.streams import open_block
from dpo_train.errors import DataError

WINDOW_BYTES = 2**20
# The longest text that is one token and can be cut: -Infinity, \uXXXX\uXXXX.
_TOKEN = 12
_MARK = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")


def read_json(block: Block) -> Generator[Record, None, int]:
    """The records of a .json file. If its first line is a whole object, and not the only one, it holds JSON lines.

    Lines number the records.

    Raises:
        DataError: the text breaks so that where the next record starts cannot be told; how much is lost cannot either.
    """
    with open_block(block) as stream:
        held = stream.readline(WINDOW_BYTES)
        head = held.removeprefix(BOM).strip()
        if held.endswith(b"\n") and head.startswith(b"{") and is_object(head):
            return (yield from read_lines(stream, 0, sys.maxsize, first=1, held=held))
        return (yield from _read_values(_Window(stream, held), block.name))


def _not_utf8(head: bytes) -> str:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return not_utf8(error) if error.start == 0 else ""
    return ""


class _BrokenError(Exception):
    """The text is no JSON, and where its next value starts cannot be told."""


def _read_values(window: _Window, name: str) -> Generator[Record, None, int]:
    number = 0
    try:
        in_array = window.peek() == "["
        if in_array:
            window.at += 1
        while _another(window, in_array, number):
            # Behind a comma that follows the last record nothing is lost.
            is_end = in_array and window.peek() == "]"
            value, size = (undecodable("a comma without a record behind it"), 1) if is_end else window.take()
            number += 1
            yield Record(number, value, size)
    except _BrokenError as error:
        raise _damaged(name, number, window, str(error)) from None
    return number


def _damaged(name: str, number: int, window: _Window, why: str) -> DataError:
    why = (_not_utf8(window.head) if number == 0 else "") or why
    began, at = window.began, f"line {window.line()}, character {window.position} of the file"
    return DataError(
        f"{name} is damaged: its JSON breaks after {number} record{'s' * (number != 1)}, at {at}",
        got=f"{why}; the record there begins in line {began}" if began else why,
        expected="one JSON array of records, whole, as UTF-8",
        fix="mend the text there, or write or copy the file again: the records behind it cannot be told apart",
    )


def _another(window: _Window, in_array: bool, number: int) -> bool:
    """Whether a value follows, of which it moves the window to the start."""
    mark = window.peek()
    if not in_array:
        return mark != ""
    if mark == "]":
        window.at += 1
        if window.peek():
            raise _BrokenError("more text after the array's end")
        return False
    if number:
        if mark != ",":
            raise _BrokenError("the file ends inside the array" if not mark else "no comma between two records")
        window.at += 1
        window.peek()
    return True


class _Window:
    """The text of a stream from the current position on, as far as it has been needed."""

    def __init__(self, stream: BinaryIO, held: bytes) -> None:
        self._stream = stream
        # Other bytes than UTF-8 become lone surrogates, so that they cost their record and not the file.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._parser = JsonParser()
        self._text = self._decoder.decode(held)
        self.head = held[:64]
        self._dropped = 0
        self._ended = False
        self._line = 1
        self._counted = 0
        self.began = 0
        self.at = 0

    @property
    def position(self) -> int:
        """Characters of the file before the current one."""
        return self._dropped + self.at

    def line(self) -> int:
        """Line of the file, from 1, at the current position; each character is counted once."""
        self._line += self._text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def peek(self) -> str:
        """Skips white space; the character there, or nothing at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more():
                return ""

    def take(self) -> tuple[Any, int]:
        """The value at the current position, or a Rejection of it, and its size in bytes.

        Raises:
            _BrokenError: where the value ends cannot be told.
        """
        self.began = self.line()
        while True:
            try:
                value, end = self._parser.value_at(self._text, self.at)
            except JSONDecodeError as error:
                # An error at the window's end, or a text without an end, may only mean that the window is too short.
                if self._ended or not (error.msg.startswith("Unterminated") or error.pos > len(self._text) - _TOKEN):
                    self.at = error.pos
                    raise _BrokenError(json_words(error)) from None
            except (ValueError, RecursionError) as error:
                return undecodable(why_undecodable(error)), self._skip_value()
            else:
                # A number near the window's end may go on behind it: of 12e+ only 12 is taken.
                if end + 2 < len(self._text) or self._ended or self._text[end - 1] in '}]"':
                    self.began = 0
                    return self._checked(value, end)
            if len(self._text) - self.at > base.MAX_RECORD_BYTES:
                size = self._skip_value()
                return too_large(size), size
            self._more()

    def _checked(self, value: Any, end: int) -> tuple[Any, int]:
        text = self._text[self.at : end]
        self.at = end
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            return undecodable(f"bytes that are not UTF-8, {error.start} characters behind its start"), len(text)
        return (self._parser.checked(value, text) if size <= base.MAX_RECORD_BYTES else too_large(size)), size

    def _skip_value(self) -> int:
        size = self._skip()
        self.began = 0
        return size

    def _skip(self) -> int:
        """Moves behind the object, array or text at the current position, holding little of it; its characters."""
        if self._text[self.at] not in '{["':
            raise _BrokenError("a number without an end")
        depth, in_text, size = 0, False, 0
        while True:
            last = self.at
            for match in _MARK.finditer(self._text, self.at):
                mark, last = match.group(), match.end()
                if mark == '"':
                    in_text = not in_text
                elif not in_text and mark[0] != "\\":
                    depth += 1 if mark in "[{" else -1
                if depth == 0 and not in_text:
                    size, self.at = size + last - self.at, last
                    return size
            # A backslash at the end belongs to the character that follows it.
            behind = len(self._text) - (self._text.endswith("\\") and last < len(self._text))
            size, self.at = size + behind - self.at, behind
            if not self._more():
                raise _BrokenError("the file ends inside a record")

    def _more(self) -> bool:
        """Drops what is read, and doubles what is left as far as a record may go; False at the end of the file."""
        if self._ended:
            return False
        self.line()
        left = self._text[self.at :]
        allowed = base.MAX_RECORD_BYTES + WINDOW_BYTES - len(left)
        new = self._stream.read(max(WINDOW_BYTES, min(len(left), allowed)))
        self._ended = not new
        self._dropped += self.at
        self._text, self.at, self._counted = left + self._decoder.decode(new, final=not new), 0, 0
        return True
