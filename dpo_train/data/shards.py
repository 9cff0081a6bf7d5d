"""Pairs on disk: each split is a run of Parquet shards, read whole, shard by shard, or pair by pair.

    train-00000.parquet  train-00001.parquet  ...  heldout-00000.parquet   shards.json

A training reads a few pairs of a step from anywhere. Parquet is made for whole columns, so what a training needs is
laid out once as an Arrow file that is mapped into memory: a pair is then read without decoding its neighbours, and
memory holds what is being looked at. Small splits are simply held.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_train import storage
from dpo_train.artifacts import Artifact
from dpo_train.data.pairs import SPLITS, TokenPair, has_rankings, token_pairs
from dpo_train.errors import StoreError

SHARDS_FILE = "shards.json"
ROW_GROUP_ROWS = 1024
HELD_BYTES = 64 << 20
"""Of Parquet: a split up to this size is held in memory rather than laid out in a file."""

TOKENS = (
    *("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "other_ids"),
    *("reference_chosen_logps", "reference_rejected_logps", "reference_other_logps"),
)
"""The columns that scoring and training read."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file of a split."""

    file: str
    rows: int
    bytes: int


def shard_name(split: str, index: int) -> str:
    """Name of a split's shard number ``index``."""
    return f"{split}-{index:05d}.parquet"


def write_shard(table: pa.Table, path: Path) -> Shard:
    """Writes a shard; the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP_ROWS, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Shard(path.name, len(table), path.stat().st_size)


def write_shard_of(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> Shard:
    """The same piece by piece; each piece becomes row groups of its own."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    rows = 0
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
                rows += len(table)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Shard(path.name, rows, path.stat().st_size)


def manifest(shards: dict[str, list[Shard]]) -> dict[str, list[dict[str, Any]]]:
    """Content of ``shards.json``."""
    return {
        split: [{"file": s.file, "rows": s.rows, "bytes": s.bytes} for s in shards.get(split, [])] for split in SPLITS
    }


