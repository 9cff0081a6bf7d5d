"""Where the scores of pairs lie already: in earlier outputs of the same reference, and in units of this one.

Scores belong to tokens. A pair's id is of its texts, and a template that writes today's date makes other tokens of them
tomorrow; so pairs are looked up by a digest of their token ids, which each output lists in ``keys.parquet``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo_train import storage
from dpo_train.artifacts import Artifact, complete_below, local_copy, mirror, open_artifact
from dpo_train.data.pairs import SCORE_NAMES, SCORES_SCHEMA, has_rankings
from dpo_train.data.shards import read_shard
from dpo_train.errors import StoreError

Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int32]

KEYS_FILE = "keys.parquet"
KEYS_SCHEMA = pa.schema([("key", pa.uint64()), ("file", pa.dictionary(pa.int32(), pa.string())), ("row", pa.int32())])
"""Which row of which shard of an output holds the pair with this key."""

UNIT_SCHEMA = pa.schema([("key", pa.uint64()), *SCORES_SCHEMA])
"""A file of scores that is a unit of work."""


def token_keys(table: pa.Table) -> Keys:
    """Of each pair a 64-bit digest of its token ids: prompt and answers, each with its length, so that borders count.

    Among 10 million pairs two share a key with probability 3e-6.
    """
    if not len(table):
        return np.empty(0, np.uint64)
    columns = [_lists(_whole(table, f"{part}_ids")) for part in ("prompt", "chosen", "rejected")]
    counts = [np.diff(offsets) for offsets, _ in columns]
    if has_rankings(table):
        others = _whole(table, "other_ids")
        ends = np.asarray(others.offsets)
        starts, ids = _lists(others.values)
        columns += [(ends, np.diff(starts).astype(np.int32)), (starts[ends], ids)]
        counts.append(np.diff(ends))
    else:
        counts.append(np.zeros(len(table), np.int32))
    counts_P4 = np.ascontiguousarray(np.stack(counts, axis=1), np.int32)
    parts = [(offsets.tolist(), values) for offsets, values in columns]
    return np.fromiter((_key(counts_P4[row], parts, row) for row in range(len(table))), np.uint64, len(table))


def _key(counts_4: Rows, parts: list[tuple[list[int], Rows]], row: int) -> int:
    digest = hashlib.blake2b(counts_4.data, digest_size=8)
    for offsets, values in parts:
        digest.update(values[offsets[row] : offsets[row + 1]].data)
    return int.from_bytes(digest.digest(), "little")


def _whole(table: pa.Table, name: str) -> pa.ListArray:
    return pa.concat_arrays(table[name].chunks)


def _lists(array: pa.ListArray) -> tuple[Rows, Rows]:
    """Offsets and values of lists of token ids."""
    return np.asarray(array.offsets), np.ascontiguousarray(array.values, np.int32)


class KnownScores:
    """Where the scores of wanted pairs lie, by the pairs' keys. 16 bytes a pair; the scores stay on disk."""

    def __init__(self, wanted: Keys) -> None:
        self._keys = np.unique(wanted)
        self._file = np.full(len(self._keys), -1, np.int32)
        self._row = np.zeros(len(self._keys), np.int32)
        self._files: list[Callable[[], Path]] = []

    def has(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """For each key whether its scores are known."""
        place, wanted = self._find(keys)
        return wanted & (self._file[place] >= 0) if len(self._keys) else wanted

    def add(self, keys: Keys, rows: Rows, file: Callable[[], Path]) -> None:
        """The scores of these keys are in these rows of a file, which is fetched when it is read."""
        place, wanted = self._find(keys)
        self._file[place[wanted]] = len(self._files)
        self._row[place[wanted]] = rows[wanted]
        self._files.append(file)

    def add_outputs(self, store: str, reference: str, *, leave_out: str, tell: Callable[[str], None]) -> None:
        """What the complete outputs of a store that have this reference hold of what is missing.

        What is taken over is read once here, so that a damaged file is as good as none, and ``tell`` says so.
        """
        for home in complete_below(storage.join(store, "score_reference")):
            if home == leave_out:
                continue
            try:
                output = open_artifact(home, "score_reference")
                if output.record.details.get("reference") != reference:
                    continue
                listed = _columns(output.file(KEYS_FILE), KEYS_SCHEMA)
            except StoreError as error:
                tell(f"note: no scores are taken over from {home}: {error}")
                continue
            self._add_output(output, listed, tell)

    def _add_output(self, output: Artifact, listed: pa.Table, tell: Callable[[str], None]) -> None:
        keys, rows = (listed[name].to_numpy() for name in ("key", "row"))
        files = listed["file"].unify_dictionaries().combine_chunks()
        names = files.dictionary.to_pylist()
        missing = np.flatnonzero(self._find(keys)[1] & ~self.has(keys))
        for number, places in _groups(np.asarray(files.indices)[missing]):
            own = missing[places]
            file = functools.partial(output.file, names[number])
            try:
                _check_rows(file(), rows[own])
            except StoreError as error:
                tell(f"note: the scores of {len(own)} pairs are not taken over from {output.home}: {error}")
                continue
            self.add(keys[own], rows[own], file)

    def add_units(self, home: str, folder: str, *, tell: Callable[[str], None]) -> None:
        """What an earlier attempt at the output has left in a folder of it; a file that cannot be read is removed."""
        for path in sorted((local_copy(home) / folder).glob("*.parquet")):
            try:
                keys = _columns(path, UNIT_SCHEMA)["key"].to_numpy()
            except StoreError as error:
                tell(f"note: the scores of a unit are made again: {error}")
                path.unlink()  # at s3:// its next making replaces it, or it goes with the folder
                continue
            file = functools.partial(mirror(home).fetch, f"{folder}/{path.name}")
            self.add(keys, np.arange(len(keys), dtype=np.int32), file)

    def scores(self, keys: Keys) -> pa.Table:
        """Log-probs of pairs that are known, in the order of the keys: SCORES_SCHEMA without the ids."""
        place, _ = self._find(keys)
        tables, order = [_SCORES.empty_table()], [np.empty(0, np.int64)]
        for number, places in _groups(self._file[place]):
            rows = self._row[place[places]]
            tables.append(_scores_in(self._files[number]()).take(pa.array(rows, pa.int64())))
            order.append(places)
        back = np.empty(len(keys), np.int64)
        back[np.concatenate(order)] = np.arange(len(keys))
        return pa.concat_tables(tables).take(pa.array(back))

    def _find(self, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Each key's place among the wanted ones, and whether it is one of them."""
        if not len(self._keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return place, self._keys[place] == keys


_SCORES = pa.schema([SCORES_SCHEMA.field(name) for name in SCORE_NAMES])


def _scores_in(path: Path) -> pa.Table:
    """The scores of a unit, or of a shard of an output."""
    table = read_shard(path, [*SCORE_NAMES, *(f"reference_{name}" for name in SCORE_NAMES)])
    return _as(table.rename_columns([name.removeprefix("reference_") for name in table.column_names]), _SCORES, path)


def _columns(path: Path, schema: pa.Schema) -> pa.Table:
    return _as(read_shard(path, schema.names), schema, path)


def _as(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    if sorted(table.column_names) != sorted(schema.names):
        raise StoreError(f"{path} has other columns than scores have", got=table.column_names, expected=schema.names)
    return table.select(schema.names).cast(schema)


def _check_rows(path: Path, rows: Rows) -> None:
    """Reads the scores once.

    Raises:
        StoreError: they cannot be read, or there are no such rows.
    """
    if (count := len(_scores_in(path))) <= rows.max():
        raise StoreError(f"{path} is cut short", got=f"{count} rows", expected=f"more than {rows.max()}")


def _groups(values: npt.NDArray[np.int32]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each value that occurs, with the places where it does."""
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, starts[1:]), strict=True) if len(found) else ()
