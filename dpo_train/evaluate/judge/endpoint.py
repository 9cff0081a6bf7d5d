"""A language model as judge: every matchup in both orders, as many at a time as the config allows.

matchup --prompts.fill--> two questions --cache, else client.ask--> replies --prompts.parse--> Judgement
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_train.config import EndpointJudge
from dpo_train.errors import RunError
from dpo_train.evaluate.judge import prompts
from dpo_train.evaluate.judge.cache import ReplyCache
from dpo_train.evaluate.judge.checks import api_key
from dpo_train.evaluate.judge.judgement import LOSS, TIE, WIN, Judgement, Matchup
from dpo_train.evaluate.judge.limits import Budget, LimitReachedError, Wait

if TYPE_CHECKING:
    from dpo_train.evaluate.judge.client import Client

T = TypeVar("T")

_WHEN_OURS_IS_FIRST = {"first": WIN, "tie": TIE, "second": LOSS}
_SHOWN_CHARS = 100
_KEPT_CHARS = 2000
"""Of a reply without a decision, when it is shown to the judge again."""
_NOTHING = "(nothing)"
"""In the place of an empty reply: many servers refuse messages without content."""


class Endpoint:
    """The judge behind a server. Replies are kept, so that nothing is paid for twice.

    Args:
        cache: folder for the replies; several processes may share it.
        wait: how pauses are made.
    """

    def __init__(self, config: EndpointJudge, cache: Path, *, wait: Wait = asyncio.sleep) -> None:
        self._config, self._cache, self._wait = config, ReplyCache(cache), wait
        self._text = prompts.load(config.prompt)
        self._key = api_key(config)

    def compare(
        self,
        matchups: Sequence[Matchup],
        *,
        progress: Callable[[int, int], None],
        tell: Callable[[str], None],
    ) -> list[Judgement]:
        """The judge's word on each matchup, in their order.

        Equal answers tie without being sent. ``progress`` gets (done, all); both are called from another thread.

        Raises:
            RunError: the server refuses or fails for good, or a limit is reached; what was judged until then is kept.
            StoreError: the cache cannot be written.
        """
        return _in_thread(
            _Run(self._config, self._text, self._cache, self._wait, progress, tell).judge_all(matchups, self._key)
        )


class _Run:
    """One call of ``compare``, inside its event loop."""

    def __init__(
        self,
        config: EndpointJudge,
        text: str,
        cache: ReplyCache,
        wait: Wait,
        progress: Callable[[int, int], None],
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._text, self._cache, self._wait = config, text, cache, wait
        self._progress, self._tell = progress, tell
        self._budget = Budget(config)
        self._slots = asyncio.Semaphore(config.parallel)
        self._reached: LimitReachedError | None = None
        self._tasks: list[asyncio.Task[Judgement | None]] = []
        self._done = 0

    async def judge_all(self, matchups: Sequence[Matchup], key: str) -> list[Judgement]:
        from dpo_train.evaluate.judge.client import Client

        client = Client(self._config, key, self._budget, wait=self._wait)
        self._tasks = [asyncio.create_task(self._one(client, matchup, len(matchups))) for matchup in matchups]
        try:
            found = await asyncio.gather(*self._tasks)
        finally:
            self._cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await client.close()
        if self._reached is not None:
            raise RunError(
                f"The judge has compared {self._done} of {len(matchups)} pairs of answers, and a limit is reached",
                got=f"evaluate.judge.{self._reached}",
                fix="raise the limit; what was judged is kept, and the same command goes on from there",
            )
        self._tell(f"the judge took {self._budget.requests} requests" + self._cost())
        return [judgement for judgement in found if judgement is not None]

    def _cost(self) -> str:
        return f", cost {self._budget.cost:.4g}" if self._budget.cost else ""

    def _cancel(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _one(self, client: Client, matchup: Matchup, total: int) -> Judgement | None:
        """None: a limit was reached. Others that are under way, and paid for, still end."""
        try:
            judgement = await self._judge(client, matchup)
        except LimitReachedError as error:
            self._reached = error
            return None
        except Exception:
            self._cancel()  # at once: the slot that is free now must not be taken
            raise
        self._done += 1
        self._progress(self._done, total)
        return judgement

    async def _judge(self, client: Client, matchup: Matchup) -> Judgement:
        ours, theirs = matchup.ours, matchup.theirs
        if ours == theirs:
            return Judgement(outcome=TIE)
        async with self._slots:
            one, said = await self._decision(client, prompts.fill(self._text, matchup.prompt, ours, theirs))
            other, also_said = await self._decision(client, prompts.fill(self._text, matchup.prompt, theirs, ours))
        first = None if one is None else _WHEN_OURS_IS_FIRST[one]
        second = None if other is None else 1 - _WHEN_OURS_IS_FIRST[other]
        if first is None or second is None:
            reply = said if first is None else also_said
            reason = f"the judge's reply ends in no decision: {reply.strip()[-_SHOWN_CHARS:]!r}"
            return Judgement(outcome=None, orders=(first, second), reason=reason)
        # Contradicting itself, it has shown no preference for either answer.
        return Judgement(outcome=first if first == second else TIE, orders=(first, second))

    async def _decision(self, client: Client, question: str) -> tuple[str | None, str]:
        """What the judge decides, asked once more where it does not; and its last reply."""
        messages = [{"role": "user", "content": question}]
        reply = await self._ask(client, messages)
        if (decision := prompts.parse(reply)) is None:
            said = reply[-_KEPT_CHARS:]
            messages += [
                {"role": "assistant", "content": said if said.strip() else _NOTHING},
                {"role": "user", "content": prompts.ASK_AGAIN},
            ]
            reply = await self._ask(client, messages)
            decision = prompts.parse(reply)
        return decision, reply

    async def _ask(self, client: Client, messages: Sequence[Mapping[str, str]]) -> str:
        # All that decides the reply. The address too: two servers may have models of one name.
        request = {
            "url": self._config.url,
            "model": self._config.model,
            "messages": list(messages),
            "temperature": self._config.temperature,
            "max_answer_tokens": self._config.max_answer_tokens,
        }
        if (kept := self._cache.get(request)) is not None:
            return kept
        reply = await client.ask(messages, self._tell)
        self._cache.put(request, reply)
        return reply


def _in_thread(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in a thread of its own, because a notebook has a loop running in this one. Ctrl-C cancels."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()
    interrupted = threading.Event()

    async def run() -> T:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        if interrupted.is_set():
            task.cancel()
        return await main

    with ThreadPoolExecutor(1) as pool:
        try:
            result = pool.submit(lambda: asyncio.run(run()))
            # A signal that comes just before a wait for a lock is noticed when the wait ends, so no wait is long.
            while not result.done():
                wait((result,), timeout=1)
            return result.result()
        except BaseException:
            # Wherever it comes, one of both sees the other: the task that it was interrupted, or this that it started.
            interrupted.set()
            if started.done():
                loop, task = started.result()
                with contextlib.suppress(RuntimeError):  # the loop is closed, and the task done
                    loop.call_soon_threadsafe(task.cancel)
            raise
