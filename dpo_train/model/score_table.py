"""Tables of pairs to tables of log-probs, for workers that know tables only."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from dpo_train.config import ModelConfig
from dpo_train.data.pairs import SCORES_SCHEMA, token_pairs
from dpo_train.model.load import load_policy, select_device
from dpo_train.model.score import check_layout, score_pairs


class ScoreTable:
    """Pairs to SCORES_SCHEMA under one policy; built once per worker."""

    def __init__(
        self, model: ModelConfig, device: str, weights: str | None, row_tokens: int, frozen_base: bool
    ) -> None:
        self._policy = load_policy(
            model, device=select_device(device), weights=Path(weights) if weights else None, frozen_base=frozen_base
        )
        self._row_tokens = row_tokens
        check_layout(self._policy)

    def __call__(self, table: pa.Table) -> pa.Table:
        scores = score_pairs(self._policy, token_pairs(table), self._row_tokens)
        sides = ([of_pair[side] for of_pair in scores] for side in (0, 1))
        columns = [table["pair_id"], *sides, [list(of_pair[2:]) for of_pair in scores]]
        return pa.table(columns, schema=SCORES_SCHEMA)
