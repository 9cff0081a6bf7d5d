"""Timetables: zones, Kubeflow's clock, start and end."""

from __future__ import annotations

import datetime
import itertools
from typing import Any

import pytest

pytest.importorskip("kfp")

from dpo_train.cluster.kubeflow.timetable import described, find_zone, timetable
from dpo_train.errors import ConfigError

NOW = datetime.datetime(2026, 11, 27, 12, tzinfo=datetime.UTC)


def upcoming(line: str, count: int = 3, **named: Any) -> list[str]:
    """The next times in UTC."""
    return [
        f"{moment:%Y-%m-%dT%H:%M}"
        for moment in itertools.islice(timetable(line, now=NOW, **named).upcoming(NOW), count)
    ]


def test_without_zones_all_is_in_utc() -> None:
    """The line goes as it is, with the seconds before it."""
    assert timetable("0 3 * * *", now=NOW).cron.text == "0 0 3 * * *"
    assert upcoming("0 3 * * *") == ["2026-11-28T03:00", "2026-11-29T03:00", "2026-11-30T03:00"]


def test_zone_without_summer_time_is_translated() -> None:
    """Tokyo is always nine hours ahead: three in the morning there is the evening before in UTC."""
    found = timetable("0 3 * * mon", zone="Asia/Tokyo", now=NOW)

    assert found.cron.text == "0 0 18 * * 0"
    assert [
        moment.astimezone(found.zone).strftime("%a %H:%M") for moment in itertools.islice(found.upcoming(NOW), 2)
    ] == [
        "Mon 03:00",
        "Mon 03:00",
    ]


def test_zone_with_summer_time_is_refused() -> None:
    """No line in UTC means three o'clock in Berlin all year; both candidates and the ways out are named."""
    with pytest.raises(ConfigError) as caught:
        timetable("0 3 * * *", zone="Europe/Berlin", now=NOW)

    assert "it differs by -2 h and -1 h. Got: 0 0 1 * * *; 0 0 2 * * *." in str(caught.value)
    assert "--timezone UTC" in str(caught.value)
    assert "--cluster-timezone Europe/Berlin" in str(caught.value)


def test_summer_time_matters_only_where_it_changes_something() -> None:
    """Every quarter of an hour is the same by both clocks, and so is what ends before the clocks are changed."""
    assert timetable("*/15 * * * *", zone="Europe/Berlin", now=NOW).cron.text == "0 */15 * * * *"
    found = timetable("0 3 * * *", zone="Europe/Berlin", end="2027-03-01", now=NOW)
    assert found.cron.text == "0 0 2 * * *"
    with pytest.raises(ConfigError, match="cannot say"):
        timetable("0 3 * * *", zone="Europe/Berlin", end="2027-04-01", now=NOW)


def test_kubeflow_whose_clock_is_the_same() -> None:
    """Then the line needs no translation, and the hour stays while the clocks are changed."""
    named = {"zone": "Europe/Berlin", "clock": "Europe/Berlin", "start": "2027-03-27T12:00"}

    assert timetable("0 3 * * *", now=NOW, **named).cron.text == "0 0 3 * * *"
    assert upcoming("0 3 * * *", **named)[:2] == ["2027-03-28T01:00", "2027-03-29T01:00"]
    assert upcoming("0 3 * * *", 1, **{**named, "start": "2027-03-01"}) == ["2027-03-01T02:00"]


def test_start_and_end_limit_the_times() -> None:
    """After the start, up to the end; without an offset both are by the clock of the zone."""
    assert upcoming("0 3 * * *", start="2027-01-01", end="2027-01-02T03:00") == ["2027-01-01T03:00", "2027-01-02T03:00"]
    assert upcoming("0 3 * * *", 1, start="2027-01-01T03:00") == ["2027-01-02T03:00"]
    found = timetable("0 3 * * *", zone="Asia/Tokyo", start="2027-01-01", end="2027-02-01T00:00Z", now=NOW)
    assert (found.start, found.end) == (
        datetime.datetime(2026, 12, 31, 15, tzinfo=datetime.UTC),
        datetime.datetime(2027, 2, 1, tzinfo=datetime.UTC),
    )


def test_start_that_is_over_is_left_out() -> None:
    """Kubeflow would begin with a run at once."""
    assert timetable("0 3 * * *", start="2026-01-01", now=NOW).start is None


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"zone": "Europe/Atlantis"}, "--timezone names no time zone"),
        ({"zone": "Europe"}, "--timezone names no time zone"),
        ({"zone": ""}, "--timezone names no time zone"),
        ({"zone": "../etc/passwd"}, "--timezone names no time zone"),
        ({"clock": "Mars"}, "--cluster-timezone names no time zone"),
        ({"start": "soon"}, "--start is no time. Got: 'soon'"),
        ({"end": "2026-13-01"}, "--end is no time"),
        ({"end": "2026-11-27T11:59"}, "end is over"),
        ({"start": "2027-02-01", "end": "2027-01-01"}, "end comes before its start"),
        ({"start": "2027-02-01", "end": "2027-02-01"}, "end comes before its start"),
        ({"end": "2026-11-28T02:00"}, "never fires up to 2026-11-28T02:00"),
        ({"start": "2027-01-01T04:00", "end": "2027-01-01T05:00"}, "never fires after 2027-01-01T04:00 and up to"),
    ],
)
def test_what_is_refused(named: dict[str, Any], said: str) -> None:
    """What is wrong is named by its option."""
    with pytest.raises(ConfigError) as caught:
        timetable("0 3 * * *", now=NOW, **named)

    assert said in str(caught.value)


def test_line_without_a_time_in_years_is_refused() -> None:
    """Kubeflow's controller would look for the next one without an end."""
    with pytest.raises(ConfigError, match="never fires within 5 years"):
        timetable("0 0 29 2 */6", now=NOW)


def test_description_is_read_back() -> None:
    """The line as it was written, both zones and the mark; of another's words nothing is understood."""
    found = described(timetable("0  3 * * *", zone="Asia/Tokyo", now=NOW).description("abc"))

    assert found is not None
    assert (found.line, found.zone, found.clock, found.mark) == (
        "0 3 * * *",
        find_zone("Asia/Tokyo", ""),
        find_zone("UTC", ""),
        "abc",
    )
    assert described("my own") is None
    assert described(None) is None
