"""A sweep whose store lies in a bucket: rungs, KL on the way, and what another machine finds of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import SelectConfig
from dpo_train.stages import prepare, score_reference, sweep
from dpo_train.stages.executor import InProcess
from dpo_train.train.job import RankJob, TrainJob
from tests.s3.flow import machine, numbers
from tests.s3.server import Server
from tests.tiny import tiny_config

LOCAL = InProcess()


class Counting(InProcess):
    """Counts trainings."""

    def __init__(self) -> None:
        self.trained = 0

    def run_ranks(self, job: RankJob) -> None:
        self.trained += isinstance(job, TrainJob)
        super().run_ranks(job)


def trials_of(made: Artifact) -> Any:
    return json.loads(made.file("trials.json").read_text())["trials"]


@pytest.mark.slow
def test_halving_in_a_bucket_is_what_it_is_on_a_disk(direct: Server, tmp_path: Path) -> None:
    """Every number is the same, no weights and no scratch stay; another machine under another budget trains nothing
    and has the curves."""
    config = tiny_config(tmp_path, train__max_steps=4, sweep__betas=[0.1, 0.5], sweep__halving=2, sweep__num_prompts=2)
    scored = score_reference(config, prepare(config, LOCAL), LOCAL)
    here = sweep(config, scored, LOCAL)
    remote = machine(replace(config, store=f"{direct.bucket('sweeps')}/store"), tmp_path / "one")

    made = sweep(remote, scored, LOCAL)

    assert trials_of(made) == trials_of(here)
    assert numbers(made) == numbers(here)
    left = [key for key in direct.objects("sweeps") if not key.startswith(("store/sweep/", "store/trial/"))]
    assert left == []
    assert not any("/work/" in key or key.endswith(".safetensors") for key in direct.objects("sweeps"))

    counting = Counting()
    looser = replace(config.sweep, select=SelectConfig(max_length_growth=9.0))
    again = sweep(machine(replace(remote, sweep=looser), tmp_path / "two"), scored, counting)

    assert counting.trained == 0
    assert trials_of(again) == trials_of(here)
    assert {name for name in again.record.files if name.startswith("trials/")} == {
        f"trials/beta={beta}/metrics.jsonl" for beta in ("0.1", "0.5")
    }
