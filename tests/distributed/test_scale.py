"""What a step sends, what a rank holds, and whether a training can change its number of ranks: counted, not timed."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_train.config import LoraConfig, ModelConfig, TrainConfig
from dpo_train.data.batches import rank_rows
from dpo_train.data.pairs import TokenPair
from dpo_train.model.adapters import fresh_adapter
from dpo_train.model.load import Policy
from dpo_train.model.shard import layers, local, shard, whole
from dpo_train.model.sharded import load_sharded
from dpo_train.train.loop import Fit, fit
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import train_step
from tests.distributed.processes import spawn
from tests.tiny import random_pairs, tiny_policy, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4)
CONFIG = TrainConfig(beta=0.5, row_tokens=40, learning_rate=5e-3, warmup_steps=1, schedule="constant", batch_pairs=4,
                     epochs=2, checkpoint_steps=2, evaluate_steps=2)  # fmt: skip


def _pairs(folder: Path, count: int) -> list[TokenPair]:
    return with_reference(tiny_policy(folder, lora=False, trainable=False), random_pairs(count, vocabulary=VOCABULARY))


# ---- bytes of a step ----


@dataclass(frozen=True)
class Case:
    """A training step of 18 pairs."""

    family: str = "llama"
    lora: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        return replace(CONFIG, **self.options)


CASES = {
    "all weights": Case(),
    "tied weights": Case("qwen2"),
    "adapters": Case(lora=True),
    "a single row": Case(options={"row_tokens": 1000}),
    "a look ahead": Case(options={"loss": "aot", "beta": 0.02}),
}


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that this rank gets from others, by kind of message."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.received: Counter[str] = Counter()
        self._from_others = (world_size - 1) / world_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional"):
            # Of a gathering the whole is what comes out, of a scattering what goes in; it stands first or second.
            largest = max(tensor.nbytes for tensor in _flat(args))
            kind = next((kind for kind in ("allgather", "reduce_scatter") if kind in name), "other")
            self.received[kind] += largest * self._from_others if kind != "other" else largest
        return func(*args, **(kwargs or {}))


def _flat(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)


def _count(root: Path, ranks: Ranks) -> dict[str, Counter[str]]:
    found = {}
    for name, case in CASES.items():
        folder = root / case.family
        policy = load_sharded(ModelConfig(path=str(folder)), device=CPU, lora=LORA if case.lora else None)
        optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
        pairs = _pairs(folder, 18)
        with _Traffic(ranks.world_size) as traffic:
            train_step(policy, optimizer, pairs, case.config, ranks, step=0, learning_rate=1.0)
        found[name] = traffic.received
    return found


def _padded(parameters: Iterable[nn.Parameter], world_size: int) -> int:
    """Bytes of whole weights as they are gathered: every rank's share has as many rows as the largest."""
    rows = ((p, math.ceil(p.shape[0] / world_size) * world_size) for p in parameters)
    return sum(count * p[0].numel() * p.element_size() for p, count in rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family."""
    folder = tmp_path_factory.mktemp("scale")
    for family in ("llama", "qwen2"):
        write(folder / family, FAMILIES[family])
    return folder


# Four ranks on two cores are part of `make test-all`.
@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def traffic(root: Path, request: pytest.FixtureRequest) -> list[dict[str, Counter[str]]]:
    """What each rank received in each case."""
    return spawn(request.param, root / f"traffic {request.param}", _count, root)


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_full_sharding_must(traffic: list[dict[str, Counter[str]]], root: Path, name: str) -> None:
    """To the byte, on every rank (arXiv 2304.11277, section 3.2): of N ranks each gets (N - 1) / N of

    every layer's weights twice for each row, forward and backward, and of the embeddings, which are not given back in
    between, once; the gradients of what is trained once for each row, adapters' alone under adapters. A look ahead is a
    forward more, for which the embeddings are gathered once. Sums of metrics and norms are a few hundred bytes.
    """
    case, world_size = CASES[name], len(traffic)
    policy = tiny_policy(root / case.family, lora=case.lora)
    in_layers = {p for layer in layers(policy) for p in layer.parameters()}
    of_layers = _padded(in_layers, world_size)
    of_root = _padded(set(policy.model.parameters()) - in_layers, world_size)
    lengths = [pair.num_tokens for pair in random_pairs(18, vocabulary=VOCABULARY)]
    num_rows = max(map(len, rank_rows(lengths, case.config.row_tokens, world_size)))
    assert num_rows == 1 if name == "a single row" else num_rows > 1

    gathered = num_rows * (2 * of_layers + of_root)
    if name == "a look ahead":
        gathered += num_rows * of_layers + of_root
    reduced = num_rows * _padded(policy.trainable().values(), world_size)
    for found in (rank[name] for rank in traffic):
        assert found["allgather"] == gathered * (world_size - 1) // world_size
        assert found["reduce_scatter"] == reduced * (world_size - 1) // world_size
        assert found["other"] < 2000
    if case.lora:
        assert reduced < 0.2 * gathered


# ---- another number of ranks ----


def _fit(root: Path, output: Path, stop: int | None, ranks: Ranks) -> Tensor:
    """The real loop over all weights; ``stop`` ends it early, as a crash after a checkpoint would."""
    output.mkdir(exist_ok=True)
    pairs, config = _pairs(root / "llama", 9), replace(CONFIG, max_steps=stop)
    if ranks.world_size > 1:
        policy = load_sharded(ModelConfig(path=str(root / "llama")), device=CPU)
    else:
        policy = tiny_policy(root / "llama", lora=False)
    job = Fit(config=config, train_pairs=pairs, validation_pairs=pairs[:3], seed=0, origin={"of": "d"},
              home=str(output))  # fmt: skip
    fit(policy, job, ranks)
    return torch.cat([whole(p).detach().flatten().clone() for p in policy.trainable().values()])


@dataclass(frozen=True)
class Stopped:
    """What two ranks left after two of five steps, and where one that went on would be."""

    output: Path
    weights: Tensor
    unbroken: Tensor


@pytest.fixture(scope="module")
def stopped(root: Path) -> Stopped:
    torch.set_num_threads(1)
    output = root / "stopped"
    weights, other = spawn(2, root / "stopping", _fit, root, output, 2)
    assert torch.equal(weights, other)
    return Stopped(output, weights, _fit(root, root / "unbroken", None, Ranks()))


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_training_goes_on_with_fewer_or_more_ranks(stopped: Stopped, root: Path, world_size: int) -> None:
    """Two ranks' checkpoint on one and on four, AdamW's state included: as if nothing had happened, to 1e-5."""
    output = Path(shutil.copytree(stopped.output, root / f"resumed {world_size}"))
    if world_size == 1:
        found = [_fit(root, output, None, Ranks())]
    else:
        found = spawn(world_size, root / f"resuming {world_size}", _fit, root, output, None)
    for weights in found:
        assert (weights - stopped.unbroken).norm() <= 1e-5 * stopped.unbroken.norm()
    assert (stopped.weights - stopped.unbroken).norm() > 1e-3 * stopped.unbroken.norm()
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert lines[:2] == (stopped.output / "metrics.jsonl").read_text().splitlines()


# ---- 70 billion weights ----

LAYERS, HIDDEN, INTERMEDIATE, KEYS, VOCABULARY_70B = 80, 8192, 28672, 8 * 128, 128256
"""Llama 3 70B (arXiv 2407.21783, table 3): 64 heads, 8 of them with keys of their own."""
SHAPES = {
    "layer": [(HIDDEN, HIDDEN)] * 2 + [(KEYS, HIDDEN)] * 2 + [(INTERMEDIATE, HIDDEN)] * 2
    + [(HIDDEN, INTERMEDIATE)] + [(HIDDEN,)] * 2,
    "rest": [(VOCABULARY_70B, HIDDEN)] * 2 + [(HIDDEN,)],
}  # fmt: skip
WHOLE = SHAPES["layer"] * LAYERS + SHAPES["rest"]


def _llama_70b(dtype: torch.dtype, lora: LoraConfig | None) -> Policy:
    """On the meta device: shapes, and no memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=VOCABULARY_70B, max_position_embeddings=8192, dtype=dtype,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).eval()
    adapters = None if lora is None else fresh_adapter(model, lora, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lora is None or "lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Policy(model=model, adapters=adapters, folder=Path("llama-3-70b"), device=CPU)


@contextmanager
def _fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """A process group of which this process is one, and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _held(policy: Policy) -> dict[str, int]:
    """Bytes of this rank's shares: weights, and after a step of AdamW gradients and its state."""
    parameters = list(policy.trainable().values())
    # Ours is fused, which has the same state and refuses the meta device.
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "weights": sum(local(p).nbytes for p in policy.model.parameters()),
        "storage": sum(local(p).untyped_storage().nbytes() for p in policy.model.parameters()),
        "gradients": sum(local(p.grad).nbytes for p in parameters if p.grad is not None),
        "state": sum(local(value).nbytes for value in states),
    }


