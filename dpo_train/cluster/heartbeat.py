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
from dpo_train.errors import RunError

HEARTBEAT = "dpo.dev/heartbeat"
PERIOD = "dpo.dev/heartbeat-seconds"


def sign(period_s: int, now: datetime | None = None) -> dict[str, str]:
    """The sign, given at this moment."""
    return {HEARTBEAT: (now or datetime.now(UTC)).isoformat(timespec="seconds"), PERIOD: str(period_s)}


class Heartbeat(threading.Thread):
    """Gives the sign at once, and then every ``period_s`` seconds until ``stop``."""

    def __init__(self, kube: Kube, path: str, uid: str, period_s: int, *, tell: Callable[[str], None]) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._kube, self._path, self._uid, self._period_s, self._tell = kube, path, uid, period_s, tell
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Gives no further sign; does not wait for one that is under way."""
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.is_set() and self._beat():
            self._stopped.wait(self._period_s)

    def _beat(self) -> bool:
        """Whether to go on."""
        # With the uid: a job of the same name that came later refuses our sign.
        body: dict[str, Any] = {"metadata": {"uid": self._uid, "annotations": sign(self._period_s)}}
        try:
            self._kube.ask("PATCH", self._path, body=body, content_type=MERGE_PATCH, patience_s=self._period_s)
        except RefusedError as refused:
            if refused.status not in ANOTHER:  # the launcher sees that itself
                self._tell(f"cannot give a sign of life; `dpo reap` may remove the job while it runs. {refused}")
            return False
        except RunError:
            pass  # the next one may get through
        return True
