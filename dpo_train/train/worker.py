"""One rank's whole life, the same function in this process, in a Ray Train worker and in a Tune trial."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_train import storage
from dpo_train.artifacts import RECORD_FILE, local_copy, mirror, open_artifact
from dpo_train.config import SftConfig
from dpo_train.data.folder import ADAPTER_FOLDER, MODEL_FOLDER, model_folder
from dpo_train.data.shards import PairSequence, Split
from dpo_train.data.tokens import load_tokenizer
from dpo_train.disk import write_atomically
from dpo_train.metrics_file import METRICS_FILE
from dpo_train.model.load import Policy, load_policy, merged_model, save_policy, select_device
from dpo_train.model.save import write_model
from dpo_train.model.score import check_layout
from dpo_train.model.sharded import load_sharded, save_sharded
from dpo_train.model.tensor_parallel import build_mesh
from dpo_train.model.transforms import transform_layers
from dpo_train.train.job import CHECKPOINT_FOLDER, POLICY_NOTE, TrainJob
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks

RANKS_FOLDER = "ranks"


def run_rank(job: TrainJob, ranks: Ranks, *, is_preempted: Callable[[], bool] = lambda: False) -> None:
    """Loads, trains, and on the first rank saves the policy. Every rank leaves a line about itself in ``ranks/``."""
    storage.use(job.storage)
    output = local_copy(job.output)
    output.mkdir(parents=True, exist_ok=True)
    _note_rank(output, ranks)
    if job.tensor_parallel > 1:
        ranks = replace(ranks, mesh=build_mesh(select_device(job.device), job.tensor_parallel))
    splits = _splits(job)
    policy = _load(job, ranks)
    transform_layers(
        policy,
        checkpointing=job.activation_checkpointing,
        compile=job.compile == "on" or (job.compile == "auto" and policy.device.type == "cuda"),
        row_tokens=job.config.row_tokens,
    )
    is_over = fit(
        policy,
        Fit(
            config=job.config,
            train_pairs=splits["train"],
            validation_pairs=splits["validation"],
            seed=job.seed,
            origin=job.origin,
            home=job.output,
            report=job.reporter.progress,
            tell=job.reporter.message,
            is_preempted=is_preempted,
            pause_at=job.pause_at,
        ),
        ranks,
    )
    if is_over:
        _save(job, policy, output, ranks)
        if ranks.is_first and storage.is_remote(job.output):
            _publish_policy(job.output)
    ranks.barrier()


def _load(job: TrainJob, ranks: Ranks) -> Policy:
    """The policy to train, checked; with ``job.shard`` this rank's share of it."""
    config, device = job.config, select_device(job.device)
    options: dict[str, Any] = {"device": device, "lora": config.lora, "seed": job.seed, "frozen": config.frozen}
    if job.shard and ranks.world_size > 1:
        tell = job.reporter.message if ranks.is_first else lambda _: None
        return load_sharded(job.model, **options, mesh=ranks.mesh, tell=tell)
    policy = load_policy(job.model, **options, trainable=True)
    check_layout(policy)
    return policy


def _splits(job: TrainJob) -> dict[str, PairSequence]:
    """The pairs to train on and to validate with; SFT reads their chosen answers alone."""
    pairs, chosen_alone = open_artifact(job.pairs), isinstance(job.config, SftConfig)
    return {name: Split(pairs, name).pairs(chosen_alone=chosen_alone) for name in ("train", "validation")}


def _save(job: TrainJob, policy: Policy, output: Path, ranks: Ranks) -> None:
    """The policy, written by the first rank; after SFT a whole model, because every later stage starts from it."""
    tokenizer = load_tokenizer(model_folder(job.model.path), trust_remote_code=job.model.trust_remote_code)
    is_merged = policy.adapters is not None and isinstance(job.config, SftConfig)
    target = output / CHECKPOINT_FOLDER if is_merged else output
    if policy.sharded:
        save_sharded(policy, target, tokenizer, keep=ranks.is_first)
    elif ranks.is_first:
        save_policy(policy, target, tokenizer)
    if is_merged and ranks.is_first:
        # On the CPU, in fp32 and into the base as it was, which the training may have had in bf16.
        write_model(merged_model(job.model, target), output / MODEL_FOLDER)
        tokenizer.save_pretrained(output / MODEL_FOLDER)


def _publish_policy(home: str) -> None:
    """To s3:// what the first rank has made, which the stage may not have on its own disk; a note says what that is.

    Unless another machine has completed the same output meanwhile: its files must stay as its record says.
    """
    shared = mirror(home)
    if storage.info(storage.join(home, RECORD_FILE)) is not None:
        return
    folders = (ADAPTER_FOLDER, MODEL_FOLDER)
    files = [file for folder in folders for file in (shared.path / folder).rglob("*") if file.is_file()]
    names = [file.relative_to(shared.path).as_posix() for file in (*files, shared.path / METRICS_FILE)]
    shared.publish(*names)
    sizes = {name: (shared.path / name).stat().st_size for name in names}
    write_atomically(shared.path / POLICY_NOTE, json.dumps(sizes))
    shared.publish(POLICY_NOTE)


def _note_rank(output: Path, ranks: Ranks) -> None:
    folder = output / RANKS_FOLDER
    folder.mkdir(exist_ok=True)
    note = {"rank": ranks.rank, "world_size": ranks.world_size, "pid": os.getpid(), "host": os.uname().nodename}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
