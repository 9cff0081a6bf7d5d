"""What a stage asks of whoever does the heavy part, and the executor that does it in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from dpo_train.errors import DpoError, NonFiniteLossError, OutOfMemoryError, first_line, is_out_of_memory
from dpo_train.train.job import RankJob

TableFunction = Callable[[pa.Table], pa.Table]

TrialCall = Callable[["Executor"], Mapping[str, Any]]
"""A trial of a sweep: does its heavy work through the executor it is given, and returns plain JSON types."""


@dataclass(frozen=True, kw_only=True)
class TrialEnd:
    """How a trial ended: with a result, or with the reason why it failed."""

    result: Mapping[str, Any] | None = None
    failure: str | None = None


class Executor(Protocol):
    """Where heavy work runs."""

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        """Applies a function to each table, in any order. ``make`` builds it once per worker (tokenizer, model)."""

    def run_ranks(self, job: RankJob) -> None:
        """Runs the job on every rank, to the end."""

    def trials(self, trials: Sequence[TrialCall], ended: Callable[[int, TrialEnd], None]) -> None:
        """Runs independent trials, side by side as far as there is room. ``ended`` is called in this process as each
        one ends, with its number. What is no ``failure`` is raised."""


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

    def trials(self, trials: Sequence[TrialCall], ended: Callable[[int, TrialEnd], None]) -> None:
        for number, trial in enumerate(trials):
            ended(number, run_trial(trial, self))


def run_trial(trial: TrialCall, executor: Executor) -> TrialEnd:
    """One trial of a sweep. That it diverged or lacked memory is a finding; any other error ends the sweep."""
    try:
        return TrialEnd(result=trial(executor))
    except Exception as error:
        if isinstance(error, NonFiniteLossError | OutOfMemoryError):
            return TrialEnd(failure=f"{type(error).__name__}: {error}")
        if is_out_of_memory(error) and not isinstance(error, DpoError):
            return TrialEnd(failure=f"OutOfMemoryError: {first_line(error)}")
        raise
