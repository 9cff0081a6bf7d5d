"""Ctrl-C in every stage: exit 130, no traceback, no half output that counts, no stray process; then it goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient

from tests.command import Finished, dpo, start, write_config
from tests.tiny import tiny_config

pytest.importorskip("kfp")
pytest.importorskip("ray")
pytestmark = pytest.mark.slow

STAGES = ["prepare", "sft", "score_reference", "sweep", "train", "evaluate", "register"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupt")
    config = tiny_config(
        folder, compute__executor="ray", compute__workers=2, sweep__betas=[0.1], sweep__max_steps=3, tracking__uri=None,
        sft__enabled=True, sft__max_steps=3, sft__batch_pairs=16,
    )  # fmt: skip
    return write_config(config, folder / "config.yaml")


@pytest.mark.parametrize("stage", STAGES)
def test_interrupt_in_a_stage_leaves_nothing_behind_and_the_next_run_goes_on(config_file: Path, stage: str) -> None:
    """The stages before are complete and reused, the interrupted one is not."""
    store = config_file.parent / "store"
    process = start("run", str(config_file))
    for event in events_of_new_run(store, known=set(folders(store))):
        if event["stage"] == stage and event["kind"] in {"start", "progress", "message"}:
            break
        assert event["kind"] != "end" or event["reused"] or event["stage"] in STAGES[: STAGES.index(stage)]
    family = psutil.Process(process.pid).children(recursive=True)

    # As a terminal does: to the whole group at once; and an impatient person does it twice.
    os.killpg(process.pid, signal.SIGINT)
    if stage == "train":
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 130, output
    assert "Interrupted" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [p.cmdline() for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert list(store.glob(f"{stage}/*/record.json")) == []
    for earlier in STAGES[: STAGES.index(stage)]:
        assert len(list(store.glob(f"{earlier}/*/record.json"))) == 1
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dpo").experiment_id])
    assert "RUNNING" not in {run.info.status for run in runs if run.data.tags["dpo.kind"] == "pipeline"}


def test_run_after_all_interrupts_completes(config_file: Path) -> None:
    """What was complete is reused; the rest is made."""
    finished = dpo("run", str(config_file), store=config_file.parent / "store")

    assert finished.code == 0, finished.output
    reused = [stage for stage, end in finished.ends().items() if end["reused"]]
    assert reused == STAGES[:-1]


def test_terminated_run_ends_as_an_interrupted_one(config_file: Path) -> None:
    """SIGTERM (an administrator, a time limit) clears up too."""
    process = start("run", str(config_file), "seed=7")
    store = config_file.parent / "store"
    for event in events_of_new_run(store, known=set(folders(store))):
        if event["kind"] == "start":
            break
    family = psutil.Process(process.pid).children(recursive=True)

    process.terminate()
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 130, output
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [p.cmdline() for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("stage", ["sweep", "train", "evaluate"])
def test_interrupt_of_a_single_stage_command(config_file: Path, stage: str) -> None:
    """A stage in the command's own process, where Ray would put its own signal handlers."""
    store = config_file.parent / f"single-{stage}"
    process = start(stage, str(config_file), f"store={store}", "sweep.betas=[0.1, 0.2]")
    for event in events_of_new_run(store, known=set()):
        if event["stage"] == stage and event["kind"] == "progress":
            break
    family = psutil.Process(process.pid).children(recursive=True)

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert list(store.glob(f"{stage}/*/record.json")) == []
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [p.cmdline() for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_killed_run_continues_from_the_last_complete_output(config_file: Path) -> None:
    """SIGKILL in the middle of training: Ray ends with its driver, and the next run trains on from a checkpoint."""
    store = config_file.parent / "store"
    arguments = ("run", str(config_file), "seed=11", "train.checkpoint_steps=1")
    process = start(*arguments)
    for event in events_of_new_run(store, known=set(folders(store))):
        if event["stage"] == "train" and event["kind"] == "progress" and event["done"] >= 5:
            break
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    # The task that kfp.local had started is an orphan now; a person's shell would have ended its group.
    for orphan in family:
        try:
            if "executor_main" in " ".join(orphan.cmdline()):
                orphan.kill()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    psutil.wait_procs(family, timeout=60)

    finished: Finished = dpo(*arguments, store=store)

    assert finished.code == 0, finished.output
    assert [s for s, end in finished.ends().items() if end["reused"]] == STAGES[:4]
    steps = [e["done"] for e in finished.events if e["stage"] == "train" and e["kind"] == "progress"]
    # The workers may have come to the end before they noticed; then nothing is left to train.
    assert 1 not in steps
    history = (Path(finished.ends()["train"]["path"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == list(range(20))


def folders(store: Path) -> list[Path]:
    return [path for path in (store / "runs").glob("*") if path.is_dir()]


def events_of_new_run(store: Path, *, known: set[Path], timeout: float = 300) -> Iterator[dict[str, Any]]:
    """Events of the run folder that appears, as they come."""
    deadline = time.monotonic() + timeout
    seen = 0
    while time.monotonic() < deadline:
        for folder in set(folders(store)) - known:
            file = folder / "events.jsonl"
            whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
            for line in whole[seen:]:
                seen += 1
                yield json.loads(line)
        time.sleep(0.02)  # the file is another process's; there is no event to wait for
    raise TimeoutError(f"no such event within {timeout} s")
