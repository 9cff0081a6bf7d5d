"""scored pairs -> the beta to train with"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard, open_artifact
from dpo_train.config import RunConfig, to_dict
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError
from dpo_train.evaluate.select import Trial, choose_beta
from dpo_train.progress import Reporter
from dpo_train.stages.common import make, model_digest, storage_options
from dpo_train.stages.executor import Executor, InProcess
from dpo_train.stages.train import CADENCE, train

TRIALS_FILE = "trials.json"
TRIALS_FOLDER = "trials"
NEVER = 2**31
_NOT_OF_TRIALS = (*CADENCE, "beta", "evaluate_steps", "keep", "best_metric", "patience")


def sweep(config: RunConfig, scored: Artifact, executor: Executor, *, output: Path | str | None = None) -> Artifact:
    """Makes ``trials.json`` and the chosen beta (``record.details["beta"]``).

    Every trial is a whole ``train`` stage with an output of its own: interrupted, the sweep goes on with the trials
    that are not finished, and an unfinished one goes on from its checkpoint. Without betas nothing is run.

    Raises:
        ConfigError: betas but no validation pairs to choose on.
        RunError: every trial failed.
    """
    betas = config.sweep.betas
    if not betas:
        content: dict[str, object] = {"beta": config.train.beta}
        return make(config, "sweep", content, {}, lambda out: _no_sweep(out, config.train.beta), output=output)
    content = {
        "sweep": {**to_dict(config.sweep), "betas": sorted(set(betas))},
        "train": {k: v for k, v in to_dict(config.train).items() if k not in _NOT_OF_TRIALS},
        "seed": config.seed,
    }
    inputs = {"scored": scored.record.digest, "model": model_digest(config)}

    def body(out: Output) -> Summary:
        num_validation = Split(scored, "validation").num_pairs
        if not num_validation:
            raise ConfigError(
                "The sweep has no validation pairs to choose beta on", fix="raise prepare.validation_fraction"
            )
        trials = _run_trials(config, scored, executor, num_validation, out.home)
        beta, reasons = choose_beta(trials)
        out.write_json(
            TRIALS_FILE, {"trials": [dataclasses.asdict(t) for t in trials], "beta": beta, "why_not": reasons}
        )
        best = next(trial for trial in trials if trial.beta == beta)
        return Summary(
            counts={"trials": len(trials), "failed": sum(t.failure is not None for t in trials)},
            metrics={"validation/accuracy": best.accuracy, "validation/margin": best.margin},
            details={"beta": beta, "why_not": reasons},
        )

    # Trials are outputs of their own.
    return make(config, "sweep", content, inputs, body, output=output, resumable=True, scratch=(TRIALS_FOLDER,))


def _no_sweep(out: Output, beta: float) -> Summary:
    out.write_json(TRIALS_FILE, {"trials": [], "beta": beta, "why_not": {}})
    return Summary(counts={"trials": 0}, details={"beta": beta})


def _run_trials(config: RunConfig, scored: Artifact, executor: Executor, num_validation: int, home: str) -> list[Trial]:
    betas = sorted(set(config.sweep.betas))
    steps = config.sweep.max_steps or config.train.max_steps
    # Of a trial only its end counts: validation pairs are measured once.
    section = dataclasses.replace(
        config.train, max_steps=steps, evaluate_steps=NEVER, keep="last", patience=None, best_metric="loss"
    )
    trial_config = dataclasses.replace(config, train=section)
    outputs = {beta: storage.join(home, TRIALS_FOLDER, f"beta-{beta!r}") for beta in betas}
    reporter = Reporter.from_environment("sweep")
    calls = [
        functools.partial(_train_trial, trial_config, scored, beta, outputs[beta], reporter, index, len(betas))
        for index, beta in enumerate(betas)
    ]
    failures = executor.trials(calls)
    return [
        _finished(beta, outputs[beta], num_validation) if failure is None else Trial(beta=beta, failure=failure)
        for beta, failure in zip(betas, failures, strict=True)
    ]


def _train_trial(
    config: RunConfig, scored: Artifact, beta: float, output: str, reporter: Reporter, index: int, count: int
) -> None:
    storage.use(storage_options(config))
    reporter.message(f"trial {index + 1} of {count}: beta {beta:g}")
    train(config, scored, InProcess(), beta=beta, output=output, reporter=reporter)


def _finished(beta: float, output: str, num_validation: int) -> Trial:
    metrics = open_artifact(output, "train").record.metrics
    for weights in ("adapter", "model"):
        # The final training is a stage of its own; a trial's weights have served once they are measured.
        discard(output, weights)
    return Trial(
        beta=beta,
        accuracy=metrics["validation/rewards/accuracy"],
        margin=metrics["validation/rewards/margin"],
        n=num_validation,
    )
