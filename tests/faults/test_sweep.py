"""SIGKILL in the middle of a sweep: of the whole command, and of one trial's process. The same command goes on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command import dpo, start, write_config
from tests.faults.test_interrupt import events_of_new_run, folders
from tests.tiny import tiny_config

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

BETAS = [0.1, 0.5, 1.0]
STEPS = 30


@dataclass(frozen=True)
class Swept:
    """A finished sweep: its record, its trials by name, and the steps that its last command trained."""

    record: dict[str, Any]
    trials: dict[str, Any]
    steps: list[int]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    config = tiny_config(
        folder, compute__executor="ray", sweep__betas=BETAS, sweep__use="policy", sweep__num_prompts=2,
        train__max_steps=STEPS, train__checkpoint_steps=2, tracking__uri=None,
    )  # fmt: skip
    return write_config(config, folder / "config.yaml")


@pytest.fixture(scope="module")
def unbroken(config_file: Path) -> Swept:
    return finish(config_file, config_file.parent / "unbroken")


def finish(config_file: Path, store: Path) -> Swept:
    """Runs the sweep's command to its end."""
    finished = dpo("sweep", str(config_file), f"store={store}", store=store)
    assert finished.code == 0, finished.output + finished.log[-3000:]
    folder = Path(finished.ends()["sweep"]["path"])
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    progress = [e for e in finished.events if e["stage"] == "sweep" and e["kind"] == "progress"]
    return Swept(
        finished.record("sweep"), {trial["name"]: trial for trial in trials}, [int(e["done"]) for e in progress]
    )


def until(store: Path, known: set[Path], is_it: Callable[[dict[str, Any]], bool]) -> None:
    """Waits for an event of the sweep."""
    events: Iterator[dict[str, Any]] = events_of_new_run(store, known=known)
    assert any(event["stage"] == "sweep" and is_it(event) for event in events)


def test_killed_command_goes_on_where_each_trial_stood(config_file: Path, unbroken: Swept) -> None:
    """Killed within the second trial: the first is not trained again, the second goes on; all numbers are the same."""
    store = config_file.parent / "killed"
    known = set(folders(store))
    process = start("sweep", str(config_file), f"store={store}")
    until(store, known, lambda event: event["kind"] == "progress" and event["done"] >= STEPS + 10)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for orphan in family:  # Ray's own processes, which a lost machine would take along
        try:
            orphan.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=60)

    again = finish(config_file, store)

    assert again.trials == unbroken.trials
    assert again.record["details"] == unbroken.record["details"]
    assert STEPS < again.steps[0] <= again.steps[-1] == len(BETAS) * STEPS
    assert again.steps == sorted(set(again.steps))
    assert_one_policy(store)


def test_killed_trial_goes_on_in_another_process(config_file: Path, unbroken: Swept) -> None:
    """Its worker alone is killed: the same command goes on, and ends as if nothing had been."""
    store = config_file.parent / "lost"
    known = set(folders(store))
    process = start("sweep", str(config_file), f"store={store}")
    until(store, known, lambda event: event["kind"] == "progress" and event["done"] >= STEPS // 2)
    (rank,) = store.glob("train/*/ranks/0.json")
    os.kill(json.loads(rank.read_text())["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    again = finish(config_file, store)  # nothing is left to do: it only reads what is there

    assert again.steps == []
    assert again.trials == unbroken.trials
    assert again.record["details"] == unbroken.record["details"]
    assert_one_policy(store)


def assert_one_policy(store: Path) -> None:
    """The winner's, whole, and no other's."""
    (record,) = store.glob("train/*/record.json")
    assert list(store.glob("train/*/adapter/*.safetensors")) == [
        record.parent / "adapter" / "adapter_model.safetensors"
    ]
