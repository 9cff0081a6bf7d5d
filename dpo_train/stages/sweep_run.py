"""Runs the trials of a sweep: which, how far, what is kept of them, and what is removed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from statistics import fmean
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output
from dpo_train.config import RunConfig
from dpo_train.data.batches import num_steps
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError, RunError
from dpo_train.evaluate.statistics import wilson
from dpo_train.evaluate.trials import Point, Trial, pool, select, trial_from_dict
from dpo_train.progress import Reporter
from dpo_train.stages.evaluate_models import WORK
from dpo_train.stages.executor import Executor, TrialEnd
from dpo_train.stages.sweep_halving import Rung, pause_step, ranked, rungs
from dpo_train.stages.sweep_space import Parameters, fixed_settings, name_of, optuna_settings, with_parameters
from dpo_train.stages.sweep_trials import (
    STEPS_FOLDER,
    TrialReporter,
    TrialTask,
    bring_curve,
    exists,
    folder_of,
    keep,
    kept,
    remove,
)
from dpo_train.stages.train import train_home

NEVER = 2**31
_FOUND_FILE = f"{WORK}/found.json"


@dataclass(kw_only=True)
class _Standing:
    """Where one trial stands."""

    name: str
    parameters: Parameters
    seed: int
    training: RunConfig
    home: str
    """Where its training belongs in the store."""
    was_there: bool
    """Somebody had made or begun that output before this sweep: it is never removed."""
    total: int
    """Steps of the whole training."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    trial: Trial | None = None
    """Set when it has come to an end, whichever."""

    @property
    def is_lost(self) -> bool:
        return self.trial is not None and (self.trial.failure is not None or self.trial.stopped is not None)


