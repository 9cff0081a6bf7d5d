"""The executor that does heavy work on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from dpo_train.config import ComputeConfig
from dpo_train.stages.executor import TableFunction, TrialCall, TrialEnd
from dpo_train.train.job import RankJob


class RayExecutor:
    """Ray Data for tables, Ray Train for work of ranks, Ray Tune for trials. Attaches to Ray when first asked."""

    def __init__(self, compute: ComputeConfig) -> None:
        self._compute = compute

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        from dpo_train.runtime.data_job import map_tables

        return map_tables(make, tables, self._compute, uses_model=uses_model)

    def run_ranks(self, job: RankJob) -> None:
        from dpo_train.runtime.rank_job import run_ranks

        run_ranks(job, self._compute)

    def trials(self, trials: Sequence[TrialCall], ended: Callable[[int, TrialEnd], None]) -> None:
        from dpo_train.runtime.sweep_job import run_trials

        run_trials(trials, self._compute, ended)
