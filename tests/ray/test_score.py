"""The reference's log-probs on a Ray Data actor pool, with actors and drivers that are killed."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.artifacts import Artifact, open_artifact
from dpo_train.config import ComputeConfig, RunConfig
from dpo_train.data.pairs import SPLITS
from dpo_train.data.shards import Split
from dpo_train.progress import Follower
from dpo_train.runtime.executor import RayExecutor
from dpo_train.stages import prepare, score_reference
from dpo_train.stages.executor import InProcess, TableFunction
from tests.command import dpo, start, write_config
from tests.tiny import tiny_config, write_pairs

LOCAL = InProcess()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("score")
    write_pairs(folder / "pairs.jsonl", 1200)
    return tiny_config(folder, compute__executor="ray", compute__data_workers=2)


@pytest.fixture(scope="module")
def pairs(config: RunConfig) -> Artifact:
    return prepare(config, LOCAL)


@pytest.fixture(scope="module")
def expected(config: RunConfig, pairs: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Scores by pair, made in one process."""
    store = str(tmp_path_factory.mktemp("local"))
    return scores(score_reference(replace(config, store=store), pairs, LOCAL))


def scores(scored: Artifact) -> dict[str, list[float]]:
    names = ("pair_id", "reference_chosen_logps", "reference_rejected_logps")
    rows = [row for split in SPLITS for row in Split(scored, split).table(names).to_pylist()]
    return {row["pair_id"]: row["reference_chosen_logps"] + row["reference_rejected_logps"] for row in rows}


def assert_same(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    """To the last bits, which hang on a process's number of threads."""
    assert found.keys() == expected.keys()
    assert all(np.allclose(found[pair_id], expected[pair_id], rtol=1e-6, atol=1e-6) for pair_id in expected)


class Killing(RayExecutor):
    """Each actor of the first attempt kills itself when it is asked for its third unit."""

    def __init__(self, compute: ComputeConfig, marks: Path) -> None:
        super().__init__(compute)
        self._marks = marks

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        return super().map_tables(functools.partial(Suicidal, make, self._marks), tables, uses_model=uses_model)


class Suicidal:
    """Kills its process, SIGKILL, before its third table, once in all."""

    def __init__(self, make: Callable[[], TableFunction], mark: Path) -> None:
        self._function, self._mark, self._calls = make(), mark, 0

    def __call__(self, table: pa.Table) -> pa.Table:
        self._calls += 1
        if self._calls == 3 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._function(table)


@pytest.mark.slow
def test_killed_actor_costs_its_unit_and_nothing_else(
    config: RunConfig, pairs: Artifact, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    """Ray starts it again; every pair is scored once."""
    elsewhere = replace(config, store=str(tmp_path / "store"))
    made = score_reference(elsewhere, pairs, Killing(config.compute, tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert made.record.counts["newly_scored"] == made.record.counts["pairs"] == 1200
    assert_same(scores(made), expected)


@pytest.mark.slow
def test_killed_driver_goes_on_with_unfinished_units(
    config: RunConfig, pairs: Artifact, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    """SIGKILL of the command and all its workers in the middle: the next one scores what no unit file holds."""
    file = write_config(config, tmp_path / "config.yaml")
    arguments = ("score-reference", str(file), "--pairs", str(pairs.path))
    process = start(*arguments, "--output", str(tmp_path / "out"))
    wait_for_progress(Path(config.store), 200)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in family:
        if child.is_running():
            child.kill()
    process.wait()
    done = sum(pq.read_metadata(unit).num_rows for unit in (tmp_path / "out" / "units").glob("*.parquet"))
    assert 200 <= done < 1200
    assert not (tmp_path / "out" / "record.json").exists()

    finished = dpo(*arguments, "--output", str(tmp_path / "out"), store=Path(config.store))

    assert finished.code == 0, finished.output
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["counts"]["newly_scored"] == 1200 - done
    assert f"{done} of 1200 pairs are scored already" in finished.output
    assert_same(scores(open_artifact(tmp_path / "out")), expected)


def wait_for_progress(store: Path, done: int) -> None:
    """Until an event says that so many pairs are scored."""
    followers: dict[Path, Follower] = {}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for events in store.glob("runs/*/events.jsonl"):
            follower = followers.setdefault(events, Follower(events))
            if any(event["kind"] == "progress" and event["done"] >= done for event in follower.new()):
                return
        time.sleep(0.01)
    raise AssertionError("no progress")


@pytest.mark.slow
def test_model_held_by_two_ranks_together_scores_the_same(
    config: RunConfig, pairs: Artifact, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    """Ray Train's workers with half of every weight each, instead of actors with all of them."""
    compute = replace(config.compute, score_sharded=True, workers=2)
    together = replace(config, store=str(tmp_path / "store"), compute=compute)

    found = scores(score_reference(together, pairs, RayExecutor(compute)))

    assert found.keys() == expected.keys()
    assert all(np.allclose(found[pair_id], expected[pair_id], rtol=1e-4, atol=1e-5) for pair_id in expected)
