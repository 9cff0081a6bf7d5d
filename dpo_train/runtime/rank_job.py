"""Ray Train: a job of ranks on N workers."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from dpo_train.config import ComputeConfig
from dpo_train.errors import DpoError, PreemptedError, WorkerError, decode, encode, is_out_of_memory
from dpo_train.runtime.failures import Decision, cause_of, decide, known_error, out_of_memory
from dpo_train.runtime.relay import drain, open_relay, use_relay
from dpo_train.runtime.session import attach, num_gpus, own_signals
from dpo_train.storage import delete, find_bytes, is_remote, join, use, write_bytes
from dpo_train.train.job import RankJob
from dpo_train.train.ranks import Ranks

ERROR_FILE = "worker-error.json"
CPU_SHARE = 0.9  # as in data_job: leaves room for Ray's own tasks where workers = cores


def run_ranks(job: RankJob, compute: ComputeConfig) -> None:
    """Runs all ranks to the end, restarting up to ``compute.max_failures`` times when a worker is lost.

    With ``compute.min_workers`` their number follows what the cluster has; a change restarts from the checkpoint.

    FailureConfig retries whatever is raised. So a rank writes down an error that another attempt would only meet again
    before it raises it, which ends the other ranks, and a restarted rank that finds such a note does nothing.

    Raises:
        DpoError: what a rank raised on purpose.
        OutOfMemoryError: a worker's memory was too small.
        WorkerError: a worker was lost too often, or raised an error of its own.
    """
    ray = attach()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from dpo_train.runtime.preemption import ListeningTorchConfig

    gpus = int(num_gpus(compute))
    use_gpu = gpus > 0
    elastic = compute.min_workers is not None and compute.min_workers < compute.workers
    workers = min(compute.workers, gpus) if use_gpu and not elastic else compute.workers
    if workers < compute.workers:
        job.reporter.message(f"{workers} workers, because there are {gpus} GPUs")
    # More workers than cores share them; asking for whole ones, they would wait for ever.
    least = compute.min_workers if elastic and compute.min_workers is not None else workers
    cpus = min(1.0, ray.cluster_resources().get("CPU", 1) / least) * CPU_SHARE
    cpus = math.floor(cpus * 1000) / 1000  # Ray counts in thousandths
    _drop_note(job)
    relay = open_relay(ray, grows=elastic)
    # Workers that cannot be placed count as the controller's failures, which Ray would retry for ever.
    failures = FailureConfig(max_failures=compute.max_failures, controller_failure_limit=3)
    with tempfile.TemporaryDirectory(prefix="dpo-ranks-", ignore_cleanup_errors=True) as storage:
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"job": job, "threads": _threads(ray, workers), "relay": relay},
            torch_config=ListeningTorchConfig(
                backend="nccl" if use_gpu else "gloo", timeout_s=round(compute.timeout_minutes * 60)
            ),
            scaling_config=ScalingConfig(
                num_workers=(least, workers) if elastic else workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)},
            ),
            run_config=RunConfig(name="ranks", storage_path=storage, failure_config=failures),
        )
        lost: Exception | None = None
        try:
            with own_signals():
                trainer.fit()
        except SystemExit:
            raise KeyboardInterrupt from None  # what Ray Train makes of Ctrl-C
        except Exception as error:
            lost = error
    drain(ray, relay)
    if (note := _read_note(job)) is not None:
        raise decode(note)
    if lost is not None:
        for failure in getattr(lost, "worker_failures", {}).values():
            if isinstance(preempted := cause_of(failure), PreemptedError):
                raise preempted
        cause = cause_of(lost)
        if is_out_of_memory(cause):
            raise out_of_memory(cause, "The ranks failed on Ray") from lost
        raise WorkerError(f"The ranks failed on Ray: {type(cause).__name__}: {cause}") from lost


def _rank(parameters: dict[str, Any]) -> None:
    """A Ray Train worker."""
    import torch

    from dpo_train.runtime.preemption import is_preempted

    torch.set_num_threads(parameters["threads"])
    job: RankJob = parameters["job"]
    use(job.storage)
    use_relay(parameters["relay"])
    if _read_note(job) is not None:
        return
    ranks = Ranks.current()
    try:
        job.run(ranks, is_preempted=is_preempted)
    except Exception as error:
        # What a rank meets after its group was taken away follows from another rank's end.
        alone = torch.distributed.is_available() and not torch.distributed.is_initialized()
        if decide(error) is Decision.RAISE and not (alone and ranks.world_size > 1):
            _write_down(known_error(error, "A rank failed"), job)
        raise


def _write_down(error: DpoError, job: RankJob) -> None:
    """The first rank to fail tells; what the others meet afterwards follows from it. The note is whole or absent.

    It lies where all ranks and the driver look: in the store.
    """
    if is_remote(job.output):
        if _read_note(job) is None:
            with contextlib.suppress(DpoError):  # what Ray reports of the error remains
                write_bytes(join(job.output, ERROR_FILE), encode(error).encode())
        return
    path = Path(job.output) / ERROR_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        temporary.write_text(encode(error), encoding="utf-8")
        os.link(temporary, path)
    except OSError:
        return  # a full disk, or a note of another rank's; what Ray reports of this error remains
    finally:
        temporary.unlink(missing_ok=True)


def _read_note(job: RankJob) -> str | None:
    if is_remote(job.output):
        found = find_bytes(join(job.output, ERROR_FILE))
        return None if found is None else found[0].decode()
    path = Path(job.output) / ERROR_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _drop_note(job: RankJob) -> None:
    if is_remote(job.output):
        delete([join(job.output, ERROR_FILE)])
    else:
        (Path(job.output) / ERROR_FILE).unlink(missing_ok=True)


def _threads(ray: Any, workers: int) -> int:
    """Cores for each rank; Ray would give every worker one thread."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)
