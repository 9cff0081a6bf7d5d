"""SFT on two ranks is SFT on one, with whole weights, shares of them, or layers that both compute; on gloo processes.

Plain SGD at rate 1 shows a gradient that is wrong by a factor, which Adam would hide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_train.config import LoraConfig, SftConfig
from dpo_train.data.pairs import TokenPair
from dpo_train.model.load import Policy
from dpo_train.model.shard import TENSOR, shard, whole
from dpo_train.model.tensor_parallel import build_mesh, parallelize
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks
from dpo_train.train.sft import Sft
from tests.distributed.processes import spawn
from tests.tiny import random_rankings, tiny_policy
from tests.unit.model.families import FAMILIES, VOCABULARY, write

STEPS = 3
CONFIG = SftConfig(
    enabled=True, row_tokens=24, max_grad_norm=0.5, learning_rate=5e-3, warmup_steps=1, batch_pairs=4, epochs=2,
    schedule="constant", checkpoint_steps=2, evaluate_steps=2,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A few steps of SGD."""

    pairs: int
    family: str = "llama"
    lora: bool = False
    row_tokens: int = CONFIG.row_tokens


CASES = {
    "a rank without pairs": Case(1),
    "adapters, a pair each": Case(2, lora=True),
    "several rows each": Case(9),
    "long rows": Case(9, row_tokens=500),
    "experts": Case(5, "mixtral"),
    "tied weights": Case(4, "qwen2"),
}
WORLDS = ("whole", "sharded", "tensor")


def _pairs(count: int) -> list[TokenPair]:
    """Answers of 1 to 7 tokens: the ranks' shares of tokens differ, and a mean of their means is no mean."""
    return [pair.chosen_alone for pair in random_rankings(count, vocabulary=VOCABULARY)]


def _policy(folder: Path, ranks: Ranks, world: str, lora: bool) -> Policy:
    policy = tiny_policy(folder, lora=lora)
    if ranks.mesh is not None:
        parallelize(policy, ranks.mesh[TENSOR])
    if world != "whole":
        shard(policy, ranks.mesh)
    return policy


def _cases(world: str) -> dict[str, Case]:
    """Ranks that compute layers together see all rows; experts and adapters are not cut."""
    uncut = {"experts", "adapters, a pair each"}
    return {name: case for name, case in CASES.items() if world != "tensor" or name not in uncut}


def _weights(policy: Policy) -> torch.Tensor:
    return torch.cat([whole(p).detach().flatten().clone() for p in policy.trainable().values()])


def _sgd(case: Case, root: Path, ranks: Ranks, world: str) -> dict[str, Any]:
    """Weight changes and metrics of a few steps at rate 1, and what is measured afterwards."""
    pairs, method = _pairs(case.pairs), Sft(replace(CONFIG, row_tokens=case.row_tokens))
    policy = _policy(root / case.family, ranks, world, case.lora)
    before = _weights(policy)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    steps = [method.step(policy, optimizer, pairs, ranks, step=step, learning_rate=1.0) for step in range(STEPS)]
    return {"change": _weights(policy) - before, "steps": [*steps, method.evaluate(policy, pairs, ranks)]}


def _fit(root: Path, output: Path, ranks: Ranks, world: str, *, lora: bool, stop: int | None = None) -> torch.Tensor:
    """The real loop; ``stop`` ends it early, as a crash after a checkpoint would."""
    output.mkdir(exist_ok=True)
    policy = _policy(root / "llama", ranks, world, lora)
    config = replace(CONFIG, max_steps=stop, lora=LoraConfig(rank=4) if lora else None)
    pairs = _pairs(9)
    job = Fit(
        config=config, train_pairs=pairs, validation_pairs=pairs[:3], seed=0, origin={"of": "d"}, home=str(output)
    )
    fit(policy, job, ranks)
    return _weights(policy)


def _everything(root: Path, output: Path, ranks: Ranks, world: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: _sgd(case, root, ranks, world) for name, case in _cases(world).items()}
    found["fit"] = _fit(root, output / "fit", ranks, world, lora=world == "whole")
    _fit(root, output / "stopped", ranks, world, lora=world == "whole", stop=2)
    return found


def _in_each_world(root: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    meshes = dict.fromkeys(WORLDS) | {"tensor": build_mesh(torch.device("cpu"), 2)}
    return {world: _everything(root, root / world, replace(ranks, mesh=meshes[world]), world) for world in WORLDS}


@dataclass(frozen=True)
class World:
    """Two ranks, and what each found."""

    name: str
    output: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family."""
    folder = tmp_path_factory.mktemp("sft-ranks")
    for family in sorted({case.family for case in CASES.values()}):
        write(folder / family, FAMILIES[family])
    return folder


@pytest.fixture(scope="module")
def found(root: Path) -> list[dict[str, dict[str, Any]]]:
    """What each rank found in each world. The same two processes do all of them: to start them takes longest."""
    for name in WORLDS:
        (root / name).mkdir()
    return spawn(2, root / "found", _in_each_world, root)


@pytest.fixture(scope="module", params=WORLDS)
def world(root: Path, found: list[dict[str, dict[str, Any]]], request: pytest.FixtureRequest) -> World:
    """What each rank of a world found."""
    name = str(request.param)
    return World(name, root / name, [each[name] for each in found])


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    """The same in this process, alone."""
    torch.set_num_threads(1)
    (root / "one").mkdir()
    found = _everything(root, root / "one", Ranks(), "whole")
    return found | {"full fit": _fit(root, root / "one" / "full", Ranks(), "whole", lora=False)}


def test_ranks_change_the_weights_as_one_does(world: World, one: dict[str, Any]) -> None:
    """Three steps of SGD at rate 1: changes agree to 1e-5 relative, and bit for bit between the ranks."""
    for case in _cases(world.name):
        wanted = one[case]["change"]
        assert wanted.norm() > 0.1
        for found in world.ranks:
            assert (found[case]["change"] - wanted).norm() <= 1e-5 * wanted.norm(), case
            assert torch.equal(found[case]["change"], world.ranks[0][case]["change"]), case


def test_metrics_are_global(world: World, one: dict[str, Any]) -> None:
    """Loss, log-probs, tokens and gradient norm of each step, and the evaluation, are those of all pairs."""
    for case in _cases(world.name):
        for found in world.ranks:
            for got, wanted in zip(found[case]["steps"], one[case]["steps"], strict=True):
                assert got == pytest.approx(wanted, rel=1e-5), case


def test_whole_training_equals_that_of_one_rank(world: World, one: dict[str, Any]) -> None:
    """The loop with AdamW, validation and checkpoints, two epochs."""
    wanted = one["fit" if world.name == "whole" else "full fit"]
    for found in world.ranks:
        assert (found["fit"] - wanted).norm() <= 1e-5 * wanted.norm()


def test_checkpoint_of_two_ranks_resumes_on_one(world: World, root: Path) -> None:
    """A resized run goes on where the other stopped: the same steps see the same answers."""
    resumed = _fit(root, world.output / "stopped", Ranks(), "whole", lora=world.name == "whole")
    wanted = world.ranks[0]["fit"]
    assert len((world.output / "stopped" / "metrics.jsonl").read_text().splitlines()) == 5
    assert (resumed - wanted).norm() <= 1e-5 * wanted.norm()
