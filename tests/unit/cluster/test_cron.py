"""Cron lines: what is understood, what is refused, when they fire, and the same by another clock."""

from __future__ import annotations

import datetime
import itertools
from zoneinfo import ZoneInfo

import pytest

from dpo_train.cluster import cron
from dpo_train.errors import ConfigError

UTC = ZoneInfo("UTC")
NEW_YORK = ZoneInfo("America/New_York")


def first(line: str, after: str, zone: ZoneInfo = UTC, count: int = 1) -> list[str]:
    """The next times, as a clock of the zone shows them."""
    moment = datetime.datetime.fromisoformat(after)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=zone)
    found = itertools.islice(cron.parse(line).times(moment, zone), count)
    return [item.astimezone(zone).isoformat(timespec="seconds")[: 25 if zone is not UTC else 19] for item in found]


@pytest.mark.parametrize(
    ("line", "after", "expected"),
    [
        ("0 3 * * *", "2026-11-27T02:59:59", "2026-11-27T03:00:00"),
        ("0 3 * * *", "2026-11-27T03:00:00", "2026-11-28T03:00:00"),
        ("30 0 3 * * *", "2026-11-27T03:00:00", "2026-11-27T03:00:30"),
        ("*/15 * * * *", "2026-12-31T23:46:00", "2027-01-01T00:00:00"),
        ("20-35/15 * * * *", "2026-07-09T23:35:51", "2026-07-10T00:20:00"),
        ("5/35 1/2 */2 * *", "2026-07-08T23:41:00", "2026-07-09T01:05:00"),
        ("0 0 9 apr-OCT ?", "2026-07-09T23:35:00", "2026-08-09T00:00:00"),
        ("0 0 29 2 *", "2026-07-09T00:00:00", "2028-02-29T00:00:00"),
        ("0 0 * feb mon/2", "2026-02-02T00:00:00", "2026-02-04T00:00:00"),
        ("0 3 * * 7", "2026-11-27T00:00:00", "2026-11-29T03:00:00"),
        ("0 3 * * fri-7", "2026-11-28T04:00:00", "2026-11-29T03:00:00"),
        ("@weekly", "2026-11-27T00:00:00", "2026-11-29T00:00:00"),
        ("@yearly", "2026-11-27T00:00:00", "2027-01-01T00:00:00"),
    ],
)
def test_next_time(line: str, after: str, expected: str) -> None:
    """Lists, ranges, steps, names, wrapped hours, days, months and years; what is asked about is not counted."""
    assert first(line, after) == [expected]


def test_days_of_month_and_week() -> None:
    """Both restricted: one is enough. A star, even one with a step, lets the other one decide."""
    assert first("0 0 13 * fri", "2026-11-27T00:00:00", count=3) == [
        "2026-12-04T00:00:00",
        "2026-12-11T00:00:00",
        "2026-12-13T00:00:00",
    ]
    assert first("0 0 */5 10 mon", "2026-07-09T00:00:00") == ["2026-10-26T00:00:00"]


