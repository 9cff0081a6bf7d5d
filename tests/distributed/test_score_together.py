"""Ranks that hold a model together say what a worker says that holds it alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.data.shards import Split
from dpo_train.progress import Reporter
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.evaluate_models import SCORE_COLUMNS, Asked, _build, prompt_tables
from dpo_train.stages.executor import InProcess
from dpo_train.train.map_job import MapJob
from dpo_train.train.ranks import Ranks
from tests.distributed.processes import spawn
from tests.tiny import tiny_config

LOCAL = InProcess()


@pytest.fixture(scope="module", params=["adapters", "all weights"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Artifact, Artifact]:
    """A policy of each kind, and the pairs that it was trained on."""
    more: dict[str, Any] = {} if request.param == "adapters" else {"train__lora": None}
    config = tiny_config(tmp_path_factory.mktemp("run"), train__max_steps=4, **more)
    scored = score_reference(config, prepare(config, LOCAL), LOCAL)
    return config, scored, train(config, scored, LOCAL)


def tables(scored: Artifact) -> tuple[list[pa.Table], list[pa.Table]]:
    """Three tables of 20, 20 and 3 pairs, and three of 4, 2 and 3 prompts."""
    pairs = Split(scored, "heldout").table(SCORE_COLUMNS).slice(0, 43)
    asked = pairs.slice(0, 3)
    prompts = prompt_tables(asked["pair_id"], asked["prompt_ids"], (1.0, 0.0), size=4, count=2)
    assert [len(table) for table in prompts] == [4, 2, 3]
    return [pairs.slice(start, 20) for start in (0, 20, 40)], prompts


def work(jobs: Sequence[MapJob], ranks: Ranks) -> None:
    for job in jobs:
        job.run(ranks)


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel"), [(2, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_ranks_say_what_one_worker_says(
    made: tuple[RunConfig, Artifact, Artifact], world_size: int, tensor_parallel: int, tmp_path: Path
) -> None:
    """Log-probs of pairs to fp32's rounding, and sampled answers token for token, with more shares than tables at the
    end of a round."""
    config, scored, policy = made
    lora = config.train.lora is not None
    if lora and tensor_parallel > 1:
        pytest.skip("adapters are not cut")
    asked = Asked(name="policy", model=config.model, weights=policy, frozen_base=lora)
    build = functools.partial(_build, config, asked)
    alone = build(None)

    jobs = [
        MapJob(
            make=build, tables=each, sizes=list(map(len, each)), before=0, unit=kind, folder=kind,
            output=str(tmp_path / "out"), device="cpu", tensor_parallel=tensor_parallel, reporter=Reporter(),
        )
        for kind, each in zip(("pairs", "prompts"), tables(scored), strict=True)
    ]  # fmt: skip

    spawn(world_size, tmp_path / "meeting", functools.partial(work, jobs))

    for job in jobs:
        for number, table in enumerate(job.tables):
            got, expected = pq.read_table(tmp_path / "out" / job.part_name(number)), alone(table)
            assert got["pair_id"].to_pylist() == expected["pair_id"].to_pylist()
            if job.unit == "prompts":
                assert got["answer_ids"].to_pylist() == expected["answer_ids"].to_pylist()
                np.testing.assert_allclose(got["logps"], expected["logps"], rtol=1e-5)
            else:
                for side in ("chosen_logps", "rejected_logps"):
                    flat = [np.concatenate(table[side].to_pylist()) for table in (got, expected)]
                    np.testing.assert_allclose(*flat, rtol=1e-4, atol=1e-6)


def test_interrupted_job_does_only_what_is_missing(made: tuple[RunConfig, Artifact, Artifact], tmp_path: Path) -> None:
    """Of three results one is taken away: it comes back, and the others stay the files that they were."""
    config, scored, policy = made
    asked = Asked(name="policy", model=config.model, weights=policy, frozen_base=config.train.lora is not None)
    pairs, _ = tables(scored)
    job = MapJob(
        make=functools.partial(_build, config, asked), tables=pairs, sizes=[1, 1, 1], before=0, unit="pairs",
        folder="parts", output=str(tmp_path), device="cpu", tensor_parallel=1, reporter=Reporter(),
    )  # fmt: skip
    job.run(Ranks())
    files = [tmp_path / job.part_name(number) for number in range(3)]
    before = [(file.stat().st_ino, file.read_bytes()) for file in files]
    files[1].unlink()

    job.run(Ranks())

    after = [(file.stat().st_ino, file.read_bytes()) for file in files]
    assert [content for _, content in after] == [content for _, content in before]
    assert (after[0][0], after[2][0]) == (before[0][0], before[2][0])


def test_reference_scored_together_is_the_reference(tmp_path: Path) -> None:
    """The stage gives the same scores by two ranks, and leaves nothing of theirs behind."""

    class TwoRanks(InProcess):
        def run_ranks(self, job: Any) -> None:
            spawn(2, tmp_path / "meeting", functools.partial(work, [job]))

    config = tiny_config(tmp_path)
    pairs = prepare(config, LOCAL)
    alone = score_reference(config, pairs, LOCAL)
    # In a store of its own, where the scores are not known yet.
    compute = replace(config.compute, score_sharded=True, workers=2)
    made = score_reference(replace(config, store=str(tmp_path / "together"), compute=compute), pairs, TwoRanks())

    assert made.record.counts == alone.record.counts
    assert not (made.path / "parts").exists()
    for split in ("train", "heldout"):
        got, expected = (Split(each, split).table() for each in (made, alone))
        assert got["pair_id"] == expected["pair_id"]
        for side in ("reference_chosen_logps", "reference_rejected_logps"):
            flat = [np.concatenate(table[side].to_pylist()) for table in (got, expected)]
            np.testing.assert_allclose(*flat, rtol=1e-4, atol=1e-6)
