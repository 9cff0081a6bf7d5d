"""Garbage: outputs that no run folder refers to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpo_train.artifacts import Output, Summary, produce
from dpo_train.cli.garbage import collect_garbage
from dpo_train.disk import lock_path
from dpo_train.errors import StoreError
from dpo_train.progress import Reporter
from dpo_train.runs import RunFolder, store_lock


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three complete outputs; a run refers to the first."""
    for name in ("a", "b", "c"):
        produce("prepare", {"name": name}, {}, tmp_path / "prepare" / name, _write)
    run = tmp_path / "runs" / "20260101-000000"
    run.mkdir(parents=True)
    used(run, "prepare/a")
    return tmp_path


def test_listing_removes_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --remove the unused outputs are named with their size and stay."""
    assert collect_garbage(store, keep_runs=None, remove=False) == 0

    text = capsys.readouterr().out
    assert "prepare/b  complete" in text
    assert "prepare/c  complete" in text
    assert "prepare/a" not in text
    assert "2.0 MB could be removed" in text
    assert outputs(store) == {"a", "b", "c"}


def test_removal_leaves_what_a_run_refers_to(store: Path) -> None:
    """Only unused outputs go, with their lock files."""
    collect_garbage(store, keep_runs=None, remove=True)

    assert outputs(store) == {"a"}
    assert not lock_path(store / "prepare" / "b").exists()


def test_nothing_is_removed_while_a_stage_runs(store: Path) -> None:
    """A stage holds the store's lock; listing is still possible."""
    with store_lock(store, alone=False):
        assert collect_garbage(store, keep_runs=None, remove=False) == 0
        with pytest.raises(StoreError, match="is running"):
            collect_garbage(store, keep_runs=None, remove=True)

    assert outputs(store) == {"a", "b", "c"}


def test_what_a_used_output_was_made_from_is_used_too(store: Path) -> None:
    """A policy's pairs stay, though the run that made them is forgotten."""
    made = produce("train", {}, {"scored": "b"}, store / "train" / "p", _write)
    used(store / "runs" / "20260101-000000", made.path.relative_to(store).as_posix())

    collect_garbage(store, keep_runs=None, remove=True)

    assert outputs(store) == {"a", "b"}
    assert (store / "train" / "p" / "record.json").is_file()


def test_forgotten_runs_no_longer_hold_outputs(store: Path) -> None:
    """--keep-runs 1 forgets the older run and what only it used."""
    newer = store / "runs" / "20270101-000000"
    newer.mkdir()
    used(newer, "prepare/b")
    os.utime(store / "runs" / "20260101-000000", (0, 0))

    collect_garbage(store, keep_runs=1, remove=True)

    assert outputs(store) == {"b"}
    assert [path.name for path in (store / "runs").iterdir() if path.is_dir()] == [newer.name]


def test_missing_store_is_the_users_mistake(tmp_path: Path) -> None:
    """There is nothing to list."""
    with pytest.raises(StoreError, match="no store"):
        collect_garbage(tmp_path / "nowhere", keep_runs=None, remove=False)


def test_two_runs_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    """The name is a time for people; it need not be unique."""
    folders = {RunFolder.create(tmp_path).path for _ in range(3)}

    assert len(folders) == 3


def used(run: Path, address: str) -> None:
    Reporter(str(RunFolder(run).events), address.partition("/")[0]).event("end", address=address)


def outputs(store: Path) -> set[str]:
    return {path.parent.name for path in store.glob("prepare/*/record.json")}


def _write(output: Output) -> Summary:
    (output.path / "data.bin").write_bytes(bytes(1_000_000))
    return Summary()
