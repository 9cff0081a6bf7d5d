"""Runs the trials of a sweep: which, how far, what is kept of them, and what is removed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from statistics import fmean

import numpy as np

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output
from dpo_train.config import RunConfig
from dpo_train.data.batches import num_steps
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError, RunError
from dpo_train.evaluate.statistics import Ints, number_groups
from dpo_train.evaluate.trials import Trial, pool, select
from dpo_train.progress import Reporter
from dpo_train.stages.evaluate_models import WORK
from dpo_train.stages.executor import Executor, TrialEnd
from dpo_train.stages.sweep_halving import Rung, pause_step, ranked, rungs
from dpo_train.stages.sweep_results import judge_of
from dpo_train.stages.sweep_space import Parameters, fixed_settings, name_of, optuna_settings, with_parameters
from dpo_train.stages.sweep_standing import Standing, over_budget, to_keep
from dpo_train.stages.sweep_trials import (
    STEPS_FOLDER,
    TrialReporter,
    TrialTask,
    bring_curve,
    exists,
    folder_of,
    is_complete,
    keep,
    kept,
    remove,
    train_again,
)
from dpo_train.stages.train import train_home

NEVER = 2**31
SECONDS_FILE = "seconds.json"
"""By trial how long it took to train and to measure; not in trials.json, which is the same however often it is made."""
_FOUND_FILE = f"{WORK}/found.json"


class SweepRun:
    """One run of a sweep, from where an earlier one was interrupted."""

    def __init__(
        self, config: RunConfig, scored: Artifact, executor: Executor, out: Output, reporter: Reporter
    ) -> None:
        self._config, self._scored, self._executor, self._out, self._reporter = config, scored, executor, out, reporter
        self._num_pairs = Split(scored, "train").num_pairs
        groups = Split(scored, "validation").table(["group"])["group"].to_pylist()
        self._group_sizes: Ints = np.bincount(number_groups(groups))
        self._judge = judge_of(config)
        self._standings: list[Standing] = []
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
            self._run(settings, rungs(len(settings), sweep.halving, sweep.kl_points))
        self._out.write_json(SECONDS_FILE, {one.name: round(one.seconds, 3) for one in self._standings})
        return [standing.trial for standing in self._standings if standing.trial is not None]

    def _check_size(self, num_settings: int) -> None:
        trials, pairs = num_settings * self._config.sweep.seeds, self._num_pairs
        if trials > pairs:
            raise ConfigError(
                "The sweep has more trials than there are pairs to train on",
                got=f"{trials} trials, {pairs} pairs",
                fix="try fewer values, or set sweep.search=random and sweep.trials",
            )

    def _tried(self, settings: list[Parameters]) -> list[float | None]:
        """What is to be maximised of each setting; None: it failed, or is outside the budgets."""
        standings = self._run(settings, rungs(len(settings), None, self._config.sweep.kl_points))
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

    def _run(self, settings: Sequence[Parameters], plan: Sequence[Rung]) -> list[Standing]:
        """Trains all settings with all seeds, rung by rung, of which the best go on."""
        standings = self._new(settings)
        self._standings += standings
        left = list(settings)
        self._total_steps += _planned_steps(standings, len(left), plan)
        for rung in plan:
            self._bring([one for one in standings if one.parameters in left and not one.is_lost], rung)
            best, over = self._ranked([one for one in standings if one.parameters in left and not one.is_lost], left)
            self._stop(standings, best, rung, over)
            left = [setting for setting in left if name_of(setting) in best[: rung.keep]]
        return standings

    def _ranked(
        self, standings: Sequence[Standing], settings: Sequence[Parameters]
    ) -> tuple[list[str], dict[str, str]]:
        """Names of settings, best first, those over the budgets last; and of these the reason."""
        sweep, seeds = self._config.sweep, dict[str, list[Standing]]()
        for one in standings:
            seeds.setdefault(one.setting, []).append(one)
        over = {name: why for name, each in seeds.items() if (why := over_budget(each, sweep.select))}
        values = {
            name: fmean(one.metrics[f"validation/{sweep.halve_on}"] for one in each) for name, each in seeds.items()
        }
        return ranked(values, settings, sweep.halve_on, over), over

    def _new(self, settings: Sequence[Parameters]) -> list[Standing]:
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
                    Standing(
                        name=name, parameters=setting, seed=seed, training=training, home=home, was_there=was_there,
                        total=self._steps_of(training),
                    )
                )  # fmt: skip
        keep(self._out, _FOUND_FILE, found)
        return standings

    def _steps_of(self, training: RunConfig) -> int:
        section = training.train
        steps = num_steps(self._num_pairs, section.batch_pairs, section.epochs)
        return min(steps, section.max_steps or steps)

    def _bring(self, standings: Sequence[Standing], rung: Rung) -> None:
        """Brings trials to the end of a rung, those that were not there yet."""
        waiting: list[tuple[Standing, TrialTask]] = []
        for one in standings:
            if one.trial is not None:
                continue
            task = self._task(one, rung)
            if (end := task.known(self._out)) is not None:
                if end.result is not None:
                    task.reporter.skip(end.result["step"])
                self._take(one, end)
            else:
                waiting.append((one, task))
        self._remove_losers()

        def ended(number: int, end: TrialEnd) -> None:
            one, task = waiting[number]
            if end.failure is not None:  # a result was kept where it was found
                keep(self._out, task.failure_file, dataclasses.asdict(end))
            self._take(one, end)
            self._tell(one, end)
            self._remove_losers()

        self._executor.trials([task for _, task in waiting], ended)

    def _task(self, one: Standing, rung: Rung) -> TrialTask:
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
            digest=storage.name_of(one.home),
            judge=self._judge,
            pause_at=pause_at,
            reporter=TrialReporter(
                self._reporter.path,
                self._reporter.stage,
                name=one.name,
                folder=str(self._out.path / STEPS_FOLDER),
                total=self._total_steps,
            ),
        )

    def _apart(self, one: Standing) -> str:
        return storage.join(self._out.home, WORK, "trainings", folder_of(one.name))

    def _take(self, one: Standing, end: TrialEnd) -> None:
        """Notes how a trial ended, or where it pauses."""
        bring_curve(self._out, folder_of(one.name))
        if end.result is None:
            assert end.failure is not None
            one.fail(end.failure)
        elif "trial" in end.result:
            one.finish(end.result)
        else:
            one.pause(end.result, self._group_sizes)

    def _tell(self, one: Standing, end: TrialEnd) -> None:
        number, count = self._standings.index(one) + 1, len(self._standings)
        told = end.failure or f"accuracy {one.metrics['validation/rewards/accuracy']:.3f}"
        at = "" if one.trial is not None else f" after {one.points[-1].step} steps"
        self._reporter.message(f"trial {number} of {count}, {one.name}{at}: {told}")

    def _stop(self, standings: Iterable[Standing], best: Sequence[str], rung: Rung, over: Mapping[str, str]) -> None:
        """Those that do not go on, with the reason."""
        metric = self._config.sweep.halve_on
        for one in standings:
            if one.trial is not None or one.setting in best[: rung.keep]:
                continue
            place, step = best.index(one.setting) + 1, one.points[-1].step
            value = one.metrics[f"validation/{metric}"]
            why = f"; {over[one.setting]}" if one.setting in over else ""
            one.stop(f"at step {step}: place {place} of {len(best)} by {metric} ({value:.4g}){why}")
        self._remove_losers()

    def _remove_losers(self) -> None:
        """Removes the trainings of trials that have lost, but for outputs that were there before."""
        takes_policy = self._config.sweep.use == "policy"
        kept_ones = to_keep(self._standings, self._config.sweep.select) if takes_policy else set()
        for one in self._standings:
            if one.trial is None or one.is_removed:
                continue
            if one.was_there:
                one.is_removed = remove(self._apart(one), self._reporter)
            elif one.name not in kept_ones:
                one.is_removed = remove(one.home, self._reporter)

    def bring_policy(self, chosen: Trial) -> None:
        """Trains the winner again, bit for bit, if its policy is to be taken and is not there: it had made room for
        another that looked better then, or was a loser of another sweep.

        Raises:
            RunError: it failed.
        """
        one = next(standing for standing in self._standings if standing.name == chosen.name)
        if self._config.sweep.use != "policy" or is_complete(one.home):
            return
        self._reporter.message(f"{one.name} is chosen, and its policy is trained again: it is not there any more")
        task, ends = self._task(one, Rung(end=Fraction(1), keep=1)), list[TrialEnd]()
        self._executor.trials([functools.partial(train_again, task)], lambda _, end: ends.append(end))
        if ends[0].failure is not None:
            raise RunError(f"The chosen trial {one.name} could not be trained again", got=ends[0].failure)


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


def _planned_steps(standings: Sequence[Standing], num_settings: int, plan: Sequence[Rung]) -> int:
    """Steps of all trials together, if none fails or ends early."""
    ends = [Fraction(0), *(rung.end for rung in plan)]
    sizes = [num_settings, *(rung.keep for rung in plan)]
    share = sum(size * (end - before) for size, before, end in zip(sizes, ends, ends[1:], strict=False)) / num_settings
    return math.ceil(share * sum(one.total for one in standings))
