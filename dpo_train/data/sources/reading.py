"""Blocks to records."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable
from typing import Any

from dpo_train.data.pairs import Rejection
from dpo_train.data.sources.base import Block, Reader, Record
from dpo_train.data.sources.csv_rows import read_csv
from dpo_train.data.sources.hub import read_hub
from dpo_train.data.sources.json_stream import read_json
from dpo_train.data.sources.lines import read_jsonl
from dpo_train.data.sources.tables import read_arrow, read_arrow_stream, read_parquet

READERS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "arrow_stream": read_arrow_stream,
    "hub": read_hub,
}

SAMPLE_LOOKED_AT = 10_000
"""A source of which no record can be decoded is told from its first records, not from all."""


class BlockReader:
    """Iterates over a block's records once; afterwards ``lines`` says how many lines it holds, blank ones included."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.lines = 0

    def __iter__(self) -> Generator[Record, None, None]:
        """
        Raises:
            DataError: the file cannot be read, or is damaged as a whole.
        """
        self.lines = yield from READERS[self.block.kind](self.block)


def read_block(block: Block) -> Generator[Record, None, None]:
    """The records of a block.

    Raises:
        DataError: the file cannot be read, or is damaged as a whole.
    """
    return iter(BlockReader(block))


def sample(blocks: Iterable[Block], n: int) -> list[Any]:
    """The values of the first ``n`` records that can be decoded, fewer if there are not as many.

    Raises:
        DataError: a file cannot be read.
    """
    found: list[Any] = []
    looked_at = 0
    for block in blocks:
        with contextlib.closing(read_block(block)) as records:
            for record in itertools.islice(records, SAMPLE_LOOKED_AT - looked_at):
                looked_at += 1
                if not isinstance(record.value, Rejection):
                    found.append(record.value)
                if len(found) == n:
                    return found
    return found
