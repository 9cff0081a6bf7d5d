"""Ray Tune behind the executor's question about trials."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import ComputeConfig, RunConfig
from dpo_train.errors import DataError, NonFiniteLossError, WorkerError
from dpo_train.runtime.executor import RayExecutor
from dpo_train.stages import prepare, score_reference, sweep
from dpo_train.stages.executor import Executor, InProcess, TrialEnd
from tests.tiny import tiny_config

EXECUTOR = RayExecutor(ComputeConfig(workers=2, data_workers=1, max_failures=1))


def run(*trials: Any) -> dict[int, TrialEnd]:
    ends: dict[int, TrialEnd] = {}
    EXECUTOR.trials(trials, ends.__setitem__)
    return ends


@pytest.mark.slow
def test_failed_trials_are_findings_and_killed_ones_go_on(tmp_path: Path) -> None:
    """One diverges, one lacks memory, one is killed once: each end comes with its number, results as they were."""
    ends = run(
        functools.partial(_trial, tmp_path / "0"),
        functools.partial(_trial, tmp_path / "1", error=NonFiniteLossError("too hot")),
        functools.partial(_trial, tmp_path / "2", error=MemoryError("no room")),
        functools.partial(_trial, tmp_path / "3", is_killed=True),
    )

    assert ends[0] == TrialEnd(result={"times": 1})
    assert ends[1] == TrialEnd(failure="NonFiniteLossError: too hot.")
    assert ends[2] == TrialEnd(failure="OutOfMemoryError: no room")
    assert ends[3] == TrialEnd(result={"times": 2})


@pytest.mark.parametrize(("error", "expected"), [(DataError("bad"), DataError), (KeyError("x"), WorkerError)])
def test_any_other_error_is_raised_and_no_further_trial_starts(
    tmp_path: Path, error: Exception, expected: type[Exception]
) -> None:
    """An error of ours as itself, another as one that names it."""
    trials = [functools.partial(_trial, tmp_path / str(number), error=error) for number in range(4)]

    with pytest.raises(expected, match=r"bad|KeyError"):
        run(*trials)
    assert len(list(tmp_path.iterdir())) < 4


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["off", "on"], ids=["one process", "a group of two"])
def test_sweep_on_ray_finds_what_one_in_this_process_does(
    scored: tuple[RunConfig, Artifact], tmp_path: Path, shard: str
) -> None:
    """Halving on Ray Tune, each trial by itself or as a Ray Train group of two ranks that share the weights."""
    base, artifact = scored
    config = replace(
        base,
        train=replace(base.train, lora=None, learning_rate=1e-3),
        sweep=replace(base.sweep, betas=(0.1, 0.5), halving=2, use="policy", num_prompts=2),
        compute=replace(base.compute, executor="ray", workers=2, shard=shard),
    )
    here = sweep(replace(config, store=str(tmp_path / "here")), artifact, InProcess())

    there = sweep(replace(config, store=str(tmp_path / "there")), artifact, RayExecutor(config.compute))

    assert there.record.details["parameters"] == here.record.details["parameters"]
    assert there.record.details["policy"] == here.record.details["policy"]
    for mine, others in zip(_trials(here), _trials(there), strict=True):
        assert (mine["name"], mine["steps"]) == (others["name"], others["steps"])
        assert mine["stopped"] == others["stopped"]
    ranks = (tmp_path / "there" / there.record.details["policy"] / "ranks").iterdir()
    assert {json.loads(file.read_text())["world_size"] for file in ranks} == {2 if shard == "on" else 1}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Artifact]:
    config = tiny_config(tmp_path_factory.mktemp("scored"), train__max_steps=4)
    return config, score_reference(config, prepare(config, InProcess()), InProcess())


def _trials(made: Artifact) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((made.path / "trials.json").read_text())["trials"]
    return found


def _trial(
    path: Path, executor: Executor, *, error: Exception | None = None, is_killed: bool = False
) -> Mapping[str, Any]:
    """Has a letter in its file for each time it ran."""
    with path.open("a") as stream:
        stream.write("x")
    times = len(path.read_text())
    if error is not None:
        raise error
    if is_killed and times == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    assert isinstance(executor, InProcess)
    return {"times": times}
