"""What only a GPU can show: bf16 compute over fp32 masters, and the whole flow without being told of the GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dpo_train import launch
from dpo_train.stages import prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from tests.tiny import tiny_config

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
