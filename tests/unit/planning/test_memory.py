"""A plan's parts against published figures, and against what FSDP2 really holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dpo_train.config import LoraConfig, RunConfig, parse_config
from dpo_train.model.attention import install
from dpo_train.model.load import Policy
from dpo_train.model.outline import config_of
from dpo_train.model.score import row_logps
from dpo_train.model.shard import local, shard
from dpo_train.planning.gpus import GPUS, find_device
from dpo_train.planning.memory import Outline, evaluate_memory, score_memory, train_memory
from dpo_train.planning.rows import FullRow
from dpo_train.planning.shapes import shape
from dpo_train.planning.sizes import NF4_BITS, adapters_of, sizes_of
from dpo_train.planning.trace import Live
from dpo_train.planning.workload import Workload

DIALOGUE = Workload(
    train_pairs=8000, validation_pairs=1000, heldout_pairs=1000, prompt_tokens=220, answer_tokens=80,
    longest_pair=None, longest_prompt=None, origin="given",
)  # fmt: skip
H100 = GPUS["H100"]


def _run(*overrides: str) -> RunConfig:
    tree = {"model": {"path": "."}, "prepare": {"path": "pairs.jsonl"}}
    return parse_config(json.dumps(tree), ["compute.executor=ray", *overrides])


@pytest.fixture(scope="module")
def llama_70b() -> Outline:
    return Outline(config=shape("llama-70b"))


@pytest.fixture(scope="module")
def llama_8b() -> Outline:
    return Outline(config=shape("llama-8b"))


@pytest.mark.parametrize(("name", "gb"), [("llama-8b", 16), ("llama-70b", 140), ("llama-405b", 810)])
def test_weights_in_16_bits_take_what_their_makers_say(name: str, gb: int) -> None:
    """Hugging Face on Llama 3.1 (huggingface.co/blog/llama31, inference memory): 16, 140 and 810 GB."""
    sizes = sizes_of(shape(name))

    assert sizes.bytes_on(1, "bf16") / 1e9 == pytest.approx(gb, rel=0.01)


def test_shapes_have_the_published_numbers_of_weights() -> None:
    """Counted tensor by tensor: as the checkpoints on the hub."""
    totals = {name: sizes_of(shape(name)).total for name in ("smollm2-135m", "llama-1b", "llama-8b", "qwen2.5-7b")}

    assert totals == {
        "smollm2-135m": 134_515_008,
        "llama-1b": 1_235_814_400,
        "llama-8b": 8_030_261_248,
        "qwen2.5-7b": 7_615_616_512,
    }


@pytest.mark.parametrize(("name", "gib"), [("llama-8b", 1.95), ("llama-70b", 4.88)])
def test_the_cache_of_16_000_tokens_takes_what_is_published(name: str, gib: float) -> None:
    """The same page, in GiB. (Its 405B has twice the heads of keys that its config has.)"""
    sizes = sizes_of(shape(name))

    cache = 16_000 * 2 * 2 * sizes.num_layers * sizes.key_value_width

    assert cache / 2**30 == pytest.approx(gib, rel=0.01)


def test_nf4_takes_4_127_bits() -> None:
    """QLoRA (arXiv 2305.14314, section 3): double quantisation brings 0.5 bits of scales down to 0.127."""
    assert pytest.approx(4.127, abs=1e-3) == NF4_BITS


@pytest.mark.parametrize(
    ("name", "lora_gb", "qlora_gb"), [("llama-8b", 16, 6), ("llama-70b", 160, 48), ("llama-405b", 950, 250)]
)
def test_bases_under_adapters_take_what_is_published(name: str, lora_gb: int, qlora_gb: int) -> None:
    """Hugging Face on Llama 3.1, training memory: LoRA and QLoRA. Theirs are rounded up to what GPUs hold; these are

    weights, adapters and their AdamW alone: at most 20 % below, 10 % above."""
    sizes = sizes_of(shape(name))
    adapters = 16 * sum(weight.numel for weight in adapters_of(sizes, LoraConfig(rank=16)))

    lora, qlora = ((sizes.bytes_on(1, stored) + adapters) / 1e9 for stored in ("bf16", "nf4"))

    assert 0.8 * lora_gb < lora < 1.1 * lora_gb
    assert 0.8 * qlora_gb < qlora < 1.1 * qlora_gb


def test_full_training_of_70b_over_64_ranks_holds_what_fsdp2_was_counted_to(llama_70b: Outline) -> None:
    """tests/distributed/test_scale.py counts it on fake ranks: 70,553,706,496 x 16 / 64 bytes. So does ZeRO
    (arXiv 1910.02054, figure 1: 1.9 GB of 120 for 7.5 billion weights over 64)."""
    config = _run("compute.workers=64", "compute.activation_checkpointing=full")

    found = train_memory(config, llama_70b, H100, DIALOGUE, config.train)

    share = 70_553_706_496 * 4 // 64
    assert found.parts["weights"] == share
    assert found.parts["optimiser"] == 2 * share


def test_shares_of_uneven_rows_are_those_of_the_fullest_rank() -> None:
    """The same on 48 ranks, where 8192 rows are 171 each."""
    sizes = sizes_of(shape("llama-70b"))

    share = sizes.bytes_on(48, "fp32")

    assert 4 * 70_553_706_496 / 48 < share < 1.005 * 4 * 70_553_706_496 / 48


def test_adapters_of_70b_over_64_ranks_hold_what_was_counted() -> None:
    """As in test_scale.py: of each first factor's 16 rows one, and a 64th of the second's."""
    sizes = sizes_of(shape("llama-70b"))
    adapters = adapters_of(sizes, LoraConfig(rank=16))
    linears = [weight.shape for weight in sizes.weights if weight.is_linear]

    share = sum(weight.bytes_on(64, "fp32") for weight in adapters)

    assert len(adapters) == 1120
    assert share == 4 * sum(columns + rows * 16 // 64 for rows, columns in linears)


@contextmanager
def _fake_ranks(world_size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world_size", "kind", "more"),
    [
        (2, "llama", {}),
        (8, "llama", {}),
        # Of 16 experts two a rank, then, of 4 experts and 8 ranks, one on half of the ranks.
        (8, "mixtral", {"num_local_experts": 16, "intermediate_size": 128}),
        (8, "mixtral", {"num_local_experts": 4, "intermediate_size": 512, "router_aux_loss_coef": 0.0}),
    ],
)
def test_what_fsdp2_gathers_is_planned_within_a_tenth(world_size: int, kind: str, more: dict[str, Any]) -> None:
    """A real step over ranks of which only this one is there (what they would send is left out, its room is not).

    FSDP2 gives storage back by making it smaller, so what is alive is asked for its size each time.
    """
    from transformers import AutoModelForCausalLM

    model_config = config_of(kind, {
        "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 2000, "num_hidden_layers": 6, **more,
    })  # fmt: skip
    work = Workload(train_pairs=100, validation_pairs=0, heldout_pairs=0, prompt_tokens=50, answer_tokens=10,
                    longest_pair=None, longest_prompt=None, is_even=True, origin="given")  # fmt: skip
    # Two rows on each rank.
    config = _run(f"train.batch_pairs={2 * world_size}", "train.row_tokens=70", f"compute.workers={world_size}",
                  "compute.device=cpu", "compute.compile=off", "train.checkpoint_steps=1")  # fmt: skip
    planned = train_memory(config, Outline(config=model_config), find_device("cpu"), work, config.train)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).eval()
    install(model)
    policy = Policy(model=model, adapters=None, folder=Path(), device=torch.device("cpu"))
    row = FullRow(tokens=70, lengths=((50, 10, 10),), per_step=1).build()

    highest = [0]
    with _fake_ranks(world_size):
        shard(policy)
        live = _Shrinking()
        live.on_change = lambda: highest.__setitem__(0, max(highest[0], live.alive))
        with live:
            for _ in range(2):
                row_logps(policy, row).token_logps_A.sum().backward()
        shares = sum(local(p).nbytes for p in policy.model.parameters())

    parts = planned.parts
    of_row = sum(parts.get(name, 0) for name in ("gradients", "gathered", "activations", "working"))
    assert parts["weights"] == shares
    assert highest[0] <= of_row < 1.1 * highest[0]


class _Shrinking(Live):
    """Counts storages by the size that they have at the time."""

    def __init__(self) -> None:
        super().__init__([])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.on_change()
        return result

    @property
    def alive(self) -> int:
        return sum(storage.nbytes() for reference, _, _ in self._kinds.values() if (storage := reference()) is not None)


def test_a_quantised_base_takes_less_and_a_copy_of_one_matrix(llama_8b: Outline) -> None:
    """QLoRA of 8 billion weights on one GPU of 24 GB; LoRA with its base in bf16 does not fit there with long rows."""
    lora, nf4 = _run("train.lora={}"), _run("train.lora={}", "model.quantization=nf4")

    plain, quantised = (train_memory(c, llama_8b, GPUS["L4"], DIALOGUE, c.train) for c in (lora, nf4))

    assert plain.parts["weights"] / 1e9 == pytest.approx(16.2, abs=0.1)
    assert quantised.parts["weights"] / 1e9 == pytest.approx(5.9, abs=0.2)
    assert quantised.parts["working"] - plain.parts["working"] == 2 * 4096 * 14336
    assert quantised.total < 24e9 < plain.total


def test_full_checkpointing_holds_bf16_copies_of_a_layer_and_without_it_of_the_model(llama_8b: Outline) -> None:
    """Autocast's copies are no shares. Recomputed layers need theirs in turn; without, autograd keeps them all."""
    common = ("compute.workers=64", "compute.compile=off")
    full, off = (_run(*common, f"compute.activation_checkpointing={name}") for name in ("full", "off"))

    found = [train_memory(c, llama_8b, H100, DIALOGUE, c.train).parts.get("copies", 0) for c in (full, off)]

    linear = sum(w.numel for w in llama_8b.sizes.weights if w.is_multiplied)
    layer = linear / llama_8b.sizes.num_layers
    assert found[0] < 2 * 3 * layer
    assert found[1] > 2 * 0.9 * linear


