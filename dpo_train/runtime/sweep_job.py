"""Ray Tune: the trials of a sweep."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from dpo_train.config import ComputeConfig
from dpo_train.errors import WorkerError, decode, encode
from dpo_train.runtime.failures import known_error
from dpo_train.runtime.session import attach, num_gpus
from dpo_train.stages.executor import run_trial


def run_trials(trials: Sequence[Callable[[], None]], compute: ComputeConfig) -> list[str | None]:
    """Runs every trial; for each None, or how it diverged.

    With GPUs one trial per GPU at a time; without, one after the other on all cores (two at once on half the cores each
    were no faster and take twice the memory).
    """
    ray = attach()
    from ray import tune

    gpus = int(num_gpus(compute))
    threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // max(1, gpus))
    # A fraction: a trial that asked for every core would wait for ever beside Tune's own actors, and none is refused.
    resources = {"CPU": 0.5, "GPU": 1} if gpus else {"CPU": 0.5}

    def run(parameters: dict[str, Any]) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        try:
            return {"failure": run_trial(trials[parameters["index"]]) or "", "error": ""}
        except Exception as error:
            return {"failure": "", "error": encode(known_error(error, "A trial failed"))}

    with tempfile.TemporaryDirectory(prefix="dpo-sweep-", ignore_cleanup_errors=True) as storage:
        results = tune.Tuner(
            tune.with_resources(run, resources),
            param_space={"index": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=gpus or 1),
            run_config=tune.RunConfig(name="sweep", storage_path=storage, verbose=0),
        ).fit()
    failures: list[str | None] = ["it never ended"] * len(trials)
    for result in results:
        index = result.config["index"]
        if result.error:
            raise WorkerError(f"Trial {index + 1} was lost: {result.error}")
        if result.metrics["error"]:
            raise decode(result.metrics["error"])
        failures[index] = result.metrics["failure"] or None
    return failures
