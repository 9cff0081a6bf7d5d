"""One trial of a sweep: a training with other settings, up to a rung or to its end, and then measured."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import (
    CLAIM_FILE,
    RECORD_FILE,
    Artifact,
    Output,
    discard,
    local_copy,
    mirror,
    open_artifact,
    void,
)
from dpo_train.config import RunConfig
from dpo_train.disk import is_locked, lock_path
from dpo_train.errors import StoreError
from dpo_train.evaluate.trials import Point
from dpo_train.evaluate.trials_file import point_to_dict, trial_to_dict
from dpo_train.metrics_file import METRICS_FILE
from dpo_train.progress import Reporter
from dpo_train.stages.common import storage_options
from dpo_train.stages.evaluate_models import WORK
from dpo_train.stages.executor import Executor, TrialEnd
from dpo_train.stages.measure_trial import Sampled, measure_trial, sample_paused
from dpo_train.stages.sweep_paused import paused_policy
from dpo_train.stages.sweep_results import Judge, find_result, keep_result, result_contents
from dpo_train.stages.sweep_space import Parameters
from dpo_train.stages.train import Paused, train

TRIALS_FOLDER = "trials"
STEPS_FOLDER = f"{WORK}/steps"


@dataclass(frozen=True, kw_only=True)
class TrialReporter(Reporter):
    """Reports one trial's steps as a part of the whole sweep's."""

    name: str = ""
    folder: str = ""
    """Where each trial leaves how many steps it has done; all of them on this machine share it."""
    total: int = 0
    """Steps of all trials."""

    def progress(self, done: float, total: float, unit: str = "pairs", **metrics: float) -> None:
        """Of the training alone: pairs and prompts that are asked for afterwards would make the bar jump."""
        del total
        if unit != "steps" or self.path is None:
            return
        try:
            everyone = self._counted(int(done))
        except OSError:
            return  # for show; on a full disk it is the training's own error that must come through
        super().progress(everyone, self.total, unit, **metrics)

    def message(self, text: str) -> None:
        super().message(f"{self.name}: {text}")

    def skip(self, done: int) -> None:
        """Counts steps that were done before."""
        if self.path is not None:
            self._counted(done)

    def _counted(self, done: int) -> int:
        """Steps of all trials, this one's being ``done``. Not flushed to disk: it is done at every step."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{self.name}"
        temporary.write_text(str(done), encoding="utf-8")
        temporary.replace(folder / self.name)
        return sum(int(file.read_text(encoding="utf-8")) for file in folder.iterdir() if file.name[0] != ".")


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """What the process that runs a trial is told; picklable."""

    name: str
    parameters: Parameters
    seed: int
    config: RunConfig
    """The sweep's."""
    training: RunConfig
    """As this trial's training has it."""
    scored: Artifact
    sweep: str
    """The sweep's output."""
    home: str
    """The training's."""
    digest: str
    """Names the training, wherever its output lies."""
    judge: Judge
    """See ``judge_of``."""
    pause_at: int | None
    reporter: TrialReporter

    @property
    def folder(self) -> str:
        """Of the trial, in the sweep's output."""
        return folder_of(self.name)

    @property
    def failure_file(self) -> str:
        """Where a failure is kept until the sweep is complete; a result has an address of its own."""
        rung = "end" if self.pause_at is None else f"{self.pause_at:08d}"
        return f"{WORK}/failures/{self.name}@{rung}.json"

    def known(self, out: Output) -> TrialEnd | None:
        """How it ended, if that was found out before, by this sweep or another."""
        if (end := kept(out, self.failure_file)) is not None:
            return TrialEnd(**end)
        contents = result_contents(self.config, self.pause_at, self.judge)
        result = find_result(self.config.store, contents, self.digest, out.path / self.folder / METRICS_FILE)
        return None if result is None else TrialEnd(result=result)

    def __call__(self, executor: Executor) -> Mapping[str, Any]:
        """Trains, and measures what it has come to.

        Returns:
            ``step`` and ``metrics`` (of the validation pairs) where it stands, and ``trial`` if it is finished, else
            ``point``, what its answers show there; ``seconds`` that this call took.
        """
        start = time.perf_counter()
        storage.use(storage_options(self.config))
        out = Output(self.sweep)
        (out.path / WORK).mkdir(parents=True, exist_ok=True)
        try:
            policy = self.train(executor)
        except Paused as paused:
            sampled = self._sampled(paused.step, executor, out)
            point = Point(step=paused.step, **sampled.numbers, deviations=sampled.deviations)
            result: dict[str, Any] = {"step": paused.step, "metrics": dict(paused.metrics)}
            result["point"] = point_to_dict(point)
        else:
            trial = measure_trial(
                self.config, self.scored, policy, name=self.name, parameters=self.parameters, seed=self.seed,
                executor=executor, out=out, reporter=self.reporter,
            )  # fmt: skip
            policy.file(METRICS_FILE)  # here, if other machines have trained
            result = {"step": trial.steps, "metrics": dict(policy.record.metrics), "trial": trial_to_dict(trial)}
        finally:
            keep_curve(self.home, out, self.folder)
        result["seconds"] = round(time.perf_counter() - start, 3)
        self._keep(out, result)
        return result

    def train(self, executor: Executor) -> Artifact:
        """The training alone.

        Raises:
            Paused: it stands at ``pause_at``.
        """
        return train(
            self.training, self.scored, executor, output=self.home, reporter=self.reporter, pause_at=self.pause_at
        )

    def _sampled(self, step: int, executor: Executor, out: Output) -> Sampled:
        """What the answers of the policy as it stands show."""
        if not self.config.sweep.num_prompts:
            return Sampled()
        folder, name = storage.join(out.home, WORK, "paused"), f"{self.name}@{step:08d}"
        policy = paused_policy(
            self.training, self.scored, executor, home=self.home, step=step, target=storage.join(folder, name),
            reporter=self.reporter,
        )  # fmt: skip
        found = sample_paused(self.config, self.scored, policy, executor=executor, out=out, reporter=self.reporter)
        discard(folder, name, tell=self.reporter.message)
        return found

    def _keep(self, out: Output, result: Mapping[str, Any]) -> None:
        """At once: were the launching process to die now, nothing would be measured twice."""
        if result.get("trial", {}).get("failure") is not None:
            keep(out, self.failure_file, {"result": result, "failure": None})
            return
        content = result_contents(self.config, self.pause_at, self.judge)[0]
        keep_result(self.config.store, content, self.digest, result, out.path / self.folder / METRICS_FILE)