@pytest.mark.parametrize(
    ("line", "after", "expected"),
    [
        ("0 2 * * *", "2012-03-11T00:00:00-05:00", ["2012-03-12T02:00:00-04:00"]),
        ("30 2 11 3 *", "2012-03-11T00:00:00-05:00", ["2013-03-11T02:30:00-04:00"]),
        ("0 * * * *", "2012-03-11T01:00:00-05:00", ["2012-03-11T03:00:00-04:00", "2012-03-11T04:00:00-04:00"]),
        ("0 1 * * *", "2012-11-04T00:00:00-04:00", ["2012-11-04T01:00:00-04:00", "2012-11-04T01:00:00-05:00"]),
        ("30 1 4 11 *", "2012-11-04T01:45:00-04:00", ["2012-11-04T01:30:00-05:00"]),
        ("0 3 * * *", "2012-11-04T00:00:00-04:00", ["2012-11-04T03:00:00-05:00", "2012-11-05T03:00:00-05:00"]),
    ],
)
def test_clocks_that_are_changed(line: str, after: str, expected: list[str]) -> None:
    """As Kubeflow's controller does: a time that is leapt over is left out, one that comes twice counts twice."""
    assert first(line, after, NEW_YORK, len(expected)) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "five or six fields"),
        ("0 3 * *", "five or six fields"),
        ("@every 1h", "five or six fields"),
        (
            "60 3 * * *",
            "The minute of the cron line '60 3 * * *' is wrong. Got: '60'. Expected: *, numbers from 0 to 59",
        ),
        ("0 24 * * *", "The hour"),
        ("0 3 0 * *", "The day of the month"),
        ("0 3 * 13 *", "The month"),
        ("0 3 * mai *", "numbers from 1 to 12, or jan, feb"),
        ("0 3 * * 8", "The day of the week"),
        ("0 3 * * fri-mon", "'fri-mon' begins after its end"),
        ("0 3 * * 5L", "The day of the week"),
        ("0 3 * * 1#2", "The day of the week"),
        ("0 3,, * * *", "Got: nothing"),
        ("*/0 3 * * *", "the step of '*/0' is no whole number above 0"),
        ("*/x 3 * * *", "the step of '*/x'"),
        ("-5 3 * * *", "The minute"),
        ("٣ 3 * * *", "The minute"),
        ("* 0 3 * * *", "more than once a minute"),
        ("61 0 3 * * *", "The second"),
        ("0 3 30 2 *", "never fires"),
        ("0 3 31 4,6,9,11 *", "never fires"),
        ("0 3 30 feb ?", "never fires"),
    ],
)
def test_what_is_refused(line: str, said: str) -> None:
    """The field and what may stand there are named."""
    with pytest.raises(ConfigError) as caught:
        cron.parse(line)

    assert said in str(caught.value)


def test_six_fields_for_kubeflow() -> None:
    """A second stands first; Sunday as 7 is written in its terms; all else stays as it was."""
    assert cron.parse("0 3 * * mon-fri").text == "0 0 3 * * mon-fri"
    assert cron.parse("15 0 3 1/2 * ?").text == "15 0 3 1/2 * ?"
    assert cron.parse("0 3 * * 5-7").text == "0 0 3 * * 0,5,6"


@pytest.mark.parametrize(
    ("line", "minutes", "expected"),
    [
        ("0 3 * * *", -60, "0 0 2 * * *"),
        ("0 3 * * *", -330, "0 30 21 * * *"),
        ("0 0 * * mon", -60, "0 0 23 * * 0"),
        ("0 23 * * sun,sat", 120, "0 0 1 * * 0,1"),
        ("30 */6 * * *", -330, "0 0 1,7,13,19 * * *"),
        ("*/15 * * * *", -330, "0 */15 * * * *"),
        ("10,20 * * * *", 45, "0 5,55 * * * *"),
        ("0 12 1 * *", -60, "0 0 11 1 * *"),
        ("0 12 * 7 mon", 60, "0 0 13 * 7 mon"),
    ],
)
def test_same_moments_by_another_clock(line: str, minutes: int, expected: str) -> None:
    """Hours, minutes and, if they must, days of the week are moved; both lines then fire at the same moments."""
    moved = cron.shifted(cron.parse(line), minutes)

    assert moved is not None
    assert moved.text == expected
    start = datetime.datetime(2027, 2, 20, tzinfo=datetime.UTC)
    gap = datetime.timedelta(minutes=minutes)
    before = [moment + gap for moment in itertools.islice(cron.parse(line).times(start, UTC), 40)]
    assert before == list(itertools.islice(moved.times(start + gap, UTC), 40))


@pytest.mark.parametrize(
    ("line", "minutes"),
    [
        ("0 0 1 * *", -60),  # the last day of the month before
        ("0 0,12 * * mon", -60),  # Sunday and Monday
        ("0 0 * 7 *", -60),  # the last of June
        ("0,45 3 * * *", 30),  # two minutes in two hours
    ],
)
def test_no_single_line_says_it(line: str, minutes: int) -> None:
    """None, rather than a line that fires at other moments."""
    assert cron.shifted(cron.parse(line), minutes) is None


def test_line_that_fires_no_more_ends() -> None:
    """29 February on some days of the week only may be decades away: nothing comes within five years."""
    line = cron.parse("0 0 29 2 */6")  # Sundays and Saturdays

    assert first("0 0 29 2 */6", "2026-12-01T00:00:00") == []
    assert line.text == "0 0 0 29 2 */6"
