"""Lines once and in order, by their times within a stream's resumption and by their words between submitters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.cluster.rayjob_logs import Lines, Place

GAPS = st.lists(st.sampled_from([0, 0, 1, 500_000_000, 10**9]), min_size=1, max_size=40)


def stamp(nanoseconds: int) -> str:
    """As the API writes it: a fraction without its last zeros, and none at all for a whole second."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    text = f".{fraction:09d}".rstrip("0") if fraction else ""
    return f"2026-01-01T00:{seconds // 60:02d}:{seconds % 60:02d}{text}Z"


@given(gaps=GAPS, cuts=st.lists(st.integers(1, 12), max_size=8))
def test_a_stream_that_is_cut_anywhere_loses_and_repeats_nothing(gaps: list[int], cuts: list[int]) -> None:
    """The server gives all lines from the second that is asked for; many may share a second, or a nanosecond."""
    times = [sum(gaps[: index + 1]) for index in range(len(gaps))]
    place = Place()
    taken: list[str] = []
    for cut in [*cuts, len(gaps)]:
        since = place.since().get("sinceTime", stamp(0))
        begin = times[0] // 10**9 if not taken else int(since[14:16]) * 60 + int(since[17:19])
        served = [(time, index) for index, time in enumerate(times) if time >= begin * 10**9]
        for time, index in served[: cut if cut < len(gaps) else None]:
            text = place.take(f"{stamp(time)} {index}")
            if text is not None:
                taken.append(text)

    assert taken == [str(index) for index in range(len(taken))]
    assert len(taken) == len(gaps)


def test_a_line_keeps_its_spaces_and_loses_the_carriage_return() -> None:
    """Only the time and one space are the API's."""
    assert Place().take("2026-01-01T00:00:00Z   two  spaces \r") == "  two  spaces "
    assert Place().take("2026-01-01T00:00:00Z ") == ""


@pytest.mark.parametrize("word", ["", "failed", "~failed to watch", "2026-01-01", "2026-13-01T00:00:00Z too late"])
def test_a_line_without_a_time_is_passed_on_and_leaves_the_place(word: str) -> None:
    """The kubelet's own: what comes after it is asked for from the last time that there was."""
    place = Place()
    place.take(f"{stamp(5)} five")
    since = place.since()

    assert place.take(f"{word}\r") == word
    assert place.since() == since == {"sinceTime": "2026-01-01T00:00:00Z"}
    assert place.take(f"{stamp(5)} five") is None
    assert place.take(f"{stamp(6)} six") == "six"


@pytest.mark.parametrize(
    ("time", "utc"),
    [
        ("2026-01-01T01:30:00.25+02:00", "2025-12-31T23:30:00Z"),
        ("2026-01-01T01:30:00-05:30", "2026-01-01T07:00:00Z"),
        ("2026-01-01T01:30:00.123456789Z", "2026-01-01T01:30:00Z"),
    ],
)
def test_nodes_whose_clocks_do_not_show_utc(time: str, utc: str) -> None:
    """Their lines have offsets; a stream is resumed in UTC."""
    place = Place()

    assert place.take(f"{time} a line") == "a line"
    assert place.since() == {"sinceTime": utc}
    assert place.take(f"{time} a line") is None


def test_a_clock_that_is_set_back_loses_no_line() -> None:
    """Within one stream every line is new, whatever its time."""
    place = Place()

    assert [place.take(f"{stamp(time)} {time}") for time in (5, 3, 4)] == ["5", "3", "4"]


@given(st.lists(st.sampled_from(["", "a", "b", "step"]), max_size=30), st.integers(0, 30), st.integers(0, 5))
def test_a_second_submitter_gives_only_what_is_new(lines: list[str], seen: int, more: int) -> None:
    """It prints the same Ray job's lines from the first one on, and equal lines stay lines of their own."""
    deduped = Lines()
    deduped.begin("ray-1")
    first = [text for text in lines[:seen] if deduped.is_new(text)]
    deduped.begin("ray-1")
    new = [f"new {number}" for number in range(more)]
    second = [text for text in lines[:seen] + new if deduped.is_new(text)]

    assert first == lines[:seen]
    assert second == new


def test_what_only_the_first_submitter_printed_is_passed_over() -> None:
    """`ray job submit` speaks before the job does; the second submitter does not submit."""
    deduped = Lines()
    deduped.begin("ray-1")
    for text in ("address", "", "-----", "submitted", "-----", "one", "two"):
        assert deduped.is_new(text)
    deduped.begin("ray-1")

    assert [text for text in ("address", "one", "two", "three") if deduped.is_new(text)] == ["three"]


def test_another_ray_job_repeats_nothing() -> None:
    """KubeRay's retry, or Kueue's second admission, is a run of its own."""
    deduped = Lines()
    deduped.begin("ray-1")
    assert deduped.is_new("one")
    deduped.begin("ray-2")
    assert deduped.is_new("one")
