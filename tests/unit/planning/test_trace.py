"""What a trace without numbers says of a row, against the same row computed with numbers."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_train.config import LoraConfig
from dpo_train.core.router import aux_loss
from dpo_train.errors import ModelError
from dpo_train.model.adapters import fresh_adapter
from dpo_train.model.attention import install
from dpo_train.model.load import Policy
from dpo_train.model.outline import config_of, cut_config, meta_model, read_config
from dpo_train.model.score import row_logps
from dpo_train.model.transforms import transform_layers
from dpo_train.planning.rows import FullRow
from dpo_train.planning.trace import Live, Way, trace

ROW = FullRow(tokens=164, lengths=((40, 12, 12), (60, 20, 20)), per_step=1)
WAY = Way(lora=None, checkpointing="off", on_gpu=False, bf16=False, trains=True, full_weights=True)
LORA = LoraConfig(rank=4)


def _config(kind: str = "llama", *, layers: int = 5, **more: Any) -> Any:
    sizes = {
        "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 300, "num_hidden_layers": layers, "pad_token_id": 0,
    }  # fmt: skip
    return config_of(kind, sizes | more)


def real_peak(config: Any, way: Way) -> int:
    """The highest of the row's own bytes with real tensors, on the CPU."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if way.bf16 and not way.full_weights else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    install(model)
    adapters = None if way.lora is None else fresh_adapter(model, way.lora, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(way.trains and (way.lora is None or "lora_" in name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if way.accumulates and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    policy = Policy(model=model, adapters=adapters, folder=Path(), device=torch.device("cpu"), bf16=way.bf16)
    transform_layers(policy, checkpointing=way.checkpointing, compile=False, row_tokens=1)
    gc.collect()
    live, highest = Live(list(model.parameters())), [0]

    def look() -> None:
        highest[0] = max(highest[0], live.bytes.total())

    live.on_change = look
    row = ROW.build()
    with live, torch.set_grad_enabled(way.trains):
        found = row_logps(policy, row, with_router=way.with_router)
        loss = found.token_logps_A.sum()
        if found.router is not None:
            loss = loss + aux_loss(*found.router)
        del found
        if way.trains:
            loss.backward()
    return highest[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulates": True},
        {"checkpointing": "selective"},
        {"checkpointing": "full", "accumulates": True},
        {"lora": LORA, "full_weights": False},
        {"lora": LORA, "full_weights": False, "checkpointing": "full"},
        {"trains": False},
        {"bf16": True},
        {"bf16": True, "lora": LORA, "full_weights": False},
        {"bf16": True, "trains": False},
    ],
    ids=str,
)
def test_two_and_three_layers_without_numbers_tell_the_peak_of_five_with_numbers(changes: dict[str, Any]) -> None:
    """Within 1 %: some tables of places are made anew with numbers, and shared without."""
    way = dataclasses.replace(WAY, **changes)
    config = _config()

    peaks = trace(config, way, ROW.build(), [list(each) for each in ROW.lengths])

    planned = max(sum(peak.at(5).values()) for peak in peaks.values())
    assert planned == pytest.approx(real_peak(config, way), rel=0.01)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2"])
def test_other_families_are_followed(kind: str) -> None:
    """The forward that is traced is the model's own, so nothing here knows a family."""
    peaks = trace(_config(kind, head_dim=16), WAY, ROW.build(), [list(each) for each in ROW.lengths])

    kept = peaks["head"].slope["activations"]
    assert 20 * 4 < kept / (ROW.tokens * 64) < 60 * 4


def test_a_gpu_keeps_about_half_and_a_bf16_copy_of_every_matrix() -> None:
    """Autocast keeps a copy of each fp32 matrix that it casts until the backward pass has used it: 2 bytes a weight."""
    on_gpu = dataclasses.replace(WAY, on_gpu=True, bf16=True)
    lengths = [list(each) for each in ROW.lengths]

    gpu, cpu = (trace(_config(), way, ROW.build(), lengths)["head"] for way in (on_gpu, WAY))

    matrices = 64 * (64 + 32 + 32 + 64 + 3 * 176)
    assert gpu.slope["copies"] == 2 * matrices
    assert cpu.slope["copies"] == 0
    assert 0.4 < gpu.slope["activations"] / cpu.slope["activations"] < 0.65


def test_full_checkpointing_keeps_a_layers_input_alone() -> None:
    """4 bytes for each token and hidden unit of a layer, as docs/performance.md says."""
    way = dataclasses.replace(WAY, checkpointing="full")

    peaks = trace(_config(), way, ROW.build(), [list(each) for each in ROW.lengths])

    assert peaks["head"].slope["activations"] == 4 * ROW.tokens * 64


def test_a_tensor_group_divides_heads_and_hidden_units() -> None:
    """A rank's part of a layer: half of every matrix, and norms whole."""
    whole, half = (meta_model(cut_config(_config(), tensor_parallel=size)) for size in (1, 2))

    layers = [sum(p.numel() for p in model.model.layers[0].parameters()) for model in (whole, half)]

    assert layers[1] - 2 * 64 == (layers[0] - 2 * 64) / 2


def test_heads_that_cannot_be_divided_are_told() -> None:
    """Before anything is traced."""
    with pytest.raises(ModelError, match="num_attention_heads=4"):
        cut_config(_config(), tensor_parallel=3)


def test_a_folder_with_nothing_but_a_config_is_enough(tmp_path: Path) -> None:
    """No weights, no tokenizer."""
    _config().save_pretrained(tmp_path)

    assert read_config(str(tmp_path)).num_hidden_layers == 5


def test_a_missing_config_is_told(tmp_path: Path) -> None:
    """As the user's mistake, with what to do."""
    with pytest.raises(ModelError, match="--shape"):
        read_config(str(tmp_path / "nowhere"))
