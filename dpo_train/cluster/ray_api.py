"""Jobs on a Ray cluster that is there, through the REST interface of its dashboard.

    not known             -> job.json is laid out, the job submitted under its name
    PENDING, RUNNING      -> adopted: the caller before this one is gone, or works beside this one
    SUCCEEDED with result -> its result stands, within one run
    ended otherwise       -> submitted again as <name>-2, -3, ...: the process that watched an ended job may still hold
                             its name, on which Ray 2.60 lets the new one die

The cluster must hold dpo and see the store. Its own environment has the logins; a job's description, which everyone who
may open the dashboard can read, has none. Ray knows no deadline of a job: whoever waits for it keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from dpo_train.cluster import job as jobs
from dpo_train.cluster.job import Ended, Job
from dpo_train.cluster.ray_rest import RayRest, State
from dpo_train.config import RunConfig
from dpo_train.errors import RunError, UserError

ENTRYPOINT_CPUS = 0.1
"""With a share of a core, a job's process may run on any node; without, on the head alone, which may be small."""
STOP_WAIT_S = 20
"""Ray kills a stopped job after 3 seconds, in which a stage cannot say in MLflow how it ended."""
STOP_WITHIN_S = 5.0
LAST_LINES_S = 30.0
"""Until then a log is just asked for again another time; at the end there is no other time."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
PENDING_S = 15.0
"""Ray takes some seconds to start a job's process; what is pending longer waits for something."""
LOG_SHARE = 20
"""A log is always sent as a whole: asking for it may take one second in so many."""

_SPEC = "dpo-spec"
_EXITS = {
    127: "the cluster has no `dpo` command",
    137: "it was killed, maybe for want of memory",
    -9: "it was killed, maybe for want of memory",
}
_ERRORS = {
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT": "the cluster had no room for it in time (RAY_JOB_START_TIMEOUT_SECONDS)",
    "JOB_SUPERVISOR_ACTOR_DIED": "the machine of its process, or the process that watches it, was lost",
}


