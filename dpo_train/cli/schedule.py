"""`dpo schedule`: the pipeline again and again on Kubeflow Pipelines, by the clock."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dpo_train.cli.kubeflow import CONTENT, add_content_arguments, refuse_options
from dpo_train.config import RunConfig, load_config
from dpo_train.errors import ConfigError

if TYPE_CHECKING:
    from dpo_train.cluster.kubeflow.client import Kubeflow
    from dpo_train.cluster.kubeflow.submission import Submission
    from dpo_train.cluster.kubeflow.timetable import Timetable

HELP = "start the pipeline on Kubeflow Pipelines again and again, by the clock"
_TIMING = ("timezone", "cluster_timezone", "start", "end")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What stands between the config and its overrides."""
    parser.add_argument(
        "action", choices=sorted(_ACTIONS), help="what to do with the schedule that --name names; list shows all"
    )
    parser.add_argument("--name", help="of the schedule (default: the config file's)")
    parser.add_argument(
        "--cron",
        metavar="LINE",
        help='"0 3 * * *": minute, hour, day of month, month, day of week; seconds may precede',
    )
    parser.add_argument("--timezone", metavar="ZONE", help="by whose clock, e.g. Asia/Tokyo (default: UTC)")
    parser.add_argument(
        "--cluster-timezone",
        metavar="ZONE",
        help="CRON_SCHEDULE_TIMEZONE of Kubeflow's controller, if an administrator has set one (default: UTC)",
    )
    parser.add_argument(
        "--start", metavar="TIME", help="times after this one count, e.g. 2026-12-01 or 2026-12-01T03:00"
    )
    parser.add_argument("--end", metavar="TIME", help="times up to this one count")
    add_content_arguments(parser)


