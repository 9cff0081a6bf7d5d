"""One rank = two that share each layer's matrices = four that also shard them, on real gloo processes.

Plain SGD at rate 1 shows a gradient that is wrong by a factor, which Adam would hide. Every process does everything
once and leaves its results in a file; the tests read them.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_train.config import ModelConfig, TrainConfig
from dpo_train.data.pairs import TokenPair
from dpo_train.data.tokens import load_tokenizer
from dpo_train.errors import DpoError
from dpo_train.model.load import Policy, load_policy, save_policy
from dpo_train.model.shard import TENSOR, local, shard, whole
from dpo_train.model.sharded import load_sharded, save_sharded
from dpo_train.model.tensor_parallel import build_mesh, parallelize
from dpo_train.model.transforms import transform_layers
from dpo_train.runtime.executor import RayExecutor
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import evaluate_pairs, train_step
from tests.distributed.processes import spawn
from tests.distributed.test_ranks import without_first_accuracy
from tests.tiny import random_pairs, tiny_config, tiny_model, with_reference
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
    schedule="constant",
    epochs=2,
)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A few steps of SGD."""

    family: str
    pairs: int = 5
    options: dict[str, Any] = field(default_factory=dict)
    checkpointing: Literal["off", "selective", "full"] = "off"
    compile: bool = False
    """On meshes; one rank computes as ever."""


