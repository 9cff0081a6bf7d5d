"""Operations counted by hand, and times that follow from them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dpo_train.config import RunConfig, parse_config
from dpo_train.data.pairs import TokenPair
from dpo_train.model.outline import config_of
from dpo_train.planning.gpus import GPUS
from dpo_train.planning.sizes import Sizes, sizes_of
from dpo_train.planning.work import forward_flops, num_trials, work_of
from dpo_train.planning.workload import Workload
from tests.benchmarks.engine_workload import SHAPES, needed_flops

WORK = Workload(
    train_pairs=1000, validation_pairs=100, heldout_pairs=200, prompt_tokens=220, answer_tokens=80, longest_pair=None,
    longest_prompt=None, origin="given",
)  # fmt: skip


def _sizes(name: str) -> Sizes:
    small = SHAPES[name]
    return sizes_of(config_of("llama", {
        "hidden_size": small.hidden, "num_hidden_layers": small.layers, "intermediate_size": small.intermediate,
        "num_attention_heads": small.heads, "num_key_value_heads": small.kv_heads, "vocab_size": small.vocabulary,
        "tie_word_embeddings": True,
    }))  # fmt: skip


def _run(*overrides: str) -> RunConfig:
    return parse_config(json.dumps({"model": {"path": "."}, "prepare": {"path": "p.jsonl"}}), overrides)


@pytest.mark.parametrize("name", ["22m", "1b"])
def test_a_pairs_operations_are_those_of_the_benchmarks(name: str) -> None:
    """The engine's benchmark counts token by token what no engine can leave out; here the logits of the backward pass
    come on top. A query sees itself, which is the half token in a thousand between the two."""
    sizes, ids = _sizes(name), np.zeros(300, np.int32)
    pair = TokenPair("a", ids[:220], ids[:80], ids[:80])

    forward = forward_flops(sizes, 220, 80)

    needed = needed_flops([pair], SHAPES[name])
    assert forward.training(lora=False, recomputed=False, ahead=False) - forward.head == pytest.approx(needed, rel=2e-3)


def test_adapters_save_the_gradients_of_the_weights() -> None:
    """A third of the layers, a quarter of the vocabulary matrix."""
    forward = forward_flops(_sizes("1b"), 220, 80)

    full, lora = (forward.training(lora=is_lora, recomputed=False, ahead=False) for is_lora in (False, True))

    assert full - lora == forward.layers + forward.head


def test_seconds_follow_from_operations_and_cost_from_hours() -> None:
    """Eight GPUs of 989 TFLOP/s at 40 %."""
    found = {s.stage: s for s in work_of(_run("compute.workers=8"), _sizes("1b"), GPUS["H100"], WORK, 0.4)}

    train = found["train"]
    assert train.seconds == pytest.approx(train.flops / (8 * 989e12 * 0.4))
    assert train.gpu_hours == pytest.approx(train.seconds * 8 / 3600)
    assert list(found) == ["score_reference", "train", "evaluate"]


def test_a_sweep_counts_every_trial() -> None:
    """Two betas, two rates and three seeds are twelve trainings."""
    config = _run("sweep.betas=[0.1, 0.2]", "sweep.learning_rates=[1e-6, 2e-6]", "sweep.seeds=3")

    found = {s.stage: s for s in work_of(config, _sizes("1b"), GPUS["H100"], WORK, 0.4)}

    assert num_trials(config) == 12
    assert found["sweep"].flops == pytest.approx(12 * found["train"].flops)


def test_fewer_steps_are_less_work() -> None:
    """train.max_steps counts."""
    whole, some = (work_of(_run(*o), _sizes("1b"), GPUS["H100"], WORK, 0.4)[1] for o in ((), ("train.max_steps=4",)))

    assert some.what == "4 steps of 64 pairs"
    assert some.flops < 0.4 * whole.flops
