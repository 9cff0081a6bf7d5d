"""Schedules: pipelines that Kubeflow starts by the clock, which it calls recurring runs.

They are told apart by their name among those of ``kubeflow.pipeline``, although Kubeflow lets several have one name.
Kubeflow cannot change a schedule. An update makes the new one first and then deletes the old one, so that at no time
there is none; both are there for a moment, in which neither fires. Cut off in between it leaves two, which every
command sees, and which the next update mends.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dpo_train.cluster.kubeflow.client import AwayError, Kubeflow, KubeflowError, NotThereError, equals
from dpo_train.cluster.kubeflow.runs import RunView
from dpo_train.cluster.kubeflow.schedule_care import (
    Tell,
    check_running,
    newest,
    unbroken,
    utc_now,
    wait_for_quiet,
)
from dpo_train.cluster.kubeflow.schedule_content import Schedule, body, differences, is_on, table_of
from dpo_train.cluster.kubeflow.submission import Reference, place
from dpo_train.cluster.kubeflow.timetable import Timetable, described
from dpo_train.errors import RunError, UserError

SHOWN_DIFFERENCES = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a schedule stands."""

    schedule_id: str
    name: str
    on: bool
    table: Timetable | None
    following: datetime.datetime | None
    """When it fires next, if nobody pauses it."""
    last: RunView | None


def find(kubeflow: Kubeflow, pipeline: str, name: str | None = None) -> list[Any]:
    """The schedules of a pipeline, or those of one name, newest first."""
    listing = kubeflow.pipelines.pipeline_service_list_pipelines
    owner = kubeflow.named(listing, "pipelines", pipeline, **kubeflow.scope)
    if owner is None:
        return []
    wanted = {} if name is None else {"filter": equals("display_name", name)}
    recurring = kubeflow.recurring_runs.recurring_run_service_list_recurring_runs
    found = [
        item
        for item in kubeflow.all(recurring, "recurring_runs", **wanted, **kubeflow.scope)
        if item.pipeline_version_reference and item.pipeline_version_reference.pipeline_id == owner.pipeline_id
    ]
    return sorted((item for item in found if name in {None, item.display_name}), key=_age, reverse=True)


def existing(kubeflow: Kubeflow, pipeline: str, name: str) -> list[Any]:
    """The schedules of this name, newest first.

    Raises:
        UserError: there is none.
    """
    found = find(kubeflow, pipeline, name)
    if not found:
        raise UserError(
            f"Kubeflow has no schedule {name!r} of the pipeline {pipeline!r}",
            fix="`dpo schedule CONFIG list` names them, `dpo schedule CONFIG create` makes one",
        )
    return found


def create(kubeflow: Kubeflow, wanted: Schedule, tell: Tell) -> tuple[str, bool]:
    """Makes the schedule, unless it is there.

    Returns:
        Its id, and whether it has been made now.

    Raises:
        KubeflowError: one of this name is there with other content, or several are.
        RunError: it may have been made, but the answer was lost.
    """
    found = find(kubeflow, wanted.submission.pipeline, wanted.name)
    if len(found) > 1:
        raise _several(found)
    if found:
        if points := differences(kubeflow, found[0], wanted, utc_now()):
            raise KubeflowError(
                f"Kubeflow has a schedule {wanted.name!r} with other content",
                got=_listed(points),
                fix="`dpo schedule CONFIG update` replaces it; or give another --name",
            )
        if not is_on(found[0]):
            tell("it is paused; `dpo schedule CONFIG resume` lets it go on")
        return str(found[0].recurring_run_id), False
    made = _make(kubeflow, wanted, place(kubeflow, wanted.submission, tell), on=True)
    return _settle(kubeflow, wanted, made, tell)


def update(kubeflow: Kubeflow, wanted: Schedule, tell: Tell) -> tuple[str, bool]:
    """Puts this schedule into the place of all that have its name; a paused one stays paused.

    Returns:
        Its id, and whether anything has been changed.

    Raises:
        UserError: there is none; or a run goes on that Kubeflow would end with its schedule.
        KubeflowError: the server refuses; the message says what is there now.
    """
    found = existing(kubeflow, wanted.submission.pipeline, wanted.name)
    on = any(is_on(item) for item in found)
    same = (item for item in found if is_on(item) == on and not differences(kubeflow, item, wanted, utc_now()))
    kept: Any = next(same, None)
    old = [item for item in found if item is not kept]
    if not old:
        return str(found[0].recurring_run_id), False
    check_running(kubeflow, old)
    placed = place(kubeflow, wanted.submission, tell)
    if on:
        wait_for_quiet([wanted.timetable, *(table for table in map(table_of, found) if table)], tell)
    with unbroken():
        made = _make(kubeflow, wanted, placed, on=on) if kept is None else str(kept.recurring_run_id)
        _remove_old(kubeflow, old, made if kept is None else None, wanted.name)
    for item in old:
        tell(f"deleted {item.display_name} ({item.recurring_run_id}), which it replaces")
    return _settle(kubeflow, wanted, made, tell)[0], True


def pause(kubeflow: Kubeflow, pipeline: str, name: str) -> list[Any]:
    """Switches all of this name off, and returns them as they were."""
    found = existing(kubeflow, pipeline, name)
    for item in found:
        kubeflow.ask(kubeflow.recurring_runs.recurring_run_service_disable_recurring_run, item.recurring_run_id)
    return found


def resume(kubeflow: Kubeflow, pipeline: str, name: str) -> tuple[Any, bool]:
    """Switches it on.

    Returns:
        The schedule as it was, and whether it missed a time: Kubeflow then starts a run for the last one at once.

    Raises:
        KubeflowError: several have this name.
    """
    found = existing(kubeflow, pipeline, name)
    if len(found) > 1:
        raise _several(found)
    item = found[0]
    missed = not is_on(item) and _has_missed(kubeflow, item)
    kubeflow.ask(kubeflow.recurring_runs.recurring_run_service_enable_recurring_run, item.recurring_run_id)
    return item, missed


