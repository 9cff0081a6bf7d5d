"""JSON lines: a block owns the lines that start between two bytes of the file."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import BinaryIO

from dpo_train.data.sources import base
from dpo_train.data.sources.base import Block, Record, too_large
from dpo_train.data.sources.json_values import JsonParser
from dpo_train.data.sources.streams import open_block

BOM = b"\xef\xbb\xbf"
SKIP_BYTES = 2**20


def read_jsonl(block: Block) -> Generator[Record, None, int]:
    """The records of the lines that start in the block; the last one is read to its end, past the block's."""
    with open_block(block) as stream:
        if block.compression:
            return (yield from read_lines(stream, 0, sys.maxsize, first=1))
        start = _first_line_start(stream, block)
        return (yield from read_lines(stream, start, block.stop, first=block.first_line or 1))


def read_lines(
    stream: BinaryIO, position: int, stop: int, *, first: int, held: bytes = b""
) -> Generator[Record, None, int]:
    """Records of lines from a byte position on, numbered from ``first``; ``held`` is a first line that is read already.

    Returns:
        The number of lines, blank ones included.
    """
    parse, limit, line = JsonParser().line, base.MAX_RECORD_BYTES, first - 1
    while position < stop:
        raw, held = held or stream.readline(limit + 1), b""
        if not raw:
            break
        line += 1
        size = len(raw)
        if size > limit and raw[-1] != 10:
            size = skip_line(stream, size)
            yield Record(line, too_large(size), size)
        else:
            # Concatenated files have a byte order mark in the middle too.
            content = (raw[3:] if raw[:3] == BOM else raw).strip()
            if content:
                yield Record(line, parse(content), size)
        position += size
    return line - first + 1


def skip_line(stream: BinaryIO, size_bytes: int) -> int:
    """Reads to the end of a line of which some bytes are read already, holding little of it; returns its whole size."""
    while chunk := stream.readline(SKIP_BYTES):
        size_bytes += len(chunk)
        if chunk[-1] == 10:
            break
    return size_bytes


def _first_line_start(stream: BinaryIO, block: Block) -> int:
    """Moves the stream to the first line that starts in the block; its position, ``stop`` or more if none does."""
    if block.start == 0:
        return 0
    # The byte before the block tells whether a line starts with it.
    position = stream.seek(block.start - 1)
    while position < block.stop:
        chunk = stream.readline(SKIP_BYTES)
        position += len(chunk)
        if not chunk or chunk[-1] == 10:
            break
    else:
        return sys.maxsize
    return position
