"""One rank = two = three, whole weights or shares of them, on real gloo processes.

Plain SGD at rate 1 shows a gradient that is wrong by a factor, which Adam would hide. Every process does everything
once and leaves its results in a file; the tests read them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
import torch

from dpo_train.config import LoraConfig, TrainConfig
from dpo_train.core.metrics import NAMES
from dpo_train.data.pairs import TokenPair
from dpo_train.errors import NonFiniteLossError
from dpo_train.model.load import Policy
from dpo_train.model.shard import shard, whole, whole_state
from dpo_train.model.transforms import transform_layers
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import evaluate_pairs, train_step
from tests.distributed.processes import spawn
from tests.tiny import random_rankings, tiny_model, tiny_policy, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write

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


@dataclass(frozen=True)
class Case:
    """A few steps of SGD."""

    pairs: int
    family: str = "llama"
    lora: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    answers: int = 2
    checkpointing: Literal["off", "selective", "full"] = "off"
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def tolerance(self) -> float:
        """Relative. In bf16 a row of other pairs is rounded otherwise, with eight bits a number."""
        return 1e-5 if self.precision == "fp32" else 2e-2


CASES = {
    "a rank without pairs": Case(1),
    "adapters, a pair each": Case(2, lora=True),
    "several rows each": Case(9),
    "a loss over the batch": Case(9, options={"loss": "aot", "beta": 0.02}),
    "several losses": Case(7, options={"loss": {"sigmoid": 1.0, "aot_unpaired": 0.5, "sft": 0.1}}),
    "weighted": Case(6, options={"wpo": True, "ld_alpha": 0.5}),
    "rankings of 2 to 5": Case(7, options={"loss": "plackett_luce"}, answers=5),
    "experts": Case(5, "mixtral", options={"router_aux_loss": 0.5}),
    "a window and caps": Case(5, "gemma2"),
    "tied weights": Case(4, "qwen2"),
    "bf16": Case(9, precision="bf16"),
    "adapters on a base in bf16": Case(9, lora=True, precision="bf16"),
    "layers computed again": Case(5, checkpointing="full"),
    "layers computed again but for products": Case(5, checkpointing="selective"),
}
# Any number of pairs in rows of any length.
CASES |= {
    f"{pairs} pairs in rows of {row_tokens}": Case(pairs, options={"row_tokens": row_tokens})
    for pairs, row_tokens in ((Random(seed).randint(1, 9), Random(seed + 100).randint(1, 90)) for seed in range(6))
}
FAMILIES_USED = sorted({case.family for case in CASES.values()})
WORLDS = {"2 whole": (2, False), "2 sharded": (2, True), "3 sharded": (3, True)}


def _pairs(folder: Path, count: int, answers: int = 2) -> list[TokenPair]:
    pairs = random_rankings(count, most=answers, vocabulary=VOCABULARY)
    return with_reference(tiny_policy(folder, lora=False, trainable=False), pairs)


def _policy(
    folder: Path, ranks: Ranks, sharded: bool, lora: bool, precision: Literal["fp32", "bf16"] = "fp32"
) -> Policy:
    policy = tiny_policy(folder, lora=lora, precision=precision)
    if sharded and ranks.world_size > 1:
        shard(policy)
    return policy


def _weights(policy: Policy) -> torch.Tensor:
    return torch.cat([whole(p).detach().flatten().clone() for p in policy.trainable().values()])


def _sgd(case: Case, root: Path, ranks: Ranks, sharded: bool) -> dict[str, Any]:
    """Weight changes and sums of a few steps at rate 1."""
    folder, config = root / case.family, replace(CONFIG, **case.options)
    pairs = _pairs(folder, case.pairs, case.answers)
    policy = _policy(folder, ranks, sharded, case.lora, case.precision)
    transform_layers(policy, checkpointing=case.checkpointing, compile=False, row_tokens=config.row_tokens)
    before = _weights(policy)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    results = [
        train_step(policy, optimizer, pairs, config, ranks, step=step, learning_rate=1.0) for step in range(STEPS)
    ]
    return {
        "change": _weights(policy) - before,
        "sums": torch.stack([result.sums for result in results]),
        "norms": torch.tensor([result.grad_norm for result in results]),
        "aux": [result.aux_loss for result in results],
        "evaluation": evaluate_pairs(policy, pairs, config, ranks),
    }


def _fit(root: Path, output: Path, ranks: Ranks, sharded: bool, stop: int | None = None) -> torch.Tensor:
    """The real loop; ``stop`` ends it early, as a crash after a checkpoint would."""
    output.mkdir(exist_ok=True)
    pairs = _pairs(root / "llama", 9)
    policy = _policy(root / "llama", ranks, sharded, lora=not sharded)
    # A later max_steps is no other training here: the origin is given by hand, and the schedule is constant.
    config = replace(CONFIG, epochs=2, schedule="constant", max_steps=stop, lora=None if sharded else CONFIG.lora)
    job = Fit(config=config, train_pairs=pairs, validation_pairs=pairs[:3], seed=0, origin={"of": "d"},
              home=str(output))  # fmt: skip
    fit(policy, job, ranks)
    state = whole_state(policy, keep=True)
    assert all(len(tensor) or not tensor.shape for tensor in state.values())
    return _weights(policy)


def _non_finite(root: Path, ranks: Ranks, sharded: bool) -> str:
    """The message that this rank raises when some rank's pair is broken."""
    pairs = _pairs(root / "llama", 2)
    pairs[1] = replace(pairs[1], reference_chosen_logps=np.full_like(pairs[1].reference_chosen_logps, np.nan))
    policy = _policy(root / "llama", ranks, sharded, lora=True)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    try:
        train_step(policy, optimizer, pairs, CONFIG, ranks, step=7, learning_rate=1.0)
    except NonFiniteLossError as error:
        return str(error)
    return "nothing was raised"


