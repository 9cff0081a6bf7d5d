"""Policies from model folders, with and without adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_train.config import LoraConfig, ModelConfig
from dpo_train.data.tokens import load_tokenizer
from dpo_train.errors import ModelError
from dpo_train.model.load import (
    Policy,
    load_parameter_state,
    load_policy,
    merged_model,
    parameter_state,
    save_policy,
)
from dpo_train.model.rows import build_row
from dpo_train.model.score import check_layout, row_logps
from tests.tiny import random_pairs, tiny_policy
from tests.unit.model.families import FAMILIES, VOCABULARY, write

CPU = torch.device("cpu")
PAIRS = random_pairs(3)


def _load(folder: Path, **options: Any) -> Policy:
    return load_policy(ModelConfig(path=str(folder)), device=CPU, **options)


@torch.no_grad()
def _logps(policy: Policy) -> torch.Tensor:
    return row_logps(policy, build_row(PAIRS)).token_logps_A


def _move(policy: Policy) -> None:
    """A made-up training: every trainable weight moves."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def test_fresh_adapters_compute_exactly_the_base(model_folder: Path) -> None:
    """The update starts at zero: the policy is its reference, bit for bit."""
    base = tiny_policy(model_folder, lora=False, trainable=False)
    assert torch.equal(_logps(tiny_policy(model_folder)), _logps(base))


def test_only_adapters_are_trained_under_lora(model_folder: Path) -> None:
    """Two factors for each of the seven linear modules of two layers; none for the vocabulary matrix."""
    trainable = tiny_policy(model_folder).trainable()
    assert len(trainable) == 2 * 7 * 2
    assert all("lora_" in name and "lm_head" not in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}


def test_all_weights_are_trained_without_lora_and_none_when_frozen(model_folder: Path) -> None:
    """Full fine-tuning in fp32; a frozen policy wants no gradient at all."""
    full = tiny_policy(model_folder, lora=False)
    assert len(full.trainable()) == len(list(full.model.parameters()))
    assert {p.dtype for p in full.trainable().values()} == {torch.float32}
    assert tiny_policy(model_folder, lora=False, trainable=False).trainable() == {}


def test_seed_decides_the_adapters_and_nothing_else_does(model_folder: Path) -> None:
    """Ranks that load on their own must start equal; the process's own random state stays as it was."""
    torch.manual_seed(11)
    first = parameter_state(tiny_policy(model_folder, seed=3))
    torch.manual_seed(12)
    before = torch.get_rng_state()
    second, other = (
        parameter_state(tiny_policy(model_folder, seed=3)),
        parameter_state(tiny_policy(model_folder, seed=4)),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_reference_is_the_base_while_adapters_are_switched_off(model_folder: Path) -> None:
    """After a training the reference is still there, and the policy comes back after it."""
    policy = tiny_policy(model_folder)
    base = _logps(policy)
    _move(policy)
    moved = _logps(policy)
    assert not torch.equal(moved, base)
    with policy.reference():
        assert torch.equal(_logps(policy), base)
    assert torch.equal(_logps(policy), moved)


def test_fully_fine_tuned_policy_has_no_reference_in_it(model_folder: Path) -> None:
    """It would have to be loaded again."""
    with (
        pytest.raises(ModelError, match="does not hold its reference"),
        tiny_policy(model_folder, lora=False).reference(),
    ):
        pass


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "model"])
def test_saved_policy_loads_as_it_was(model_folder: Path, tmp_path: Path, lora: bool) -> None:
    """Log-probs after loading equal those before saving, bit for bit; as an adapter or as a whole model folder."""
    policy = tiny_policy(model_folder, lora=lora)
    base = _logps(policy)
    _move(policy)
    save_policy(policy, tmp_path, load_tokenizer(model_folder))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter" if lora else "model"]
    assert not list(tmp_path.rglob("*.bin"))
    loaded = _load(model_folder, weights=tmp_path)
    assert torch.equal(_logps(loaded), _logps(policy))
    assert not torch.equal(_logps(loaded), base)
    assert loaded.trainable() == {}


def test_saved_model_folder_has_its_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    """It can be used as a base model again."""
    save_policy(tiny_policy(model_folder, lora=False), tmp_path, load_tokenizer(model_folder))
    assert load_tokenizer(tmp_path / "model").chat_template == load_tokenizer(model_folder).chat_template
    check_layout(tiny_policy(tmp_path / "model"))


