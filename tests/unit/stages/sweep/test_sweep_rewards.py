"""What a judge says along a sweep: of which answers, when it is asked again, and what its silence does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import FunctionJudge, RunConfig, SelectConfig
from dpo_train.progress import ENVIRONMENT_KEY
from dpo_train.stages import sweep
from tests.unit.stages.sweep.project import BETAS, LOCAL, Counting, elsewhere, trials_of, with_evaluate, with_sweep

_asked: list[str] = []
"""The answers that ``mute_at_first`` was asked about."""


def length(prompt: Any, answer: str) -> float:
    """A judge whose reward is known by hand."""
    return float(len(answer))


def brevity(prompt: Any, answer: str) -> float:
    """The opposite."""
    return -float(len(answer))


def mute_at_first(prompt: Any, answer: str) -> float:
    """Says nothing about the third and fourth answer."""
    _asked.append(answer)
    return float("nan") if len(_asked) in (3, 4) else float(len(answer))


class Noting(Counting):
    """Keeps the answers of each model that was asked for some, in the order of asking."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[dict[str, str]] = []

    def map_tables(self, *args: Any, **more: Any) -> Iterator[pa.Table]:
        found = list(super().map_tables(*args, **more))
        rows = [row for table in found if "answer" in table.column_names for row in table.to_pylist()]
        if rows:
            self.answers.append({row["pair_id"]: row["answer"] for row in rows})
        return iter(found)


def by(config: RunConfig, function: str, metric: str = "reward", **select: Any) -> RunConfig:
    judge = FunctionJudge(kind="function", function=f"{__name__}:{function}")
    rule = SelectConfig(metric=metric, **select)  # type: ignore[arg-type] # one of the three
    return with_sweep(with_evaluate(config, judge=judge), select=rule)


def test_points_have_the_rewards_of_the_answers_that_their_kl_is_of(config: RunConfig, scored: Artifact) -> None:
    """Two betas after half of the steps and at the end, each with two answers, by their lengths; the win rate is
    against the reference's. Everything else is what it is where no judge is asked."""
    halves = with_sweep(config, betas=(0.1, 0.5), kl_points=2)
    noting = Noting()

    trials = trials_of(sweep(by(halves, "length"), scored, noting))

    first, theirs, second, *ends = noting.answers
    ways = {"beta=0.1": (first, ends[0]), "beta=0.5": (second, ends[1])}
    for name, way in ways.items():
        assert [point["step"] for point in trials[name]["points"]] == [4, 8]
        for point, ours in zip(trials[name]["points"], way, strict=True):
            assert point["reward"]["n"] == point["win_rate"]["n"] == point["kl"]["n"] == 2
            assert point["reward"]["value"] == pytest.approx(np.mean([len(answer) for answer in ours.values()]))
            wins = [0.5 + 0.5 * np.sign(len(answer) - len(theirs[prompt])) for prompt, answer in ours.items()]
            assert point["win_rate"]["value"] == pytest.approx(np.mean(wins))
        assert trials[name]["points"][-1]["reward"] == trials[name]["reward"]
    rewards = {point["reward"]["value"] for trial in trials.values() for point in trial["points"]}
    assert len(rewards) > 1
    without = trials_of(sweep(elsewhere(halves), scored, LOCAL))
    assert unjudged(trials) == unjudged(without)
    assert all(point["reward"] is None for trial in without.values() for point in trial["points"])


def unjudged(trials: dict[str, dict[str, Any]]) -> list[Any]:
    """What no judge has a part in."""
    names = ("step", "accuracy", "margin", "kl", "length_ratio")
    return [[[point[name] for name in names] for point in trials[key]["points"]] for key in sorted(trials)]


def test_a_judge_is_asked_once_and_another_one_again(config: RunConfig, scored: Artifact) -> None:
    """Under another budget nothing is trained or asked, nor by a sweep over accuracy, which the same results serve. The
    other judge rewards the same answers."""
    halves = with_sweep(config, betas=(0.1, 0.5), kl_points=2)
    first = trials_of(sweep(by(halves, "length"), scored, LOCAL))
    budget, accuracy, other = Counting(), Counting(), Counting()

    again = trials_of(sweep(by(halves, "length", max_length_growth=99.0), scored, budget))
    sweep(by(halves, "length", metric="accuracy"), scored, accuracy)
    opposite = trials_of(sweep(by(halves, "brevity"), scored, other))

    assert again == first
    assert (budget.trained, budget.asked, accuracy.trained, accuracy.asked) == ([], 0, [], 0)
    assert [pause for _, pause in other.trained] == [4, 4, None, None]
    assert rewards(opposite) == [-value for value in rewards(first)]
    assert unjudged(opposite) == unjudged(first)


def rewards(trials: dict[str, dict[str, Any]]) -> list[float]:
    return [point["reward"]["value"] for key in sorted(trials) for point in trials[key]["points"]]


def test_interrupted_sweep_asks_no_judge_twice(config: RunConfig, scored: Artifact) -> None:
    """Ctrl-C when the first trial pauses, judged: what is left is trained and asked, and the result is equal."""
    halves = by(with_sweep(config, betas=(0.1, 0.5), kl_points=2), "length")

    def interrupt() -> None:
        raise KeyboardInterrupt

    first, second, whole = Counting(interrupt), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        sweep(halves, scored, first)

    made = sweep(halves, scored, second)

    assert trials_of(made) == trials_of(sweep(elsewhere(halves), scored, whole))
    assert first.trained == [(0.1, 4)]
    assert first.asked + second.asked == whole.asked


def test_silence_of_a_judge_on_the_way_is_a_point_without_a_reward(
    config: RunConfig, scored: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN for both answers at the pause, after the reference's two; the trial goes on to its end, and is chosen. It is
    said, and not asked again."""
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "events.jsonl"))
    _asked.clear()
    halves = with_sweep(config, betas=(0.1,), kl_points=2)

    made = sweep(by(halves, "mute_at_first"), scored, LOCAL)

    (trial,) = trials_of(made).values()
    way, end = trial["points"]
    assert trial["failure"] is None
    assert (way["reward"], way["win_rate"], way["kl"]["n"]) == (None, None, 2)
    assert end["reward"]["value"] == pytest.approx(np.mean([len(answer) for answer in _asked[4:]]))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    told = [event["text"] for event in events if event["kind"] == "message"]
    silence = "after 4 steps its reward cannot be used: the judge rewards none of the answers with a number"
    assert f"beta=0.1: note: {silence}" in told
    counting = Counting()
    sweep(by(halves, "mute_at_first", max_length_growth=99.0), scored, counting)
    assert (counting.trained, counting.asked) == ([], 0)


def test_a_stopped_trial_has_the_reward_of_its_rung(config: RunConfig, scored: Artifact) -> None:
    """A function costs nothing: halving's rungs are judged without ``kl_points``, and the page shows every way."""
    halved = by(with_sweep(config, betas=BETAS[:2], halving=2), "length")

    made = sweep(halved, scored, LOCAL)

    (stopped,) = [trial for trial in trials_of(made).values() if trial["stopped"]]
    assert stopped["reward"] == stopped["points"][-1]["reward"] is not None
    page = (made.path / "frontier.html").read_text()
    assert page.count("step 4: mean reward of sampled answers") == 2
