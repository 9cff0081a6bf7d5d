"""Tables through a function that needs a model: on workers that each hold it, or on ranks that hold it together."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train import storage
from dpo_train.artifacts import Output, mirror
from dpo_train.config import ModelConfig, RunConfig
from dpo_train.progress import Reporter
from dpo_train.stages.common import storage_options
from dpo_train.stages.executor import Executor, TableFunction
from dpo_train.train.map_job import MapJob

if TYPE_CHECKING:
    from dpo_train.model.load import Policy
    from dpo_train.train.ranks import Ranks

PARTS = "parts"
"""Scratch folder of results that ranks leave."""

Build = Callable[["Ranks | None"], TableFunction]
"""Builds the function in its worker; with ranks of a model that they hold together."""


def map_with_model(
    config: RunConfig,
    build: Build,
    tables: Sequence[pa.Table],
    out: Output,
    executor: Executor,
    reporter: Reporter,
    *,
    name: str,
    sizes: Sequence[int],
    size_of: Callable[[pa.Table], int] = len,
    before: int = 0,
    unit: str = "pairs",
) -> Iterator[pa.Table]:
    """The function's result for each table, in any order; a model that has nothing to do is not loaded.

    Args:
        name: of the model.
        sizes: for the progress, how much of ``unit`` each table stands for.
        size_of: the same, seen by its result.
        before: how much had been done already.
    """
    total = before + sum(sizes)
    reporter.progress(before, total, unit)
    if not tables:
        return
    if not config.compute.score_sharded:
        done = before
        for result in executor.map_tables(functools.partial(build, None), tables, uses_model=True):
            done += size_of(result)
            reporter.progress(done, total, unit)
            yield result
        return
    job = MapJob(
        make=build,
        tables=tables,
        sizes=sizes,
        before=before,
        unit=unit,
        # By content: an interrupted attempt may have had other tables to do.
        folder=f"{PARTS}/{name}-{_digest(tables)}",
        output=out.home,
        device=config.compute.device,
        tensor_parallel=config.compute.tensor_parallel,
        reporter=reporter,
        storage=storage_options(config),
    )
    executor.run_ranks(job)
    for number in range(len(tables)):
        yield pq.read_table(mirror(out.home).fetch(job.part_name(number)))


def _digest(tables: Sequence[pa.Table]) -> str:
    found = hashlib.sha256()
    for table in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        found.update(sink.getvalue())
    return found.hexdigest()[:16]


def load_model(
    config: RunConfig, model: ModelConfig, ranks: Ranks | None, *, weights: str | None = None, frozen_base: bool
) -> Policy:
    """A model to ask, in its worker; with ranks this rank's share of it. Arguments are those of ``load_policy``."""
    from dpo_train.model.load import load_policy, select_device
    from dpo_train.model.score import check_layout
    from dpo_train.model.sharded import load_sharded

    storage.use(storage_options(config))
    options: dict[str, Any] = {
        "device": select_device(config.compute.device),
        "trainable": False,
        "weights": None if weights is None else Path(weights),
        "frozen_base": frozen_base,
    }
    if ranks is not None and ranks.world_size > 1:
        return load_sharded(model, **options, mesh=ranks.mesh)
    policy = load_policy(model, **options)
    check_layout(policy)
    return policy


def most(ranks: Ranks | None) -> Callable[[float], float]:
    """The largest of a number on all ranks, as ``score_pairs`` wants it."""
    return float if ranks is None else ranks.max
