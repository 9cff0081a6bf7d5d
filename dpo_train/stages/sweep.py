"""scored pairs -> the settings to train with

    space --grid, chance, Optuna--> settings x seeds --train, rung by rung--> policies --measure--> trials --select-->

A trial is a training with other settings, at the very address that the same training would have by itself. So one that
was trained before is not trained again, and the winner is found there by the stage that follows (``sweep.use=policy``).
Interrupted, a sweep goes on where each trial stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.shards import Split
from dpo_train.disk import write_atomically
from dpo_train.errors import ConfigError
from dpo_train.evaluate import judge as judging
from dpo_train.evaluate.frontier import write_frontier
from dpo_train.evaluate.trials import Choice, Trial, select
from dpo_train.evaluate.trials_file import TRIALS_FILE
from dpo_train.evaluate.trials_file import to_dict as trials_to_dict
from dpo_train.progress import Reporter
from dpo_train.stages.common import make, model_digest
from dpo_train.stages.evaluate_models import WORK
from dpo_train.stages.executor import Executor
from dpo_train.stages.measure_trial import check_measurable
from dpo_train.stages.sweep_run import SweepRun
from dpo_train.stages.sweep_space import with_parameters
from dpo_train.stages.train import CADENCE, train_home
from dpo_train.stages.with_model import PARTS


def sweep(config: RunConfig, scored: Artifact, executor: Executor, *, output: Path | str | None = None) -> Artifact:
    """Makes ``trials.json``, the frontier's pictures, each trial's curve, and the choice: ``record.details`` has
    ``parameters`` (``chosen_config`` puts them into a config), ``beta``, and with ``sweep.use=policy`` the address of
    the winner's ``policy``. With nothing to try nothing is run.

    Raises:
        ConfigError: no validation pairs to choose on, or more trials than training pairs.
        RunError: every trial failed, or none is within the budgets.
    """
    if not config.sweep.space:
        content: dict[str, object] = {"beta": config.train.beta}
        return make(config, "sweep", content, {}, lambda out: _no_sweep(out, config), output=output)
    inputs = {"scored": scored.record.digest, "model": model_digest(config)}
    reporter = Reporter.from_environment("sweep")

    def body(out: Output) -> Summary:
        _check(config, scored)
        run = SweepRun(config, scored, executor, out, reporter)
        trials = run.all_trials()
        choice = select(trials, config.sweep.select)
        run.bring_policy(choice.trial)
        write_frontier(trials, choice, config.sweep.select, out.path)
        return _summary(config, scored, trials, choice)

    scratch = (WORK, PARTS)
    artifact = make(config, "sweep", _content(config), inputs, body, output=output, resumable=True, scratch=scratch)
    if not artifact.reused:
        for folder in scratch:
            discard(artifact.home, folder, tell=reporter.message)
    return artifact


def chosen_config(config: RunConfig, choice: Artifact) -> RunConfig:
    """The config with what a sweep has chosen, for the stage ``train``. Where the winner's policy is to be taken, the
    training is that of the trial, seed included: its output is there already."""
    details = choice.record.details
    config = with_parameters(config, details["parameters"])
    return dataclasses.replace(config, seed=details["seed"]) if details["policy"] is not None else config


def _content(config: RunConfig) -> dict[str, Any]:
    """What the trials and the choice depend on."""
    section = to_dict(config.sweep)
    lists = {"betas": "beta", "learning_rates": "learning_rate", "losses": "loss", "epochs": "epochs"}
    varied = {key: list(values) for key, values in config.sweep.space.items() if isinstance(values, tuple)}
    section |= {name: varied[key] for name, key in lists.items() if key in varied}
    judge = config.evaluate.judge if config.sweep.select.metric != "accuracy" else None
    return {
        "sweep": section,
        "train": {k: v for k, v in to_dict(config.train).items() if k not in {*CADENCE, *config.sweep.space}},
        "seed": config.seed,
        "max_sample_tokens": config.evaluate.max_sample_tokens if config.sweep.num_prompts else None,
        "judge": None if judge is None else dict(judging.identity(judge)),
    }


def _no_sweep(out: Output, config: RunConfig) -> Summary:
    out.write_json(TRIALS_FILE, trials_to_dict([], None, config.sweep.select))
    # Kubeflow's task promises a page, whatever it was asked to do.
    page = f"<!doctype html><title>No sweep</title><p>Nothing was tried: train.beta = {config.train.beta:g}."
    write_atomically(out.path / "frontier.html", page)
    details = {"beta": config.train.beta, "parameters": {}, "trials": 0, "why_not": {}, "policy": None}
    return Summary(counts={"trials": 0}, details=details)


def _check(config: RunConfig, scored: Artifact) -> None:
    """What only the pairs show.

    Raises:
        ConfigError: there is nothing to choose on, or it cannot be measured.
    """
    if not Split(scored, "validation").num_pairs:
        raise ConfigError("The sweep has no validation pairs to choose on", fix="raise prepare.validation_fraction")
    check_measurable(config, scored)


def _summary(config: RunConfig, scored: Artifact, trials: Sequence[Trial], choice: Choice) -> Summary:
    chosen = choice.trial
    names = ("accuracy", "margin", "kl", "length_ratio", "reward", "win_rate")
    found = {name: estimate for name in names if (estimate := getattr(chosen, name)) is not None}
    policy = None
    if config.sweep.use == "policy":
        training = dataclasses.replace(with_parameters(config, chosen.parameters), seed=chosen.seed)
        policy = f"train/{storage.name_of(train_home(training, scored))}"
    return Summary(
        counts={
            "trials": len(trials),
            "failed": sum(trial.failure is not None for trial in trials),
            "stopped": sum(trial.stopped is not None for trial in trials),
            "steps": sum(trial.steps for trial in trials),
        },
        metrics={f"validation/{name}": estimate.value for name, estimate in found.items()},
        details={
            "beta": chosen.parameters.get("beta", config.train.beta),
            "parameters": dict(chosen.parameters),
            "seed": chosen.seed,
            "trials": len(trials),
            "why_not": dict(choice.why_not),
            "notes": list(choice.notes),
            "policy": policy,
        },
    )