class Split:
    """One split of a prepared or scored output."""

    def __init__(self, artifact: Artifact, split: str) -> None:
        """Raises:
        StoreError: the output has no such split.
        """
        self.artifact, self.name = artifact, split
        content = json.loads(artifact.file(SHARDS_FILE).read_text(encoding="utf-8"))
        if split not in content:
            raise StoreError(f"{artifact.home} has no {split} pairs", got=sorted(content))
        self.shards = [Shard(**fields) for fields in content[split]]

    @property
    def num_pairs(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def path(self, shard: Shard) -> Path:
        """The shard's file, fetched if need be."""
        return self.artifact.file(shard.file)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Shard by shard."""
        for shard in self.shards:
            yield read_shard(self.path(shard), columns)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All of it at once: for splits that are known to be small, and single columns."""
        return pa.concat_tables(self.tables(columns))

    def pairs(self, *, chosen_alone: bool = False) -> PairSequence:
        """Random access to all pairs, or to their prompts and chosen answers alone."""
        return PairSequence([self._tokens(shard) for shard in self.shards], chosen_alone=chosen_alone)

    def _tokens(self, shard: Shard) -> pa.Table:
        """What scoring and training read of a shard: held if the split is small, else mapped from a file."""
        if sum(s.bytes for s in self.shards) <= HELD_BYTES:
            return read_shard(self.path(shard), TOKENS).combine_chunks()
        record = self.artifact.record
        folder = storage.cache_folder() / "pairs" / f"{record.digest}-{record.making}"  # made again, it may differ
        target = folder / f"{Path(shard.file).stem}.arrow"
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _lay_out(self.path(shard), target)
        return pa.ipc.open_file(pa.memory_map(str(target))).read_all()


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard, or those of the named columns that it has.

    Raises:
        StoreError: the file is damaged.
    """
    with _shard_errors(path):
        file = pq.ParquetFile(path, memory_map=True)
        return file.read(columns=_present(file, columns))


@contextmanager
def _shard_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"{path} cannot be read: {error}", fix=f"remove {path.parent} and run the stage that makes it again"
        ) from None


def _present(file: pq.ParquetFile, columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else [name for name in columns if name in file.schema_arrow.names]


def _lay_out(source: Path, target: Path) -> None:
    """A shard's token columns as an Arrow file, a record batch for each of its row groups: memory holds one of them."""
    temporary = target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with _shard_errors(source):
            file = pq.ParquetFile(source, memory_map=True)
            names = _present(file, TOKENS)
            schema = pa.schema([file.schema_arrow.field(name) for name in names or ()])
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for number in range(file.num_row_groups):
                with _shard_errors(source):
                    group = file.read_row_group(number, columns=names)
                writer.write_table(group.combine_chunks())
        temporary.replace(target)  # another rank may have done the same: the content is equal
    finally:
        temporary.unlink(missing_ok=True)


class PairSequence(Sequence[TokenPair]):
    """Token pairs of several tables as one sequence; a pair is made when it is asked for."""

    def __init__(self, tables: Sequence[pa.Table], *, chosen_alone: bool = False) -> None:
        self._chosen_alone = chosen_alone
        self._tables = [_without_empty_columns(table) for table in tables if len(table)]
        self._ends = np.cumsum([len(table) for table in self._tables], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> TokenPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenPair]: ...
    def __getitem__(self, index: int | slice) -> TokenPair | list[TokenPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        number = int(np.searchsorted(self._ends, place, side="right"))
        table = self._tables[number]
        pair = token_pairs(table.slice(place - int(self._ends[number]) + len(table), 1))[0]
        return pair.chosen_alone if self._chosen_alone else pair

    @cached_property
    def ids_digest(self) -> str:
        """Of the pairs' ids in their order, and nothing else."""
        digest = hashlib.sha256()
        for number, table in enumerate(self._tables):
            for start in range(0, len(table), ROW_GROUP_ROWS):
                ids = table["pair_id"].slice(start, ROW_GROUP_ROWS).to_pylist()
                digest.update(("\n" if number or start else "").encode() + "\n".join(ids).encode())
        return digest.hexdigest()


def _without_empty_columns(table: pa.Table) -> pa.Table:
    """Where there are no rankings, a pair is read without a look for further answers."""
    if has_rankings(table):
        return table
    return table.select([name for name in table.column_names if name not in ("other_ids", "reference_other_logps")])


def lengths(table: pa.Table, *parts: str) -> npt.NDArray[np.int64]:
    """Tokens of each pair: of the named parts together, or of prompt and all answers."""
    total = np.zeros(len(table), np.int64)
    for part in parts or ("prompt", "chosen", "rejected"):
        total += pc.list_value_length(table[f"{part}_ids"]).to_numpy()
    if not parts:
        np.add.at(total, *other_lengths(table, "other_ids"))
    return total


def other_lengths(table: pa.Table, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(row, entries) of each list in a column of lists of lists, such as a ranking's further answers; a table without
    that column has none."""
    if name not in table.column_names:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    counts = pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy()
    entries = pc.list_value_length(pc.list_flatten(table[name])).to_numpy()
    return np.repeat(np.arange(len(table)), counts), entries.astype(np.int64)


def list_sums(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Sum of each list in a column of lists of numbers; 0 for an empty list."""
    return np.concatenate([np.empty(0), *map(_list_sums, column.chunks)])


def _list_sums(chunk: pa.ListArray) -> npt.NDArray[np.float64]:
    counts = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
    sums = np.zeros(len(chunk))
    if counts.any():
        # An empty list would get the next one's first value: reduceat asks for starts that grow.
        starts = (np.cumsum(counts, dtype=np.int64) - counts)[counts > 0]
        sums[counts > 0] = np.add.reduceat(chunk.flatten().to_numpy(), starts, dtype=np.float64)
    return sums
