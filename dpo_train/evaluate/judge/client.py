"""One question to an OpenAI-compatible server, asked until it is answered or it is plain that it will not be."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx2

from dpo_train.config import EndpointJudge
from dpo_train.errors import RunError
from dpo_train.evaluate.judge.limits import Bill, Budget, Pace, Wait

FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
LONGEST_WISH_S = 600.0
"""A server that asks for a longer pause than this has no more to give today."""
MOST_BYTES = 1 << 20
"""Of a response. A reply of 512 tokens has some 3 kB."""
SHORTEST_SECRET = 8
"""Shorter keys ("none", "EMPTY") are words, which a reply may hold by chance."""
_MESSAGE_CHARS = 300

_USAGE = ("prompt_tokens", "completion_tokens")
_PASSING = {408, 409, 425, 429}
_REFUSALS = {
    401: "check the key in the environment variable {variable}",
    403: "check that the key in {variable} may use this model",
    404: "check evaluate.judge.url (the path before /chat/completions) and evaluate.judge.model",
}


@dataclass(frozen=True)
class Failure:
    """What went wrong, and may go well another time."""

    what: str
    wish_s: float = 0.0
    """The pause that the server asks for."""


class Client:
    """A pool of connections. To be used from one event loop, and closed."""

    def __init__(
        self, config: EndpointJudge, key: str, budget: Budget, *, wait: Wait, luck: Callable[[], float] = random.random
    ) -> None:
        self._config, self._key, self._budget = config, key, budget
        self._pace = Pace(config.requests_per_minute, wait)
        self._wait, self._luck = wait, luck
        self._limit_name = "max_tokens"
        self._told: set[str] = set()
        self._http = httpx2.AsyncClient(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=None,  # the limit below is on a whole request, not on each of its parts
            limits=httpx2.Limits(max_connections=config.parallel),
            follow_redirects=False,  # the key is for this server
        )
        self._address = f"{config.url.rstrip('/')}/chat/completions"

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, messages: Sequence[Mapping[str, str]], tell: Callable[[str], None]) -> str:
        """The server's reply.

        Raises:
            RunError: it refuses, or was tried as often as may be.
            LimitReachedError: another request might exceed a limit.
        """
        attempt = 0
        while True:
            attempt += 1
            await self._pace.turn()
            found = await self._send(messages)
            if isinstance(found, str):
                return found
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * (0.5 + 0.5 * self._luck())
            pause_s = max(pause_s, found.wish_s)
            if attempt == self._config.attempts or pause_s > LONGEST_WISH_S:
                raise self._gave_up(found, attempt)
            if found.what not in self._told:
                self._told.add(found.what)
                tell(f"the judge's server: {found.what}; trying again")
            await self._wait(pause_s)

    def _gave_up(self, found: Failure, attempts: int) -> RunError:
        wish = f", which asks for a pause of {found.wish_s:.0f} s" if found.wish_s > LONGEST_WISH_S else ""
        return RunError(
            f"The judge's server at {self._config.url} gave no answer in {attempts} attempts{wish}",
            got=found.what,
            fix="see that it is well and not asked too much at a time (evaluate.judge.parallel, requests_per_minute, "
            "timeout_seconds); what was judged is kept, and the same command goes on from there",
        )

    async def _send(self, messages: Sequence[Mapping[str, str]]) -> str | Failure:
        config = self._config
        payload = {"model": config.model, "messages": list(messages), "temperature": config.temperature}
        payload[self._limit_name] = config.max_answer_tokens
        content = json.dumps(payload).encode()
        async with self._budget.request(content) as bill:
            try:
                async with asyncio.timeout(config.timeout_seconds):
                    status, headers, body = await self._post(content)
            except TimeoutError:
                return Failure(f"no answer within {config.timeout_seconds:g} s")
            except httpx2.RequestError as error:
                return Failure(self._clean(f"{type(error).__name__}: {error}"))
            if status == HTTPStatus.OK:
                return self._reply(body, bill)
            bill.cost = 0.0
        words = self._clean(body.decode("utf-8", "replace"))
        if status == HTTPStatus.BAD_REQUEST and "max_completion_tokens" in words and "max_tokens" in payload:
            self._limit_name = "max_completion_tokens"  # newer models of OpenAI know the limit by this name only
            return await self._send(messages)
        if status in _PASSING or (status >= 500 and status != HTTPStatus.NOT_IMPLEMENTED):
            return Failure(f"status {status}: {words}", _wish_s(headers.get("retry-after", "")))
        raise self._refusal(status, words, headers)

    async def _post(self, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body, of which no more is read than a reply can have."""
        body = bytearray()
        async with self._http.stream("POST", self._address, content=content) as response:
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MOST_BYTES:
                    break
            return response.status_code, response.headers, bytes(body)

    def _reply(self, body: bytes, bill: Bill) -> str | Failure:
        """The text in a response, and its price; a message without text is an empty reply."""
        if len(body) > MOST_BYTES:
            return Failure(f"an answer of more than {MOST_BYTES >> 20} MiB")
        try:
            content: Any = json.loads(body)
            text = content["choices"][0]["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError):
            return Failure(f"an answer that is no chat completion: {self._clean(body.decode('utf-8', 'replace'))}")
        usage = content.get("usage")
        read, written = (usage.get(name) if isinstance(usage, dict) else None for name in _USAGE)
        if isinstance(read, int) and isinstance(written, int) and min(read, written) >= 0:
            bill.cost = self._budget.price(read, written)
        return self._without_key(text).encode("utf-8", "replace").decode()

    def _refusal(self, status: int, words: str, headers: Mapping[str, str]) -> RunError:
        variable = self._config.api_key_variable or "evaluate.judge.api_key_variable"
        fix = _REFUSALS.get(status, "see what the server says, and check evaluate.judge").format(variable=variable)
        if 300 <= status < 400:
            fix = f"set evaluate.judge.url to where it points: {self._clean(headers.get('location', 'nowhere'))}"
        # Servers show a part of the key that they refuse.
        said = "" if status == HTTPStatus.UNAUTHORIZED else f": {words}"
        return RunError(
            f"The judge's server at {self._config.url} refuses to answer",
            got=f"status {status}{said}",
            fix=fix,
        )

    def _clean(self, text: str) -> str:
        """A foreign text as one short line."""
        line = " ".join(self._without_key(text).split())
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)[:_MESSAGE_CHARS].rstrip(".")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= SHORTEST_SECRET else text


def _wish_s(text: str) -> float:
    """Seconds of a Retry-After header: a number, or a date; 0 where it is neither."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
