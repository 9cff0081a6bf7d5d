"""Cron lines as Kubeflow's controller reads them: seconds first, and no other signs than ``* ? , - /`` and names.

It evaluates them with robfig/cron 1.2, which differs from what the libraries for Python do: a step keeps the star
(``*/2`` in one field of the days lets the other one decide alone), a time that the clock leaps over in spring is left
out, one that it shows twice in autumn counts twice, and ``L``, ``#`` and ranges over the week's end do not exist.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from zoneinfo import ZoneInfo

from dpo_train.errors import ConfigError

HORIZON_YEARS = 5
"""What does not fire within so many years, counted to their end, never does: the controller looks no further."""
FIELDS = "minute hour day-of-month month day-of-week, e.g. 0 3 * * * (with six fields, seconds stand first)"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "@hourly": "0 * * * *",
        "@daily": "0 0 * * *",
        "@midnight": "0 0 * * *",
        "@weekly": "0 0 * * 0",
        "@monthly": "0 0 1 * *",
        "@yearly": "0 0 1 1 *",
        "@annually": "0 0 1 1 *",
    }
)


@dataclass(frozen=True, kw_only=True)
class _Bounds:
    name: str
    first: int
    last: int
    names: tuple[str, ...] = ()
    """Of the numbers from ``first`` on."""

    @property
    def all(self) -> frozenset[int]:
        return frozenset(range(self.first, self.last + 1))


_SECOND = _Bounds(name="second", first=0, last=59)
_MINUTE = _Bounds(name="minute", first=0, last=59)
_HOUR = _Bounds(name="hour", first=0, last=23)
_DAY = _Bounds(name="day of the month", first=1, last=31)
_MONTH = _Bounds(name="month", first=1, last=12, names=_MONTHS)
_WEEKDAY = _Bounds(name="day of the week", first=0, last=6, names=_DAYS)
_ALL = (_SECOND, _MINUTE, _HOUR, _DAY, _MONTH, _WEEKDAY)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One of the six."""

    text: str
    values: frozenset[int]
    star: bool
    """Whether a star, or a question mark, is in it."""


@dataclass(frozen=True, kw_only=True)
class Cron:
    """A line that has been understood."""

    second: Field
    minute: Field
    hour: Field
    day: Field
    month: Field
    weekday: Field
    """Sunday is 0."""

    @property
    def text(self) -> str:
        """Six fields, as Kubeflow wants them."""
        fields = (self.second, self.minute, self.hour, self.day, self.month, self.weekday)
        return " ".join(field.text for field in fields)

    def times(self, after: datetime.datetime, zone: ZoneInfo) -> Iterator[datetime.datetime]:
        """The moments, in UTC, at which it fires by a clock of this zone; none any more once five years have none."""
        after = after.astimezone(datetime.UTC)
        day = after.astimezone(zone).date()
        last = _last_day(day)
        while day <= last:
            for moment in self._of_day(day, zone, after) if self.is_on(day) else ():
                yield moment
                last = _last_day(day)
            day += datetime.timedelta(days=1)

    def is_on(self, day: datetime.date) -> bool:
        """Whether it fires on this day: with both fields of days restricted, one of them is enough."""
        in_month, in_week = day.day in self.day.values, day.isoweekday() % 7 in self.weekday.values
        both = self.day.star or self.weekday.star
        return day.month in self.month.values and (in_month and in_week if both else in_month or in_week)

    def _of_day(self, day: datetime.date, zone: ZoneInfo, after: datetime.datetime) -> Iterator[datetime.datetime]:
        for hour in sorted(self.hour.values):
            if _moment(day, hour, 59, 59, zone, fold=1) <= after:
                continue
            for fold in (0, 1):
                for minute in sorted(self.minute.values):
                    for second in sorted(self.second.values):
                        moment = _moment(day, hour, minute, second, zone, fold=fold)
                        shown = moment.astimezone(zone)
                        # A time that is leapt over is shown as another; one that comes once knows no fold.
                        is_there = (shown.date(), shown.hour, shown.minute, shown.fold) == (day, hour, minute, fold)
                        if is_there and moment > after:
                            yield moment


def parse(line: str) -> Cron:
    """A line of five fields, or of six with the seconds first, or a word such as ``@daily``.

    Raises:
        ConfigError: a field is wrong, or it fires more than once a minute, or never.
    """
    texts = _WORDS.get(line.strip().lower(), line).split()
    if len(texts) not in {5, 6}:
        raise ConfigError("A cron line has five or six fields", got=repr(line), expected=FIELDS)
    if len(texts) == 5:
        texts = ["0", *texts]
    second, minute, hour, day, month, weekday = (
        _field(text, bounds, line) for text, bounds in zip(texts, _ALL, strict=True)
    )
    if len(second.values) > 1:
        raise ConfigError(
            "The cron line fires more than once a minute", got=repr(line), fix="give one second, or leave seconds out"
        )
    cron = Cron(second=second, minute=minute, hour=hour, day=day, month=month, weekday=weekday)
    # Kubeflow takes such a line, and its controller then looks for the next time without an end.
    if not _has_day(cron):
        raise ConfigError("The cron line never fires: no year has such a day", got=repr(line))
    return cron


