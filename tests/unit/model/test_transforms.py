"""Checkpointed and compiled layers compute what plain ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_train.errors import ModelError
from dpo_train.model.load import Policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import row_logps
from dpo_train.model.shard import layers
from dpo_train.model.transforms import transform_layers
from tests.tiny import random_pairs, tiny_policy
from tests.unit.model.families import FAMILIES, VOCABULARY, write

PAIRS = random_pairs(4, vocabulary=VOCABULARY)


def _policy(folder: Path, family: str, *, lora: bool = False) -> Policy:
    if not folder.exists():
        write(folder, FAMILIES[family])
    return tiny_policy(folder, lora=lora)


def _run(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs and gradients."""
    logps_A = row_logps(policy, build_row(PAIRS)).token_logps_A
    logps_A.sum().backward()
    gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
    assert len(gradients) == len(policy.trainable())
    return logps_A.detach(), gradients


def _counted(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """The same, and the FLOPs of matrix products. Nothing is compiled while they are counted."""
    counter: Any = FlopCounterMode(display=False)
    with counter:
        found = _run(policy)
    return *found, counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "qwen2"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
def test_checkpointed_layers_give_the_same_bits_and_compute_no_more_than_they_must(
    tmp_path: Path, family: str, lora: bool
) -> None:
    """Log-probs and every gradient bit for bit. Selective checkpointing repeats no matrix product, full repeats the
    layers' forward: between a fifth and a half more."""
    logps_A, gradients, flops = _counted(_policy(tmp_path / "m", family, lora=lora))
    more: dict[str, float] = {}
    kinds: tuple[Literal["selective", "full"], ...] = ("selective", "full")
    for kind in kinds:
        policy = _policy(tmp_path / "m", family, lora=lora)
        transform_layers(policy, checkpointing=kind, compile=False, row_tokens=64)
        again = _counted(policy)
        assert torch.equal(again[0], logps_A)
        assert all(torch.equal(one, other) for one, other in zip(again[1], gradients, strict=True))
        more[kind] = again[2] / flops
    if family != "mixtral":  # experts multiply in groups, which are not kept
        assert more["selective"] == 1.0
    assert 1.1 < more["full"] < 1.6


def test_full_checkpointing_keeps_the_input_of_each_layer_alone(tmp_path: Path) -> None:
    """Bytes that the backward pass finds saved, parameters not counted, fall to less than a third."""

    def saved_bytes(policy: Policy) -> int:
        weights = {p.data_ptr() for p in policy.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logps_A = row_logps(policy, build_row(PAIRS)).token_logps_A
        total = sum(kept.values())
        logps_A.sum().backward()
        return total

    plain = saved_bytes(_policy(tmp_path / "m", "llama"))
    policy = _policy(tmp_path / "m", "llama")
    transform_layers(policy, checkpointing="full", compile=False, row_tokens=64)
    assert saved_bytes(policy) < plain / 3


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_compiled_layers_compute_the_same_in_rows_of_one_length(
    tmp_path: Path, checkpointing: Literal["off", "selective", "full"]
) -> None:
    """To 1e-5; and rows of other pairs need no other compilation."""
    logps_A, gradients = _run(_policy(tmp_path / "m", "llama"))
    policy = _policy(tmp_path / "m", "llama")
    transform_layers(policy, checkpointing=checkpointing, compile=True, row_tokens=128)
    torch._dynamo.reset()
    again = _run(policy)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert (again[0] - logps_A).abs().max() <= 1e-5 * logps_A.abs().max()
    for one, other in zip(again[1], gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    with torch._dynamo.config.patch(error_on_recompile=True):
        row_logps(policy, build_row(random_pairs(7, seed=1, vocabulary=VOCABULARY))).token_logps_A.sum().backward()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_padding_behind_a_row_changes_nothing(tmp_path: Path, family: str) -> None:
    """Log-probs, gradients, and how the tokens of a mixture of experts chose, to 1e-5."""
    found = []
    for static_tokens in (None, 64):
        policy = _policy(tmp_path / "m", family)
        policy.packed.static_tokens = static_tokens
        result = row_logps(policy, build_row(PAIRS), with_router=family == "mixtral")
        result.token_logps_A.sum().backward()
        gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
        router = [] if result.router is None else [*result.router]
        found.append([result.token_logps_A, *gradients, *router])
    assert len(found[0]) == len(found[1]) > 5
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_a_model_that_hides_its_layers_is_refused_by_name(tmp_path: Path) -> None:
    """Nothing would be checkpointed, and the user would look for the memory elsewhere."""
    policy = _policy(tmp_path / "m", "llama")
    assert len(layers(policy)) == 2
    policy.model._no_split_modules = []
    with pytest.raises(ModelError, match="LlamaForCausalLM does not say which modules are its layers"):
        transform_layers(policy, checkpointing="full", compile=False, row_tokens=64)
