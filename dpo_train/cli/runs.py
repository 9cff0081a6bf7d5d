"""Folders of runs (log, events, outputs used), and outputs that no run refers to."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_train.artifacts import CLAIM_FILE, RECORD_FILE, is_locked, lock_path, write_atomically
from dpo_train.errors import StoreError

RUNS = "runs"


@dataclass(frozen=True)
class RunFolder:
    """``<store>/runs/<time>``: what one command printed and which outputs it used."""

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

    def write_outputs(self, outputs: Sequence[str]) -> None:
        """The addresses this run refers to, for ``dpo gc``."""
        write_atomically(self.path / "outputs.json", json.dumps(list(outputs)) + "\n")


def collect_garbage(store: Path, *, keep_runs: int | None, remove: bool) -> int:
    """Lists, and removes if asked to, outputs that no run folder refers to. One in the making is left alone."""
    if not store.is_dir():
        raise StoreError(f"There is no store {store}")
    runs = sorted(path for path in (store / RUNS).glob("*") if path.is_dir())
    forgotten = runs[: max(0, len(runs) - keep_runs)] if keep_runs is not None else []
    referred = {address for run in runs if run not in forgotten for address in _outputs(run)}
    total = 0
    for output in _outputs_in(store):
        address = f"{output.parent.name}/{output.name}"
        if address in referred or is_locked(output):
            continue
        size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        total += size
        state = "complete" if (output / RECORD_FILE).is_file() else "incomplete"
        print(f"{'removed' if remove else 'unused'}  {address}  {state}  {size / 1e6:.1f} MB")
        if remove:
            # The record first: a removal cut short leaves an incomplete output, not a damaged complete one.
            (output / RECORD_FILE).unlink(missing_ok=True)
            shutil.rmtree(output)
            lock_path(output).unlink(missing_ok=True)
    if remove:
        for run in forgotten:
            shutil.rmtree(run)
    print(f"{total / 1e6:.1f} MB {'removed' if remove else 'could be removed with --remove'}")
    return 0


def _outputs(run: Path) -> list[str]:
    file = run / "outputs.json"
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


def _outputs_in(store: Path) -> Iterator[Path]:
    for claim in sorted(store.glob(f"*/*/{CLAIM_FILE}")):
        yield claim.parent
