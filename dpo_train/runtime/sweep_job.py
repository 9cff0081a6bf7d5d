"""Ray Tune: the trials of a sweep."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from dpo_train.config import ComputeConfig
from dpo_train.runtime.session import attach
from dpo_train.stages.executor import run_trial


def run_trials(trials: Sequence[Callable[[], None]], compute: ComputeConfig) -> list[str | None]:
    """Runs every trial; for each None, or the reason why it failed.

    With GPUs one trial per GPU at a time; without, one after the other on all cores (two at once on half the cores each
    were no faster and take twice the memory).
    """
    ray = attach()
    from ray import tune

    num_gpus = int(ray.cluster_resources().get("GPU", 0)) if compute.device != "cpu" else 0
    threads = int(ray.cluster_resources().get("CPU", 1))
    # A fraction: a trial that asked for every core would wait for ever beside Tune's own actors, and none is refused.
    resources = {"CPU": 0.5, "GPU": 1} if num_gpus else {"CPU": 0.5}

    def run(parameters: dict[str, Any]) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        return {"failure": run_trial(trials[parameters["index"]]) or ""}

    with tempfile.TemporaryDirectory(prefix="dpo-sweep-") as storage:
        results = tune.Tuner(
            tune.with_resources(run, resources),
            param_space={"index": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=num_gpus or 1),
            run_config=tune.RunConfig(name="sweep", storage_path=storage, verbose=0),
        ).fit()
    failures: list[str | None] = ["it never ended"] * len(trials)
    for result in results:
        index = result.config["index"]
        failures[index] = str(result.error) if result.error else (result.metrics["failure"] or None)
    return failures
