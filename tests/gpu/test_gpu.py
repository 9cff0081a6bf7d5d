"""What only a GPU can show: bf16 compute over fp32 masters, and the whole flow without being told of the GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dpo_train import launch
from dpo_train.config import ModelConfig
from dpo_train.core.logprobs import token_logprobs
from dpo_train.model.load import load_policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import row_logps
from dpo_train.model.shard import shard
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from tests.tiny import random_pairs, tiny_config, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to be seen: GPU tests need one"),
]


def test_gpu_is_found_without_being_told(tmp_path: Path) -> None:
    """compute.device=auto becomes cuda."""
    assert launch.resolve_device(tiny_config(tmp_path)).compute.device == "cuda"


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8.0}, None], ids=["adapters", "all weights"])
def test_first_loss_in_bf16_is_ln_2_and_training_learns(tmp_path: Path, lora: dict[str, float] | None) -> None:
    """To 1e-2, and the loss falls."""
    config = tiny_config(tmp_path, train__lora=lora, train__learning_rate=5e-3 if lora else 1e-3)
    local = InProcess()

    made = train(config, score_reference(config, prepare(config, local), local), local)

    assert made.record.metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert made.record.metrics["loss"] < 0.9 * made.record.metrics["first_loss"]


def test_compiled_log_probs_equal_fp64() -> None:
    """The kernel that GPUs run, in fp32, for tokens that do and do not fill a chunk: 1e-5 forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden_AD, weight_VD = (torch.randn(n, 64, generator=generator) for n in (700, 5000))
    targets_A = torch.randint(0, 5000, (700,), generator=generator)
    exact = [t.double().requires_grad_() for t in (hidden_AD, weight_VD)]
    wanted_A = torch.log_softmax(exact[0] @ exact[1].T, dim=-1).gather(1, targets_A[:, None]).squeeze(1)
    wanted_A.sum().backward()
    leaves = [t.cuda().requires_grad_() for t in (hidden_AD, weight_VD)]
    got_A = token_logprobs(leaves[0], leaves[1], targets_A.cuda())
    got_A.sum().backward()
    for got, wanted in zip(
        (got_A.detach(), *(t.grad for t in leaves)), (wanted_A, *(t.grad for t in exact)), strict=True
    ):
        assert (got.cpu().double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_sharded_log_probs_are_those_of_whole_weights(tmp_path: Path) -> None:
    """FSDP2 on one rank, with autocast: no dtype of its own comes in, so the first step's log-ratios are zero."""
    config = ModelConfig(path=str(tiny_model(tmp_path / "model")))
    row = build_row(random_pairs(5)).to(torch.device("cuda"))
    policies = [load_policy(config, device=torch.device("cuda"), trainable=True) for _ in range(2)]
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        shard(policies[1])
        logps = [row_logps(policy, row).token_logps_A.detach() for policy in policies]
    finally:
        dist.destroy_process_group()
    assert torch.equal(logps[0], logps[1])
