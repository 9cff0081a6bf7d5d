"""What a schedule consists of: as Kubeflow wants it, and how it differs from one that is there."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_train.cluster.cron import Cron, parse
from dpo_train.cluster.kubeflow.client import Kubeflow, NotThereError, messages
from dpo_train.cluster.kubeflow.submission import CONFIG_ARGUMENT, Reference, Submission, find_experiment
from dpo_train.cluster.kubeflow.timetable import CLOCK, Timetable, described, find_zone
from dpo_train.errors import ConfigError
from dpo_train.tracking import redacted

CONCURRENCY = 1
"""Runs at a time: the next one waits until the one before it has ended."""
NO_CATCHUP = True
"""Of times that were missed, only the last is made up for."""
_SHOWN = 60
"""Signs of a value."""
_NEVER = datetime.datetime.fromtimestamp(0, tz=datetime.UTC)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is to run, and when."""

    submission: Submission
    timetable: Timetable

    @property
    def name(self) -> str:
        """Of the schedule, and of its runs in MLflow."""
        return self.submission.name


def body(schedule: Schedule, reference: Reference, experiment_id: str, *, on: bool, mark: str) -> Any:
    """The message that makes it."""
    table = schedule.timetable
    trigger = messages.V2beta1CronSchedule(cron=table.cron.text, start_time=table.start, end_time=table.end)
    return messages.V2beta1RecurringRun(
        display_name=schedule.name,
        description=table.description(mark),
        experiment_id=experiment_id,
        pipeline_version_reference=messages.V2beta1PipelineVersionReference(
            pipeline_id=reference.pipeline_id, pipeline_version_id=reference.version_id
        ),
        runtime_config=messages.V2beta1RuntimeConfig(parameters=dict(schedule.submission.arguments)),
        service_account=schedule.submission.service_account,
        trigger=messages.V2beta1Trigger(cron_schedule=trigger),
        max_concurrency=str(CONCURRENCY),
        no_catchup=NO_CATCHUP,
        # Kubeflow takes a schedule without a mode for one that is switched off.
        mode="ENABLE" if on else "DISABLE",
    )


def differences(kubeflow: Kubeflow, there: Any, wanted: Schedule, now: datetime.datetime) -> list[str]:
    """In which points one that is there is another: ``what: there -> wanted``; none: it is the same."""
    submission, table = wanted.submission, wanted.timetable
    start, end = limits(there)
    experiment = find_experiment(kubeflow, submission.experiment)
    account = submission.service_account or there.service_account  # without one, Kubeflow fills its own in
    points: dict[str, tuple[Any, Any]] = {
        "cron": (line(there), table.cron.text),
        "start": (start if start and start > now else None, table.start),
        "end": (end, table.end),
        "pipeline version": (_version(kubeflow, there), submission.package.version),
        "experiment": (
            there.experiment_id,
            experiment.experiment_id if experiment else f"{submission.experiment}, which is new",
        ),
        "service account": (there.service_account, account),
        "runs at a time": (int(there.max_concurrency or 0), CONCURRENCY),
        "no catch-up": (bool(there.no_catchup), NO_CATCHUP),
    }
    found = [f"{what}: {_shown(one)} -> {_shown(other)}" for what, (one, other) in points.items() if one != other]
    return [*found, *_arguments(arguments(there), submission.arguments)]


def line(there: Any) -> str:
    """Kubeflow's cron line; empty where the schedule has none."""
    trigger = there.trigger and there.trigger.cron_schedule
    return " ".join(((trigger and trigger.cron) or "").split())


def limits(there: Any) -> tuple[datetime.datetime | None, datetime.datetime | None]:
    """Start and end. Kubeflow writes 1970 for what is not set."""
    trigger = there.trigger and there.trigger.cron_schedule
    start, end = (trigger.start_time, trigger.end_time) if trigger else (None, None)
    return (start if start and start > _NEVER else None), (end if end and end > _NEVER else None)


def arguments(there: Any) -> Mapping[str, Any]:
    """Of its runs."""
    found: Mapping[str, Any] = (there.runtime_config and there.runtime_config.parameters) or {}
    return found


def is_on(there: Any) -> bool:
    """Whether it fires."""
    return bool(there.status == "ENABLED")


def table_of(there: Any) -> Timetable | None:
    """When one that is there fires; None: by no cron line that is understood."""
    try:
        cron: Cron = parse(line(there))
    except ConfigError:
        return None
    start, end = limits(there)
    own, utc = described(there.description), find_zone(CLOCK, "zone")
    return Timetable(
        line=own.line if own else cron.text,
        zone=own.zone if own else utc,
        clock=own.clock if own else utc,
        cron=cron,
        start=start,
        end=end,
    )


def _version(kubeflow: Kubeflow, there: Any) -> str:
    reference = there.pipeline_version_reference
    if reference is None or not reference.pipeline_version_id:
        return "the newest, whichever it is"
    try:
        version = kubeflow.ask(
            kubeflow.pipelines.pipeline_service_get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
    except NotThereError:
        return "one that is gone"
    return str(version.display_name)


def _arguments(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() | wanted.keys()):
        one, other = there.get(name), wanted.get(name)
        if one == other:
            continue
        if name == CONFIG_ARGUMENT:
            before, after = _flat(one), _flat(other)
            changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
            yield from (f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}" for key in changed)
        else:
            yield f"argument {name}: {_shown(one)} -> {_shown(other)}"


def _flat(text: Any) -> dict[str, Any]:
    """A config's values by their keys with points."""
    try:
        content = json.loads(text)
    except (TypeError, ValueError):
        return {CONFIG_ARGUMENT: text}
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else name)
        else:
            found[key] = value

    walk(content, "")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, datetime.datetime):
        return f"{value.astimezone(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    text = redacted(str(value)) if value is not None else "none"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