def shifted(cron: Cron, minutes: int) -> Cron | None:
    """The same moments by a clock that is so many minutes ahead; None where no single line says them."""
    hours, rest = divmod(minutes, 60)
    carried = {(minute + rest) // 60 for minute in cron.minute.values}
    any_day = cron.day.values == _DAY.all and cron.month.values == _MONTH.all
    is_daily = any_day and cron.weekday.values == _WEEKDAY.all
    if is_daily and cron.hour.values == _HOUR.all:
        return replace(cron, minute=_moved(cron.minute, rest, _MINUTE))
    if len(carried) > 1:
        return None
    ahead = hours + carried.pop()
    days = {(hour + ahead) // 24 for hour in cron.hour.values}
    found = replace(cron, minute=_moved(cron.minute, rest, _MINUTE), hour=_moved(cron.hour, ahead, _HOUR))
    if is_daily or days == {0}:
        return found
    # Days of a month have no fixed number, so that only days of the week can be moved.
    if len(days) == 1 and any_day and cron.day.star:
        return replace(found, weekday=_moved(cron.weekday, days.pop(), _WEEKDAY))
    return None


def _field(text: str, bounds: _Bounds, line: str) -> Field:
    values: set[int] = set()
    star = sunday = False
    for part in text.split(","):
        span, slash, step_text = part.partition("/")
        begin, dash, end = span.partition("-")
        if begin in {"*", "?"} and not dash:
            first, last, star = bounds.first, bounds.last, True
        else:
            first = _number(begin, bounds, line)
            # Kubeflow knows Sunday as 0 only; many people write 7.
            sunday = sunday or (bounds is _WEEKDAY and "7" in {begin, end})
            last = _number(end, bounds, line) if dash else bounds.last if slash else first
        if first > last:
            raise _wrong(bounds, line, f"{part!r} begins after its end")
        step = int(step_text) if step_text.isdecimal() and step_text.isascii() else 0
        if slash and step < 1:
            raise _wrong(bounds, line, f"the step of {part!r} is no whole number above 0")
        values |= set(range(first, last + 1, step if slash else 1))
    if bounds is _WEEKDAY:
        values = {value % 7 for value in values}
    return Field(text=_text(values) if sunday else text, values=frozenset(values), star=star)


def _number(text: str, bounds: _Bounds, line: str) -> int:
    if text.lower() in bounds.names:
        return bounds.first + bounds.names.index(text.lower())
    last = 7 if bounds is _WEEKDAY else bounds.last
    if not (text.isdecimal() and text.isascii()) or not bounds.first <= int(text) <= last:
        raise _wrong(bounds, line, repr(text) if text else "nothing")
    return int(text)


def _wrong(bounds: _Bounds, line: str, got: str) -> ConfigError:
    names = f", or {', '.join(bounds.names)}" if bounds.names else ""
    return ConfigError(
        f"The {bounds.name} of the cron line {line!r} is wrong",
        got=got,
        expected=f"*, numbers from {bounds.first} to {bounds.last}{names}, lists (1,5), ranges (1-5) and steps (*/5)",
    )


def _has_day(cron: Cron) -> bool:
    # 2028 is a leap year; a day that it does not have comes in no year, whatever weekday it must be.
    days = (datetime.date(2028, 1, 1) + datetime.timedelta(days=index) for index in range(366))
    if cron.day.star or cron.weekday.star:
        return any(day.month in cron.month.values and day.day in cron.day.values for day in days)
    return True


def _moved(field: Field, by: int, bounds: _Bounds) -> Field:
    values = frozenset((value - bounds.first + by) % len(bounds.all) + bounds.first for value in field.values)
    return field if values == field.values else Field(text=_text(values), values=values, star=False)


def _text(values: Iterable[int]) -> str:
    return ",".join(str(value) for value in sorted(values))


def _moment(day: datetime.date, hour: int, minute: int, second: int, zone: ZoneInfo, *, fold: int) -> datetime.datetime:
    local = datetime.datetime(day.year, day.month, day.day, hour, minute, second, tzinfo=zone, fold=fold)
    return local.astimezone(datetime.UTC)


def _last_day(day: datetime.date) -> datetime.date:
    return datetime.date(day.year + HORIZON_YEARS, 12, 31)
