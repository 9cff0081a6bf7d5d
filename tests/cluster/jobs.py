"""Jobs of the tests, and threads that wait for them."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_train.cluster.job import Ended, Job, job_for
from dpo_train.cluster.kube import Kube
from dpo_train.cluster.launcher import RayJobLauncher
from dpo_train.config import RunConfig, parse_config
from tests.cluster.operator import DEADLINE_S


@dataclass
class Waiting:
    """A launcher's ``run`` in a thread, and what it said."""

    launcher: RayJobLauncher
    job: Job
    told: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    ended: Ended | None = None
    error: BaseException | None = None

    def start(self) -> Waiting:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def result(self) -> Ended:
        """Waits for its end; raises what it raised."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), self.told
        if self.error is not None:
            raise self.error
        assert self.ended is not None
        return self.ended

    def _run(self) -> None:
        try:
            self.ended = self.launcher.run(self.job, tell=self.told.append, line=self.lines.append)
        except BaseException as error:
            self.error = error


class Full(list[str]):
    """Lines that go to a disk that is full: an error of the caller's own, which ends a waiter as an interrupt does."""

    def append(self, _: str) -> None:
        raise OSError("no space left")


def config_in(store: Path, **cluster: Any) -> RunConfig:
    """A config whose stages are RayJobs; another store gives another job."""
    content = {
        "store": str(store),
        "prepare": {"path": "pairs.jsonl"},
        "model": {"path": "a-model"},
        "cluster": {"launcher": "rayjob", "image": "registry.example/dpo@sha256:0", **cluster},
    }
    return parse_config(json.dumps(content), origin="the test")


def job_of(config: RunConfig, run_id: str | None = "a-run") -> Job:
    """A stage of a run; None: one that is called by itself."""
    return job_for("prepare", config, {}, run_id=run_id)


def without_pauses(kube: Kube, pauses: list[float]) -> Kube:
    def pause(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(0.01)

    kube.pause = pause
    return kube
