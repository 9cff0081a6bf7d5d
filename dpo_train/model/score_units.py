"""Pairs of a shard to a file of their log-probs: one unit of work, done or not there."""

from __future__ import annotations

import pyarrow as pa

from dpo_train.artifacts import Artifact, local_copy, mirror
from dpo_train.data.known import UNIT_SCHEMA, token_keys
from dpo_train.data.shards import TOKENS, lengths, read_shard, write_shard
from dpo_train.model.score_table import ScoreTable

UNITS_SCHEMA = pa.schema([("shard", pa.string()), ("unit", pa.string()), ("rows", pa.list_(pa.int32()))])
"""A task: the rows of a shard to score, and the name of the file for their scores."""


class ScoreUnits:
    """Tasks (UNITS_SCHEMA) to files of scores (UNIT_SCHEMA); says how many pairs and tokens each had."""

    def __init__(self, scorer: ScoreTable, pairs: Artifact, home: str) -> None:
        """``home`` is where the output that the units are for belongs."""
        self._scorer, self._pairs, self._home = scorer, pairs, home
        self._shard: tuple[str, pa.Table] | None = None

    def __call__(self, tasks: pa.Table) -> pa.Table:
        done = [self._score(**task) for task in tasks.to_pylist()]
        return pa.Table.from_pylist(done)

    def _score(self, *, shard: str, unit: str, rows: list[int]) -> dict[str, object]:
        pairs = self._tokens(shard).take(pa.array(rows, pa.int64()))
        path = local_copy(self._home) / unit
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = self._scorer(pairs).add_column(0, "key", pa.array(token_keys(pairs)))
        write_shard(scores.cast(UNIT_SCHEMA), path)
        mirror(self._home).publish(unit)
        return {"unit": unit, "pairs": len(pairs), "tokens": int(lengths(pairs).sum())}

    def _tokens(self, shard: str) -> pa.Table:
        """The shard's token ids; tasks come shard by shard, so one is kept."""
        if self._shard is None or self._shard[0] != shard:
            self._shard = shard, read_shard(self._pairs.file(shard), TOKENS)
        return self._shard[1]