def test_saved_adapter_does_not_name_this_machine(model_folder: Path, tmp_path: Path) -> None:
    """Two machines write the same bytes."""
    for name in ("a", "b"):
        base = Path(shutil.copytree(model_folder, tmp_path / name / "base"))
        save_policy(tiny_policy(base), tmp_path / name, None)
    contents = [(tmp_path / name / "adapter" / "adapter_config.json").read_text() for name in ("a", "b")]
    assert contents[0] == contents[1]
    assert str(tmp_path) not in contents[0]
    assert json.loads(contents[0])["base_model_name_or_path"] is None


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "model"])
def test_merged_model_computes_what_the_policy_did(model_folder: Path, tmp_path: Path, lora: bool) -> None:
    """Adapters multiplied into the base weights: the same logits to fp32's rounding, and no adapter is left."""
    policy = tiny_policy(model_folder, lora=lora)
    _move(policy)
    save_policy(policy, tmp_path, load_tokenizer(model_folder))
    merged = merged_model(ModelConfig(path=str(model_folder)), tmp_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted, got = policy.model(ids).logits, merged(ids).logits
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]


def test_parameter_state_is_a_copy_that_loads_back(model_folder: Path) -> None:
    """Moving the policy leaves the state alone; loading it moves the policy back."""
    policy = tiny_policy(model_folder)
    state, before = parameter_state(policy), _logps(policy)
    _move(policy)
    assert not torch.equal(_logps(policy), before)
    load_parameter_state(policy, state)
    assert torch.equal(_logps(policy), before)


def test_state_of_other_parameters_is_refused(model_folder: Path) -> None:
    """Adapters do not load into a full fine-tuning."""
    with pytest.raises(ModelError, match="other parameters"):
        load_parameter_state(tiny_policy(model_folder), parameter_state(tiny_policy(model_folder, lora=False)))


def test_dropout_stays_off_while_training(tmp_path: Path) -> None:
    """GPT-2 has dropout of 0.1 by default: two forwards of a trainable policy agree bit for bit."""
    policy = _load(write(tmp_path, FAMILIES["gpt2"]), lora=LoraConfig(rank=2), trainable=True)
    row = build_row(random_pairs(2, vocabulary=VOCABULARY))
    assert torch.equal(row_logps(policy, row).token_logps_A, row_logps(policy, row).token_logps_A)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_adapters_on_all_linear_modules(tmp_path: Path, family: str) -> None:
    """ "all-linear" finds modules in each, GPT-2's convolutions included, and each second factor gets a gradient."""
    policy = _load(write(tmp_path, FAMILIES[family]), lora=LoraConfig(rank=2), trainable=True)
    row_logps(policy, build_row(random_pairs(3, vocabulary=VOCABULARY))).token_logps_A.sum().backward()
    second = {name: p for name, p in policy.trainable().items() if "lora_B" in name}
    assert len(second) >= 2 * 4
    assert all(p.grad.norm() > 0 for p in second.values())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("no_such_module",), "The model has no such module"),
        (("q_proj", "lm_head"), "LoRA on the vocabulary matrix is not supported"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(model_folder: Path, targets: tuple[str, ...], message: str) -> None:
    """A module that does not exist, and the one whose adapter the log-probs would not see."""
    with pytest.raises(ModelError, match=message):
        _load(model_folder, lora=LoraConfig(target_modules=targets), trainable=True)


def test_adapter_on_an_embedding_that_is_also_the_vocabulary_matrix_is_refused(tmp_path: Path) -> None:
    """With tied weights the log-probs would not see it, and merging it would change the vocabulary matrix as well."""
    folder = write(tmp_path, FAMILIES["qwen2"])
    with pytest.raises(ModelError, match="LoRA on the vocabulary matrix is not supported"):
        _load(folder, lora=LoraConfig(target_modules=("q_proj", "embed_tokens")), trainable=True)


def _gpt_neo() -> Any:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=8, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def test_attention_that_our_mask_would_replace_is_refused_by_name(tmp_path: Path) -> None:
    """GPT-Neo's local layers have a window of their own kind, which a mask of ours would widen without a word."""
    with pytest.raises(
        ModelError, match=r"GPTNeoForCausalLM\) cannot be trained in packed rows\. Got: attention_types"
    ):
        _load(write(tmp_path, _gpt_neo))


def test_layers_that_are_no_attention_are_refused_by_name(tmp_path: Path) -> None:
    """A linear-attention layer reads the whole row in order, whatever the mask says."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ModelError, match="layers of type linear_attention"):
        _load(write(tmp_path, lambda: Qwen3NextForCausalLM(config)))


def test_folder_that_holds_no_causal_model_is_refused(tmp_path: Path) -> None:
    """A config without weights."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        _load(tmp_path)


def test_pickled_weights_are_not_loaded(model_folder: Path, tmp_path: Path) -> None:
    """A pickle may run code; only safetensors are read."""
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    torch.save(tiny_policy(model_folder, lora=False).model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        _load(tmp_path)
