"""A sign of life on a job: an annotation with the time, renewed by whoever waits for the job.

Kubeflow ends a task without giving it time to clean up; ``reaper`` removes the jobs whose sign has become old.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from dpo_train.cluster.kube import MERGE_PATCH, Kube
from dpo_train.cluster.kube_errors import ANOTHER, RefusedError
from dpo_train.errors import DpoError, RunError, UserError

HEARTBEAT = "dpo.dev/heartbeat"
PERIOD = "dpo.dev/heartbeat-seconds"
PATIENCE_S = 20.0
"""How long one sign is tried; then the next one, with the time that it is by then."""
SOON_S = 5.0
"""So long after a sign that could not be given comes the next one: when the API is back, the sign is old already."""


def sign(period_s: int, now: datetime | None = None) -> dict[str, str]:
    """The sign, given at this moment."""
    return {HEARTBEAT: (now or datetime.now(UTC)).isoformat(timespec="seconds"), PERIOD: str(period_s)}


class Heartbeat(threading.Thread):
    """Gives the sign at once, and then every ``period_s`` seconds until ``stop``."""

    def __init__(self, kube: Kube, path: str, uid: str, period_s: int, *, tell: Callable[[str], None]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._kube, self._path, self._uid, self._period_s, self._tell = kube, path, uid, period_s, tell
        self._stopped = threading.Event()
        self._told = False

    def stop(self) -> None:
        """Gives no further sign; does not wait for one that is under way."""
        self._stopped.set()

    def run(self) -> None:
        pause_s: float | None = 0.0
        while pause_s is not None and not self._stopped.wait(pause_s):
            pause_s = self._beat()

    def _beat(self) -> float | None:
        """Seconds until the next one; None: there is none, since the job is gone."""
        # With the uid: a job of the same name that came later refuses our sign.
        body: dict[str, Any] = {"metadata": {"uid": self._uid, "annotations": sign(self._period_s)}}
        patience_s = min(self._period_s, PATIENCE_S)
        try:
            self._kube.ask("PATCH", self._path, body=body, content_type=MERGE_PATCH, patience_s=patience_s)
        except RefusedError as refused:
            if refused.status in ANOTHER:  # the launcher sees that itself
                return None
            self._tell_once(refused)
        except UserError as error:  # a login that cannot be read may just be being written
            self._tell_once(error)
            return min(self._period_s, SOON_S)
        except RunError:  # the launcher says so, if it stays like that
            return min(self._period_s, SOON_S)
        return self._period_s

    def _tell_once(self, error: DpoError) -> None:
        if not self._told:
            self._told = True
            self._tell(f"no sign of life can be given; if it stays so, `dpo reap` may remove the job. {error}")
