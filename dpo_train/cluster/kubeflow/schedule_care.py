"""What a change of a schedule has to mind: its times, its runs that go on, and Ctrl-C in the middle."""

from __future__ import annotations

import datetime
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dpo_train.cluster.kubeflow.client import Kubeflow, equals
from dpo_train.cluster.kubeflow.runs import RunView, view
from dpo_train.cluster.kubeflow.timetable import Timetable
from dpo_train.errors import UserError

BEFORE, AFTER = datetime.timedelta(seconds=10), datetime.timedelta(seconds=40)
"""Around a time at which a schedule fires, and in which it is not replaced. Kubeflow may be half a minute late."""
KEEPS_RUNS = (2, 16)
"""The release since which Kubeflow can delete a schedule without the run of it that goes on."""

Tell = Callable[[str], None]


def utc_now() -> datetime.datetime:
    """The time by this machine's clock."""
    return datetime.datetime.now(tz=datetime.UTC)


def pause_for(seconds: float) -> None:
    """Waits."""
    time.sleep(seconds)


def wait_for_quiet(tables: Sequence[Timetable], tell: Tell) -> None:
    """Waits until neither the old nor the new one is about to fire, or may be late."""
    now = utc_now()
    firing = [(moment, table) for table in tables for moment in _around(table, now)]
    if firing:
        moment, table = max(firing, key=lambda pair: pair[0])
        seconds = (moment + AFTER - now).total_seconds()
        tell(f"waiting {seconds:.0f} s: it is {moment.astimezone(table.zone):%H:%M:%S}'s turn just now")
        pause_for(seconds)


def _around(table: Timetable, now: datetime.datetime) -> Iterator[datetime.datetime]:
    moment = next(table.upcoming(now - AFTER), None)
    if moment is not None and moment < now + BEFORE:
        yield moment


def check_running(kubeflow: Kubeflow, found: Sequence[Any]) -> None:
    """Whether these can be deleted without ending a run.

    Raises:
        UserError: one has a run that goes on, and the server may be too old to leave it alone.
    """
    if _release(kubeflow) >= KEEPS_RUNS:
        return
    for item in found:
        # One run at a time, and a few that somebody made when it was another number.
        for run in newest(kubeflow, item.recurring_run_id, 10):
            if not run.has_ended:
                raise UserError(
                    f"A run of the schedule {item.display_name!r} goes on, and this Kubeflow would end it with its "
                    "schedule: it does not say that it is of release 2.16 or newer",
                    got=run.run_id,
                    fix="wait for its end, or end it with `dpo cancel`",
                )


def _release(kubeflow: Kubeflow) -> tuple[int, int]:
    """The server's, or zeros where it does not tell; the generated client leaves it out of the answer."""
    found = re.search(r'"tag_name"\s*:\s*"v?(\d+)\.(\d+)', kubeflow.ask(kubeflow.text, "/apis/v2beta1/healthz"))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def newest(kubeflow: Kubeflow, schedule_id: str, count: int) -> list[RunView]:
    """The newest runs of a schedule, at most so many."""
    answer = kubeflow.ask(
        kubeflow.runs.run_service_list_runs,
        filter=equals("recurring_run_id", schedule_id),
        sort_by="created_at desc",
        page_size=count,
        **kubeflow.scope,
    )
    return [view(run) for run in answer.runs or ()]


@contextmanager
def unbroken() -> Iterator[None]:
    """Lets Ctrl-C wait until the block is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)
