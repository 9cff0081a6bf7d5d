"""Runs checks side by side, each with a limit, and says what they found in their own order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dpo_train.cluster.doctor.answers import Answer, Finding, answer_of, failed
from dpo_train.errors import DpoError, first_line
from dpo_train.tracking import redacted

LIMIT_S = 45.0
"""Longer than any question's own patience, so that a dead address is mostly said in the words of who asked."""
IMPORT_LIMIT_S = 120.0
"""Of a check that imports MLflow, kfp or torch, which takes its time on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question with a name."""

    name: str
    ask: Callable[[], Answer]
    limit_s: float = LIMIT_S


def run(checks: Sequence[Check]) -> Iterator[Finding]:
    """The findings, in the order of the checks, each as soon as those before it are there."""
    asked = [_Asked(check) for check in checks]
    for each in asked:
        yield each.finding()


class _Asked:
    """A check under way. Its thread is a daemon: one that hangs does not keep the command."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._answer: Answer | None = None
        self._end = time.monotonic() + check.limit_s
        self._thread = threading.Thread(target=self._run, name=f"doctor {check.name}", daemon=True)
        self._thread.start()

    def finding(self) -> Finding:
        """Waits for the answer, until the limit."""
        self._thread.join(max(0.0, self._end - time.monotonic()))
        answer = self._answer or failed(
            f"no answer within {self._check.limit_s:g} s",
            "see whether the address is right and the server well, and run this again",
        )
        mend = None if answer.mend is None else _line(answer.mend)
        return Finding(name=self._check.name, status=answer.status, text=_line(answer.text), mend=mend)

    def _run(self) -> None:
        try:
            self._answer = self._check.ask()
        except DpoError as error:
            self._answer = answer_of(error)
        except Exception as error:
            self._answer = failed(
                f"the check itself failed: {type(error).__name__}: {first_line(error)[:300]}",
                "report this as a bug of dpo; the other lines stand",
            )


def _line(text: str) -> str:
    """One line. Texts of others may have several, and hold an address with a login."""
    return " ".join(redacted(text).split())
