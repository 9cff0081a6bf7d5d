"""Runs a job as a KubeRay RayJob: starts it or finds it, follows it to its end, takes it away if its caller goes.

    none there                         lay job.json, drop an old result, create
    there and alive, same content      adopt: the caller was restarted, or another one waits for the same
    there and succeeded in this run    nothing to do, if its result is there
    there and ended otherwise          delete, wait until it and its pods are gone, create
    there and alive, other content     an error: two configs cannot share a name

A job that has run and failed is not started again within one ``run``: whoever calls decides about another attempt.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpo_train.cluster import heartbeat
from dpo_train.cluster import job as jobs
from dpo_train.cluster.heartbeat import Heartbeat
from dpo_train.cluster.job import Ended, Job
from dpo_train.cluster.kube import MERGE_PATCH, Kube
from dpo_train.cluster.kube_errors import ANOTHER, ClusterError, RefusedError
from dpo_train.cluster.rayjob import API_VERSION, MANAGED_BY, SPEC_HASH, Owner, manifest, spec_hash
from dpo_train.cluster.rayjob_logs import LogReader
from dpo_train.cluster.rayjob_owner import owner_of_this_pod
from dpo_train.cluster.rayjob_pods import obstacles
from dpo_train.cluster.rayjob_removal import delete, give_up
from dpo_train.cluster.rayjob_state import Phase, ended_of, phase_of, words_of
from dpo_train.cluster.watching import watch
from dpo_train.config import RunConfig
from dpo_train.errors import DpoError, RunError

REMOVAL_S = 300.0
"""KubeRay stops the Ray job before it lets a RayJob go, and its pods may take their time to end."""
POLL_S = 1.0
QUIET_S = 60.0
"""A job that has not begun after so long is asked why, and then as often again."""
LAST_LINES_S = 15.0
CANCEL_TIMEOUT_S = 2.0


class RayJobLauncher:
    """Runs jobs as RayJobs in one namespace."""

    def __init__(self, config: RunConfig, kube: Kube | None = None) -> None:
        """Finds the cluster's login.

        Raises:
            ClusterError: there is none.
        """
        self._config = config
        self._kube = kube or Kube(config.cluster.namespace)

    def run(self, job: Job, *, tell: Callable[[str], None], line: Callable[[str], None]) -> Ended:
        """Starts the job, or finds it, and comes back when it has ended; see ``cluster.job.Launcher``.

        An interrupt removes the job, unless other workflows wait for it too. An error of the cluster leaves it: the
        next call finds it.
        """
        voice = _Voice(tell, line)
        try:
            return _Run(self._kube, self._config, job, voice).run()
        finally:
            voice.close()


class _Voice:
    """The caller's two functions, one call at a time and none after the end: they are called from several threads."""

    def __init__(self, tell: Callable[[str], None], line: Callable[[str], None]) -> None:
        self._tell, self._line = tell, line
        self._lock = threading.RLock()
        self._closed = False

    def tell(self, text: str) -> None:
        with self._lock:
            if not self._closed:
                self._tell(text)

    def line(self, text: str) -> None:
        with self._lock:
            if not self._closed:
                self._line(text)

    def close(self) -> None:
        # Without the lock: an interrupt may have come while another thread holds it.
        self._closed = True


