"""Plans of mixtures of experts: all weights are held, some of them are met, and what the engine does with experts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from dpo_train.config import RunConfig, parse_config
from dpo_train.errors import ModelError
from dpo_train.model.outline import config_of
from dpo_train.planning.gpus import GPUS
from dpo_train.planning.memory import Outline, train_memory
from dpo_train.planning.plan import make_plan
from dpo_train.planning.shapes import shape
from dpo_train.planning.sizes import adapters_of, placed_adapters, sizes_of
from dpo_train.planning.trace import Way, trace
from dpo_train.planning.work import forward_flops, work_of
from dpo_train.planning.workload import Workload
from tests.unit.planning.test_trace import LORA, ROW, WAY, real_peak

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 300, "num_hidden_layers": 5, "pad_token_id": 0, "eos_token_id": 1, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 48},
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    "gpt_oss": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "glm4_moe": {
        "n_routed_experts": 8, "moe_intermediate_size": 48, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip
WORK = Workload(
    train_pairs=1000, validation_pairs=0, heldout_pairs=0, prompt_tokens=220, answer_tokens=80, longest_pair=None,
    longest_prompt=None, origin="given",
)  # fmt: skip


def config(family: str, **more: Any) -> Any:
    return config_of(family, SIZES | FAMILIES.get(family, {}) | more)


def run(*overrides: str) -> RunConfig:
    tree = {"model": {"path": "."}, "prepare": {"path": "pairs.jsonl"}}
    return parse_config(json.dumps(tree), ["compute.executor=ray", *overrides])


@pytest.mark.parametrize(
    ("name", "total", "active"), [("mixtral-8x7b", 46.7, 12.9), ("qwen3-30b-a3b", 30.5, 3.3), ("olmoe-1b-7b", 6.9, 1.3)]
)
def test_shapes_have_as_many_weights_as_their_makers_say(name: str, total: float, active: float) -> None:
    """In billions: Mixtral 8x7B (arXiv 2401.04088), Qwen3-30B-A3B (2505.09388), OLMoE-1B-7B (2409.02060)."""
    sizes = sizes_of(shape(name))

    assert sizes.total / 1e9 == pytest.approx(total, abs=0.05)
    assert sizes.active / 1e9 == pytest.approx(active, abs=0.06)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_followed_to_the_peak_that_they_have(family: str) -> None:
    """Two and three layers without numbers against five with numbers, as of models without experts."""
    peaks = trace(config(family), WAY, ROW.build(), [list(each) for each in ROW.lengths])

    planned = max(sum(peak.at(5).values()) for peak in peaks.values())
    assert planned == pytest.approx(real_peak(config(family), WAY), rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"with_router": True},
        {"with_router": True, "checkpointing": "full", "accumulates": True},
        {"checkpointing": "selective"},
        {"lora": LORA, "full_weights": False},
        {"lora": LORA, "full_weights": False, "with_router": True, "checkpointing": "full"},
        {"trains": False},
    ],
    ids=str,
)
def test_every_way_of_training_a_mixture_is_followed(changes: dict[str, Any]) -> None:
    """With the balancing loss, adapters, and every kind of checkpointing."""
    way: Way = dataclasses.replace(WAY, **changes)

    peaks = trace(config("qwen3_moe"), way, ROW.build(), [list(each) for each in ROW.lengths])

    planned = max(sum(peak.at(5).values()) for peak in peaks.values())
    assert planned == pytest.approx(real_peak(config("qwen3_moe"), way), rel=0.01)


def test_layers_without_experts_at_the_beginning_do_not_stand_for_the_others() -> None:
    """Three of six, as GLM-4.5 and DeepSeek have: they are traced, and so are two of those that follow."""
    model = config("glm4_moe", first_k_dense_replace=3, num_hidden_layers=6, intermediate_size=500)
    sizes = sizes_of(model)

    peaks = trace(model, WAY, ROW.build(), [list(each) for each in ROW.lengths], num_unlike=sizes.num_unlike)

    assert sizes.num_unlike == 3
    planned = max(sum(peak.at(6).values()) for peak in peaks.values())
    assert planned == pytest.approx(real_peak(model, WAY), rel=0.01)


def test_layers_that_take_turns_are_refused() -> None:
    """No two of them stand for all."""
    with pytest.raises(ModelError, match="take turns"):
        sizes_of(config("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=12))


def test_attention_that_the_engine_does_not_have_is_refused() -> None:
    """DeepSeek-V3: keys of 192 and values of 128."""
    with pytest.raises(ModelError, match=r"deepseek_v3 cannot be planned.*keys of 192, values of 128"):
        sizes_of(config_of("deepseek_v3", {"num_hidden_layers": 4}))


def test_tensor_parallelism_is_refused_as_the_engine_refuses_it() -> None:
    """Experts are not cut; nothing is traced before that is said."""
    wanted = run("compute.workers=8", "compute.tensor_parallel=2")

    with pytest.raises(ModelError, match="mixture of experts is not trained with tensor parallelism"):
        train_memory(wanted, Outline(config=shape("mixtral-8x7b")), GPUS["H200"], WORK, wanted.train)


def test_adapters_stand_on_routers_and_experts_where_peft_puts_them_there() -> None:
    """By hand: of each expert 4 ranks on the way down and twice as many on the two matrices of the way up; and what is

    held of them: fp32, and AdamW's two moments."""
    wanted = run("train.lora={rank: 4}", "compute.device=cpu")
    experts = 4 * (8 * (64 + 2 * 96) + 4 * (96 + 64))
    attention = 4 * ((64 + 64) * 2 + (64 + 32) * 2)
    counted = 5 * (experts + attention + 4 * (64 + 4))

    found = train_memory(wanted, Outline(config=config("mixtral")), GPUS["H100"], WORK, wanted.train)

    assert sum(w.numel for w in placed_adapters(config("mixtral"), LORA)) == counted
    assert found.parts["optimiser"] == 8 * counted


