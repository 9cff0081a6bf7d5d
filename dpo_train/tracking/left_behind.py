"""Journals whose stages are gone: MLflow was away to their end, or they were killed."""

from __future__ import annotations

import math
import time
from pathlib import Path

from dpo_train.errors import DpoError, StoreError
from dpo_train.tracking.client import AwayError, TrackingError
from dpo_train.tracking.experiment import JOURNAL_TAG, Tracking
from dpo_train.tracking.journal import Journal, left_behind
from dpo_train.tracking.run_log import RunLog


def send_left_behind(
    tracking: Tracking, store: Path, *, seconds: float = math.inf
) -> list[tuple[str, DpoError | None]]:
    """Sends what earlier stages of this store could not, the oldest first, and ends the runs of those that were killed.

    Args:
        seconds: after which nothing more is begun.

    Returns:
        by run name what is in the way; None where everything has arrived.
    """
    deadline = time.monotonic() + seconds
    found: list[tuple[str, DpoError | None]] = []
    for path, changed in left_behind(store):
        try:
            journal = Journal(path, {})
        except StoreError as error:
            found.append((path.stem, error))
            continue
        if not journal.header:  # another process has sent it in this very moment
            journal.close(remove=True)
            continue
        problem = _send_journal(tracking, journal, changed, deadline)
        found.append((str(journal.header["name"]), problem))
        journal.close(remove=problem is None)
        if isinstance(problem, AwayError):
            break
    return found


def _send_journal(tracking: Tracking, journal: Journal, changed: int, deadline: float) -> DpoError | None:
    """``changed``: when its stage was last heard of, in milliseconds since 1970."""
    if (uri := journal.header["uri"]) != tracking.uri_shown:
        return TrackingError(f"It belongs to MLflow at {uri}", fix="set tracking.uri to that")
    is_own = JOURNAL_TAG in journal.header.get("tags", {})
    if is_own and not journal.header.get("ended"):
        reason = "its process ended without a word: it was killed, or ran out of memory"
        end = {"op": "end", "status": "KILLED", "error": reason, "milliseconds": changed, "if_running": True}
        journal.append(end, durable=True)
        journal.update(ended=True)
    run = RunLog(tracking, journal)
    if run.send(seconds=deadline - time.monotonic()):
        return None
    return run.problem
