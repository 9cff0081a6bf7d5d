"""What a step takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_train.config import TrainConfig
from dpo_train.train import speed
from dpo_train.train.ranks import Ranks
from tests.tiny import random_pairs, tiny_policy


def test_arithmetic_of_a_token_counts_trained_weights_twice_as_often_backward(model_folder: Path) -> None:
    """Forward 2, backward to inputs 2, backward to trained weights 2: 6 for each weight, 4 for a frozen one."""
    full, adapters = tiny_policy(model_folder, lora=False), tiny_policy(model_folder)
    weights = sum(p.numel() for p in full.model.parameters())
    trained = sum(p.numel() for p in adapters.trainable().values())
    assert speed._flops_per_token(full) == 6 * weights
    assert speed._flops_per_token(adapters) == 4 * (weights + trained) + 2 * trained


def test_rates_and_filling_are_worked_by_hand(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of two and four seconds; evaluations between them do not count."""
    clock = iter([10.0, 12.0, 100.0, 104.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    pairs = random_pairs(6)
    tokens = sum(pair.num_tokens for pair in pairs)
    measured = speed.Speed(tiny_policy(model_folder), replace(TrainConfig(), row_tokens=tokens), Ranks())
    with measured.step(pairs[:3]):
        pass
    with measured.step(pairs[3:]):
        pass
    metrics = measured.metrics()
    assert metrics["pairs_per_second"] == pytest.approx(1.0)
    assert metrics["tokens_per_second"] == pytest.approx(tokens / 6)
    assert metrics["row_fill"] == pytest.approx(sum(pair.num_tokens for pair in pairs[3:]) / tokens)
    assert set(metrics) == set(speed.NAMES) - {"mfu"}
