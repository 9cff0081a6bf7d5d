"""Ray Train: ``worker.run_rank`` on N workers."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

from dpo_train.config import ComputeConfig
from dpo_train.errors import DpoError, WorkerError
from dpo_train.runtime.failures import Decision, cause_of, decide, known_error
from dpo_train.runtime.session import attach
from dpo_train.train.job import TrainJob
from dpo_train.train.ranks import Ranks
from dpo_train.train.worker import run_rank

ERROR_FILE = "worker-error.pkl"
CPUS_PER_WORKER = 0.9  # as in data_job: leaves room for Ray's own tasks where workers = cores


def train(job: TrainJob, compute: ComputeConfig) -> None:
    """Runs all ranks to the end, restarting up to ``compute.max_failures`` times when a worker is lost.

    FailureConfig retries whatever is raised. So a rank writes down an error that another attempt would only meet again
    before it raises it, which ends the other ranks, and a restarted rank that finds such a note does nothing.

    Raises:
        DpoError: what a rank raised on purpose.
        WorkerError: a worker was lost too often, or raised an error of its own.
    """
    ray = attach()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    num_gpus = int(ray.cluster_resources().get("GPU", 0)) if compute.device != "cpu" else 0
    use_gpu = num_gpus > 0
    workers = min(compute.workers, num_gpus) if use_gpu else compute.workers
    if workers < compute.workers:
        job.reporter.message(f"training on {workers} workers: there are {num_gpus} GPUs")
    error_file = Path(job.output) / ERROR_FILE
    error_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="dpo-train-") as storage:
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"job": job, "threads": _threads(ray, workers)},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": CPUS_PER_WORKER, "GPU": int(use_gpu)}
            ),
            run_config=RunConfig(
                name="train", storage_path=storage, failure_config=FailureConfig(max_failures=compute.max_failures)
            ),
        )
        lost: Exception | None = None
        try:
            trainer.fit()
        except Exception as error:
            lost = error
    if error_file.is_file():
        raise pickle.loads(error_file.read_bytes())  # noqa: S301 - written by our own worker a moment ago
    if lost is not None:
        cause = cause_of(lost)
        raise WorkerError(f"The training failed on Ray: {type(cause).__name__}: {cause}") from lost


def _rank(parameters: dict[str, Any]) -> None:
    """A Ray Train worker."""
    import torch

    torch.set_num_threads(parameters["threads"])
    job: TrainJob = parameters["job"]
    error_file = Path(job.output) / ERROR_FILE
    if error_file.exists():
        return
    try:
        run_rank(job, Ranks.current())
    except Exception as error:
        if decide(error) is Decision.RAISE:
            _write_down(known_error(error, "A rank failed"), error_file)
        raise


def _write_down(error: DpoError, path: Path) -> None:
    """The first rank to fail tells; what the others meet afterwards follows from it."""
    try:
        with path.open("xb") as stream:
            stream.write(pickle.dumps(error))
    except FileExistsError:
        return


def _threads(ray: Any, workers: int) -> int:
    """Cores for each rank; Ray would give every worker one thread."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)
