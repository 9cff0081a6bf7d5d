"""The lines that a job prints, as its submitter pod has them, each once and in order.

KubeRay submits a job by a Kubernetes Job of the RayJob's name; its pod prints what the Ray job prints. Two things break
the flow, and each has its own way to go on:

- the stream: it is opened again from the second of the last line (``sinceTime``), and what was seen of it is left out
  by its time, which the API gives to the nanosecond;
- the submitter: another pod takes its place, asks Ray for all lines from the first one on, and prints them once more.
  The repetition is left out by what the lines say.
"""

from __future__ import annotations

import re
import threading
from array import array
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from dpo_train.cluster.kube import Kube, StreamBrokenError
from dpo_train.cluster.kube_errors import NoLoginError, RefusedError
from dpo_train.errors import RunError

SUBMITTER = "ray-job-submitter"
"""The container whose log it is; service meshes and the like put others beside it, also before it."""
POLL_S = 2.0
SILENCE_S = 120.0
"""A stream that gives nothing for so long is opened anew: a lost connection looks the same as a quiet job."""
WINDOW = 32
"""So many lines further on a repeated line is looked for: what `ray job submit` prints before the job's first line is
not repeated."""


class Lines:
    """Leaves out what a second submitter of the same Ray job repeats."""

    def __init__(self) -> None:
        self._job: str | None = None
        self._seen = array("q")  # hashes: eight bytes a line, however long the job prints
        self._at = self._end = 0

    def begin(self, ray_job: str) -> None:
        """A submitter begins to print the lines of this Ray job; another job's lines are all new."""
        if ray_job != self._job:
            self._job, self._seen = ray_job, array("q")
        self._at, self._end = 0, len(self._seen)

    def is_new(self, text: str) -> bool:
        """Whether this line was not there before."""
        code = hash(text)
        try:
            self._at = self._seen.index(code, self._at, min(self._end, self._at + WINDOW)) + 1
        except ValueError:
            self._seen.append(code)
            return True
        return False


class Place:
    """Where the reading of one pod stands."""

    def __init__(self) -> None:
        self._last = ""
        self._with_it = 0  # lines that have the last one's time
        self._skip = 0
        self._resumed = False

    def since(self) -> dict[str, str]:
        """The query that goes on from here; what is seen again ``take`` leaves out."""
        self._skip, self._resumed = self._with_it, bool(self._last)
        return {"sinceTime": self._last[: len("2026-01-01T00:00:00")] + "Z"} if self._last else {}

    def take(self, raw: str) -> str | None:
        """The line's text without its time; None: it has been here."""
        time, _, text = raw.partition(" ")
        key = _sortable(time)
        if key is None:  # the kubelet's own word, such as that it cannot read on: written into the stream, not the log
            return raw.removesuffix("\r")
        if self._resumed:
            if key < self._last:
                return None
            if key == self._last and self._skip:
                self._skip -= 1
                return None
            self._resumed = False
        if key > self._last:
            self._last, self._with_it = key, 0
        self._with_it += key == self._last
        return text.removesuffix("\r")


class LogReader(threading.Thread):
    """Reads until ``finish``; a daemon, because a read that hangs must not keep the process."""

    def __init__(self, kube: Kube, name: str, *, tell: Callable[[str], None], line: Callable[[str], None]) -> None:
        super().__init__(name=f"logs of {name}", daemon=True)
        self._kube, self._job_name, self._tell, self._line = kube, name, tell, line
        self._path = f"/api/v1/namespaces/{kube.namespace}/pods"
        self._over, self._stopped = threading.Event(), threading.Event()
        self._lines = Lines()
        self._places: dict[str, Place] = {}
        self._done: set[str] = set()
        self.error: BaseException | None = None
        """What ``line`` raised."""

    def finish(self, limit_s: float) -> None:
        """The job has ended: reads what is still there and stops."""
        self._over.set()
        if self.is_alive():
            self.join(limit_s)
        self.stop()

    def stop(self) -> None:
        """Reads no more."""
        self._stopped.set()

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                over = self._over.is_set()  # before the look at the pods: what ends between the two is read once more
                if self._round() and over:
                    return
                if over:
                    self._stopped.wait(POLL_S / 4)
                else:
                    self._over.wait(POLL_S)
        except RefusedError as refused:
            if refused.status != 404:
                self._tell(
                    f"the job's lines cannot be shown here; kubectl logs job/{self._job_name} has them. {refused}"
                )
        except BaseException as error:  # `line` is the caller's; its errors are raised there
            self.error = error

    def _round(self) -> bool:
        """Reads what there is; whether no pod that has begun is left to be read."""
        try:
            found = self._kube.ask("GET", self._path, query={"labelSelector": f"job-name={self._job_name}"})["items"]
        except (RunError, NoLoginError):
            return False  # the API is away; the launcher itself says when it has been so for too long
        for pod in sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
            if _key(pod) not in self._done and _has_begun(pod) and self._read(pod):
                self._done.add(_key(pod))
        return not any(_has_begun(pod) and _key(pod) not in self._done for pod in found)

    def _read(self, pod: dict[str, Any]) -> bool:
        """Reads on; whether the pod had ended before and was read to its end."""
        ended, key = _has_ended(pod), _key(pod)
        if key not in self._places:
            self._places[key] = Place()
            self._lines.begin(_ray_job(pod))
        place = self._places[key]
        query = {"timestamps": "true", "container": SUBMITTER, **place.since()}
        if not ended:
            query["follow"] = "true"
        path = f"{self._path}/{pod['metadata']['name']}/log"
        try:
            for raw in self._kube.lines(path, query, silence_s=SILENCE_S, patience_s=POLL_S):
                if self._stopped.is_set():
                    return False
                text = place.take(raw)
                if text is not None and self._lines.is_new(text):
                    self._line(text)
        except (StreamBrokenError, RunError, NoLoginError):
            return False
        except RefusedError as refused:
            if refused.status in {400, 404}:  # the container is only being started; the pod is gone
                return refused.status == 404
            raise
        return ended


_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))")
"""As RFC 3339 has it; nodes whose clocks do not show UTC write their offset."""


def _sortable(time: str) -> str | None:
    """A time in UTC as text that sorts: the API leaves out a fraction's last zeros. None: it is none."""
    found = _TIME.fullmatch(time)
    if found is None:
        return None
    second, fraction, sign, hours, minutes = found.groups()
    try:
        moment = datetime.fromisoformat(second)
    except ValueError:
        return None
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    moment = moment + offset if sign == "-" else moment - offset
    return f"{moment.isoformat()}.{fraction or '':0<9}"


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    states = pod.get("status", {}).get("containerStatuses") or []
    return next((dict(state) for state in states if state["name"] == SUBMITTER), {})


def _key(pod: dict[str, Any]) -> str:
    """A restarted container begins a log of its own."""
    return f"{pod['metadata']['uid']}/{_container(pod).get('restartCount', 0)}"


def _has_begun(pod: dict[str, Any]) -> bool:
    return _has_ended(pod) or "running" in _container(pod).get("state", {})


def _has_ended(pod: dict[str, Any]) -> bool:
    over = pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}
    return over or "terminated" in _container(pod).get("state", {})


def _ray_job(pod: dict[str, Any]) -> str:
    """The Ray job whose lines it prints; KubeRay says so in its environment."""
    for container in pod["spec"]["containers"]:
        for item in container.get("env") or []:
            if container["name"] == SUBMITTER and item["name"] == "RAY_JOB_SUBMISSION_ID":
                return str(item.get("value"))
    return ""
