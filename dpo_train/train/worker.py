"""One rank's whole life, the same function in this process, in a Ray Train worker and in a Tune trial."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from dpo_train.data.folder import model_folder
from dpo_train.data.pairs import TokenPair, token_pairs
from dpo_train.data.tokens import load_tokenizer
from dpo_train.model.load import load_policy, save_policy, select_device
from dpo_train.model.score import check_layout
from dpo_train.model.shard import shard, whole_state
from dpo_train.train.job import TrainJob
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks

RANKS_FOLDER = "ranks"


def run_rank(job: TrainJob, ranks: Ranks, *, is_preempted: Callable[[], bool] = lambda: False) -> None:
    """Loads, trains, and on the first rank saves the policy. Every rank leaves a line about itself in ``ranks/``."""
    output = Path(job.output)
    _note_rank(output, ranks)
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
            train_pairs=load_split(Path(job.scored), "train"),
            validation_pairs=load_split(Path(job.scored), "validation"),
            seed=job.seed,
            origin=job.origin,
            folder=output,
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
    ranks.barrier()


def load_split(folder: Path, split: str) -> list[TokenPair]:
    """Token pairs of one split of a prepared or scored output."""
    return token_pairs(pq.read_table(folder / f"{split}.parquet"))


def _note_rank(output: Path, ranks: Ranks) -> None:
    folder = output / RANKS_FOLDER
    folder.mkdir(exist_ok=True)
    note = {"rank": ranks.rank, "world_size": ranks.world_size, "pid": os.getpid(), "host": os.uname().nodename}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
