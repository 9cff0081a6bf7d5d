"""Answers with rewards and KL, and policies along a training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file

from dpo_train.artifacts import Artifact, Output
from dpo_train.config import FunctionJudge, RunConfig
from dpo_train.errors import ConfigError, RunError
from dpo_train.progress import Reporter
from dpo_train.recipes.along import policy_after, steps_of
from dpo_train.recipes.answers import (
    Answers,
    answers,
    best_of_kl,
    gained,
    heldout_prompts,
    outcomes,
    read,
    read_rewards,
    rewards_of_chosen,
    win_rate,
)
from dpo_train.recipes.contrasts import Mean
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from dpo_train.stages.measure_trial import measure_trial
from tests.tiny import tiny_config

LOCAL = InProcess()
JUDGE = FunctionJudge(kind="function", function="tests.unit.recipes.test_answers:length")
PROMPTS = 24


def length(prompt: Sequence[Mapping[str, str]], answer: str) -> float:
    return float(len(answer)) if prompt else math.nan


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(tmp_path_factory.mktemp("answers"), evaluate__num_prompts=PROMPTS)
    return replace(config, evaluate=replace(config.evaluate, judge=JUDGE))


@pytest.fixture(scope="module")
def scored(config: RunConfig) -> Artifact:
    return score_reference(config, prepare(config, LOCAL), LOCAL)


@pytest.fixture(scope="module")
def along(config: RunConfig, scored: Artifact) -> list[tuple[int, Artifact]]:
    return followed(config, scored, parts=3)


def followed(config: RunConfig, scored: Artifact, parts: int) -> list[tuple[int, Artifact]]:
    *way, end = steps_of(config, scored, parts)
    found = [(step, policy_after(config, scored, LOCAL, step=step)) for step in way]
    return [*found, (end, train(config, scored, LOCAL))]


@pytest.fixture(scope="module")
def prompts(scored: Artifact) -> pa.Table:
    return heldout_prompts(scored, "heldout", PROMPTS)


def asked(
    config: RunConfig, scored: Artifact, prompts: pa.Table, policy: Artifact | None = None, **more: object
) -> Artifact:
    return answers(config, prompts, LOCAL, inputs={"scored": scored.record.digest}, policy=policy, **more)  # type: ignore[arg-type]


def test_a_training_is_followed_on_its_way_and_ends_as_an_unbroken_one(
    config: RunConfig, scored: Artifact, along: list[tuple[int, Artifact]]
) -> None:
    unbroken = train(replace(config, store=f"{config.store}-unbroken"), scored, LOCAL)
    again = followed(config, scored, parts=3)

    assert [step for step, _ in along] == [7, 14, 20]
    weights = [load_file(each.file("adapter/adapter_model.safetensors")) for _, each in along]
    expected = load_file(unbroken.file("adapter/adapter_model.safetensors"))
    assert all((weights[-1][name] == expected[name]).all() for name in expected)
    assert any((weights[0][name] != weights[1][name]).any() for name in expected)
    assert [each.home for _, each in again] == [each.home for _, each in along]
    assert again[-1][1].reused


def test_more_steps_of_a_finished_training_are_there_too(
    config: RunConfig, scored: Artifact, along: list[tuple[int, Artifact]]
) -> None:
    """It is trained again beside itself, and ends at the same place."""
    more = followed(config, scored, parts=4)
    weights = [load_file(each.file("adapter/adapter_model.safetensors")) for _, each in more]

    assert [step for step, _ in more] == [5, 10, 15, 20]
    assert more[-1][1].home == along[-1][1].home
    assert (
        len(
            {
                tuple(each["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].flatten().tolist())
                for each in weights
            }
        )
        == 4
    )
    assert not list((Path(config.store) / "apart").glob("*/record.json"))


def test_kl_is_the_evaluations(
    config: RunConfig, scored: Artifact, prompts: pa.Table, along: list[tuple[int, Artifact]]
) -> None:
    """Of the same answers to the same prompts; the reference has none from itself. The mean of log-ratios is it too."""
    policy = along[-1][1]
    report = json.loads(evaluate(config, scored, policy, LOCAL).file("report.json").read_text(encoding="utf-8"))
    found = read(asked(config, scored, prompts, policy))
    reference = read(asked(config, scored, prompts))

    expected = report["findings"]["divergence"]["kl"]
    assert found.kl().value == pytest.approx(expected["value"], rel=1e-6)
    assert found.kl().n == expected["n"] == PROMPTS
    assert found.kl().value > 0.05, "it was trained"
    ratios = Mean.of(found.log_ratios())
    assert ratios.value == pytest.approx(found.kl().value)
    # Here by Student's t over a handful of prompts, there by resampling.
    assert ratios.estimate.high - ratios.value == pytest.approx(found.kl().high - found.kl().value, rel=0.5)
    assert (reference.kl().value, reference.kl().high) == (0.0, 0.0)


def test_a_sweeps_trial_and_answers_are_the_same_prompts_in_the_same_order(
    config: RunConfig, scored: Artifact, along: list[tuple[int, Artifact]], tmp_path: Path
) -> None:
    """Differences between trials of a sweep and other policies are taken prompt by prompt."""
    sweep = replace(config.sweep, num_prompts=8, select=replace(config.sweep.select, metric="reward"))
    policy = along[-1][1]
    trial = measure_trial(
        replace(config, sweep=sweep), scored, policy, name="t", parameters={}, seed=0, executor=LOCAL,
        out=Output(str(tmp_path)), reporter=Reporter(),
    )  # fmt: skip
    prompts = heldout_prompts(scored, "validation", 8)
    said = read(asked(config, scored, prompts, policy))

    assert len(prompts) > 4
    for metric, values in (("kl", said.log_ratios()), ("reward", said.rewards())):
        assert trial.deviations[metric] == pytest.approx(Mean.of(values).deviations_G, rel=1e-4, abs=1e-6)
        assert len(set(np.round(trial.deviations[metric], 3))) > 2, "prompts differ"


def test_rewards_are_of_the_answers_and_the_chosen_have_theirs(
    config: RunConfig, scored: Artifact, prompts: pa.Table
) -> None:
    made = asked(config, scored, prompts, temperatures=(0.5, 1.0), count=3)
    found = read(made)
    chosen = read_rewards(rewards_of_chosen(config, prompts, LOCAL, inputs={"scored": scored.record.digest}))

    rows = found.table.to_pylist()
    assert len(rows) == PROMPTS * 2 * 3
    assert all(row["reward"] == len(row["answer"]) for row in rows)
    assert chosen == {row["pair_id"]: float(len(row["chosen"])) for row in prompts.to_pylist()}
    firsts = [row["reward"] for row in rows if row["index"] == 0 and row["temperature"] == 0.5]
    assert sorted(found.best_of(1, 0.5)["reward"].to_pylist()) == sorted(firsts)
    best = [max(r["reward"] for r in rows if r["pair_id"] == p and r["temperature"] == 1.0) for p in sorted(chosen)]
    assert found.rewards(best_of=3).tolist() == best
    assert found.rewards().tolist() == [
        row["reward"]
        for row in sorted(rows, key=lambda row: row["pair_id"])
        if not row["index"] and row["temperature"] == 1.0
    ]
    assert asked(config, scored, prompts, temperatures=(0.5, 1.0), count=3).reused
    assert not asked(replace(config, seed=9), scored, prompts, temperatures=(0.5, 1.0), count=3).reused


def test_a_folder_of_another_model_is_asked_like_a_policy(
    config: RunConfig, scored: Artifact, prompts: pa.Table
) -> None:
    """The reference's own folder is no further from the reference than rounding."""
    found = read(asked(config, scored, prompts, folder=config.model.path))
    reference = read(asked(config, scored, prompts))

    assert abs(found.kl().value) < 1e-5
    assert found.at(1.0)["answer"].to_pylist() == reference.at(1.0)["answer"].to_pylist()


