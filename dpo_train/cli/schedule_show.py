"""What a person sees of schedules: when they fire next, and how the last run went."""

from __future__ import annotations

import datetime
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo_train.cli.kubeflow_show import duration, plain

if TYPE_CHECKING:
    from dpo_train.cluster.kubeflow.schedules import Row
    from dpo_train.cluster.kubeflow.timetable import Timetable

SHOWN_TIMES = 3
_COLUMNS = ("name", "status", "next", "cron", "last run", "schedule id")


def print_times(table: Timetable) -> None:
    """The next times, by the clock of people and in UTC."""
    now = datetime.datetime.now(tz=datetime.UTC)
    for moment in itertools.islice(table.upcoming(now), SHOWN_TIMES):
        local = moment.astimezone(table.zone)
        shown = f"{local:%a %Y-%m-%d %H:%M:%S} {table.zone.key}"
        utc = "" if table.zone.key == "UTC" else f"   {moment:%a %Y-%m-%d %H:%M:%S} UTC"
        print(f"  {shown}{utc}", flush=True)


def print_schedules(rows: Sequence[Row]) -> None:
    """A table where a person looks; where a program reads, the same cells between tabs."""
    lines = [[plain(cell) for cell in _cells(row)] for row in rows]
    if not sys.stdout.isatty():
        for line in (_COLUMNS, *lines):
            print("\t".join(line))
        return
    table = Table(box=None, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, no_wrap=column == "schedule id", overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line))
    Console(highlight=False).print(table)


def _cells(row: Row) -> tuple[str, ...]:
    now, table, last = datetime.datetime.now(tz=datetime.UTC), row.table, row.last
    status = "paused" if not row.on else "on" if row.following or table is None else "over"
    following, line = "", "none that is understood"
    if table is not None:
        line = f"{table.line} ({table.zone.key})"
        if row.on and row.following:
            following = f"{row.following.astimezone(table.zone):%Y-%m-%d %H:%M}"
    age = f", {duration((now - last.created).total_seconds())} ago" if last and last.created else ""
    ran = f"{last.state.lower()}{age}" if last else "none yet"
    return row.name, status, following, line, ran, row.schedule_id
