"""Scores that earlier outputs of the same reference hold, by the pairs' ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo_train import storage
from dpo_train.artifacts import Artifact, complete_below, open_artifact
from dpo_train.data.pairs import SCORE_NAMES, SCORES_SCHEMA, SPLITS
from dpo_train.data.shards import Shard, Split, read_shard
from dpo_train.errors import StoreError

_SCORES = ("pair_id", *(f"reference_{name}" for name in SCORE_NAMES))


class KnownScores:
    """Which pairs are scored already, and their scores. An id is 16 bytes here; the scores stay on disk."""

    def __init__(self, outputs: Sequence[Artifact]) -> None:
        self._shards: list[tuple[Split, Shard]] = [
            (split, shard)
            for output in outputs
            for split in (Split(output, name) for name in SPLITS)
            for shard in split.shards
            if shard.rows
        ]
        # Sorted ids with the shard and row of each: 8 + 4 + 4 bytes a pair.
        parts = [_ids(read_shard(split.path(shard), ["pair_id"])) for split, shard in self._shards]
        ids = np.concatenate(parts) if parts else np.empty(0, np.uint64)
        shards = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts]) if parts else shards
        order = np.argsort(ids, kind="stable")
        self._ids, self._shard, self._row = ids[order], shards[order], rows[order]

    @classmethod
    def find(cls, store: str, reference: str, *, leave_out: str) -> KnownScores:
        """The complete outputs of a store that have this reference; a damaged one is as good as none."""
        found = []
        for home in complete_below(storage.join(store, "score_reference")):
            if home == leave_out:
                continue
            try:
                artifact = open_artifact(home, "score_reference")
            except StoreError:
                continue
            if artifact.record.details.get("reference") == reference:
                found.append(artifact)
        return cls(found)

    def has(self, pair_ids: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """For each pair whether its scores are known."""
        wanted = _ids(pa.table({"pair_id": pair_ids}))
        place = np.searchsorted(self._ids, wanted)
        found = np.zeros(len(wanted), np.bool_)
        inside = place < len(self._ids)
        found[inside] = self._ids[place[inside]] == wanted[inside]
        return found

    def scores(self, pair_ids: Sequence[str]) -> pa.Table:
        """Scores of known pairs, in any order (SCORES_SCHEMA)."""
        wanted = _ids(pa.table({"pair_id": pa.array(pair_ids, pa.string())}))
        place = np.searchsorted(self._ids, wanted)
        tables = []
        for number in np.unique(self._shard[place]) if len(place) else ():
            split, shard = self._shards[number]
            rows = self._row[place[self._shard[place] == number]]
            table = read_shard(split.path(shard), _SCORES).take(pa.array(rows, pa.int64()))
            tables.append(pa.table(table.select(list(_SCORES)).columns, schema=SCORES_SCHEMA))
        return pa.concat_tables(tables) if tables else SCORES_SCHEMA.empty_table()


def _ids(table: pa.Table) -> npt.NDArray[np.uint64]:
    return np.fromiter((int(text, 16) for text in table["pair_id"].to_pylist()), np.uint64, len(table))