def _everything(root: Path, output: Path, sharded: bool, ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {name: _sgd(case, root, ranks, sharded) for name, case in CASES.items()}
    found["fit"] = _fit(root, output / "fit", ranks, sharded)
    _fit(root, output / "stopped", ranks, sharded, stop=2)
    found["error"] = _non_finite(root, ranks, sharded)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family."""
    folder = tmp_path_factory.mktemp("ranks")
    for family in FAMILIES_USED:
        write(folder / family, FAMILIES[family])
    tiny_model(folder / "tiny")
    return folder


# Three ranks on two cores take half a minute: they are part of `make test-all`.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name.startswith("3") else ()) for name in WORLDS],
)
def world(root: Path, request: pytest.FixtureRequest) -> World:
    """What each rank of a world found."""
    world_size, sharded = WORLDS[request.param]
    output = root / request.param.replace(" ", "-")
    return World(output, sharded, spawn(world_size, output, _everything, root, output, sharded))


@dataclass(frozen=True)
class World:
    """A number of ranks, and what each found."""

    output: Path
    sharded: bool
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    """The same in this process, alone."""
    torch.set_num_threads(1)
    (root / "one").mkdir()
    found = _everything(root, root / "one", False, Ranks())
    # Sharded ranks train all weights.
    return found | {"full fit": _fit(root, root / "one" / "full", Ranks(), sharded=True)}


@pytest.mark.parametrize("case", CASES)
def test_ranks_change_the_weights_as_one_does(world: World, one: dict[str, Any], case: str) -> None:
    """Three steps of SGD at rate 1: changes agree on every rank, in fp32 to 1e-5 relative."""
    wanted = one[case]["change"]
    assert wanted.norm() > 0.1
    for found in world.ranks:
        assert (found[case]["change"] - wanted).norm() <= CASES[case].tolerance * wanted.norm()


def test_a_pair_left_out_would_be_noticed(root: Path, one: dict[str, Any]) -> None:
    """Eight of nine pairs change the weights differently by a thousand tolerances."""
    without = _sgd(Case(8), root, Ranks(), sharded=False)["change"]
    wanted = one["several rows each"]["change"]
    assert (without - wanted).norm() > 1e-2 * wanted.norm()


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_bit_for_bit(world: World, case: str) -> None:
    """They hold one policy; a drift between them would never be noticed later."""
    for found in world.ranks[1:]:
        assert torch.equal(world.ranks[0][case]["change"], found[case]["change"])


def without_first_accuracy(sums: torch.Tensor) -> torch.Tensor:
    """The sums of all steps but for the accuracy of the first; the given ones stay as they are."""
    kept = sums.clone()
    kept[0, NAMES.index("rewards/accuracy")] = 0.0
    return kept


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_global(world: World, one: dict[str, Any], case: str) -> None:
    """Sums, gradient norm and evaluation on each rank are those of all pairs.

    Before the first update all margins are zero but for rounding, which alone decides the accuracy there.
    """
    wanted, rtol = one[case], CASES[case].tolerance
    wanted_sums = without_first_accuracy(wanted["sums"])
    assert wanted_sums[:, -1].tolist() == [CASES[case].pairs] * STEPS
    for found in world.ranks:
        sums = without_first_accuracy(found[case]["sums"])
        assert torch.allclose(sums, wanted_sums, rtol=rtol, atol=2 * rtol)
        assert torch.allclose(found[case]["norms"], wanted["norms"], rtol=rtol, atol=0.0)
        assert torch.allclose(found[case]["evaluation"], wanted["evaluation"], rtol=rtol, atol=2 * rtol)
        if wanted["aux"][0] is not None:
            assert found[case]["aux"] == pytest.approx(wanted["aux"], rel=1e-5)


def test_whole_training_equals_that_of_one_rank(world: World, one: dict[str, Any]) -> None:
    """The loop with AdamW, validation and checkpoints, two epochs.

    Adam divides by the gradient's own size, which enlarges rounding where a gradient is near zero: still within 1e-5.
    """
    wanted = one["full fit" if world.sharded else "fit"]
    for found in world.ranks:
        assert (found["fit"] - wanted).norm() <= 1e-5 * wanted.norm()
        assert torch.equal(found["fit"], world.ranks[0]["fit"])


def test_each_share_is_written_by_its_rank_and_the_history_by_the_first(world: World) -> None:
    """One history with each step once, one checkpoint of as many shards as ranks hold different weights."""
    assert len((world.output / "fit" / "metrics.jsonl").read_text().splitlines()) == 5
    (checkpoint,) = (world.output / "fit" / "checkpoints").iterdir()
    count = len(world.ranks) if world.sharded else 1
    shards = [f"shard-{rank}-of-{count}.safetensors" for rank in range(count)]
    assert sorted(path.name for path in checkpoint.iterdir()) == [*shards, "training.json"]


def test_checkpoint_of_many_ranks_resumes_on_one(world: World, root: Path) -> None:
    """A resized run goes on where the other stopped: the same steps see the same pairs.

    What is left to do is done with the same numbers as in the world that saved it, to rounding; 1e-5 as above.
    """
    resumed = _fit(root, world.output / "stopped", Ranks(), sharded=world.sharded)
    assert len((world.output / "stopped" / "metrics.jsonl").read_text().splitlines()) == 5
    wanted = world.ranks[0]["fit"]
    assert (resumed - wanted).norm() <= 1e-5 * wanted.norm()


def test_loss_that_is_not_finite_stops_every_rank(world: World, one: dict[str, Any]) -> None:
    """Every rank names the pair and the rank that has it, and none waits for ever."""
    assert "step 7" in one["error"]
    assert "pairs pair-1 (rank 0)" in one["error"]
    errors = [found["error"] for found in world.ranks]
    assert len(set(errors)) == 1
    assert re.search(r"not finite at step 7\. Got: pairs pair-1 \(rank [012]\)\.", errors[0])
