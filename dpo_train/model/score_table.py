"""Tables of pairs to tables of log-probs, for workers that know tables only."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from dpo_train.data.pairs import SCORES_SCHEMA, token_pairs
from dpo_train.model.load import Policy
from dpo_train.model.score import score_pairs
from dpo_train.model.shard import reshard


class ScoreTable:
    """Pairs to SCORES_SCHEMA under one policy."""

    def __init__(self, policy: Policy, row_tokens: int, *, most: Callable[[float], float] = float) -> None:
        """``most``: see ``score_pairs``."""
        self._policy, self._row_tokens, self._most = policy, row_tokens, most

    def __call__(self, table: pa.Table) -> pa.Table:
        scores = score_pairs(self._policy, token_pairs(table), self._row_tokens, most=self._most)
        reshard(self._policy)
        sides = ([of_pair[side] for of_pair in scores] for side in (0, 1))
        columns = [table["pair_id"], *sides, [list(of_pair[2:]) for of_pair in scores]]
        return pa.table(columns, schema=SCORES_SCHEMA)