def delete(kubeflow: Kubeflow, pipeline: str, name: str) -> list[Any]:
    """Deletes all of this name, and returns them. A run that goes on is not ended.

    Raises:
        UserError: there is none; or a run goes on that Kubeflow would end with its schedule.
    """
    found = existing(kubeflow, pipeline, name)
    check_running(kubeflow, found)
    for item in found:
        _delete(kubeflow, item.recurring_run_id)
    return found


def rows(kubeflow: Kubeflow, pipeline: str) -> list[Row]:
    """How the pipeline's schedules stand, by name."""
    now, answer = utc_now(), []
    for item in sorted(find(kubeflow, pipeline), key=lambda item: (item.display_name, _age(item))):
        table, last = table_of(item), newest(kubeflow, item.recurring_run_id, 1)
        answer.append(
            Row(
                schedule_id=item.recurring_run_id,
                name=item.display_name,
                on=is_on(item),
                table=table,
                following=next(table.upcoming(now), None) if table else None,
                last=last[0] if last else None,
            )
        )
    return answer


def _make(kubeflow: Kubeflow, wanted: Schedule, placed: tuple[Reference, str], *, on: bool) -> str:
    reference, experiment_id = placed
    mark = uuid.uuid4().hex
    message = body(wanted, reference, experiment_id, on=on, mark=mark)
    try:
        made = kubeflow.tell(kubeflow.recurring_runs.recurring_run_service_create_recurring_run, message)
        return str(made.recurring_run_id)
    except AwayError as error:
        if not error.lost:
            raise
        return _find_lost(kubeflow, wanted, mark, error)


def _find_lost(kubeflow: Kubeflow, wanted: Schedule, mark: str, error: AwayError) -> str:
    try:
        for item in find(kubeflow, wanted.submission.pipeline, wanted.name):
            own = described(item.description)
            if own and own.mark == mark:
                return str(item.recurring_run_id)
    except KubeflowError:
        pass
    raise RunError(
        f"It is not known whether the schedule {wanted.name!r} has been made: {error}",
        fix="run the same command again: it looks first",
    ) from error


def _remove_old(kubeflow: Kubeflow, old: Sequence[Any], made: str | None, name: str) -> None:
    """Deletes what has been replaced; if the first of it cannot be deleted, the new one goes instead."""
    for index, item in enumerate(old):
        try:
            _delete(kubeflow, item.recurring_run_id)
        except KubeflowError as error:
            if index == 0 and made is not None:
                _take_back(kubeflow, made, name, error)
                raise
            raise _unfinished(name, error) from error


def _take_back(kubeflow: Kubeflow, made: str, name: str, error: KubeflowError) -> None:
    try:
        _delete(kubeflow, made)
    except KubeflowError:
        raise _unfinished(name, error) from error


def _unfinished(name: str, error: KubeflowError) -> RunError:
    return RunError(
        f"Several schedules {name!r} are there now, and each fires: the old one could not be deleted. {error}",
        fix="run the same update again: it leaves one",
    )


def _settle(kubeflow: Kubeflow, wanted: Schedule, made: str, tell: Tell) -> tuple[str, bool]:
    """Of schedules that several people made at the same moment the first one stays; whoever made another takes it back.

    Raises:
        KubeflowError: somebody else's stays, and it has other content.
    """
    found = find(kubeflow, wanted.submission.pipeline, wanted.name)
    first = found[-1] if found else None
    if first is None or len(found) == 1:
        return made, True
    if first.recurring_run_id == made:
        tell(f"somebody just made another schedule {wanted.name!r}; `dpo schedule CONFIG list` shows whether it stays")
        return made, True
    _delete(kubeflow, made)
    if points := differences(kubeflow, first, wanted, utc_now()):
        raise KubeflowError(
            f"Somebody has made a schedule {wanted.name!r} with other content at the same moment, and that one stays",
            got=_listed(points),
            fix="agree with them; `dpo schedule CONFIG update` replaces it",
        )
    return str(first.recurring_run_id), False


def _has_missed(kubeflow: Kubeflow, item: Any) -> bool:
    table, last = table_of(item), newest(kubeflow, item.recurring_run_id, 1)
    since = (last[0].created if last else None) or item.created_at
    moment = next(table.upcoming(since), None) if table and since else None
    return moment is not None and moment <= utc_now()


def _delete(kubeflow: Kubeflow, schedule_id: str) -> None:
    """Deletes it, and leaves a run of it alone; older servers do not know that word, see ``_check_running``."""
    # It may be gone: somebody was faster, or the first answer was lost.
    with suppress(NotThereError):
        kubeflow.ask(
            kubeflow.recurring_runs.recurring_run_service_delete_recurring_run,
            schedule_id,
            propagation_policy="ORPHAN",
        )


def _several(found: Sequence[Any]) -> KubeflowError:
    ids = ", ".join(str(item.recurring_run_id) for item in found)
    return KubeflowError(
        f"Kubeflow has {len(found)} schedules {found[0].display_name!r}, and each that is not paused fires",
        got=ids,
        fix="`dpo schedule CONFIG update` leaves one, `dpo schedule CONFIG delete` none",
    )


def _listed(points: Sequence[str]) -> str:
    more = len(points) - SHOWN_DIFFERENCES
    return "; ".join(points[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _age(item: Any) -> tuple[str, str]:
    """Whole seconds, then the id: the same order for everybody."""
    return (item.created_at.isoformat() if item.created_at else "", item.recurring_run_id)
