"""The pace of requests, and what Retry-After means."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from dpo_train.evaluate.judge.client import _wish_s
from dpo_train.evaluate.judge.limits import Pace


class Clock:
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits_s: list[float] = []

    async def wait(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        self.now_s += seconds


@pytest.mark.parametrize(("per_minute", "waits_s"), [(30, [2.0, 2.0, 2.0]), (None, [])])
def test_requests_are_spaced_evenly(per_minute: int | None, waits_s: list[float]) -> None:
    """30 a minute are one every 2 s: the first goes at once. Without a number nobody waits."""
    clock = Clock()
    pace = Pace(per_minute, clock.wait, lambda: clock.now_s)

    async def turns() -> None:
        for _ in range(4):
            await pace.turn()

    asyncio.run(turns())

    assert clock.waits_s == waits_s


def test_turns_that_were_not_taken_are_not_saved_up() -> None:
    """After a minute's rest the next two still keep their distance."""
    clock = Clock()
    pace = Pace(60, clock.wait, lambda: clock.now_s)

    async def turns() -> None:
        await pace.turn()
        clock.now_s += 60
        await pace.turn()
        await pace.turn()

    asyncio.run(turns())

    assert clock.waits_s == [1.0]


def test_pause_is_read_in_both_forms() -> None:
    """Seconds or a date (RFC 9110, 10.2.3); whatever else is there asks for no pause."""
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert [_wish_s(text) for text in ("7", "0.5", "-3", "soon", "")] == [7.0, 0.5, 0.0, 0.0, 0.0]
    assert 55 < _wish_s(in_a_minute) <= 60
    assert _wish_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _wish_s("nan") == 0.0
