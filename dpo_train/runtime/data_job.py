"""Ray Data: a function over many tables, on a pool of actors that build it once each."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from dpo_train.config import ComputeConfig
from dpo_train.errors import DpoError, WorkerError, decode, encode
from dpo_train.runtime.failures import cause_of, known_error
from dpo_train.runtime.session import attach, num_gpus
from dpo_train.stages.executor import TableFunction

MODEL_ACTOR_CPUS = 0.9
"""Less than a core: with as many actors as cores, Ray Data's own tasks would wait for a core for ever."""


_ERROR_COLUMN = "dpo_error"


def map_tables(
    make: Callable[[], TableFunction], tables: Sequence[pa.Table], compute: ComputeConfig, *, uses_model: bool
) -> Iterator[pa.Table]:
    """Results in any order. One input table is one block, so a worker's memory is bounded by it.

    Raises:
        DpoError: what the function raised on purpose.
        WorkerError: a worker died, or the function raised something else.
    """
    attach()
    from ray import data

    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    workers = min(compute.data_workers, len(tables))
    gpus = _gpus_per_actor(compute, workers) if uses_model else 0
    dataset = data.from_arrow(list(tables)).map_batches(
        _Worker,
        fn_constructor_args=(make,),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=MODEL_ACTOR_CPUS,
        num_gpus=gpus,
        max_restarts=2,  # Ray Data's own choice is for ever, which hides a model that does not fit into memory
        max_task_retries=2,
    )
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            if table.column_names == [_ERROR_COLUMN]:
                raise decode(table[_ERROR_COLUMN][0].as_py())
            yield table
    except DpoError:
        raise
    except Exception as error:
        cause = cause_of(error)
        raise WorkerError(f"A Ray Data worker was lost: {type(cause).__name__}: {cause}") from error


class _Worker:
    """The actor: calls ``make`` once and its result for every block.

    An error travels as a table: Ray keeps only the text of what an actor raises, and makes one that fails to start
    again and again.
    """

    def __init__(self, make: Callable[[], TableFunction]) -> None:
        self._make = make
        self._function: TableFunction | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            if self._function is None:
                self._function = self._make()
                gc.freeze()  # full collections would walk all that was imported: 5 % of the time of preparing
            return self._function(table)
        except Exception as error:
            return pa.table({_ERROR_COLUMN: [encode(known_error(error, "A Ray Data worker failed"))]})


def _gpus_per_actor(compute: ComputeConfig, workers: int) -> float:
    """A share of one GPU that lets all actors find a place; 0 without a GPU."""
    total = num_gpus(compute)
    return 1 / math.ceil(workers / total) if total else 0.0
