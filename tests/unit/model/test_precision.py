"""`model.precision`: what is computed in bf16, on the CPU as on GPUs, and what stays in fp32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dpo_train.config import LoraConfig, ModelConfig
from dpo_train.model.export import export_policy
from dpo_train.model.load import Policy, load_policy, merged_model, save_policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import check_layout, row_logps
from tests.tiny import random_pairs, tiny_tokenizer
from tests.unit.model.families import FAMILIES, VOCABULARY, write

CPU = torch.device("cpu")
ROW = build_row(random_pairs(5, vocabulary=VOCABULARY))


def _policy(folder: Path, precision: str, *, lora: bool = False) -> Policy:
    adapters = LoraConfig(rank=4, alpha=8.0) if lora else None
    config = ModelConfig(path=str(folder), precision=precision)  # type: ignore[arg-type]
    return load_policy(config, device=CPU, lora=adapters, trainable=True, frozen_base=lora)


@torch.no_grad()
def _logps(policy: Policy) -> torch.Tensor:
    """Of every answer of the row."""
    return ROW.answer_sums(row_logps(policy, ROW).token_logps_A)


def _trained(folder: Path) -> Policy:
    """A Llama whose adapters have learned something; they are in ``trained``."""
    policy = _policy(write(folder / "llama", FAMILIES["llama"]), "bf16", lora=True)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    save_policy(policy, folder / "trained", tiny_tokenizer())
    return policy


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_near_fp32_and_packed_as_plain(tmp_path: Path, family: str, lora: bool) -> None:
    """Eight bits of each number: within 2 % of an answer's log-prob, and in no family the same."""
    folder = write(tmp_path / family, FAMILIES[family])
    in_bf16, in_fp32 = (_policy(folder, precision, lora=lora) for precision in ("bf16", "fp32"))
    check_layout(in_bf16)
    difference = (_logps(in_bf16) - _logps(in_fp32)).abs() / _logps(in_fp32).abs()
    assert 1e-6 < float(difference.max()) < 2e-2


@pytest.mark.parametrize(("precision", "on_gpu", "bf16"), [
    ("auto", True, True), ("auto", False, False), ("bf16", False, True), ("fp32", True, False),
])  # fmt: skip
def test_auto_is_the_device_s(precision: str, on_gpu: bool, bf16: bool) -> None:
    """bf16 on GPUs; a CPU without its instructions would be slower for it."""
    assert ModelConfig(path="m", precision=precision).in_bf16(on_gpu=on_gpu) is bf16  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_trained_has_fp32_masters(tmp_path: Path, lora: bool) -> None:
    """A frozen base alone is kept in bf16."""
    policy = _policy(write(tmp_path / "llama", FAMILIES["llama"]), "bf16", lora=lora)
    trained = set(policy.trainable().values())
    frozen = {p for p in policy.model.parameters() if p not in trained}
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in frozen} == ({torch.bfloat16} if lora else set())


def test_policy_that_learned_nothing_is_its_reference_bit_for_bit(tmp_path: Path) -> None:
    """So that the first loss is ln 2 in bf16 too."""
    policy = _policy(write(tmp_path / "llama", FAMILIES["llama"]), "bf16", lora=True)
    with policy.reference():
        reference_P2 = _logps(policy)
    margins_P = (_logps(policy) - reference_P2) @ torch.tensor([1.0, -1.0])
    assert torch.nn.functional.softplus(-0.1 * margins_P).tolist() == pytest.approx([math.log(2)] * len(margins_P))


def test_what_is_exported_computes_what_was_trained(tmp_path: Path) -> None:
    """In fp32, whatever the training's precision: the check of the written files would refuse bf16's rounding."""
    policy = _trained(tmp_path)
    config = ModelConfig(path=str(policy.folder), precision="bf16")
    export_policy(config, tmp_path / "trained", tmp_path / "exported", tiny_tokenizer())
    written = safetensors.torch.load_file(tmp_path / "exported" / "model" / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.float32}


def test_adapters_are_merged_into_the_base_as_it_was(tmp_path: Path) -> None:
    """What is registered does not have the rounding of the computation in it."""
    policy = _trained(tmp_path)
    configs = [ModelConfig(path=str(policy.folder), precision=name) for name in ("bf16", "fp32")]  # type: ignore[arg-type]
    in_bf16, in_fp32 = (merged_model(config, tmp_path / "trained").state_dict() for config in configs)
    assert in_bf16.keys() == in_fp32.keys()
    for name, weight in in_bf16.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, in_fp32[name]), name