def schedule(arguments: argparse.Namespace) -> int:
    """Does what the action says; all that can be checked without asking anybody comes first."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.action not in {"create", "update"}:
        refuse_options(arguments, ("cron", *_TIMING, *CONTENT), f"{arguments.action} only takes --name")
    name = arguments.config.stem if arguments.name is None else arguments.name
    if not name.strip():
        raise ConfigError("The schedule's name is empty", fix="give --name, or leave it out for the config file's")
    return _ACTIONS[arguments.action](config, arguments, name)


def _create(config: RunConfig, arguments: argparse.Namespace, name: str) -> int:
    from dpo_train.cluster.kubeflow import schedules
    from dpo_train.cluster.kubeflow.schedule_content import Schedule

    if arguments.cron is None:
        raise ConfigError("A schedule needs a cron line", fix='give --cron, e.g. --cron "0 3 * * *"')
    table = _timetable(arguments)
    wanted = Schedule(submission=_submission(config, arguments, name), timetable=table)
    kubeflow = _connect(config)
    schedule_id, made = schedules.create(kubeflow, wanted, _tell)
    _tell(f"made the schedule {name}" if made else f"the schedule {name} is there already, with the same content")
    _show(kubeflow, table, schedule_id)
    return 0


def _update(config: RunConfig, arguments: argparse.Namespace, name: str) -> int:
    from dpo_train.cluster.kubeflow import schedules
    from dpo_train.cluster.kubeflow.schedule_content import Schedule

    if arguments.cron is None:
        refuse_options(arguments, _TIMING, "an update keeps the times, unless --cron gives others")
    given = None if arguments.cron is None else _timetable(arguments)
    submission = _submission(config, arguments, name)
    kubeflow = _connect(config)
    table = given or _kept(kubeflow, submission.pipeline, name)
    schedule_id, changed = schedules.update(kubeflow, Schedule(submission=submission, timetable=table), _tell)
    _tell(f"updated the schedule {name}" if changed else f"the schedule {name} has this content already")
    _show(kubeflow, table, schedule_id)
    return 0


def _pause(config: RunConfig, arguments: argparse.Namespace, name: str) -> int:
    from dpo_train.cluster.kubeflow import schedules

    for item in schedules.pause(_connect(config), config.kubeflow.pipeline, name):
        _tell(f"paused {name} ({item.recurring_run_id}); a run of it that goes on is not ended")
    return 0


def _resume(config: RunConfig, arguments: argparse.Namespace, name: str) -> int:
    from dpo_train.cli.schedule_show import print_times
    from dpo_train.cluster.kubeflow import schedules
    from dpo_train.cluster.kubeflow.schedule_content import table_of

    item, has_missed = schedules.resume(_connect(config), config.kubeflow.pipeline, name)
    _tell(f"resumed {name} ({item.recurring_run_id})")
    if has_missed:
        _tell("it missed a time meanwhile: Kubeflow starts one run for the last that it missed, at once")
    if table := table_of(item):
        print_times(table)
    return 0


def _delete(config: RunConfig, arguments: argparse.Namespace, name: str) -> int:
    from dpo_train.cluster.kubeflow import schedules

    for item in schedules.delete(_connect(config), config.kubeflow.pipeline, name):
        _tell(f"deleted {name} ({item.recurring_run_id}); a run of it that goes on is not ended")
    return 0


def _list(config: RunConfig, arguments: argparse.Namespace, name: str) -> int:
    from dpo_train.cli.schedule_show import print_schedules
    from dpo_train.cluster.kubeflow import schedules

    rows = schedules.rows(_connect(config), config.kubeflow.pipeline)
    if arguments.name is not None:
        rows = [row for row in rows if row.name == name]
    if not rows:
        _tell(f"no such schedules of the pipeline {config.kubeflow.pipeline}")
        return 0
    print_schedules(rows)
    names = [row.name for row in rows]
    for twice in sorted({name for name in names if names.count(name) > 1}):
        print(
            f"note: {names.count(twice)} schedules are called {twice}, and each that is on fires; "
            "`dpo schedule CONFIG update` leaves one",
            file=sys.stderr,
        )
    return 0


def _timetable(arguments: argparse.Namespace) -> Timetable:
    from dpo_train.cluster.kubeflow.timetable import CLOCK, timetable

    now = datetime.datetime.now(tz=datetime.UTC)
    table = timetable(
        arguments.cron,
        zone=CLOCK if arguments.timezone is None else arguments.timezone,
        clock=CLOCK if arguments.cluster_timezone is None else arguments.cluster_timezone,
        start=arguments.start,
        end=arguments.end,
        now=now,
    )
    if arguments.start is not None and table.start is None:
        print("note: the start is over, so that the schedule begins now", file=sys.stderr)
    return table


def _kept(kubeflow: Kubeflow, pipeline: str, name: str) -> Timetable:
    """The times of the schedule that is there.

    Raises:
        UserError: there is none, or it has no cron line that is understood.
    """
    from dpo_train.cluster.kubeflow.schedule_content import table_of
    from dpo_train.cluster.kubeflow.schedules import existing

    table = table_of(existing(kubeflow, pipeline, name)[0])
    if table is None:
        raise ConfigError(f"The schedule {name!r} has no cron line that is understood", fix="give --cron")
    return table


def _submission(config: RunConfig, arguments: argparse.Namespace, name: str) -> Submission:
    from dpo_train.cli.kubeflow import compiled_pipeline, parse_arguments
    from dpo_train.cluster.kubeflow.submission import prepare

    package = compiled_pipeline()
    return prepare(
        config,
        package,
        name=name,
        arguments=parse_arguments(package, arguments.argument),
        image=arguments.image,
        experiment=arguments.experiment,
        service_account=arguments.service_account,
        cache=not arguments.no_cache,
    )


def _connect(config: RunConfig) -> Kubeflow:
    from dpo_train.cluster.kubeflow.client import connect
    from dpo_train.cluster.kubeflow.login import address

    return connect(address(config.kubeflow), config.kubeflow)


def _show(kubeflow: Kubeflow, table: Timetable, schedule_id: str) -> None:
    from dpo_train.cli.schedule_show import print_times

    _tell(f"{table.line} in {table.zone.key}; by Kubeflow's clock, in {table.clock.key}: {table.cron.text}")
    print_times(table)
    _tell(f"{kubeflow.address.page}/#/recurringrun/details/{schedule_id}")


def _tell(line: str) -> None:
    print(line, flush=True)


_Action = Callable[[RunConfig, argparse.Namespace, str], int]
_ACTIONS: Mapping[str, _Action] = {
    "create": _create,
    "update": _update,
    "pause": _pause,
    "resume": _resume,
    "delete": _delete,
    "list": _list,
}
