"""When a schedule fires: a cron line by the clock of people, and the line that says the same by Kubeflow's clock.

Kubeflow has one clock for all schedules, CRON_SCHEDULE_TIMEZONE of its controller, by default UTC, and tells
nobody which it is.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from zoneinfo import ZoneInfo

from dpo_train.cluster.cron import HORIZON_YEARS, Cron, parse, shifted
from dpo_train.errors import ConfigError

CLOCK = "UTC"
"""Kubeflow's, unless somebody has set another."""
_DESCRIPTION = re.compile(
    r"`(?P<line>[^`]+)` in (?P<zone>\S+), by a clock in (?P<clock>\S+); dpo schedule (?P<mark>\w+)"
)


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """A checked line with all that decides when it fires."""

    line: str
    """As a person wrote it, for a clock in ``zone``."""
    zone: ZoneInfo
    clock: ZoneInfo
    cron: Cron
    """For Kubeflow's ``clock``."""
    start: datetime.datetime | None = None
    """Times after it count."""
    end: datetime.datetime | None = None
    """Times up to it count."""

    def upcoming(self, after: datetime.datetime) -> Iterator[datetime.datetime]:
        """The next times, UTC."""
        begin = max(after, self.start) if self.start else after
        for moment in self.cron.times(begin, self.clock):
            if self.end and moment > self.end:
                return
            yield moment

    def description(self, mark: str) -> str:
        """What stands with the schedule on the server, for people and for ``described``."""
        return f"`{self.line}` in {self.zone.key}, by a clock in {self.clock.key}; dpo schedule {mark}"


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the server keeps of a timetable besides Kubeflow's own line."""

    line: str
    zone: ZoneInfo
    clock: ZoneInfo
    mark: str


def timetable(
    line: str,
    *,
    zone: str = CLOCK,
    clock: str = CLOCK,
    start: str | None = None,
    end: str | None = None,
    now: datetime.datetime,
) -> Timetable:
    """Checks what a person gave.

    Args:
        zone, clock: names of time zones: the person's, and Kubeflow's.
        start, end: in ISO's form; without an offset they are in ``zone``.

    Raises:
        ConfigError: the line is wrong, never fires, or cannot be said by Kubeflow's clock; a zone is unknown; a time is
            none, or the end is over.
    """
    written = " ".join(line.split())
    cron, here, there = parse(line), find_zone(zone, "--timezone"), find_zone(clock, "--cluster-timezone")
    begin, until = _moment(start, here, "--start"), _moment(end, here, "--end")
    if begin and until and until <= begin:
        raise ConfigError("The schedule's end comes before its start", got=f"--start {start} --end {end}")
    if until and until <= now:
        raise ConfigError("The schedule's end is over", got=f"--end {end}", expected=f"after {now:%Y-%m-%dT%H:%MZ}")
    # A start that is over would have Kubeflow begin with a run at once, for the last time since.
    begin = begin if begin and begin > now else None
    found = Timetable(
        line=written,
        zone=here,
        clock=there,
        cron=_translate(cron, written, here, there, begin or now, until),
        start=begin,
        end=until,
    )
    if next(found.upcoming(now), None) is None:
        limits = " and ".join(text for text in (begin and f"after {start}", until and f"up to {end}") if text)
        raise ConfigError(f"The cron line never fires {limits or f'within {HORIZON_YEARS} years'}", got=repr(written))
    return found


def find_zone(name: str, origin: str) -> ZoneInfo:
    """The time zone of this name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return ZoneInfo(name)
    # What is no name is a ValueError, and a folder of zones, such as "Europe", cannot be read.
    except (KeyError, ValueError, OSError):
        raise ConfigError(
            f"{origin} names no time zone that is known here",
            got=repr(name),
            expected="a name such as UTC or Europe/Berlin",
            fix="check it; where no zone at all is known, `pip install tzdata`",
        ) from None


def described(description: str | None) -> Described | None:
    """What ``Timetable.description`` wrote; None: somebody else has made that schedule."""
    found = _DESCRIPTION.fullmatch(description or "")
    if found is None:
        return None
    try:
        zone, clock = find_zone(found["zone"], "zone"), find_zone(found["clock"], "clock")
    except ConfigError:
        return None
    return Described(line=found["line"], zone=zone, clock=clock, mark=found["mark"])


def _translate(
    cron: Cron,
    line: str,
    zone: ZoneInfo,
    clock: ZoneInfo,
    begin: datetime.datetime,
    until: datetime.datetime | None,
) -> Cron:
    """The one line for Kubeflow's clock, whatever the difference of the clocks is until the end."""
    if zone.key == clock.key:
        return cron
    differences = sorted(_differences(zone, clock, begin, until))
    moved = [shifted(cron, minutes) for minutes in differences]
    first = moved[0]
    if first is not None and all(other is not None and _values(other) == _values(first) for other in moved):
        return first
    apart = " and ".join(f"{minutes / 60:+g} h" for minutes in differences)
    said = "; ".join(other.text for other in moved if other is not None) or "no line"
    raise ConfigError(
        f"One line by Kubeflow's clock ({clock.key}) cannot say {line!r} in {zone.key}: it differs by {apart}",
        got=said,
        fix=f"give the line for --timezone {clock.key}, or have CRON_SCHEDULE_TIMEZONE of Kubeflow's controller set, "
        f"which counts for all schedules there, and name that with --cluster-timezone {zone.key}",
    )


def _differences(
    zone: ZoneInfo, clock: ZoneInfo, begin: datetime.datetime, until: datetime.datetime | None
) -> set[int]:
    """How many minutes the clock is ahead of the zone, at all times that matter."""
    last = begin + datetime.timedelta(days=366 * HORIZON_YEARS)
    last = min(last, until) if until else last
    # No zone changes twice within six hours.
    steps = itertools.count(0, 6)
    moments = itertools.takewhile(lambda moment: moment < last, (begin + datetime.timedelta(hours=h) for h in steps))
    return {_ahead(moment, zone, clock) for moment in (*moments, last)}


def _ahead(moment: datetime.datetime, zone: ZoneInfo, clock: ZoneInfo) -> int:
    there, here = moment.astimezone(clock).utcoffset(), moment.astimezone(zone).utcoffset()
    assert there is not None
    assert here is not None
    return round((there - here).total_seconds() / 60)


def _values(cron: Cron) -> tuple[frozenset[int], ...]:
    return tuple(field.values for field in (cron.minute, cron.hour, cron.day, cron.month, cron.weekday))


def _moment(text: str | None, zone: ZoneInfo, origin: str) -> datetime.datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=zone)
        return moment.astimezone(datetime.UTC).replace(microsecond=0)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{origin} is no time", got=repr(text), expected="2026-12-01, 2026-12-01T03:00 or 2026-12-01T03:00+01:00"
        ) from None
