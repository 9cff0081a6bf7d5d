"""The policy of a training that pauses at a rung: its checkpoint as a folder that answers and scores like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, local_copy, mirror, produce
from dpo_train.config import RunConfig
from dpo_train.data.folder import ADAPTER_FOLDER, MODEL_FOLDER, model_folder
from dpo_train.disk import write_atomically
from dpo_train.progress import Reporter
from dpo_train.stages.executor import Executor
from dpo_train.stages.train import training_job
from dpo_train.train.job import CHECKPOINT_FOLDER, POLICY_NOTE, TrainJob

if TYPE_CHECKING:
    from dpo_train.model.load import Policy
    from dpo_train.train.ranks import Ranks


def paused_policy(
    training: RunConfig,
    scored: Artifact,
    executor: Executor,
    *,
    home: str,
    step: int,
    target: str,
    reporter: Reporter,
) -> Artifact:
    """Makes ``adapter/`` or ``model/`` of a checkpoint; ``record.details`` has the training's ``beta``.

    Args:
        training: the config whose training it is.
        home: of the training, which stands after ``step`` steps.
        target: where the policy goes.
    """

    def body(out: Output) -> Summary:
        job = training_job(training, training.train, scored, Output(home), origin={}, reporter=reporter)
        executor.run_ranks(PausedJob(training=job, step=step, output=out.home))
        out.adopt_noted(POLICY_NOTE)
        return Summary(
            counts={"steps": step}, details={"beta": training.train.beta, "summary": f"the policy after {step} steps"}
        )

    content = {"training": storage.name_of(home), "step": step}
    return produce("paused", content, {}, target, body, scratch=(CHECKPOINT_FOLDER,))


@dataclass(frozen=True, kw_only=True)
class PausedJob:
    """See RankJob."""

    training: TrainJob
    step: int
    output: str

    @property
    def reporter(self) -> Reporter:
        """See RankJob."""
        return self.training.reporter

    @property
    def storage(self) -> storage.Options:
        """See RankJob."""
        return self.training.storage

    def run(self, ranks: Ranks, *, is_preempted: Callable[[], bool] = lambda: False) -> None:
        """See RankJob. The policy is loaded as its training loads it, on as many ranks."""
        from dpo_train.data.tokens import load_tokenizer
        from dpo_train.model.load import save_policy, select_device
        from dpo_train.model.sharded import save_sharded
        from dpo_train.model.tensor_parallel import build_mesh
        from dpo_train.train.checkpoint import Checkpoints
        from dpo_train.train.optimizer import build_optimizer

        del is_preempted  # it is soon done, and done again
        job = self.training
        storage.use(job.storage)
        if job.tensor_parallel > 1:
            ranks = replace(ranks, mesh=build_mesh(select_device(job.device), job.tensor_parallel))
        policy = _load(job, ranks)
        optimizer = build_optimizer(policy.trainable().values(), job.config)
        Checkpoints(job.output, job.origin, policy, optimizer, ranks).load_parameters(self.step)
        tokenizer = load_tokenizer(model_folder(job.model.path), trust_remote_code=job.model.trust_remote_code)
        target = local_copy(self.output)
        target.mkdir(parents=True, exist_ok=True)  # each rank: it may have a disk of its own
        if policy.sharded:
            save_sharded(policy, target, tokenizer, keep=ranks.is_first)
        elif ranks.is_first:
            save_policy(policy, target, tokenizer)
        if ranks.is_first and storage.is_remote(self.output):
            _publish(self.output)
        ranks.barrier()


def _load(job: TrainJob, ranks: Ranks) -> Policy:
    """As it is when its training begins; with ``job.shard`` this rank's share of it."""
    from dpo_train.model.load import load_policy, select_device
    from dpo_train.model.sharded import load_sharded

    config = job.config
    options: dict[str, Any] = {
        "device": select_device(job.device),
        "lora": config.lora,
        "seed": job.seed,
        "frozen": config.frozen,
    }
    if job.shard and ranks.world_size > 1:
        return load_sharded(job.model, **options, mesh=ranks.mesh)
    return load_policy(job.model, **options, trainable=True)


def _publish(home: str) -> None:
    """To s3:// what the first rank has made, which the stage may not have on its own disk; a note says what that is."""
    shared = mirror(home)
    files = [file for name in (ADAPTER_FOLDER, MODEL_FOLDER) for file in (shared.path / name).rglob("*")]
    names = [file.relative_to(shared.path).as_posix() for file in files if file.is_file()]
    shared.publish(*names)
    sizes = {name: (shared.path / name).stat().st_size for name in names}
    (shared.path / POLICY_NOTE).parent.mkdir(exist_ok=True)
    write_atomically(shared.path / POLICY_NOTE, json.dumps(sizes))
    shared.publish(POLICY_NOTE)