QUICK = {
    "llama": Case("llama"),
    "qwen3": Case("qwen3"),
    "gemma2": Case("gemma2"),
    "a share without pairs": Case("llama", pairs=1),
    "a loss over the batch": Case("llama", pairs=9, options={"loss": "aot", "beta": 0.02}),
    "layers computed again": Case("qwen2", checkpointing="full"),
}
OTHERS = ("qwen2", "gemma3", "mistral", "phi3", "olmo2", "smollm3", "gpt_neox", "cohere", "granite", "odd")
CASES = QUICK | {family: Case(family) for family in OTHERS}
CASES |= {
    "layers computed again but for products": Case("qwen3", checkpointing="selective"),
    "compiled layers": Case("qwen3", compile=True),
}
WORLDS = {"1x2": (1, 2, QUICK), "2x2": (2, 2, CASES)}
"""Shares of a batch by ranks of a share, and what they do."""
DONE = [
    pytest.param(world, case, marks=pytest.mark.slow if world == "2x2" else (), id=f"{world}, {case}")
    for world, (_, _, cases) in WORLDS.items()
    for case in cases
]
EACH_WORLD = ["1x2", pytest.param("2x2", marks=pytest.mark.slow)]
REFUSED = {
    "gpt2": r"no plan for its layers \(tp_plan\)",
    "mixtral": r"moe_tp_experts for model\.layers\.0\.mlp\.experts",
    "three heads": r"num_attention_heads=3\. Expected: a multiple of compute\.tensor_parallel=2",
    "one head of keys": r"num_key_value_heads=1\. Expected: a multiple of",
    "odd widths": r"mlp\.gate_proj of width 45\. Expected: a multiple of",
}
_LLAMA = {
    "vocab_size": VOCABULARY, "initializer_range": 0.15, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMAS: dict[str, dict[str, Any]] = {
    "odd": {"hidden_size": 36, "intermediate_size": 50, "head_dim": 10},
    "three heads": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
    "one head of keys": {"num_key_value_heads": 1},
    "odd widths": {"intermediate_size": 45},
}
"""Sizes that are no multiples; those of "odd" are of 2, but what is left is none."""


def _write(root: Path, name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    build = FAMILIES.get(name) or (lambda: LlamaForCausalLM(LlamaConfig(**{**_LLAMA, **LLAMAS[name]})))
    write(root / name, build)


def _config(folder: Path) -> ModelConfig:
    return ModelConfig(path=str(folder))


def _policy(folder: Path, ranks: Ranks) -> Policy:
    if ranks.world_size == 1:
        return load_policy(_config(folder), device=CPU, trainable=True)
    return load_sharded(_config(folder), device=CPU, mesh=ranks.mesh)


def _pairs(folder: Path, count: int) -> list[TokenPair]:
    return with_reference(load_policy(_config(folder), device=CPU), random_pairs(count, vocabulary=VOCABULARY))


def _weights(policy: Policy) -> Tensor:
    return torch.cat([whole(p).detach().flatten().clone() for p in policy.trainable().values()])


def _sgd(case: Case, root: Path, ranks: Ranks) -> dict[str, Any]:
    """Weight changes and sums of a few steps at rate 1."""
    folder, config = root / case.family, replace(CONFIG, **case.options)
    pairs, policy = _pairs(folder, case.pairs), _policy(folder, ranks)
    compile = case.compile and ranks.world_size > 1
    transform_layers(policy, checkpointing=case.checkpointing, compile=compile, row_tokens=config.row_tokens)
    before = _weights(policy)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    results = [
        train_step(policy, optimizer, pairs, config, ranks, step=step, learning_rate=1.0) for step in range(STEPS)
    ]
    return {
        "start": before,
        "change": _weights(policy) - before,
        "sums": torch.stack([result.sums for result in results]),
        "norms": torch.tensor([result.grad_norm for result in results]),
        "evaluation": evaluate_pairs(policy, pairs, config, ranks),
    }


def _fit(root: Path, output: Path, ranks: Ranks, *, stop: int | None = None) -> Tensor:
    """The real loop; ``stop`` ends it early, as a crash after a checkpoint would."""
    output.mkdir(exist_ok=True, parents=True)
    pairs, policy = _pairs(root / "qwen3", 9), _policy(root / "qwen3", ranks)
    # A later max_steps is no other training here: the origin is given by hand, and the schedule is constant.
    job = Fit(config=replace(CONFIG, max_steps=stop), train_pairs=pairs, validation_pairs=pairs[:3], seed=0,
              origin={"of": "d"}, home=str(output))  # fmt: skip
    fit(policy, job, ranks)
    return _weights(policy)


def _message(build: Callable[[], Any]) -> str:
    try:
        build()
    except DpoError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _half_a_plan(root: Path, ranks: Ranks) -> None:
    """A step of a model whose plan does not say that a norm over heads sees some of them."""
    assert ranks.mesh is not None
    policy = load_policy(_config(root / "qwen3"), device=CPU, trainable=True)
    policy.model._tp_plan = {name: style for name, style in policy.model.tp_plan.items() if "q_norm" not in name}
    pairs = _pairs(root / "qwen3", 5)
    parallelize(policy, ranks.mesh[TENSOR])
    shard(policy, ranks.mesh)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    train_step(policy, optimizer, pairs, CONFIG, ranks, step=0, learning_rate=1.0)


def _held(policy: Policy) -> tuple[int, int]:
    """Numbers of the layers' matrices: this rank's, and all."""
    matrices = [p for name, p in policy.trainable().items() if name.endswith("proj.weight")]
    return sum(local(p).numel() for p in matrices), sum(p.numel() for p in matrices)


def _everything(root: Path, output: Path, name: str, ranks: Ranks) -> dict[str, Any]:
    _, tensor, cases = WORLDS[name]
    refused_mesh = _message(lambda: build_mesh(CPU, 3))
    ranks = Ranks.current(build_mesh(CPU, tensor))
    found: dict[str, Any] = {case: _sgd(CASES[case], root, ranks) for case in cases}
    found["fit"] = _fit(root, output / "fit", ranks)
    _fit(root, output / "stopped", ranks, stop=2)
    found["resumed"] = _fit(root, output / "one", ranks)
    policy = load_sharded(_config(root / "tiny"), device=CPU, mesh=ranks.mesh)
    found["held"] = _held(policy)
    save_sharded(policy, output / "saved", load_tokenizer(root / "tiny"), keep=ranks.is_first)
    found["refused"] = {
        name: _message(lambda name=name: load_sharded(_config(root / name), device=CPU, mesh=ranks.mesh))
        for name in REFUSED
    } | {"mesh": refused_mesh, "half a plan": _message(lambda: _half_a_plan(root, ranks))}
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind, and a training that one rank began."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tensor")
    for name in {*(case.family for case in CASES.values()), *REFUSED}:
        _write(folder, name)
    tiny_model(folder / "tiny")
    _fit(folder, folder / "begun", Ranks(), stop=2)
    return folder


@dataclass(frozen=True)
class World:
    """A mesh of ranks, and what each found."""

    output: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def worlds(root: Path) -> Callable[[str], World]:
    """What each rank of a mesh found."""

    @functools.cache
    def world(name: str) -> World:
        data, tensor, _ = WORLDS[name]
        shutil.copytree(root / "begun", root / name / "one")
        return World(root / name, spawn(data * tensor, root / name / "found", _everything, root, root / name, name))

    return world


@pytest.fixture(scope="module")
def one(root: Path) -> Callable[[str], dict[str, Any]]:
    """A case in this process, alone."""
    torch.set_num_threads(1)
    return functools.cache(lambda case: _sgd(CASES[case], root, Ranks()))


@pytest.fixture(scope="module")
def fit_alone(root: Path) -> Tensor:
    """The weights that the loop leaves in this process, alone."""
    return _fit(root, root / "alone", Ranks())


Worlds = Callable[[str], World]
One = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize(("world", "case"), DONE)
def test_ranks_change_the_weights_as_one_does(worlds: Worlds, one: One, world: str, case: str) -> None:
    """Three steps of SGD at rate 1: changes agree to 1e-5 relative, on every rank; ranks agree bit for bit."""
    found, wanted = worlds(world).ranks, one(case)
    assert wanted["change"].norm() > 0.1
    for each in found:
        assert torch.equal(each[case]["start"], wanted["start"])
        assert (each[case]["change"] - wanted["change"]).norm() <= 1e-5 * wanted["change"].norm()
        assert torch.equal(each[case]["change"], found[0][case]["change"])


@pytest.mark.parametrize(("world", "case"), DONE)
def test_metrics_are_global(worlds: Worlds, one: One, world: str, case: str) -> None:
    """Sums, gradient norm and evaluation on each rank are those of all pairs, each counted once.

    Before the first update all margins are zero but for rounding, which alone decides the accuracy there.
    """
    found, wanted = worlds(world).ranks, one(case)
    wanted_sums = without_first_accuracy(wanted["sums"])
    assert wanted_sums[:, -1].tolist() == [CASES[case].pairs] * STEPS
    for each in found:
        sums = without_first_accuracy(each[case]["sums"])
        assert torch.allclose(sums, wanted_sums, rtol=1e-5, atol=2e-5)
        assert torch.allclose(each[case]["norms"], wanted["norms"], rtol=1e-5)
        assert torch.allclose(each[case]["evaluation"], wanted["evaluation"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("world", EACH_WORLD)
def test_whole_training_equals_that_of_one_rank(worlds: Worlds, fit_alone: Tensor, world: str) -> None:
    """The loop with AdamW, validation and checkpoints, two epochs."""
    for found in worlds(world).ranks:
        assert (found["fit"] - fit_alone).norm() <= 1e-5 * fit_alone.norm()
        assert torch.equal(found["fit"], worlds(world).ranks[0]["fit"])


@pytest.mark.parametrize("world", EACH_WORLD)
def test_checkpoint_of_a_mesh_resumes_on_one_rank(worlds: Worlds, root: Path, fit_alone: Tensor, world: str) -> None:
    """What is left to do is done with the same numbers as on the mesh that saved it, to rounding."""
    stopped = worlds(world).output / "stopped"
    assert (_fit(root, stopped, Ranks()) - fit_alone).norm() <= 1e-5 * fit_alone.norm()
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("world", EACH_WORLD)
def test_checkpoint_of_one_rank_resumes_on_a_mesh(worlds: Worlds, fit_alone: Tensor, world: str) -> None:
    """And ends as an unbroken training does."""
    for found in worlds(world).ranks:
        assert (found["resumed"] - fit_alone).norm() <= 1e-5 * fit_alone.norm()
    assert len((worlds(world).output / "one" / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("world", EACH_WORLD)
def test_each_number_is_written_once(worlds: Worlds, root: Path, world: str) -> None:
    """A shard for each rank, and together no more numbers than the policy has."""
    (checkpoint,) = (worlds(world).output / "fit" / "checkpoints").iterdir()
    shards = [load_file(path) for path in checkpoint.glob("shard-*")]
    assert len(shards) == len(worlds(world).ranks)
    written = sum(t.numel() for tensors in shards for name, t in tensors.items() if name.startswith("parameter/"))
    policy = load_policy(_config(root / "qwen3"), device=CPU, trainable=True)
    assert written == sum(p.numel() for p in policy.trainable().values())


@pytest.mark.slow
def test_checkpoint_of_another_mesh_resumes(root: Path, fit_alone: Tensor) -> None:
    """Two ranks with a share of the rows each begin, two that compute a row together end."""
    spawn(2, root / "changed", _fit_on, root, root / "changed" / "fit", 1, 2)
    for found in spawn(2, root / "changed back", _fit_on, root, root / "changed" / "fit", 2, None):
        assert (found - fit_alone).norm() <= 1e-5 * fit_alone.norm()


def _fit_on(root: Path, output: Path, tensor: int, stop: int | None, ranks: Ranks) -> Tensor:
    mesh = build_mesh(CPU, tensor) if tensor > 1 else None
    return _fit(root, output, replace(ranks, mesh=mesh), stop=stop)


@pytest.mark.parametrize("world", EACH_WORLD)
def test_saved_model_is_that_of_one_rank(worlds: Worlds, root: Path, tmp_path: Path, world: str) -> None:
    """File for file, and byte for byte."""
    policy = load_policy(_config(root / "tiny"), device=CPU, trainable=True)
    save_policy(policy, tmp_path, load_tokenizer(root / "tiny"))
    folders = [tmp_path / "model", worlds(world).output / "saved" / "model"]
    wanted, found = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert found == wanted


@pytest.mark.parametrize("world", EACH_WORLD)
def test_each_rank_holds_its_part_of_the_matrices(worlds: Worlds, world: str) -> None:
    """Half of them on two ranks, a quarter on four."""
    for found in worlds(world).ranks:
        held, total = found["held"]
        assert held * len(worlds(world).ranks) == total


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_cannot_be_cut_is_refused_by_name(worlds: Worlds, name: str) -> None:
    """On every rank, and with what it has."""
    for found in worlds("1x2").ranks:
        assert re.search(rf"ModelError: .* with tensor parallelism\. Got: .*{REFUSED[name]}", found["refused"][name])


def test_workers_that_cannot_be_divided_are_refused(worlds: Worlds) -> None:
    """Two by three; a cluster may have fewer GPUs than the config has workers."""
    for found in worlds("1x2").ranks:
        assert found["refused"]["mesh"].startswith("ConfigError: The training's workers cannot be divided")
        assert "2 workers, compute.tensor_parallel=3" in found["refused"]["mesh"]


def test_plan_that_is_not_whole_is_noticed(worlds: Worlds) -> None:
    """A norm over heads whose gradients nobody adds up would drift apart between ranks."""
    for found in worlds("1x2").ranks:
        assert "RunError: Ranks that compute a row together have other gradients" in found["refused"]["half a plan"]


@pytest.mark.slow
def test_stage_trains_on_ray_with_workers_that_share_matrices(tmp_path: Path) -> None:
    """Two workers leave the model that one leaves: changes to 1e-4, as Adam turns rounding into whole steps."""
    options = {"train.lora": None, "train.max_steps": 6, "train.learning_rate": 1e-3}
    alone = tiny_config(tmp_path, **options)
    scored = score_reference(alone, prepare(alone, InProcess()), InProcess())
    compute = {"compute.executor": "ray", "compute.workers": 2, "compute.tensor_parallel": 2}
    config = tiny_config(tmp_path, **options, **compute)
    made = train(config, scored, RayExecutor(config.compute), output=tmp_path / "ray")
    wanted = train(alone, scored, InProcess(), output=tmp_path / "alone")

    base = load_file(Path(alone.model.path) / "model.safetensors")
    found, expected = (load_file(each.file("model/model.safetensors")) for each in (made, wanted))
    changes = [torch.cat([(weights[name] - base[name]).flatten() for name in base]) for weights in (found, expected)]
    assert (changes[0] - changes[1]).norm() <= 1e-4 * changes[1].norm()
    assert len(list((made.path / "ranks").iterdir())) == 2