def test_adapters_of_a_kind_that_peft_does_not_know_leave_experts_alone() -> None:
    """Qwen 2: shared experts and their gate are linear modules, the others are not."""
    model = config("qwen2_moe")

    placed, on_linears = placed_adapters(model, LORA), adapters_of(sizes_of(model), LORA)

    assert sum(weight.numel for weight in placed) == sum(weight.numel for weight in on_linears)
    assert any("shared_expert" in weight.name for weight in placed)


def test_quantised_experts_stay_in_bf16() -> None:
    """NF4 replaces linear modules: of Mixtral's 46.7 billion weights 1.3, in attention."""
    sizes = sizes_of(shape("mixtral-8x7b"))
    linear = sum(weight.numel for weight in sizes.weights if weight.is_linear)

    assert linear == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert sizes.bytes_on(1, "nf4") > 2 * (sizes.total - linear)


def test_a_token_computes_with_its_experts_alone_and_once_more_for_the_balance() -> None:
    """By hand: 4 matrices of attention, the router, 2 of 4 experts of 3 each. A balanced step begins with a forward."""
    sizes = sizes_of(config("mixtral", router_aux_loss_coef=0.02))
    plain, balanced = (
        next(s for s in work_of(run(*o), sizes, GPUS["H100"], WORK, 0.4) if s.stage == "train")
        for o in (["train.router_aux_loss=0.0"], [])
    )

    assert sizes.linear == 5 * (64 * (64 + 32 + 32 + 64) + 4 * 64 + 2 * 3 * 64 * 96)
    pair = forward_flops(sizes, 220, 80)
    assert plain.flops == pytest.approx(1000 * pair.training(lora=False, recomputed=False, ahead=False))
    assert balanced.flops - plain.flops == pytest.approx(1000 * pair.total)


def test_plan_says_what_a_mixture_costs() -> None:
    """All weights in memory, a quarter of Mixtral's at work; and that more ranks than experts share nothing more."""
    wanted = run("compute.workers=16", "train.row_tokens=512", "score.row_tokens=512", "evaluate.num_prompts=0")

    plan = make_plan(wanted, Outline(config=config("mixtral")), GPUS["H100"], WORK, mfu=0.4, price=None)

    notes = " ".join(plan.notes)
    assert plan.active < plan.weights
    assert "memory holds all of them" in notes
    assert "more than 4 workers make no share of them smaller" in notes
