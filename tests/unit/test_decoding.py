"""Strict decoding: what is asked of the dataclasses themselves; what people type is in test_config.py."""

from __future__ import annotations

from typing import Any

from dpo_train.config import LoraConfig, RunConfig
from dpo_train.decoding import section_type, walk_options


def test_every_option_is_listed_with_its_help() -> None:
    """`dpo init` and the documentation are written from these; an option without help would be left unexplained."""
    options = dict(walk_options(RunConfig))
    assert {"train", "train.lora", "train.lora.rank", "evaluate.gate.min_margin"} <= set(options)
    assert list(options)[:2] == ["store", "seed"]
    assert [key for key, item in options.items() if not item.metadata.get("help")] == []


def test_section_type_finds_the_dataclass_behind_a_field() -> None:
    """Through `| None`, and None for plain values."""
    hints: dict[Any, type | None] = {LoraConfig: LoraConfig, LoraConfig | None: LoraConfig, int: None, str | None: None}
    assert {hint: section_type(hint) for hint in hints} == hints
