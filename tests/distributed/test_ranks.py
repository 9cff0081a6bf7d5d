"""Two ranks equal one, on two real gloo processes.

Plain SGD at rate 1 shows a gradient that is wrong by a factor, which Adam would hide.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpo_train.config import LoraConfig, TrainConfig
from dpo_train.core.metrics import NAMES
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import NonFiniteLossError
from dpo_train.model.load import parameter_state
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import evaluate_pairs, train_step
from tests.tiny import random_pairs, tiny_model, tiny_policy, with_reference

WORLD_SIZE = 2
STEPS = 3
CONFIG = TrainConfig(
    beta=0.5,
    row_tokens=40,
    max_grad_norm=0.5,
    learning_rate=5e-3,
    warmup_steps=1,
    batch_pairs=4,
    checkpoint_steps=2,
    evaluate_steps=2,
    lora=LoraConfig(rank=4),
)
CASES = {"full 1": "one rank has no pair", "lora 2": "one pair each", "full 9": "several rows each"}


def _pairs(folder: Path) -> list[TokenPair]:
    return with_reference(tiny_policy(folder, lora=False, trainable=False), random_pairs(9))


def _sgd(folder: Path, pairs: list[TokenPair], ranks: Ranks, lora: bool) -> dict[str, Any]:
    """Weight changes and sums of a few steps at rate 1."""
    policy = tiny_policy(folder, lora=lora)
    before = parameter_state(policy)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    results = [
        train_step(policy, optimizer, pairs, CONFIG, ranks, step=step, learning_rate=1.0) for step in range(STEPS)
    ]
    return {
        "change": torch.cat([(value - before[name]).flatten() for name, value in parameter_state(policy).items()]),
        "sums": torch.stack([result.sums for result in results]),
        "norms": torch.tensor([result.grad_norm for result in results]),
        "evaluation": evaluate_pairs(policy, pairs, CONFIG, ranks),
    }


def _fit(folder: Path, output: Path, ranks: Ranks, stop: int | None = None) -> torch.Tensor:
    """The real loop, whose report may stop the training like a crash would."""
    pairs = _pairs(folder)
    policy = tiny_policy(folder)
    # A later max_steps is no other training here: the identity is given by hand, and the schedule is constant.
    config = replace(CONFIG, epochs=2, schedule="constant", max_steps=stop)
    job = Fit(config=config, train_pairs=pairs, validation_pairs=pairs[:3], data_digest="d", seed=0, identity="id",
              folder=output)  # fmt: skip
    fit(policy, job, ranks)
    return torch.cat([value.flatten() for value in parameter_state(policy).values()])


def _non_finite(folder: Path, ranks: Ranks) -> str:
    """The message that this rank raises when the other one's pair is broken."""
    pairs = _pairs(folder)[:2]
    pairs[1] = replace(pairs[1], reference_chosen_logps=np.full_like(pairs[1].reference_chosen_logps, np.nan))
    policy = tiny_policy(folder)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    try:
        train_step(policy, optimizer, pairs, CONFIG, ranks, step=7, learning_rate=1.0)
    except NonFiniteLossError as error:
        return str(error)
    return "nothing was raised"


def _everything(folder: Path, output: Path, ranks: Ranks) -> dict[str, Any]:
    pairs = _pairs(folder)
    found: dict[str, Any] = {}
    for case in CASES:
        kind, count = case.split()
        found[case] = _sgd(folder, pairs[: int(count)], ranks, lora=kind == "lora")
    found["fit"] = _fit(folder, output, ranks)
    found["error"] = _non_finite(folder, ranks)
    return found


def _rank(rank: int, root: str, model: str) -> None:
    torch.set_num_threads(1)
    folder = Path(root)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD_SIZE)
    try:
        found = _everything(Path(model), folder / "two", Ranks.current())
        torch.save(found, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left their results."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one", "two", "mixed"):
        (folder / name).mkdir()
    tiny_model(folder / "model")
    mp.spawn(_rank, args=(str(folder), str(folder / "model")), nprocs=WORLD_SIZE)
    return folder


@pytest.fixture(scope="module")
def two(root: Path) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    return [torch.load(root / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    """The same in this process, alone."""
    return _everything(root / "model", root / "one", Ranks())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_change_the_weights_as_one_does(two: list[dict[str, Any]], one: dict[str, Any], case: str) -> None:
    """Three steps of SGD at rate 1: changes agree to 1e-5 relative, on both ranks."""
    wanted = one[case]["change"]
    assert wanted.norm() > 0.1
    for found in two:
        assert (found[case]["change"] - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_bit_for_bit(two: list[dict[str, Any]], case: str) -> None:
    """They hold one policy; a drift between them would never be noticed later."""
    assert torch.equal(two[0][case]["change"], two[1][case]["change"])


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_global(two: list[dict[str, Any]], one: dict[str, Any], case: str) -> None:
    """Sums, gradient norm and evaluation on each rank are those of all pairs.

    Before the first update all margins are zero but for rounding, which alone decides the accuracy there.
    """
    wanted = one[case]
    assert wanted["sums"][:, -1].tolist() == [int(case.split()[1])] * STEPS
    for sums in (wanted["sums"], *(found[case]["sums"] for found in two)):
        sums[0, NAMES.index("rewards/accuracy")] = 0.0
    for found in two:
        for name in ("sums", "norms", "evaluation"):
            assert torch.allclose(found[case][name], wanted[name], rtol=1e-5, atol=1e-5), name


def test_whole_training_on_two_ranks_equals_one(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """The loop with AdamW, validation and checkpoints, two epochs.

    Adam divides by the gradient's own size and so turns rounding into whole steps where a gradient is near zero: 1e-3.
    """
    assert (two[0]["fit"] - one["fit"]).norm() <= 1e-3 * one["fit"].norm()
    assert torch.equal(two[0]["fit"], two[1]["fit"])


def test_first_rank_alone_writes(root: Path, two: list[dict[str, Any]]) -> None:
    """One history with each step once, one checkpoint."""
    del two
    assert len((root / "two" / "metrics.jsonl").read_text().splitlines()) == 5
    assert [p.name for p in (root / "two" / "checkpoints").iterdir()] == ["step-00000005.pt"]


def test_checkpoint_of_two_ranks_resumes_on_one(root: Path, one: dict[str, Any]) -> None:
    """A resized run goes on where the other stopped: the same steps see the same pairs."""
    _fit(root / "model", root / "mixed", Ranks(), stop=2)
    assert torch.equal(_fit(root / "model", root / "mixed", Ranks()), one["fit"])


def test_loss_that_is_not_finite_stops_every_rank(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Every rank names the pair and the rank that has it, and none waits for ever."""
    assert "step 7" in one["error"]
    assert "pairs pair-1 (rank 0)" in one["error"]
    errors = [found["error"] for found in two]
    assert errors[0] == errors[1]
    assert re.search(r"not finite at step 7\. Got: pairs pair-1 \(rank [01]\)\.", errors[0])