class RayApiLauncher:
    """A ``Launcher`` for the cluster at ``cluster.address``."""

    def __init__(
        self,
        config: RunConfig,
        *,
        wait: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert config.cluster.address is not None
        self._config, self._address = config, config.cluster.address
        self._wait, self._clock = wait, clock
        self._name = ""

    def run(self, job: Job, *, tell: Callable[[str], None], line: Callable[[str], None]) -> Ended:
        """See ``Launcher``.

        An interrupt stops the job. An error of ours leaves it alone: it works on, and the same call finds it again.
        """
        ray = RayRest(self._address, tell=tell, wait=self._wait, clock=self._clock)
        with contextlib.closing(ray):
            ray.check()
            try:
                if self._begin(ray, job, tell):
                    return Ended(succeeded=True, reason="SUCCEEDED")
                return self._follow(ray, self._name, tell, line)
            except (KeyboardInterrupt, SystemExit):
                self._cancel(ray, self._name, tell)
                raise

    def _begin(self, ray: RayRest, job: Job, tell: Callable[[str], None]) -> bool:
        """Sees to it that the job is there, as ``self._name``; whether its success lies behind it already."""
        spec = self._spec(job)
        attempt, before, is_met = 1, "", False
        while True:
            self._name = name = job.name if attempt == 1 else f"{job.name}-{attempt}"
            found = ray.find(name)
            if found is None:
                if before:
                    tell(f"ended as {before} before; starting it again")
                jobs.drop_result(job)
                jobs.write_job(job)
                if ray.submit({**spec, "submission_id": name}):
                    tell(f"submitted to {self._address}")
                    return False
                is_met = True  # somebody was quicker, or it is our own request, whose answer was lost
            elif found.is_live or is_met:
                if found.metadata.get(_SPEC) != spec["metadata"][_SPEC]:
                    raise _another(name, found)
                tell(f"runs at {self._address}; following it")
                return False
            elif found.status == "SUCCEEDED" and jobs.may_stand(job):
                tell(f"has run at {self._address} already")
                return True
            else:
                attempt, before = attempt + 1, found.status

    def _spec(self, job: Job) -> dict[str, Any]:
        """What the cluster is told, with its digest."""
        environment = {
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            **job.environment,
            **self._config.cluster.environment,
        }
        spec: dict[str, Any] = {
            "entrypoint": job.entrypoint,
            "entrypoint_num_cpus": ENTRYPOINT_CPUS,
            "runtime_env": {"env_vars": environment},
        }
        return {**spec, "metadata": {"dpo-stage": job.stage, _SPEC: _digest(json.dumps(spec, sort_keys=True))}}

    def _follow(self, ray: RayRest, name: str, tell: Callable[[str], None], line: Callable[[str], None]) -> Ended:
        reader = _Reader(line, tell)
        pause_s, is_told, is_late, begin = FIRST_PAUSE_S, False, False, self._clock()
        while True:
            state = ray.find(name)
            if state is None:
                raise RunError(
                    f"Ray at {self._address} does not know the job {name} any more",
                    fix="see whether its head was restarted; run again, the stage goes on from what is complete",
                )
            if state.status == "PENDING" and not is_told and self._clock() - begin > PENDING_S:
                tell("waits for room on the cluster")
                is_told = True
            start = self._clock()
            if state.status != "PENDING":
                moved = reader.read(ray, name, is_over=not state.is_live)
                pause_s = FIRST_PAUSE_S if moved else min(LONGEST_PAUSE_S, pause_s * 1.5)
            if not state.is_live:
                reason = "DeadlineExceeded: it ran longer than cluster.deadline_hours" if is_late else ""
                return Ended(succeeded=state.status == "SUCCEEDED", reason=reason or _reason(state, reader.last))
            if not is_late and self._is_late(state):
                is_late = True
                tell("is stopped, because it ran longer than cluster.deadline_hours")
                ray.stop(name, within_s=STOP_WITHIN_S)
            self._wait(max(pause_s, LOG_SHARE * (self._clock() - start)))

    def _is_late(self, state: State) -> bool:
        limit_s = self._config.cluster.deadline_hours * 3600
        return state.started_s > 0 and time.time() - state.started_s > limit_s

    def _cancel(self, ray: RayRest, name: str, tell: Callable[[str], None]) -> None:
        """Stops the job, and waits a little to see it end: started again at once, it would be found still stopping."""
        try:
            ray.stop(name, within_s=STOP_WITHIN_S)
            end = self._clock() + STOP_WAIT_S + STOP_WITHIN_S
            while (state := ray.find(name)) is not None and state.is_live:
                if self._clock() > end:
                    tell("was told to stop, and has not ended yet")
                    return
                self._wait(FIRST_PAUSE_S)
            tell("was stopped")
        except (UserError, RunError) as error:
            tell(f"could not be stopped: {error} By hand: ray job stop --address {self._address} {name}")


class _Reader:
    """Hands on the new lines of a log that is always sent as a whole."""

    def __init__(self, line: Callable[[str], None], tell: Callable[[str], None]) -> None:
        self.last = ""
        """The last line that is no event."""
        self._line, self._tell = line, tell
        self._offset = 0
        self._told = False

    def read(self, ray: RayRest, name: str, *, is_over: bool) -> bool:
        """Whether there were new lines. A log that cannot be read is no reason to lose the job."""
        try:
            text = ray.logs(name, within_s=LAST_LINES_S if is_over else 0.0)
        except RunError as error:
            if is_over or not self._told:
                self._told = True
                self._tell(f"what it prints cannot be read: {error}")
            return False
        end = len(text) if is_over else text.rfind("\n") + 1
        new = text[self._offset : end]
        if not new:
            return False
        self._offset = end
        for each in new.removesuffix("\n").split("\n"):
            if each.strip() and jobs.EVENT_MARK not in each:
                self.last = each.strip()
            self._line(each)
        return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _another(name: str, found: State) -> UserError:
    return UserError(
        f"Another job runs on the cluster under the name {name}",
        got=f"{found.status}, spec {found.metadata.get(_SPEC)}",
        fix=f"wait for its end, or end it by `ray job stop {name}`",
    )


def _reason(state: State, last: str) -> str:
    """How the job ended, for people."""
    if state.status == "STOPPED":
        return "STOPPED: somebody has stopped it on the cluster"
    if state.status != "FAILED":
        return state.status
    if state.exit_code is not None:
        why = _EXITS.get(state.exit_code, "")
        ends = f"its process ended with exit code {state.exit_code}" + (f": {why}" if why else "")
        return f"FAILED: {ends}" + (f". Its last line: {last[:300]}" if last else "")
    words = _ERRORS.get(state.error_type or "", " ".join(state.message.split())[:300])
    return f"FAILED: {words}"
