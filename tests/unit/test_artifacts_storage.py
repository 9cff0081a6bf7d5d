"""Outputs on real storage: locks between processes, full disks, read-only mounts."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from dpo_train.artifacts import Output, Summary, check_writable, open_artifact, produce
from dpo_train.disk import is_locked
from dpo_train.errors import DiskFullError, StoreError

HOLD = """
import sys, time
from pathlib import Path
from dpo_train.artifacts import Summary, produce

def body(output):
    print("inside", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    return Summary(counts={"holder": 1})

produce("train", {}, {}, Path(sys.argv[1]), body)
"""


def _make(target: Path, body: Callable[[Output], Summary] = lambda _: Summary()) -> object:
    return produce("train", {}, {}, target, body)


@contextmanager
def _holder(target: Path, release: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is inside the body of the same output until ``release`` exists."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target), str(release)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "inside\n"
            yield process
        finally:
            process.kill()


def _waits_for_a_lock(pid: int) -> bool:
    """By the kernel's own list, where "->" stands before whoever waits."""
    waits = rf"-> FLOCK +\S+ +\S+ +{pid} "
    return re.search(waits, Path("/proc/locks").read_text()) is not None


def test_second_producer_waits_and_reuses(tmp_path: Path) -> None:
    """Two processes on one output: one makes it, the other waits for it and makes nothing."""
    target, release = tmp_path / "out", tmp_path / "release"
    assert not is_locked(target)
    with _holder(target, release) as first:
        assert is_locked(target)
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(target), str(release)], stdout=subprocess.PIPE, text=True
        ) as second:
            while not _waits_for_a_lock(second.pid):
                assert second.poll() is None
                time.sleep(0.01)
            release.touch()
            assert second.communicate(timeout=30)[0] == ""
            assert second.returncode == 0
        assert first.wait(timeout=30) == 0
    assert not is_locked(target)
    assert open_artifact(target).record.counts == {"holder": 1}


def test_lock_dies_with_its_process(tmp_path: Path) -> None:
    """After a kill -9 nothing has to be cleared up by hand."""
    target = tmp_path / "out"
    with _holder(target, tmp_path / "release") as process:
        assert is_locked(target)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        assert not is_locked(target)
    _make(target)
    assert open_artifact(target).record.counts == {}


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    with _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        yield tmp_path / "disk"


def _plain_file(path: Path) -> None:
    path.write_bytes(bytes(1 << 20))


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"a": np.random.default_rng(0).random(1 << 17)}), path)


def _checkpoint(path: Path) -> None:
    with path.open("wb") as stream:
        torch.save({"a": torch.ones(1 << 18)}, stream)


def _safetensors(path: Path) -> None:
    save_file({"a": torch.ones(1 << 18)}, path)


@pytest.mark.parametrize("write", [_plain_file, _parquet, _checkpoint, _safetensors])
def test_full_disk_is_said_and_the_output_does_not_count(small_disk: Path, write: Callable[[Path], None]) -> None:
    """A megabyte onto 64 KiB, through every library that writes outputs; once there is room a rerun succeeds."""

    def body(output: Output) -> Summary:
        write(output.path / "big")
        return Summary()

    target = small_disk / "store" / "out"
    with pytest.raises(DiskFullError, match=r"is full; the output stays incomplete .* free some space"):
        _make(target, body)
    with pytest.raises(StoreError, match="is not complete"):
        open_artifact(target)
    _make(target)
    assert open_artifact(target).record.stage == "train"


def test_disk_too_full_for_the_record_makes_no_record(small_disk: Path) -> None:
    """The content fits and record.json does not: the output stays invisible."""

    def body(output: Output) -> Summary:
        with (output.path / "filler").open("wb") as stream:
            while True:
                try:
                    stream.write(bytes(4096))
                    stream.flush()
                except OSError:
                    break
        return Summary()

    with pytest.raises(DiskFullError):
        _make(small_disk / "out", body)
    with pytest.raises(StoreError, match="is not complete"):
        open_artifact(small_disk / "out")


def test_read_only_store_says_what_to_set(tmp_path: Path) -> None:
    """A mount without write permission, which holds for root as well."""
    with _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs"):
        for attempt in (_make, check_writable):
            with pytest.raises(StoreError, match="cannot be written: Read-only file system") as caught:
                attempt(tmp_path / "disk" / "store" / "out")
            assert "`store`" in str(caught.value)


def test_store_below_a_file_says_what_to_set(tmp_path: Path) -> None:
    """The path of a file cannot hold outputs."""
    (tmp_path / "file").touch()
    for attempt in (_make, check_writable):
        with pytest.raises(StoreError, match="cannot be written: Not a directory"):
            attempt(tmp_path / "file" / "out" / "deep")


def test_store_that_can_be_written_is_made(tmp_path: Path) -> None:
    """The check leaves the folder, and nothing in it."""
    check_writable(tmp_path / "new" / "store")
    assert list((tmp_path / "new" / "store").iterdir()) == []
