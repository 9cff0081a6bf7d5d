"""Tables through a function that all ranks compute together, for models that do not fit one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_train import storage
from dpo_train.artifacts import local_copy, mirror
from dpo_train.progress import Reporter

if TYPE_CHECKING:
    from dpo_train.train.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class MapJob:
    """See RankJob. Result number k goes to the file ``part_name(k)`` of the output."""

    make: Callable[[Ranks], Callable[[pa.Table], pa.Table]]
    """Builds the function on every rank. All ranks of a share call it with the same table, all shares equally often."""
    tables: Sequence[pa.Table]
    sizes: Sequence[int]
    before: int
    unit: str
    """For the progress: what each table stands for, and what had been done before."""
    folder: str
    output: str
    device: str
    tensor_parallel: int
    reporter: Reporter
    storage: storage.Options = field(default_factory=storage.Options)

    def part_name(self, number: int) -> str:
        """Where a result lies in the output."""
        return f"{self.folder}/part-{number:05d}.parquet"

    def run(self, ranks: Ranks, *, is_preempted: Callable[[], bool] = lambda: False) -> None:
        """See RankJob."""
        from dpo_train.model.load import select_device
        from dpo_train.model.tensor_parallel import build_mesh

        del is_preempted  # results are saved as they come
        storage.use(self.storage)
        if self.tensor_parallel > 1:
            ranks = replace(ranks, mesh=build_mesh(select_device(self.device), self.tensor_parallel))
        function = self.make(ranks)
        (local_copy(self.output) / self.folder).mkdir(parents=True, exist_ok=True)
        done, total = self.before, self.before + sum(self.sizes)
        for start in range(0, len(self.tables), ranks.num_shares):
            number = start + ranks.share
            if ranks.any(not all(map(self._is_there, self._round(start, ranks)))):
                # The last round may have fewer tables than shares: the others keep them company.
                result = function(self.tables[min(number, len(self.tables) - 1)])
                if number < len(self.tables) and ranks.is_first_of_share:
                    self._write(result, number)
            done += sum(self.sizes[start : start + ranks.num_shares])
            if ranks.is_first:
                self.reporter.progress(done, total, self.unit)
        ranks.barrier()

    def _round(self, start: int, ranks: Ranks) -> range:
        """Numbers of the tables that all shares do at once."""
        return range(start, min(start + ranks.num_shares, len(self.tables)))

    def _is_there(self, number: int) -> bool:
        """Whether an interrupted attempt has left this result."""
        home = storage.join(self.output, self.part_name(number))
        return storage.info(home) is not None if storage.is_remote(home) else Path(home).is_file()

    def _write(self, result: pa.Table, number: int) -> None:
        path = local_copy(self.output) / self.part_name(number)
        temporary = path.with_suffix(".tmp")
        pq.write_table(result, temporary)
        temporary.replace(path)
        mirror(self.output).publish(self.part_name(number))