def train_again(task: TrialTask, executor: Executor) -> Mapping[str, Any]:
    """The training of a trial that is known, for its policy."""
    storage.use(storage_options(task.config))
    task.train(executor)
    return {}


def folder_of(name: str) -> str:
    """Of a trial's files, in the sweep's output."""
    return f"{TRIALS_FOLDER}/{name}"


def keep(out: Output, name: str, content: Any) -> None:
    """A small file of the sweep's output, whole, here and where it belongs."""
    (out.path / name).parent.mkdir(parents=True, exist_ok=True)
    out.write_json(name, content)
    mirror(out.home).publish(name)


def kept(out: Output, name: str) -> Any:
    """What ``keep`` was given, by this machine or another; None if it never was."""
    file = _fetched(out, name)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))


def _fetched(out: Output, name: str) -> Path | None:
    if not (out.path / name).is_file() and (
        not storage.is_remote(out.home) or storage.info(storage.join(out.home, name)) is None
    ):
        return None
    return mirror(out.home).fetch(name)


def keep_curve(home: str, out: Output, folder: str) -> None:
    """A copy of the training's numbers so far: those of a loser go with its output."""
    source, target = local_copy(home) / METRICS_FILE, out.path / folder / METRICS_FILE
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        mirror(out.home).publish(f"{folder}/{METRICS_FILE}")


def bring_curve(out: Output, folder: str) -> None:
    """The copy that another machine has left, for the output's list of files."""
    _fetched(out, f"{folder}/{METRICS_FILE}")


def is_complete(home: str) -> bool:
    """Whether this output can be used."""
    try:
        open_artifact(home)
    except StoreError:
        return False
    return True


def exists(home: str) -> bool:
    """Whether somebody has made, or begun to make, this output."""
    if storage.is_remote(home):
        return any(storage.info(storage.join(home, name)) is not None for name in (RECORD_FILE, CLAIM_FILE))
    return any((Path(home) / name).is_file() for name in (RECORD_FILE, CLAIM_FILE))


def remove(home: str, reporter: Reporter) -> bool:
    """Takes a whole output away, its record first: nobody must find a complete one without its weights.

    One that another process is making right now stays.

    Returns:
        whether that is done, or cannot be.
    """
    if not exists(home):
        return True
    if is_locked(local_copy(home)):
        return False
    try:
        artifact = open_artifact(home)
    except StoreError:
        artifact = None  # it was never complete
    try:
        if artifact is not None:
            void(artifact)
    except (StoreError, storage.StorageUnavailableError) as error:
        reporter.message(f"note: {home} has served and could not be removed: {error}")
        return True
    parent, name = home.rstrip("/").rsplit("/", 1)
    discard(parent, name, tell=reporter.message)
    lock_path(local_copy(home)).unlink(missing_ok=True)
    return True
