"""A run in bf16, and what happens where precisions would be mixed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.errors import ConfigError
from dpo_train.findings import Champion
from dpo_train.model.load import merged_model
from dpo_train.model.save import write_model
from dpo_train.stages import evaluate, prepare, score_reference, sft, train
from dpo_train.stages.evaluate import ChampionModel
from dpo_train.stages.executor import InProcess
from tests.tiny import tiny_config, tiny_tokenizer

LOCAL = InProcess()
Made = tuple[RunConfig, Artifact, Artifact]


def _in(config: RunConfig, precision: str) -> RunConfig:
    return replace(config, model=replace(config.model, precision=precision))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Config, scored pairs and policy, all of it in bf16 on the CPU."""
    config = tiny_config(tmp_path_factory.mktemp("bf16"), model__precision="bf16")
    scored = score_reference(config, prepare(config, LOCAL), LOCAL)
    return config, scored, train(config, scored, LOCAL)


def _history(policy: Artifact, name: str) -> list[float]:
    lines = [json.loads(line) for line in policy.file("metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_training_in_bf16_starts_at_ln_2_and_learns(made: Made) -> None:
    """The first loss is off by the rounding of rows that are packed otherwise; the last one is far below."""
    config, scored, policy = made
    assert scored.record.config["compute_dtype"] == "bfloat16"
    losses = _history(policy, "loss")
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    heldout = json.loads(evaluate(config, scored, policy, LOCAL).file("report.json").read_text())["findings"]["heldout"]
    assert heldout["accuracy"]["value"] > 0.5


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_precisions_are_not_mixed(made: Made, precision: str) -> None:
    """A policy's rounding is not its reference's."""
    config, scored, policy = made
    with pytest.raises(ConfigError, match=r"scored by another model|another dtype"):
        evaluate(_in(config, precision), scored, policy, LOCAL)


def test_champion_is_asked_in_the_precision_of_the_policy(made: Made, tmp_path: Path) -> None:
    """Rounding is no difference between two models."""
    config, scored, policy = made
    found = []

    class Listening(InProcess):
        def map_tables(self, make: Any, tables: Any, *, uses_model: bool) -> Iterator[pa.Table]:
            found.append((make.args[1].name, make.args[1].model.precision))
            return super().map_tables(make, tables, uses_model=uses_model)

    write_model(merged_model(config.model, policy.path), tmp_path / "champion")
    tiny_tokenizer().save_pretrained(tmp_path / "champion")
    about = Champion(name="tiny", version="3", digest="d")
    evaluate(
        config, scored, policy, Listening(), champion=ChampionModel(about=about, fetch=lambda: tmp_path / "champion")
    )
    assert set(found) == {("policy", "bf16"), ("reference", "bf16"), ("champion", "bf16")}


def test_sft_in_another_precision_is_another_output(tmp_path: Path) -> None:
    """Its address tells them apart, and each is reused."""
    config = tiny_config(tmp_path, sft__enabled=True, sft__max_steps=2, sft__batch_pairs=16, sft__row_tokens=256)
    pairs = prepare(config, LOCAL)
    outputs = [sft(_in(config, precision), pairs, LOCAL) for precision in ("fp32", "bf16", "fp32", "bf16")]
    addresses = [output.address for output in outputs]
    assert addresses[:2] == addresses[2:]
    assert len(set(addresses)) == 2
    assert [output.reused for output in outputs] == [False, False, True, True]
