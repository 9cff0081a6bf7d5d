"""What a sweep is told wrongly is refused when the config is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_train.config import LogUniform, RunConfig, parse_config
from dpo_train.errors import ConfigError

BASE = "{model: {path: m}, prepare: {path: p.jsonl}, train: {lora: {rank: 8}}}"
BETAS = "sweep.betas=[0.1, 0.2]"
RANGE = "sweep.betas={low: 0.01, high: 1.0}"
REWARD = "evaluate.judge={kind: function, path: 'rewards:good'}"


def read(*overrides: str) -> RunConfig:
    return parse_config(BASE, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.betas=[0.1, 0]"], "sweep.betas"),
        (["sweep.betas=[-1]"], "greater than 0"),
        (["sweep.betas=['0.1']"], "should be a valid number"),
        (["sweep.betas={low: 0, high: 1}"], "greater than 0"),
        (["sweep.betas={low: 1, high: 0.1}", "sweep.search=random", "sweep.trials=3"], "low must be below high"),
        (["sweep.trials=3"], "it has nothing to try"),
        (["sweep.halving=2"], "it has nothing to try"),
        ([RANGE], "cannot try every value of a range"),
        ([RANGE, "sweep.search=random"], "needs sweep.trials"),
        ([BETAS, "sweep.search=optuna"], "needs sweep.trials"),
        ([BETAS, "sweep.trials=2"], "no meaning with sweep.search=grid"),
        ([BETAS, "sweep.search=random", "sweep.trials=3"], "more than the 2 combinations"),
        ([BETAS, "sweep.search=optuna", "sweep.trials=2", "sweep.halving=2"], "trials that start together"),
        (["sweep.lora_ranks=[4]", "train.lora=null"], "needs train.lora"),
        ([BETAS, "sweep.use=policy", "sweep.max_steps=3"], "makes trials shorter"),
        ([BETAS, "sweep.select.metric=reward"], "needs a judge that rewards"),
        ([BETAS, "sweep.select.metric=win_rate"], "needs evaluate.judge"),
        ([BETAS, "sweep.select.max_kl=5", "sweep.num_prompts=0"], "sweep.num_prompts is 0"),
        ([BETAS, "prepare.validation_fraction=0"], "needs validation pairs"),
        ([BETAS, "sweep.halving=1"], "greater than 1"),
        (["sweep.losses=[sigmoid, exo_pair]"], "sweep.losses: exo_pair: the exo_pair loss needs a label_smoothing"),
        ([BETAS, "sweep.losses=[sigmoid, simpo]"], "at which no loss of train.loss looks"),
    ],
)  # fmt: skip
def test_contradiction_is_one_clear_error(overrides: list[str], message: str) -> None:
    """Before anything is started."""
    with pytest.raises(ConfigError, match=message):
        read(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [BETAS, "sweep.halving=2", "sweep.seeds=3"],
        [RANGE, "sweep.search=random", "sweep.trials=5", "sweep.learning_rates=[1.0e-6, 1.0e-5]"],
        [BETAS, "sweep.use=policy"],
        [BETAS, "sweep.losses=[sigmoid, ipo]", "sweep.epochs=[1, 2]", "sweep.lora_ranks=[4, 8]"],
        ["sweep.betas=[]", "sweep.max_steps=3"],
    ],
)
def test_what_makes_sense_is_read(overrides: list[str], tmp_path: Path) -> None:
    """Each kind of space, and a config whose betas are taken away for one run."""
    assert read(*overrides).sweep.num_prompts == 16


def test_a_range_is_read_as_one() -> None:
    """{low, high} is another type than a list."""
    config = read(RANGE, "sweep.search=random", "sweep.trials=2")

    assert config.sweep.betas == LogUniform(low=0.01, high=1.0)
    assert config.sweep.space == config.sweep.ranges == {"beta": LogUniform(low=0.01, high=1.0)}
