"""Ranks that share nothing but the bucket: each has a disk of its own, and so has the stage that started them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpo_train import storage
from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.errors import PreemptedError
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from dpo_train.train.job import TrainJob
from dpo_train.train.ranks import Ranks
from dpo_train.train.worker import run_rank
from tests.s3.flow import contents, machine, numbers
from tests.s3.server import Server
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow


class TwoRanks(InProcess):
    """Trains on two gloo processes; with ``disks``, each has a folder of its own there."""

    def __init__(self, rendezvous: Path, disks: tuple[str, str] | None = None, preempted_after: int | None = None):
        self._rendezvous, self._disks, self._preempted_after = rendezvous, disks, preempted_after

    def run_ranks(self, job: TrainJob) -> None:
        self._rendezvous.unlink(missing_ok=True)
        mp.spawn(_rank, (job, str(self._rendezvous), self._disks, self._preempted_after), nprocs=2)
        if self._preempted_after is not None:
            raise PreemptedError("as the ranks have said")


def _rank(
    rank: int, job: TrainJob, rendezvous: str, disks: tuple[str, str] | None, preempted_after: int | None
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    options = replace(job.storage, cache=disks[rank]) if disks else job.storage
    steps = iter(range(1, 1000))
    try:
        run_rank(replace(job, storage=options), Ranks.current(), is_preempted=lambda: next(steps) == preempted_after)
    except PreemptedError:
        assert preempted_after is not None
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """All weights, each rank a share of them."""
    return tiny_config(tmp_path_factory.mktemp("apart"), train__lora=None, compute__shard="on")


@pytest.fixture(scope="module")
def together(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Two ranks on one disk, in one go."""
    pairs = prepare(config, InProcess())
    scored = score_reference(config, pairs, InProcess())
    ranks = TwoRanks(tmp_path_factory.mktemp("together") / "rendezvous")
    return {"pairs": pairs, "scored": scored, "policy": train(config, scored, ranks)}


def test_ranks_on_machines_of_their_own_train_and_go_on_as_on_one(
    direct: Server, config: RunConfig, together: dict[str, Artifact], tmp_path: Path
) -> None:
    """Taken away after step 7 and begun again on new disks: the weights of one go on one disk, bit for bit.

    Each rank's share of the checkpoint comes from the bucket, and the stage gets the policy from there as well.
    """
    remote = machine(replace(config, store=direct.bucket("apart") + "/store"), tmp_path / "driver")
    scored = score_reference(remote, prepare(remote, InProcess()), InProcess())
    first = TwoRanks(tmp_path / "rendezvous", (str(tmp_path / "a"), str(tmp_path / "b")), preempted_after=7)
    with pytest.raises(PreemptedError):
        train(remote, scored, first)
    shards = {key.rpartition("/")[2] for key in direct.objects("apart") if "step-00000007/" in key}
    assert shards == {"shard-0-of-2.safetensors", "shard-1-of-2.safetensors", "training.json", "metrics.jsonl"}

    remote = machine(remote, tmp_path / "driver2")
    second = TwoRanks(tmp_path / "rendezvous", (str(tmp_path / "c"), str(tmp_path / "d")))
    policy = train(remote, scored, second)

    assert numbers(policy) == numbers(together["policy"])
    assert contents(policy, ".safetensors") == contents(together["policy"], ".safetensors")
    assert len(contents(policy, "metrics.jsonl")["metrics.jsonl"].splitlines()) == 20
    assert not any("/checkpoints/" in key for key in direct.objects("apart"))
    assert storage.cache_folder() == tmp_path / "driver2"
