"""What a stage asks of whoever does the heavy part, and the executor that does it in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa

from dpo_train.errors import NonFiniteLossError
from dpo_train.train.job import RankJob

TableFunction = Callable[[pa.Table], pa.Table]


class Executor(Protocol):
    """Where heavy work runs."""

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        """Applies a function to each table, in any order. ``make`` builds it once per worker (tokenizer, model)."""

    def run_ranks(self, job: RankJob) -> None:
        """Runs the job on every rank, to the end."""

    def trials(self, trials: Sequence[Callable[[], None]]) -> list[str | None]:
        """Runs independent trainings; for each None, or how it diverged."""


class InProcess:
    """Everything here, one after the other, with one rank."""

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        del uses_model
        function = make()
        yield from map(function, tables)

    def run_ranks(self, job: RankJob) -> None:
        from dpo_train.train.ranks import Ranks

        job.run(Ranks(), is_preempted=lambda: False)

    def trials(self, trials: Sequence[Callable[[], None]]) -> list[str | None]:
        return [run_trial(trial) for trial in trials]


def run_trial(trial: Callable[[], None]) -> str | None:
    """One trial of a sweep. That it diverged is a finding; any other error is none, and ends the sweep."""
    try:
        trial()
    except NonFiniteLossError as error:
        return f"{type(error).__name__}: {error}"
    return None
