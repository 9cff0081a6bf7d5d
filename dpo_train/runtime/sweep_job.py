"""Ray Tune: the trials of a sweep."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_train.config import ComputeConfig
from dpo_train.errors import WorkerError, decode, encode, first_line, is_out_of_memory
from dpo_train.runtime.failures import cause_of, known_error
from dpo_train.runtime.relay import drain, open_relay, use_relay
from dpo_train.runtime.session import attach, num_gpus
from dpo_train.stages.executor import Executor, InProcess, TrialCall, TrialEnd, run_trial

_LITTLE = 0.01
"""CPUs of a trial whose work is done by workers of its own: what it asked for they would lack, and wait for ever."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many trials run at a time, and on what."""

    at_once: int
    resources: Mapping[str, float]
    """Of the process that a trial is called in."""
    threads: int
    workers: int
    """More than 1: the trial's ranks are a Ray Train group of its own."""


def plan(compute: ComputeConfig, cores: Sequence[float], gpus: int) -> Plan:
    """``cores``: those of each machine.

    With GPUs a trial has as many as the training will have, and as many trials run as find theirs. Without, one trial
    runs on each machine, on all its cores: two at once on half the cores each were no faster and take twice the memory.
    A trial is one process, unless the training is to have several workers and these have GPUs or machines of their own,
    or must share the weights.
    """
    shares = compute.shard == "on" or compute.tensor_parallel > 1
    if gpus:
        workers = min(compute.workers, gpus)
        threads = max(1, int(sum(cores)) // gpus)
        resources = {"CPU": _LITTLE} if workers > 1 else {"CPU": 0.5, "GPU": 1.0}
        return Plan(at_once=gpus // workers, resources=resources, threads=threads, workers=workers)
    if compute.workers > 1 and (len(cores) > 1 or shares):
        return Plan(at_once=1, resources={"CPU": _LITTLE}, threads=1, workers=compute.workers)
    # A fraction: a trial that asked for every core would wait for ever beside Tune's own actors, and none is refused.
    share = 0.5 if len(cores) == 1 else 0.51 * min(cores)
    return Plan(at_once=len(cores), resources={"CPU": share}, threads=max(1, int(min(cores))), workers=1)


def run_trials(trials: Sequence[TrialCall], compute: ComputeConfig, ended: Callable[[int, TrialEnd], None]) -> None:
    """Runs every trial, side by side as ``plan`` says; one whose process was killed goes on, max_failures times.

    Raises:
        DpoError: what a trial raised on purpose, and is no failure of its own.
        WorkerError: a trial was lost too often, or raised an error of its own.
    """
    if not trials:
        return
    ray = attach()
    from ray import tune

    machines = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    how = plan(compute, [cores for cores in machines if cores] or [1.0], int(num_gpus(compute)))
    watch, relay = _watch(ended), open_relay(ray, grows=False)

    def run(parameters: dict[str, Any]) -> dict[str, Any]:
        import torch

        torch.set_num_threads(how.threads)
        use_relay(relay)
        try:
            end = run_trial(trials[parameters["index"]], _executor(compute, how))
        except Exception as error:
            return {"error": encode(known_error(error, "A trial failed"))}
        return {"end": json.dumps({"result": end.result, "failure": end.failure})}

    with tempfile.TemporaryDirectory(prefix="dpo-sweep-", ignore_cleanup_errors=True) as storage:
        results = tune.Tuner(
            tune.with_resources(run, dict(how.resources)),
            param_space={"index": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=how.at_once),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=storage,
                verbose=0,
                callbacks=[watch],
                stop=watch.stopper,
                failure_config=tune.FailureConfig(max_failures=compute.max_failures),
            ),
        ).fit()
    drain(ray, relay)
    if watch.error is not None:
        raise watch.error
    for result in results:
        if result.error is None:
            continue
        cause = cause_of(result.error)
        if not is_out_of_memory(cause):
            number = result.config["index"] + 1
            raise WorkerError(f"Trial {number} was lost: {type(cause).__name__}: {cause}") from result.error
        ended(result.config["index"], TrialEnd(failure=f"OutOfMemoryError: {first_line(cause)}"))


def _executor(compute: ComputeConfig, how: Plan) -> Executor:
    """What a trial's heavy work runs on."""
    if how.workers == 1:
        return InProcess()
    from dpo_train.runtime.executor import RayExecutor

    # Others run beside it: what asks the policy must not take their GPUs.
    return RayExecutor(replace(compute, data_workers=min(compute.data_workers, how.workers)))


def _watch(ended: Callable[[int, TrialEnd], None]) -> Any:
    """Tune's callback, and what stops all trials once one has raised an error."""
    from ray import tune

    class Watch(tune.Callback):  # type: ignore[misc] # Ray ships no types
        def __init__(self) -> None:
            self.error: Exception | None = None
            self.stopper = Stopper()

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            del iteration, trials, info
            found = trial.last_result
            try:
                if "error" in found:
                    raise decode(found["error"])
                if "end" in found:
                    ended(trial.config["index"], TrialEnd(**json.loads(found["end"])))
            except Exception as error:  # raised once Tune has cleared up
                self.error = self.error or error
                self.stopper.is_over = True

    class Stopper(tune.Stopper):  # type: ignore[misc]
        is_over = False

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return self.is_over

    return Watch()