def test_a_win_rate_counts_ties_as_half_and_leaves_out_the_unrewarded() -> None:
    table = pa.table(
        {
            "pair_id": ["a", "b", "c", "d", "a"],
            "index": pa.array([0, 0, 0, 0, 1], pa.int32()),
            "temperature": [1.0] * 5,
            "reward": pa.array([2.0, 1.0, 3.0, None, 99.0]),
        }
    )
    found = outcomes(table, {"a": 1.0, "b": 1.0, "c": 4.0, "d": 0.0})

    assert found == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert (win_rate(found).value, win_rate(found).n) == (0.5, 3)
    best = outcomes(Answers(table=table).best_of(2), {"a": 98.0, "b": 0.0, "c": 0.0, "d": None})
    assert best == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_a_gain_is_counted_prompt_by_prompt() -> None:
    """Where both win and lose together the interval is that of their difference."""
    theirs = {str(place): float(place % 2) for place in range(40)}
    ours = {**theirs, "0": 1.0, "2": 1.0, "4": 1.0, "6": 1.0, "elsewhere": 0.0}
    found = gained(ours, theirs)

    assert (found.value, found.n) == (pytest.approx(0.1), 40)
    assert 0 < found.low < found.value < found.high < 0.25


@pytest.mark.parametrize(("number", "expected"), [(1, 0.0), (2, math.log(2) - 0.5), (16, math.log(16) - 15 / 16)])
def test_best_of_ns_kl(number: int, expected: float) -> None:
    assert best_of_kl(number) == pytest.approx(expected)


def test_a_judge_that_says_nothing_is_an_error() -> None:
    table = pa.table(
        {
            "pair_id": ["a", "b"],
            "index": pa.array([0, 0], pa.int32()),
            "temperature": [1.0] * 2,
            "reward": pa.nulls(2, pa.float64()),
        }
    )
    for call in (
        lambda: win_rate(outcomes(table, {"a": 1.0, "b": 1.0})),
        lambda: Mean.of(Answers(table=table).rewards()),
    ):
        with pytest.raises(RunError, match=r"rewards none|Too few answers"):
            call()


def test_without_a_judge_that_rewards_nothing_is_asked(config: RunConfig, scored: Artifact, prompts: pa.Table) -> None:
    with pytest.raises(ConfigError, match="judge that rewards"):
        asked(replace(config, evaluate=replace(config.evaluate, judge=None)), scored, prompts)