def _share(rank: int, world_size: int) -> int:
    """Weights of a rank: of each matrix the next ceil(rows / world_size) rows, as far as there are any."""
    total = 0
    for rows, *others in WHOLE:
        size = math.ceil(rows / world_size)
        total += max(0, min(rows, (rank + 1) * size) - rank * size) * math.prod(others)
    return total


@pytest.mark.parametrize("rank", [0, 63])
def test_70_billion_weights_take_17_6_gb_on_each_of_64_ranks(rank: int) -> None:
    """70,553,706,496 weights in fp32, their gradients and AdamW's two moments: 16 bytes / 64 for each, and a step count
    for each of 723 tensors. All numbers of rows are multiples of 64, so that nothing is padded."""
    assert sum(map(math.prod, WHOLE)) == 70_553_706_496
    with _fake_ranks(rank, 64):
        policy = _llama_70b(torch.float32, None)
        shard(policy)
        held = _held(policy)
    share = 70_553_706_496 * 4 // 64
    assert held == {"weights": share, "storage": share, "gradients": share, "state": 2 * share + 4 * 723}
    assert sum(held.values()) - held["storage"] == 17_638_429_516


@pytest.mark.parametrize("rank", [0, 47])
def test_uneven_rows_are_padded_to_the_largest_share(rank: int) -> None:
    """On 48 ranks 8192 rows are 171 each but for the last rank's 155, and of 1024 rows it gets none at all.

    Its gradients and moments are as small as its share, its weights as large as everyone's: FSDP2 pads them once rather
    than before every gathering. That is 0.4 % more than an even share.
    """
    with _fake_ranks(rank, 48):
        policy = _llama_70b(torch.float32, None)
        shard(policy)
        held = _held(policy)
    share, padded = 4 * _share(rank, 48), 4 * _share(0, 48)
    assert sum(_share(other, 48) for other in range(48)) == 70_553_706_496
    assert held == {"weights": share, "storage": padded, "gradients": share, "state": 2 * share + 4 * 723}
    assert (share < padded) == (rank == 47)
    assert padded < 1.005 * 4 * 70_553_706_496 / 48


# Shapes alone, but of 1120 adapters: a quarter of a minute.
@pytest.mark.slow
def test_adapters_of_70_billion_weights_take_2_3_gb_on_each_of_64_ranks() -> None:
    """A frozen bf16 base, and adapters of rank 16 on all linear modules in fp32 with gradients and moments. The second
    factors' rows are shared out evenly; of the first factors' 16 rows each is on a rank of its own, and 48 have none.
    """
    rank, linears = 16, [shape for shape in SHAPES["layer"] if len(shape) == 2] * LAYERS
    with _fake_ranks(0, 64):
        policy = _llama_70b(torch.bfloat16, LoraConfig(rank=rank))
        shard(policy)
        held = _held(policy)
    base = 70_553_706_496 * 2 // 64
    adapters = 4 * sum(columns + rows * rank // 64 for rows, columns in linears)
    assert held["weights"] == held["storage"] == base + adapters
    assert held["gradients"] == adapters
    assert held["state"] == 2 * adapters + 4 * 2 * len(linears)
    assert 2.2e9 < sum(held.values()) - held["storage"] < 2.4e9
