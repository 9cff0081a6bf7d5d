"""Folders of runs: ``<store>/runs/<name>`` holds a run's events and log. What its events name, it refers to.

Everyone who makes outputs holds the store's lock shared; whoever removes some takes it alone.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_train.errors import StoreError
from dpo_train.progress import Follower

RUNS = "runs"


@dataclass(frozen=True)
class RunFolder:
    """What one command did, in which order, with what result."""

    path: Path

    @classmethod
    def create(cls, store: Path) -> RunFolder:
        """A new folder, named by the time for people; nothing depends on the name."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for suffix in ("", *(f"-{n}" for n in range(2, 100))):
            path = store / RUNS / f"{stamp}{suffix}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise StoreError(f"The store {store} cannot be written: {error.strerror}") from None
            return cls(path)
        raise StoreError(f"Too many runs at once in {store}")

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    def addresses(self) -> set[str]:
        """The outputs that the run's stages made or reused."""
        return {event["address"] for event in Follower(self.events).new() if event["kind"] == "end"}


def run_folders(store: Path) -> list[RunFolder]:
    """All runs of a store, the oldest first."""
    paths = [path for path in (store / RUNS).glob("*") if path.is_dir()]
    return [RunFolder(path) for path in sorted(paths, key=lambda path: (path.stat().st_mtime, path.name))]


@contextmanager
def store_lock(store: Path, *, alone: bool) -> Iterator[None]:
    """The store's lock: shared while outputs are made, alone while some are removed.

    Raises:
        StoreError: it is wanted alone and somebody makes outputs right now.
    """
    (store / RUNS).mkdir(parents=True, exist_ok=True)
    with (store / RUNS / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            raise StoreError(f"A stage is running in {store}", fix="try again when it has ended") from None
        yield
