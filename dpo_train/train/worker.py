"""One rank's whole life, the same function in this process, in a Ray Train worker and in a Tune trial."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from dpo_train import storage
from dpo_train.artifacts import RECORD_FILE, local_copy, mirror, open_artifact
from dpo_train.data.folder import model_folder
from dpo_train.data.shards import Split
from dpo_train.data.tokens import load_tokenizer
from dpo_train.disk import write_atomically
from dpo_train.metrics_file import METRICS_FILE
from dpo_train.model.load import ADAPTER_FOLDER, MODEL_FOLDER, load_policy, save_policy, select_device
from dpo_train.model.score import check_layout
from dpo_train.model.shard import shard, whole_state
from dpo_train.train.job import POLICY_NOTE, TrainJob
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks

RANKS_FOLDER = "ranks"


def run_rank(job: TrainJob, ranks: Ranks, *, is_preempted: Callable[[], bool] = lambda: False) -> None:
    """Loads, trains, and on the first rank saves the policy. Every rank leaves a line about itself in ``ranks/``."""
    storage.use(job.storage)
    output = local_copy(job.output)
    output.mkdir(parents=True, exist_ok=True)
    _note_rank(output, ranks)
    scored = open_artifact(job.scored)
    policy = load_policy(
        job.model, device=select_device(job.device), lora=job.config.lora, trainable=True, seed=job.seed
    )
    check_layout(policy)
    if job.shard and ranks.world_size > 1:
        shard(policy)
    fit(
        policy,
        Fit(
            config=job.config,
            train_pairs=Split(scored, "train").pairs(),
            validation_pairs=Split(scored, "validation").pairs(),
            seed=job.seed,
            origin=job.origin,
            home=job.output,
            report=job.reporter.progress,
            tell=job.reporter.message,
            is_preempted=is_preempted,
        ),
        ranks,
    )
    state = whole_state(policy, keep=ranks.is_first) if policy.sharded else None
    if ranks.is_first:
        tokenizer = load_tokenizer(model_folder(job.model.path), trust_remote_code=job.model.trust_remote_code)
        save_policy(policy, output, tokenizer, state)
        if storage.is_remote(job.output):
            _publish_policy(job.output)
    ranks.barrier()


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