def test_a_gpu_that_computes_in_fp32_holds_a_larger_base_and_no_copies(llama_8b: Outline) -> None:
    """model.precision=fp32: 4 bytes a weight under adapters too."""
    bf16, fp32 = (_run("train.lora={}", f"model.precision={name}") for name in ("auto", "fp32"))

    small, large = (train_memory(c, llama_8b, H100, DIALOGUE, c.train).parts for c in (bf16, fp32))

    assert large["weights"] == pytest.approx(2 * small["weights"], rel=0.02)
    assert large.get("copies", 0) == 0


def test_rmsprop_holds_one_moment(llama_8b: Outline) -> None:
    """AdamW two."""
    adamw, rmsprop = (_run(f"train.optimizer={name}") for name in ("adamw", "rmsprop"))

    found = [train_memory(c, llama_8b, H100, DIALOGUE, c.train).parts["optimiser"] for c in (adamw, rmsprop)]

    assert found[0] == 2 * found[1] == 8 * llama_8b.sizes.total


def test_scoring_together_holds_a_share(llama_8b: Outline) -> None:
    """compute.score_sharded: an eighth of the weights on each of eight."""
    alone, together = _run(), _run("compute.workers=8", "compute.score_sharded=true")

    found = [score_memory(c, llama_8b, H100, DIALOGUE).parts["weights"] for c in (alone, together)]

    assert found[0] == 4 * llama_8b.sizes.total
    assert found[1] == pytest.approx(found[0] / 8, rel=0.01)


def test_longer_answers_need_a_larger_cache(llama_8b: Outline) -> None:
    """Prompts of 1,024 tokens and answers of 256 and 1,280, 32 side by side; keys in fp32, values in bf16."""
    short, long = (_run("evaluate.row_tokens=4096", f"evaluate.max_sample_tokens={n}") for n in (256, 1280))

    found = [evaluate_memory(c, llama_8b, H100, DIALOGUE) for c in (short, long)]

    caches = [stage.parts["cache"] for stage in found]
    assert caches[0] == 32 * 1280 * 32 * 1024 * 6
    assert caches[1] > 1.7 * caches[0]
