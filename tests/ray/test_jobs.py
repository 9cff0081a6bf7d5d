"""Ray Data, Ray Train and Ray Tune behind the executor's three questions."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file

from dpo_train.artifacts import Artifact
from dpo_train.config import ComputeConfig, RunConfig
from dpo_train.errors import DataError, NonFiniteLossError, WorkerError
from dpo_train.progress import Reporter
from dpo_train.runtime.executor import RayExecutor
from dpo_train.stages import prepare, score_reference
from dpo_train.stages.executor import InProcess
from dpo_train.train.job import TrainJob
from tests.tiny import tiny_config

EXECUTOR = RayExecutor(ComputeConfig(workers=2, data_workers=2, max_failures=2))


def test_map_tables_gives_every_table_once_from_more_than_one_process() -> None:
    """All results come back, and the work is spread over the actors."""
    tables = [pa.table({"x": [index]}) for index in range(20)]

    found = list(EXECUTOR.map_tables(_double, tables, uses_model=True))

    assert sorted(table["x"][0].as_py() for table in found) == [2 * index for index in range(20)]
    assert len({table["pid"][0].as_py() for table in found}) == 2
    assert os.getpid() not in {table["pid"][0].as_py() for table in found}


@pytest.mark.parametrize(("error", "expected"), [(DataError("bad line"), DataError), (KeyError("x"), WorkerError)])
def test_map_tables_raises_what_a_worker_raised(error: Exception, expected: type[Exception]) -> None:
    """An error of ours comes out as itself with its words; another is a WorkerError that names it."""
    with pytest.raises(expected, match=r"bad line|KeyError"):
        list(EXECUTOR.map_tables(functools.partial(_failing, error), [pa.table({"x": [1]})], uses_model=False))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Artifact]:
    config = tiny_config(tmp_path_factory.mktemp("scored"))
    return config, score_reference(config, prepare(config, InProcess()), InProcess())


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, *Random().sample(range(1, 20), 1)], ids=["step 8", "a random step"])
def test_worker_killed_in_the_middle_resumes_to_the_same_weights(
    scored: tuple[RunConfig, Artifact], tmp_path: Path, step: int
) -> None:
    """SIGKILL at any step of 20, with checkpoints every 5: the weights and the history equal the unbroken run's."""
    print(f"killed at step {step}")
    unbroken = _job(scored, tmp_path / "unbroken", Reporter())
    killed = _job(scored, tmp_path / "killed", KillOnce(stage=str(tmp_path / "was-killed"), step=step))

    EXECUTOR.run_ranks(unbroken)
    EXECUTOR.run_ranks(killed)

    assert (tmp_path / "was-killed").exists()
    _assert_same_weights(unbroken, killed)
    losses = [[line["loss"] for line in _history(job)] for job in (unbroken, killed)]
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["adapters", "FSDP2"])
def test_terminated_worker_saves_first_and_nothing_is_trained_twice(
    scored: tuple[RunConfig, Artifact], tmp_path: Path, shard: bool
) -> None:
    """SIGTERM to one of two workers at step 8, with no checkpoint due before the end: each step is done once.

    Both ranks stop after the same step, and the training goes on from there to the unbroken run's weights.
    """
    changes: dict[str, Any] = {"checkpoint_steps": 1000, "lora": None if shard else scored[0].train.lora}
    unbroken = _job(scored, tmp_path / "unbroken", Reporter(), shard=shard, **changes)
    terminated = _job(
        scored, tmp_path / "terminated", TerminateOnce(str(tmp_path / "steps"), str(tmp_path / "was-terminated")),
        shard=shard, **changes,
    )  # fmt: skip

    EXECUTOR.run_ranks(unbroken)
    EXECUTOR.run_ranks(terminated)

    assert (tmp_path / "was-terminated").exists()
    steps = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert steps == list(range(1, 21))
    _assert_same_weights(unbroken, terminated)
    assert [line["loss"] for line in _history(unbroken)] == [line["loss"] for line in _history(terminated)]


@pytest.mark.slow
def test_error_that_a_retry_cannot_mend_is_raised_once(scored: tuple[RunConfig, Artifact], tmp_path: Path) -> None:
    """A rank's own error is not retried though failures are allowed, and arrives as itself."""
    job = _job(scored, tmp_path / "output", RaiseAndCount(stage=str(tmp_path / "count")))

    with pytest.raises(NonFiniteLossError, match="too hot"):
        EXECUTOR.run_ranks(job)

    assert (tmp_path / "count").read_text() == "x"


def _assert_same_weights(one: TrainJob, other: TrainJob) -> None:
    """Bit for bit, and not those of an untrained policy."""
    file = "adapter/adapter_model.safetensors" if one.config.lora else "model/model.safetensors"
    weights = [load_file(Path(job.output) / file) for job in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    if one.config.lora:
        assert any(weights[0][name].abs().max() > 0 for name in weights[0] if "lora_B" in name)
    else:
        base = load_file(Path(one.model.path) / "model.safetensors")
        assert any(not weights[0][name].equal(base[name]) for name in base)


@dataclass(frozen=True)
class TerminateOnce(Reporter):
    """Sends SIGTERM to its own process at step 8, the first time; ``path`` lists the steps, ``stage`` remembers."""

    def progress(self, done: float, total: float, unit: str = "pairs", **metrics: float) -> None:
        with Path(str(self.path)).open("a") as stream:
            stream.write(f"{done:.0f}\n")
        if done == 8 and not Path(self.stage).exists():
            Path(self.stage).touch()
            os.kill(os.getpid(), signal.SIGTERM)

    def event(self, kind: str, **fields: Any) -> None:
        """Nothing but steps goes into the file."""


@dataclass(frozen=True)
class KillOnce(Reporter):
    """Kills its own process at a step, the first time; ``stage`` is the file that remembers."""

    step: int = 8

    def progress(self, done: float, total: float, unit: str = "pairs", **metrics: float) -> None:
        if done == self.step and not Path(self.stage).exists():
            Path(self.stage).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class RaiseAndCount(Reporter):
    """Raises at the first step; the file ``stage`` has a letter for each time."""

    def progress(self, done: float, total: float, unit: str = "pairs", **metrics: float) -> None:
        with Path(self.stage).open("a") as stream:
            stream.write("x")
        raise NonFiniteLossError("too hot")


def _job(
    scored: tuple[RunConfig, Artifact], output: Path, reporter: Reporter, *, shard: bool = False, **changes: Any
) -> TrainJob:
    config, artifact = scored
    output.mkdir()
    return TrainJob(
        model=config.model,
        device="cpu",
        config=replace(config.train, evaluate_steps=1000, **changes),
        seed=0,
        origin={},
        shard=shard,
        pairs=str(artifact.path),
        output=str(output),
        reporter=reporter,
    )


def _history(job: TrainJob) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(job.output) / "metrics.jsonl").read_text().splitlines()]


def _double() -> Callable[[pa.Table], pa.Table]:
    def double(table: pa.Table) -> pa.Table:
        return pa.table({"x": [2 * table["x"][0].as_py()], "pid": [os.getpid()]})

    return double


def _failing(error: Exception) -> Callable[[pa.Table], pa.Table]:
    def fail(table: pa.Table) -> pa.Table:
        raise error

    return fail