class _Run:
    """One call of ``run``."""

    def __init__(self, kube: Kube, config: RunConfig, job: Job, voice: _Voice) -> None:
        self._kube, self._config, self._job, self._voice = kube, config, job, voice
        self._collection = f"/apis/{API_VERSION}/namespaces/{kube.namespace}/rayjobs"
        self._path = f"{self._collection}/{job.name}"
        self._uid: str | None = None
        self._owner: Owner | None = None
        self._owners: list[dict[str, Any]] = []
        """Owner references of the job, as last seen."""
        self._manifest: dict[str, Any] = {}
        self._told: set[str] = set()
        self._over = False

    def run(self) -> Ended:
        try:
            ended = self._start()
            return self._follow() if ended is None else ended
        except DpoError:
            raise
        except BaseException:  # an interrupt, a termination, an error of the caller's own functions
            if not self._over:
                self._cancel()
            raise

    def _start(self) -> Ended | None:
        """Creates or adopts; an end, if it is there already."""
        self._owner = owner_of_this_pod(self._kube, self._voice.tell)
        self._manifest = manifest(self._job, self._config, namespace=self._kube.namespace, owner=self._owner)
        end = time.monotonic() + REMOVAL_S
        asked = False
        while time.monotonic() < end:
            found = self._found()
            if found is None:
                if self._create():
                    return None
                asked = True  # and there is one by now: another launcher's, or ours and the answer was lost
                continue
            if "deletionTimestamp" in found["metadata"]:
                self._once(f"an earlier attempt is being removed from {self._kube.namespace}")
            elif (ended := ended_of(found)) is None or (asked and self._is_same(found)):
                if self._adopt(found):
                    return None
                continue
            elif self._is_same(found) and ended.succeeded and jobs.may_stand(self._job):
                self._voice.tell(f"it has succeeded already in {self._kube.namespace}")
                return ended
            else:
                self._require_ours(found)
                self._voice.tell(f"an earlier attempt ended ({ended.reason}); it is replaced")
                delete(self._kube, self._path, found["metadata"]["uid"])
            self._kube.pause(POLL_S)
        raise RunError(
            f"The RayJob {self._job.name} is being removed and does not go",
            got=f"it was still there after {REMOVAL_S:.0f} s",
            fix="look whether KubeRay's operator runs and the job's pods end (their node may be out of reach): "
            f"kubectl -n {self._kube.namespace} get pods; kubectl -n {self._kube.namespace} describe rayjob "
            f"{self._job.name}",
        )

    def _found(self) -> dict[str, Any] | None:
        try:
            return self._kube.ask("GET", self._path)
        except RefusedError as refused:
            if refused.status == 404 and refused.words.startswith("rayjobs"):
                return None
            raise

    def _create(self) -> bool:
        """Whether it is ours; a lost answer to our own request looks like another's job, and is adopted."""
        jobs.write_job(self._job)
        jobs.drop_result(self._job)
        sign = heartbeat.sign(self._config.cluster.heartbeat_seconds)
        self._manifest["metadata"]["annotations"].update(sign)
        try:
            created = self._kube.ask("POST", self._collection, query={"fieldValidation": "Strict"}, body=self._manifest)
        except RefusedError as refused:
            if refused.status == 409:
                return False
            raise
        self._see(created)
        self._voice.tell(f"created as a RayJob in {self._kube.namespace}")
        return True

    def _adopt(self, found: Mapping[str, Any]) -> bool:
        """Whether it is followed from here on; not if it has changed meanwhile."""
        if not self._is_same(found):
            raise ClusterError(
                f"A RayJob {self._job.name} with other content is alive in {self._kube.namespace}",
                got=f"spec {_hash(found)}",
                expected=f"spec {spec_hash(self._manifest)}: image, resources and settings of this config",
                fix=f"wait for its end, or end it: kubectl -n {self._kube.namespace} delete rayjob {self._job.name}",
            )
        shared = self._share(found)
        if shared is None:
            return False
        self._see(shared)
        self._voice.tell(f"found in {self._kube.namespace}, {phase_of(found)}; it is followed")
        return True

    def _share(self, found: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The job with our owner added; None: it has changed meanwhile.

        Else the job would go with the workflow that began it, although this one waits for it too.
        """
        metadata = found["metadata"]
        owners = metadata.get("ownerReferences", [])
        if self._owner is None or self._owner.uid in {known["uid"] for known in owners}:
            return found
        change = {
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],  # another one may be adding itself
            "ownerReferences": [*owners, *self._manifest["metadata"]["ownerReferences"]],
        }
        try:
            return self._kube.ask("PATCH", self._path, body={"metadata": change}, content_type=MERGE_PATCH)
        except RefusedError as refused:
            if refused.status in ANOTHER:
                return None
            raise

    def _see(self, found: Mapping[str, Any]) -> None:
        """Whose job it is, for who is interrupted and has no time to ask."""
        self._uid, self._owners = found["metadata"]["uid"], found["metadata"].get("ownerReferences", [])

    def _is_same(self, found: Mapping[str, Any]) -> bool:
        return _hash(found) == spec_hash(self._manifest)

    def _require_ours(self, found: Mapping[str, Any]) -> None:
        if not MANAGED_BY.items() <= found["metadata"].get("labels", {}).items():
            raise ClusterError(
                f"The RayJob {self._job.name} in {self._kube.namespace} is not one that dpo has made",
                fix="delete it, or set another cluster.namespace",
            )

    def _follow(self) -> Ended:
        assert self._uid is not None
        seconds = self._config.cluster.heartbeat_seconds
        logs = LogReader(self._kube, self._job.name, tell=self._voice.tell, line=self._voice.line)
        beats = Heartbeat(self._kube, self._path, self._uid, seconds, tell=self._voice.tell)
        with _stopping(logs, beats):
            beats.start()
            ended = self._to_the_end(logs)
            logs.finish(LAST_LINES_S)
        if logs.error is not None:
            raise logs.error
        return ended

    def _to_the_end(self, logs: LogReader) -> Ended:
        phase: Phase = "new"
        since = time.monotonic()
        for found in watch(self._kube, self._collection, self._job.name, every_s=QUIET_S / 2):
            if found is None or found["metadata"]["uid"] != self._uid:
                return self._gone()
            self._see(found)
            if logs.error is not None:
                raise logs.error
            if "deletionTimestamp" in found["metadata"]:
                self._once(f"somebody has removed it; its pods in {self._kube.namespace} are ending")
            now = phase_of(found)
            if now in {"running", "ended"} and not logs.is_alive() and logs.ident is None:
                logs.start()
            ended = ended_of(found)
            if ended is not None:
                self._over = True
                return ended
            if now != phase:
                self._voice.tell(words_of(found))
                phase, since = now, time.monotonic()
            if now in {"new", "starting"} and time.monotonic() - since >= QUIET_S:
                since = time.monotonic()
                self._explain(found, now)
        raise AssertionError("a watch ends with None")

    def _gone(self) -> Ended:
        """The RayJob is not there any more. That is no harm if it had ended, and KubeRay tidied up while we were away.

        Raises:
            RunError: it was deleted before it had ended.
        """
        result = jobs.read_result(self._job)
        if result is not None:
            return Ended(succeeded=result.error is None, reason="it ended, and its RayJob is gone already")
        raise RunError(
            f"The RayJob {self._job.name} was deleted while it ran",
            got=f"it is not in {self._kube.namespace} any more",
            fix="run again if that was a mistake; the stage goes on from what is complete",
        )

    def _explain(self, found: Mapping[str, Any], phase: Phase) -> None:
        """Says what keeps the job from beginning; each thing once.

        Raises:
            ClusterError: something that will stay as it is.
        """
        seen = obstacles(self._kube, self._job.name, (found.get("status") or {}).get("rayClusterName"))
        hopeless = next((obstacle for obstacle in seen if obstacle.hopeless), None)
        if hopeless is not None:
            self._remove()
            raise ClusterError(
                "The job can never begin, and was removed",
                got=hopeless.text,
                fix="mend cluster.image (or kubeflow.image)",
            )
        for obstacle in seen:
            self._once(f"not begun yet: {obstacle.text}")
        if not seen and phase == "new":
            self._once(f"KubeRay's operator has not looked at it yet; does it run, for {self._kube.namespace} too?")

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._voice.tell(text)

    def _cancel(self) -> None:
        """Gives the job up with the first request; a task that is ended may have one second."""
        with self._unless_gone():
            if self._uid is None and self._manifest:  # it came between the request and its answer
                found = self._kube.ask("GET", self._path, patience_s=0, timeout_s=CANCEL_TIMEOUT_S)
                if self._is_same(found) and ended_of(found) is None:
                    self._see(found)
            if self._uid is not None:
                own = None if self._owner is None else self._owner.uid
                become = give_up(self._kube, self._path, self._uid, self._owners, own, limit_s=CANCEL_TIMEOUT_S)
                if become:
                    self._voice.tell(become)

    def _remove(self) -> None:
        """Takes the job away, whoever else waits for it."""
        assert self._uid is not None
        with self._unless_gone():
            delete(self._kube, self._path, self._uid, patience_s=CANCEL_TIMEOUT_S, timeout_s=CANCEL_TIMEOUT_S)

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """A job that is gone already is no trouble; what else goes wrong is told, since a first error is under way."""
        try:
            yield
        except DpoError as error:
            if not (isinstance(error, RefusedError) and error.status == 404):
                self._voice.tell(f"could not be removed; `dpo reap` will. {error}")


@contextlib.contextmanager
def _stopping(*threads: LogReader | Heartbeat) -> Iterator[None]:
    """Stops them; waits for none, since an interrupted caller has no time."""
    try:
        yield
    finally:
        for thread in threads:
            thread.stop()


def _hash(found: Mapping[str, Any]) -> str | None:
    value = found["metadata"].get("annotations", {}).get(SPEC_HASH)
    return None if value is None else str(value)
