"""How much may be asked of an endpoint: requests and money in all, requests a minute.

All of it is used from one event loop, so that nothing happens between two awaits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from dpo_train.config import EndpointJudge

Wait = Callable[[float], Awaitable[None]]

TEMPLATE_TOKENS = 64
"""Tokens that a server's chat template may add to a request; 4 to 20 are usual."""


class LimitReachedError(Exception):
    """One more request might exceed a limit; the message says which, and how much is used."""


@dataclass
class Bill:
    """What a request costs: the most it can, until more is known."""

    cost: float


class Budget:
    """Counts requests and money, and stops before a limit is exceeded rather than after it."""

    def __init__(self, config: EndpointJudge) -> None:
        self._config = config
        self._held = 0.0
        self._under_way = 0
        self._settled = asyncio.Event()
        self.requests = 0
        self.cost = 0.0

    @asynccontextmanager
    async def request(self, content: bytes) -> AsyncIterator[Bill]:
        """Inside, a request may be sent. Its bill is counted at the end; a request that fails may lower it.

        Raises:
            LimitReachedError: it might exceed a limit.
        """
        # A token is at least a byte, so this is never too little.
        most = self.price(len(content) + TEMPLATE_TOKENS, self._config.max_answer_tokens)
        await self._hold(most)
        self.requests += 1
        bill = Bill(most)
        try:
            yield bill
        finally:
            self._held -= most
            self._under_way -= 1
            self.cost += bill.cost
            self._settled.set()

    def price(self, input_tokens: int, output_tokens: int) -> float:
        """Of a request, in the currency of the config's prices."""
        config = self._config
        return (input_tokens * config.price_per_million_input + output_tokens * config.price_per_million_output) / 1e6

    async def _hold(self, cost: float) -> None:
        """Sets the money aside; waits where requests under way may turn out to cost less than is set aside."""
        limit = self._config.max_cost
        while limit is not None and self.cost + self._held + cost > limit:
            if not self._under_way:
                raise LimitReachedError(
                    f"max_cost={limit:g}: {self.cost:.4g} is spent, and one more may cost {cost:.2g}"
                )
            self._settled.clear()
            await self._settled.wait()
        most = self._config.max_requests
        if most is not None and self.requests >= most:
            raise LimitReachedError(f"max_requests={most}: so many are sent")
        self._held += cost
        self._under_way += 1


class Pace:
    """Spaces requests evenly, so that no minute sees more than its number."""

    def __init__(
        self, requests_per_minute: int | None, wait: Wait, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._space_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._wait, self._clock = wait, clock
        self._next_s = -float("inf")

    async def turn(self) -> None:
        """Waits until a request may be sent."""
        now_s = self._clock()
        start_s = max(now_s, self._next_s)
        self._next_s = start_s + self._space_s
        if start_s > now_s:
            await self._wait(start_s - now_s)
