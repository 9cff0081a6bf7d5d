"""KL and lengths along a sweep, budgets of them, and what another budget finds again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig, SelectConfig
from dpo_train.errors import RunError
from dpo_train.stages import sweep, train
from dpo_train.stages.sweep import chosen_config
from tests.unit.stages.sweep.project import (
    LOCAL,
    Counting,
    elsewhere,
    policies,
    same_weights,
    trials_of,
    with_sweep,
)


def test_kl_at_a_rung_is_that_of_the_policy_there(config: RunConfig, scored: Artifact) -> None:
    """With a constant rate a training of four steps is the first half of one of eight: the stopped trial's KL, accuracy
    and length ratio are those of that training's end, and nothing of the paused policy stays."""
    halved = with_sweep(config, betas=(0.1, 0.5), halving=2)
    stopped = trials_of(sweep(halved, scored, LOCAL))
    (name,) = [name for name, trial in stopped.items() if trial["steps"] == 4]
    alone = with_sweep(elsewhere(config), betas=(stopped[name]["parameters"]["beta"],), max_steps=4)

    ended = trials_of(sweep(alone, scored, LOCAL))[name]

    assert stopped[name]["kl"]["value"] == pytest.approx(ended["kl"]["value"], abs=1e-4)
    assert stopped[name]["accuracy"]["value"] == pytest.approx(ended["accuracy"]["value"])
    assert stopped[name]["length_ratio"] == ended["length_ratio"]
    assert list(Path(config.store).rglob("*.safetensors")) == []


def test_kl_points_are_measured_on_the_way_of_every_trial(config: RunConfig, scored: Artifact) -> None:
    """After half of the steps and at the end, without stopping anything; the policy is an unbroken training's."""
    halves = with_sweep(config, betas=(0.1, 0.5), kl_points=2, use="policy")

    made = sweep(halves, scored, LOCAL)

    for trial in trials_of(made).values():
        assert [point["step"] for point in trial["points"]] == [4, 8]
        assert all(point["kl"]["n"] == 2 for point in trial["points"])
        assert trial["stopped"] is None
    alone = train(chosen_config(elsewhere(halves), made), scored, LOCAL)
    assert same_weights(train(chosen_config(halves, made), scored, LOCAL), alone)


def test_another_budget_trains_nothing_and_measures_nothing(config: RunConfig, scored: Artifact) -> None:
    """Losers' weights are gone; what was found of them is found again, curves and all. So too after a sweep that ended
    without a choice."""
    swept = with_sweep(config, betas=(0.1, 0.5), max_steps=3)
    with pytest.raises(RunError, match="within the budgets"):
        sweep(with_sweep(swept, select=SelectConfig(max_length_growth=1e-9)), scored, LOCAL)
    counting = Counting()

    made = sweep(with_sweep(swept, select=SelectConfig(max_length_growth=9.0)), scored, counting)

    assert (counting.trained, counting.asked) == ([], 0)
    fresh = sweep(elsewhere(swept), scored, LOCAL)
    assert trials_of(made) == trials_of(fresh)
    names = [name for name in made.record.files if name.startswith("trials/")]
    assert len(names) == 2
    assert all((made.path / name).read_text().count("\n") == 3 for name in names)


def test_loser_of_one_sweep_that_wins_another_is_trained_again(config: RunConfig, scored: Artifact) -> None:
    """Hardly moved, it loses; under a budget that the winner breaks it wins, with ``use=policy``: one training, bit for
    bit what it was."""
    taken = with_sweep(config, learning_rates=(1e-9, 5e-3), use="policy", num_prompts=8)
    first = sweep(taken, scored, LOCAL)
    assert first.record.details["parameters"] == {"learning_rate": 5e-3}
    counting = Counting()

    stricter = with_sweep(taken, select=SelectConfig(max_kl=0.01))
    second = sweep(stricter, scored, counting)

    assert second.record.details["parameters"] == {"learning_rate": 1e-9}
    assert [pause for _, pause in counting.trained] == [None]
    assert counting.asked == 0
    assert policies(config) == sorted([first.record.details["policy"], second.record.details["policy"]])
    alone = train(chosen_config(elsewhere(stricter), second), scored, LOCAL)
    assert same_weights(train(chosen_config(stricter, second), scored, LOCAL), alone)


def test_halving_stops_what_is_over_the_budget_before_what_is_within(config: RunConfig, scored: Artifact) -> None:
    """The better of two rates is over the KL's budget at its rung: the other one goes on, where the sweep would have
    ended without any trial within the budget."""
    halved = with_sweep(config, learning_rates=(1e-9, 5e-3), halving=2, num_prompts=8, select=SelectConfig(max_kl=0.01))

    made = sweep(halved, scored, LOCAL)

    assert made.record.details["parameters"] == {"learning_rate": 1e-9}
    (why,) = made.record.details["why_not"].values()
    assert why.startswith("stopped at step 4: place 2 of 2 by rewards/accuracy")
    assert "over the budget of 0.01" in why
