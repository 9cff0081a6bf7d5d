"""Modules that a full training leaves as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_train.config import ModelConfig, TrainConfig
from dpo_train.errors import ModelError
from dpo_train.model.load import Policy, load_policy, save_policy
from dpo_train.train.optimizer import build_optimizer
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import train_step
from tests.tiny import random_pairs, tiny_tokenizer, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write

CONFIG = TrainConfig(beta=0.5, row_tokens=64, learning_rate=1e-2, weight_decay=0.1, batch_pairs=4)


def load(folder: Path, **options: Any) -> Policy:
    return load_policy(ModelConfig(path=str(folder)), device=torch.device("cpu"), **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("base"), FAMILIES["llama"])


def steps(policy: Policy, base: Path) -> dict[str, bool]:
    """Whether each weight moved in two steps with weight decay."""
    pairs = with_reference(load(base), random_pairs(4, vocabulary=VOCABULARY))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = build_optimizer(policy.trainable().values(), CONFIG)
    for step in range(2):
        train_step(policy, optimizer, pairs, CONFIG, Ranks(), step=step, learning_rate=1e-2)
    return {name: not torch.equal(before[name], p) for name, p in policy.model.named_parameters()}


def test_frozen_modules_stay_bit_for_bit_and_all_others_move(base: Path) -> None:
    """By the end of their names, whole layers included; weight decay does not reach them either."""
    moved = steps(load(base, trainable=True, frozen=("embed_tokens", "layers.0", "norm")), base)
    held = {name for name in moved if "embed_tokens" in name or ".layers.0." in name or name == "model.norm.weight"}
    assert len(held) == 1 + 9 + 1
    assert {name for name, has_moved in moved.items() if not has_moved} == held


def test_whole_names_mean_one_module(base: Path) -> None:
    """And an end of a name is one at a dot: ``proj`` means none."""
    policy = load(base, trainable=True, frozen=("model.layers.1.mlp.up_proj",))
    frozen = [name for name, p in policy.model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"no such module\. Got: frozen: proj, no_such"):
        load(base, trainable=True, frozen=("proj", "up_proj", "no_such"))


def test_tied_matrix_is_frozen_under_either_name(tmp_path: Path) -> None:
    """It is one matrix: the vocabulary's stays as well."""
    folder = write(tmp_path, FAMILIES["qwen2"])
    for name in ("embed_tokens", "lm_head"):
        moved = steps(load(folder, trainable=True, frozen=(name,)), folder)
        assert [n for n, has_moved in moved.items() if not has_moved] == ["model.embed_tokens.weight"]


def test_nothing_left_to_train_is_refused(base: Path) -> None:
    """Each name for itself is well; all together they leave nothing."""
    with pytest.raises(ModelError, match=r"Every weight is frozen.*frozen: model, lm_head"):
        load(base, trainable=True, frozen=("model", "lm_head"))


def test_frozen_weights_are_saved_with_the_others(base: Path, tmp_path: Path) -> None:
    """The output is a whole model folder."""
    policy = load(base, trainable=True, frozen=("layers.0",))
    steps(policy, base)
    save_policy(policy, tmp_path, tiny_tokenizer())
    loaded = dict(load(base, weights=tmp_path).model.named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in policy.model.named_parameters())
    stored = load_file(tmp_path / "model" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], stored[name])}
    assert same == {name for name in before if ".layers.0." in name}
