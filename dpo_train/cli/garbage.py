"""Outputs that no run refers to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from dpo_train.artifacts import CLAIM_FILE, RECORD_FILE, open_artifact
from dpo_train.disk import lock_path
from dpo_train.errors import StoreError
from dpo_train.runs import run_folders, store_lock


def collect_garbage(store: Path, *, keep_runs: int | None, remove: bool) -> int:
    """Lists, and removes if asked to, outputs that no run used and that no used output was made from."""
    if not store.is_dir():
        raise StoreError(f"There is no store {store}")
    with store_lock(store, alone=remove):
        runs = run_folders(store)
        forgotten = runs[: max(0, len(runs) - keep_runs)] if keep_runs is not None else []
        used = _with_origins(store, {a for run in runs if run not in forgotten for a in run.addresses()})
        total = 0
        for output in _outputs_in(store):
            address = f"{output.parent.name}/{output.name}"
            if address in used:
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
        for run in forgotten if remove else []:
            shutil.rmtree(run.path)
    print(f"{total / 1e6:.1f} MB {'removed' if remove else 'could be removed with --remove'}")
    return 0


def _with_origins(store: Path, addresses: set[str]) -> set[str]:
    """The addresses and, through their records' inputs, all that they were made from."""
    by_digest = _by_digest(store)
    found: set[str] = set()
    waiting = [store / address for address in addresses]
    while waiting:
        output = waiting.pop()
        address = f"{output.parent.name}/{output.name}"
        if address in found or not (output / RECORD_FILE).is_file():
            continue
        found.add(address)
        digests = open_artifact(output).record.inputs.values()
        waiting += [by_digest[digest] for digest in digests if digest in by_digest]
    return found


def _by_digest(store: Path) -> dict[str, Path]:
    """Every output by what others name it by in their inputs; that is of an SFT, or a champion, the model in it."""
    found: dict[str, Path] = {}
    for output in _outputs_in(store):
        found[output.name] = output
        if output.parent.name in {"sft", "champion"} and (output / RECORD_FILE).is_file():
            found[open_artifact(output).record.details.get("model", output.name)] = output
    return found


def _outputs_in(store: Path) -> Iterator[Path]:
    for claim in sorted(store.glob(f"*/*/{CLAIM_FILE}")):
        yield claim.parent
