"""What is found of a trial lies at an address of its own: which sweeps share it, and which must not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_train.config import EndpointJudge, FunctionJudge, JudgeConfig, RunConfig, SelectConfig
from dpo_train.errors import ConfigError
from dpo_train.metrics_file import METRICS_FILE
from dpo_train.stages.sweep_results import find_result, judge_of, keep_result, result_contents
from tests.tiny import tiny_config

RESULT = {"step": 4, "metrics": {"validation/loss": 0.5}, "trial": {}}
RULE = FunctionJudge(kind="function", function="tests.unit.stages.test_sweep_results:longer")
ENDPOINT = EndpointJudge(kind="endpoint", url="https://host/v1", model="some", prompt="dialogue")


def longer(prompt: Any, answer: str) -> float:
    """A judge."""
    return float(len(answer))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("results"))


def judged(config: RunConfig, metric: str, judge: JudgeConfig = RULE, **sweep: Any) -> RunConfig:
    select = SelectConfig(metric=metric)  # type: ignore[arg-type] # one of the three
    config = replace(config, evaluate=replace(config.evaluate, judge=judge))
    return replace(config, sweep=replace(config.sweep, select=select, **sweep))


def keep(config: RunConfig, store: Path, pause_at: int | None = None, training: str = "abc") -> None:
    curve = store / "curve.jsonl"
    store.mkdir(exist_ok=True)
    curve.write_text("{}\n")
    keep_result(str(store), result_contents(config, pause_at, judge_of(config))[0], training, RESULT, curve)


def find(config: RunConfig, store: Path, pause_at: int | None = None, training: str = "abc") -> Any:
    contents = result_contents(config, pause_at, judge_of(config))
    return find_result(str(store), contents, training, store / "copy" / METRICS_FILE)


def test_another_budget_finds_the_result_and_its_curve(config: RunConfig, tmp_path: Path) -> None:
    """Budgets are no part of the address; the training, the pause, the seed and the prompts are."""
    keep(config, tmp_path)
    looser = replace(config, sweep=replace(config.sweep, select=SelectConfig(max_kl=3)))

    assert find(looser, tmp_path) == RESULT
    assert (tmp_path / "copy" / METRICS_FILE).read_text() == "{}\n"
    assert find(config, tmp_path, pause_at=4) is None
    assert find(config, tmp_path, training="abd") is None
    assert find(replace(config, seed=1), tmp_path) is None
    assert find(replace(config, sweep=replace(config.sweep, num_prompts=3)), tmp_path) is None


@pytest.mark.parametrize("pause_at", [None, 4])
def test_what_a_judge_was_asked_for_does_for_accuracy_and_not_the_other_way_round(
    config: RunConfig, tmp_path: Path, pause_at: int | None
) -> None:
    """Its reward and win rate are found together; without them it has to be asked, and of another judge nothing is
    taken: at the end and on the way."""
    keep(judged(config, "reward"), tmp_path / "one", pause_at)
    keep(judged(config, "accuracy"), tmp_path / "two", pause_at)
    other = FunctionJudge(kind="function", function="tests.unit.stages.test_sweep_results:judged")

    assert find(judged(config, "accuracy"), tmp_path / "one", pause_at) == RESULT
    assert find(judged(config, "win_rate"), tmp_path / "one", pause_at) == RESULT
    assert find(judged(config, "reward"), tmp_path / "two", pause_at) is None
    assert find(judged(config, "reward", other), tmp_path / "one", pause_at) is None


def test_rung_at_which_an_endpoint_is_not_asked_is_shared_with_accuracy(config: RunConfig, tmp_path: Path) -> None:
    """Without ``kl_points`` nothing is paid for on the way. What was paid for on the way of another sweep does as well,
    and whoever wants it has to ask."""
    keep(judged(config, "accuracy"), tmp_path / "one", 4)
    keep(judged(config, "win_rate", ENDPOINT, kl_points=2), tmp_path / "two", 4)

    assert find(judged(config, "win_rate", ENDPOINT), tmp_path / "one", 4) == RESULT
    assert find(judged(config, "win_rate", ENDPOINT), tmp_path / "two", 4) == RESULT
    assert find(judged(config, "win_rate", ENDPOINT, kl_points=2), tmp_path / "one", 4) is None
    assert find(judged(config, "win_rate", ENDPOINT, kl_points=4), tmp_path / "two", 4) == RESULT


def test_judge_that_is_not_there_hinders_only_who_asks_it(config: RunConfig, tmp_path: Path) -> None:
    """A sweep over accuracy does not need the evaluation's judge."""
    missing = FunctionJudge(kind="function", function="no_such_module:reward")

    assert judge_of(judged(config, "accuracy", missing)) is None
    with pytest.raises(ConfigError):
        judge_of(judged(config, "reward", missing))
