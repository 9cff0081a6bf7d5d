"""What tests of stages at s3:// share: stores that are copied, machines that are other caches, runs that are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from dpo_train import storage
from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.progress import Reporter
from dpo_train.stages.executor import InProcess, TableFunction
from dpo_train.train.job import TrainJob
from tests.s3.server import Server

SPEED = ("pairs_per_second", "tokens_per_second", "peak_memory_gb")
"""Metrics that say how fast, not what."""


def copy_up(server: Server, folder: Path, address: str) -> None:
    """A folder to a bucket, past everything that is tested."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            key = f"{prefix}/{file.relative_to(folder).as_posix()}"
            server.client().put_object(Bucket=bucket, Key=key, Body=file.read_bytes())


def machine(config: RunConfig, cache: Path) -> RunConfig:
    """The same config on a machine with a disk of its own, which this process is from now on."""
    changed = replace(config, storage=replace(config.storage, cache=str(cache)))
    storage.use(storage.Options(attempts=changed.storage.attempts, cache=str(cache)))
    return changed


def numbers(artifact: Artifact) -> dict[str, float]:
    """All counts and metrics that must not depend on the place."""
    both = {**artifact.record.counts, **artifact.record.metrics}
    return {name: value for name, value in both.items() if name not in SPEED}


def contents(artifact: Artifact, *endings: str) -> dict[str, bytes]:
    """The output's files with these endings."""
    return {name: artifact.file(name).read_bytes() for name in artifact.record.files if name.endswith(endings)}


def outputs(server: Server, bucket: str, prefix: str) -> dict[str, bytes]:
    """All objects of a store by their key in it."""
    return {key.removeprefix(prefix): body for key, body in server.objects(bucket).items() if key.startswith(prefix)}


class Counting(InProcess):
    """Counts tasks; dies after so many, or after the training."""

    def __init__(self, stop_after: int | None = None, *, dies_after_training: bool = False) -> None:
        self.tasks = 0
        self._stop_after, self._dies_after_training = stop_after, dies_after_training

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        for result in super().map_tables(make, tables, uses_model=uses_model):
            self.tasks += 1
            yield result
            if self.tasks == self._stop_after:
                raise KeyboardInterrupt

    def run_ranks(self, job: TrainJob) -> None:
        super().run_ranks(job)
        if self._dies_after_training:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Steps(Reporter):
    """Remembers the steps of a training; interrupts it at one of them."""

    stop_at: int | None = None
    seen: list[int] = field(default_factory=list)
    stop: Callable[[], None] | None = None

    def progress(self, done: float, total: float, unit: str = "pairs", **metrics: float) -> None:
        self.seen.append(int(done))
        if done == self.stop_at:
            (self.stop or _interrupt)()


def _interrupt() -> None:
    raise KeyboardInterrupt