class SweepRun:
    """One run of a sweep, from where an earlier one was interrupted."""

    def __init__(
        self, config: RunConfig, scored: Artifact, executor: Executor, out: Output, reporter: Reporter
    ) -> None:
        self._config, self._scored, self._executor, self._out, self._reporter = config, scored, executor, out, reporter
        self._num_pairs = {split: Split(scored, split).num_pairs for split in ("train", "validation")}
        self._standings: list[_Standing] = []
        self._total_steps = 0

    def all_trials(self) -> list[Trial]:
        """Every trial of the sweep: finished, stopped early, or failed.

        Raises:
            ConfigError: more trials than training pairs.
        """
        sweep = self._config.sweep
        if sweep.search == "optuna":
            assert sweep.trials is not None, "refused when the config is read"
            self._check_size(sweep.trials)
            optuna_settings(self._config, self._tried)
        else:
            settings = fixed_settings(self._config)
            self._check_size(len(settings))
            self._run(settings, rungs(len(settings), sweep.halving))
        return [standing.trial for standing in self._standings if standing.trial is not None]

    def _check_size(self, num_settings: int) -> None:
        trials, pairs = num_settings * self._config.sweep.seeds, self._num_pairs["train"]
        if trials > pairs:
            raise ConfigError(
                "The sweep has more trials than there are pairs to train on",
                got=f"{trials} trials, {pairs} pairs",
                fix="try fewer values, or set sweep.search=random and sweep.trials",
            )

    def _tried(self, settings: list[Parameters]) -> list[float | None]:
        """What is to be maximised of each setting; None: it failed, or is outside the budgets."""
        standings = self._run(settings, rungs(len(settings), None))
        rule = self._config.sweep.select
        values: list[float | None] = []
        for setting in settings:
            trials = [one.trial for one in standings if one.parameters == setting and one.trial is not None]
            try:
                select(trials, rule)
                values.append(pool(trials, rule.metric)[0].metric.value)
            except RunError:
                values.append(None)
        return values

    def _run(self, settings: Sequence[Parameters], plan: Sequence[Rung]) -> list[_Standing]:
        """Trains all settings with all seeds, rung by rung, of which the best go on."""
        standings = self._new(settings)
        self._standings += standings
        left = list(settings)
        self._total_steps += _planned_steps(standings, len(left), plan)
        for rung in plan:
            self._bring([one for one in standings if one.parameters in left and not one.is_lost], rung)
            values: dict[str, list[float]] = {}
            for one in standings:
                if one.parameters in left and not one.is_lost:
                    value = one.metrics[f"validation/{self._config.sweep.halve_on}"]
                    values.setdefault(name_of(one.parameters), []).append(value)
            best = ranked({name: fmean(each) for name, each in values.items()}, left, self._config.sweep.halve_on)
            self._stop(standings, best, rung)
            left = [setting for setting in left if name_of(setting) in best[: rung.keep]]
        return standings

    def _new(self, settings: Sequence[Parameters]) -> list[_Standing]:
        """Trials as they stand at their beginning. What was in the store before is noted once, before anything runs."""
        found: dict[str, bool] = kept(self._out, _FOUND_FILE) or {}
        standings = []
        for setting in settings:
            for seed in range(self._config.seed, self._config.seed + self._config.sweep.seeds):
                name = name_of(setting) + (f",seed={seed}" if self._config.sweep.seeds > 1 else "")
                training = _training(self._config, setting, seed)
                home = train_home(training, self._scored)
                was_there = found.setdefault(name, exists(home))
                standings.append(
                    _Standing(
                        name=name, parameters=setting, seed=seed, training=training, home=home, was_there=was_there,
                        total=self._steps_of(training),
                    )
                )  # fmt: skip
        keep(self._out, _FOUND_FILE, found)
        return standings

    def _steps_of(self, training: RunConfig) -> int:
        section = training.train
        steps = num_steps(self._num_pairs["train"], section.batch_pairs, section.epochs)
        return min(steps, section.max_steps or steps)

    def _bring(self, standings: Sequence[_Standing], rung: Rung) -> None:
        """Brings trials to the end of a rung, those that were not there yet."""
        waiting: list[tuple[_Standing, TrialTask]] = []
        for one in standings:
            task = self._task(one, rung)
            if one.trial is not None:
                continue
            if (end := kept(self._out, task.result_file)) is not None:
                self._take(one, TrialEnd(**end))
            else:
                waiting.append((one, task))
        self._remove_losers()

        def ended(number: int, end: TrialEnd) -> None:
            one, task = waiting[number]
            if end.failure is not None:  # a result was kept where it was found
                keep(self._out, task.result_file, dataclasses.asdict(end))
            self._take(one, end)
            self._tell(one, end)
            self._remove_losers()

        self._executor.trials([task for _, task in waiting], ended)

    def _task(self, one: _Standing, rung: Rung) -> TrialTask:
        pause_at = pause_step(one.total, rung.end)
        # What others have trained further, or only to another step, says nothing about this rung.
        apart = one.was_there and pause_at is not None
        return TrialTask(
            name=one.name,
            parameters=one.parameters,
            seed=one.seed,
            config=self._config,
            training=one.training,
            scored=self._scored,
            sweep=self._out.home,
            home=self._apart(one) if apart else one.home,
            pause_at=pause_at,
            reporter=TrialReporter(
                self._reporter.path,
                self._reporter.stage,
                name=one.name,
                folder=str(self._out.path / STEPS_FOLDER),
                total=self._total_steps,
            ),
        )

    def _apart(self, one: _Standing) -> str:
        return storage.join(self._out.home, WORK, "trainings", folder_of(one.name))

    def _take(self, one: _Standing, end: TrialEnd) -> None:
        """Notes how a trial ended, or where it pauses."""
        bring_curve(self._out, folder_of(one.name))
        if end.result is None:
            one.trial = self._ended(one, failure=end.failure)
            return
        one.metrics = end.result["metrics"]
        if "trial" in end.result:
            trial = trial_from_dict(end.result["trial"])
            steps = {point.step for point in trial.points}
            paused = [point for point in one.points if point.step not in steps]
            one.trial = replace(trial, points=tuple(sorted((*paused, *trial.points), key=lambda point: point.step)))
            return
        accuracy, pairs = one.metrics["validation/rewards/accuracy"], self._num_pairs["validation"]
        one.points.append(Point(step=end.result["step"], accuracy=wilson(accuracy * pairs, pairs, n=pairs)))

    def _ended(self, one: _Standing, **how: Any) -> Trial:
        """The trial of a training without a policy to measure."""
        steps = one.points[-1].step if one.points else 0
        return Trial(
            name=one.name, parameters=one.parameters, seed=one.seed, steps=steps, points=tuple(one.points), **how
        )

    def _tell(self, one: _Standing, end: TrialEnd) -> None:
        number, count = self._standings.index(one) + 1, len(self._standings)
        told = end.failure or f"accuracy {one.metrics['validation/rewards/accuracy']:.3f}"
        at = "" if one.trial is not None else f" after {one.points[-1].step} steps"
        self._reporter.message(f"trial {number} of {count}, {one.name}{at}: {told}")

    def _stop(self, standings: Iterable[_Standing], best: Sequence[str], rung: Rung) -> None:
        """Those that do not go on, with the reason."""
        metric = self._config.sweep.halve_on
        for one in standings:
            if one.trial is not None or name_of(one.parameters) in best[: rung.keep]:
                continue
            place, step = best.index(name_of(one.parameters)) + 1, one.points[-1].step
            value = one.metrics[f"validation/{metric}"]
            one.trial = self._ended(
                one, stopped=f"at step {step}: place {place} of {len(best)} by {metric} ({value:.4g})"
            )
        self._remove_losers()

    def _remove_losers(self) -> None:
        """Removes the trainings of trials that have lost, but for outputs that were there before."""
        ended = [one for one in self._standings if one.trial is not None]
        best = self._best([one.trial for one in ended if one.trial is not None])
        for one in ended:
            if not one.was_there and one.name != best:
                remove(one.home, self._reporter)
            elif one.was_there:
                remove(self._apart(one), self._reporter)

    def _best(self, trials: Sequence[Trial]) -> str | None:
        """The trial whose policy is kept, if any has to be: the one that would win if no other came."""
        if self._config.sweep.use == "settings":
            return None
        try:
            return select(trials, self._config.sweep.select).trial.name
        except RunError:
            return None


def _training(config: RunConfig, setting: Parameters, seed: int) -> RunConfig:
    """The config whose training is the trial's."""
    section = config.train
    if config.sweep.use == "settings":
        # Of such a trial only its end counts: validation pairs are measured once.
        section = replace(
            section,
            max_steps=config.sweep.max_steps or section.max_steps,
            evaluate_steps=NEVER,
            keep="last",
            patience=None,
            best_metric="loss",
        )
    return with_parameters(replace(config, train=section, seed=seed), setting)


def _planned_steps(standings: Sequence[_Standing], num_settings: int, plan: Sequence[Rung]) -> int:
    """Steps of all trials together, if none fails or ends early."""
    ends = [Fraction(0), *(rung.end for rung in plan)]
    sizes = [num_settings, *(rung.keep for rung in plan)]
    share = sum(size * (end - before) for size, before, end in zip(sizes, ends, ends[1:], strict=False)) / num_settings
    return math.ceil(share * sum(one.total for one in standings))
